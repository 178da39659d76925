from functools import cache

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from models.quantizer import ResidualKMeans, centroids, codebook_size, on_grid, residual_codes
from models.rqvae import RqVae, quantise
from models.vectors import unit_rows


def clouds(count: int = 120, width: int = 6, seed: int = 0) -> np.ndarray:
    """Unit vectors around four well separated centres."""
    random = np.random.default_rng(seed)
    centres = np.eye(width)[np.arange(count) % 4]
    return unit_rows(centres + 0.05 * random.normal(size=(count, width)))


@cache
def fitted(name: str) -> ResidualKMeans | RqVae:
    if name == "kmeans":
        return ResidualKMeans.fit(clouds(), 3, 16, seed=0)
    return RqVae.fit(clouds(), 3, 16, seed=0, steps=150)


BOTH = pytest.mark.parametrize("name", ["kmeans", "rqvae"])


@BOTH
def test_codes_stay_inside_their_levels_and_are_used(name):
    quantizer = fitted(name)
    codes = quantizer.encode(clouds())
    assert codes.shape == (120, 3)
    assert quantizer.sizes == (16, 16, 16)
    assert (codes >= 0).all()
    assert (codes < np.array(quantizer.sizes)).all()
    assert len(np.unique(codes[:, 0])) >= 4


@BOTH
def test_vectors_of_one_cloud_share_first_codes_and_clouds_do_not(name):
    first = fitted(name).encode(clouds())[:, 0]
    owners = [{int(code) for code in first[start::4]} for start in range(4)]
    assert all(owners[a].isdisjoint(owners[b]) for a in range(4) for b in range(a))


@BOTH
@settings(max_examples=25, deadline=None)
@given(rows=st.lists(st.integers(0, 119), min_size=1, max_size=30))
def test_an_items_codes_do_not_depend_on_its_batch(name, rows):
    whole = fitted(name).encode(clouds())
    assert np.array_equal(fitted(name).encode(clouds()[rows]), whole[rows])


@BOTH
def test_the_nearest_code_of_the_last_level_is_the_one_encode_chooses(name):
    codes = fitted(name).encode(clouds())
    for row in range(0, 120, 17):
        order = fitted(name).nearest(clouds()[row])
        assert order[0] == codes[row, -1]
        assert sorted(order.tolist()) == list(range(fitted(name).sizes[-1]))


@BOTH
def test_a_quantizer_rebuilt_from_its_arrays_gives_the_same_codes(name):
    quantizer = fitted(name)
    again = type(quantizer).from_arrays(quantizer.arrays())
    assert again.sizes == quantizer.sizes
    assert np.array_equal(again.encode(clouds(seed=5)), quantizer.encode(clouds(seed=5)))


@pytest.mark.parametrize("fit", [ResidualKMeans.fit, lambda *a, **k: RqVae.fit(*a, **k, steps=30)])
def test_one_seed_gives_one_quantizer_and_leaves_the_global_generator_alone(fit):
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    one, two, other = (fit(clouds(), 2, 8, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(1), expected)
    same = [np.array_equal(a, b) for a, b in zip(one.arrays().values(), two.arrays().values(), strict=True)]
    assert all(same)
    assert any(not np.array_equal(a, b) for a, b in zip(one.arrays().values(), other.arrays().values(), strict=True))


def test_every_level_brings_the_reconstruction_nearer():
    vectors = clouds()
    quantizer = ResidualKMeans.fit(vectors, 3, 16, seed=0)
    rest, errors = on_grid(vectors), []
    for code, codebook in zip(quantizer.encode(vectors).T, quantizer.codebooks, strict=True):
        rest = rest - codebook[code]
        errors.append(float((rest * rest).sum()))
    assert errors[0] > errors[1] > errors[2]


def test_residual_codes_by_hand():
    codebooks = (np.array([[0.0, 0.0], [4.0, 0.0]]), np.array([[0.0, 1.0], [1.0, 0.0]]))
    vectors = np.array([[4.5, 0.125], [0.0, 0.75], [2.0, 0.0]])
    # the third lies midway at the first level: the lower code wins, and (2, 0) is nearer to (1, 0)
    assert residual_codes(vectors, codebooks).tolist() == [[1, 1], [0, 0], [0, 1]]


@pytest.mark.parametrize(
    ("distinct", "bound", "size"), [(1, 256, 1), (2, 256, 2), (7, 256, 2), (100, 256, 25), (4000, 256, 256)]
)
def test_a_small_catalogue_gets_small_codebooks(distinct, bound, size):
    assert codebook_size(distinct, bound) == size


def test_vectors_without_any_difference_share_one_code():
    quantizer = ResidualKMeans.fit(np.zeros((9, 3)), 3, 256, seed=0)
    assert quantizer.sizes == (1, 1, 1)
    assert quantizer.encode(np.ones((2, 3))).tolist() == [[0, 0, 0]] * 2


def test_a_large_catalogue_is_fitted_on_a_seeded_sample():
    many = clouds(count=6000)
    one, two = (centroids(many, 4, seed=0) for _ in range(2))
    assert np.array_equal(one, two)
    # one centroid a cloud, whichever rows were drawn
    assert sorted(np.abs(one).argmax(axis=1).tolist()) == [0, 1, 2, 3]


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        (np.array([[np.nan, 0.0]]), "finite"),
        (np.array([[100.0, 0.0]]), "norms of at most 32, got 100"),
        (np.zeros((0, 3)), "at least one vector"),
    ],
)
def test_vectors_that_cannot_be_quantised_are_refused(vectors, message):
    with pytest.raises(ValueError, match=message):
        ResidualKMeans.fit(vectors, 2, 4, seed=0)


def test_the_rqvae_loss_by_hand():
    codebook = nn.Parameter(torch.tensor([[0.0, 0.0], [3.0, 0.0]]))
    latent = torch.tensor([[2.0, 0.0]], requires_grad=True)
    quantised, loss, codes = quantise(latent, [codebook])
    assert codes[0].tolist() == [1]
    assert quantised.tolist() == [[3.0, 0.0]]
    assert loss.item() == pytest.approx(1.0 + 0.25)
    loss.backward()
    # the codebook moves down to the latent by the codebook term, the latent up to it by the commitment term
    assert codebook.grad is not None
    assert codebook.grad.tolist() == [[0.0, 0.0], [2.0, 0.0]]
    assert latent.grad is not None
    assert latent.grad.tolist() == [[-0.5, 0.0]]


def test_the_gradient_passes_straight_through_the_rqvae_codes():
    latent = torch.tensor([[2.0, 1.0]], requires_grad=True)
    quantised, _, _ = quantise(latent, [nn.Parameter(torch.ones(3, 2))])
    (quantised * torch.tensor([[5.0, -7.0]])).sum().backward()
    assert latent.grad is not None
    assert latent.grad.tolist() == [[5.0, -7.0]]


def test_a_dead_rqvae_code_moves_onto_a_vector_of_the_batch():
    from models.rqvae import _reset_dead_codes

    codebook = nn.Parameter(torch.tensor([[0.0], [99.0]]))
    latent, code = torch.tensor([[0.5], [0.5]]), torch.tensor([0, 0])
    _reset_dead_codes([codebook], [torch.tensor([True, False])], latent, [code])
    assert codebook.tolist() == [[0.0], [0.5]]
