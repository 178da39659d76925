from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from models.backbone import small_backbone
from models.generative import GenerativeModel, TokenBatch
from models.input_moments import Forward, distinct_inputs, input_moments, limited, linear_maps, packed_text
from regularizers.null_space import count_protected, decay_to_start, project, protect, remove
from regularizers.subspace import adam, orthonormal
from tests import tiny


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@given(st.integers(1, 12), st.integers(2, 12), st.integers(1, 11))
def test_removing_twice_is_removing_once_and_nothing_protected_is_left(m: int, n: int, k: int) -> None:
    protected, update = orthonormal(normal(n, min(k, n - 1))), normal(m, n, seed=1)
    once = remove(update, protected)
    torch.testing.assert_close(remove(once, protected), once, atol=1e-6 * max(1.0, float(update.norm())), rtol=0)
    assert float((once @ protected).norm()) <= 1e-5 * float(update.norm())


def features(count: int = 2000, size: int = 256) -> Tensor:
    return normal(count, size) * (torch.arange(1, size + 1).float() ** -1.3) @ orthonormal(normal(size, size, seed=1)).T


def test_the_projector_as_printed_changes_what_it_should_keep() -> None:
    inputs, weight, update = features(), normal(256, 256, seed=2) / 16, normal(256, 256, seed=3)
    update *= 0.1 * weight.norm() / update.norm()
    protected = protect(inputs.T @ inputs, len(inputs), "fixed", 64).basis

    def change(moved: Tensor) -> float:
        return float((inputs @ moved.T).norm() / (inputs @ weight.T).norm())

    raw = change(update)
    literal, kept = (project(update, protected, how) for how in ("paper_literal", "orthogonal"))
    assert change(kept) <= 0.05 * raw
    assert change(literal) >= 0.95 * raw
    assert change(literal * update.norm() / literal.norm()) >= 1.9 * raw


@pytest.mark.parametrize(("rule", "number"), [("energy", 0.95), ("energy", 0.99), ("fixed", 20)])
def test_what_an_isotropic_update_keeps_of_its_output_change_is_what_is_reported(rule: str, number: float) -> None:
    inputs, update = features(), normal(400, 256, seed=3)
    found = protect(inputs.T @ inputs, len(inputs), rule, number)
    kept = remove(update, found.basis)
    kept *= update.norm() / kept.norm()
    ratio = float((inputs @ kept.T).norm() / (inputs @ update.T).norm())
    assert ratio == pytest.approx(found.left_over, rel=0.05)
    assert found.numbers() == {"k": found.basis.shape[1], "k_over_n": found.basis.shape[1] / 256,
                               "energy": found.energy, "left_over": found.left_over}  # fmt: skip


def test_adam_after_the_projection_leaks_back_into_the_protected_space() -> None:
    protected, gradient = orthonormal(normal(64, 16)), normal(48, 64, seed=1)
    before = adam(torch.zeros(48, 64), torch.zeros(48, 64), remove(gradient, protected), 1, (0.9, 0.999), 1e-8)
    after = remove(adam(torch.zeros(48, 64), torch.zeros(48, 64), gradient, 1, (0.9, 0.999), 1e-8), protected)
    assert float((before @ protected).norm() / before.norm()) > 0.1
    assert float((after @ protected).norm() / after.norm()) < 1e-6


def test_the_projector_stands_on_the_side_of_the_inputs() -> None:
    protected, update = orthonormal(normal(32, 8)), normal(32, 32, seed=1)
    left = update - protected @ (protected.T @ update)
    assert float((remove(update, protected) @ protected).abs().max()) < 1e-5
    assert float((left @ protected).norm()) > 1


def test_off_and_no_corpus_let_everything_through_and_other_words_are_refused() -> None:
    update, protected = normal(3, 5), orthonormal(normal(5, 2))
    assert project(update, protected, "off") is update
    assert project(update, None, "orthogonal") is update
    with pytest.raises(ValueError, match="null_space is 'both'; choose one of orthogonal, off, paper_literal"):
        project(update, protected, "both")


def test_decay_toward_the_start_leaves_the_protected_outputs_alone() -> None:
    protected, start = orthonormal(normal(10, 3)), normal(4, 10, seed=1)
    pull = decay_to_start(start + normal(4, 10, seed=2), start, protected, "orthogonal")
    assert float((pull @ protected).abs().max()) < 1e-5
    assert float(pull.norm()) > 1


SPECTRUM = torch.tensor([8.0, 4.0, 2.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("rule", "number", "count"),
    [
        ("energy", 0.49, 1),
        ("energy", 0.51, 2),
        ("energy", 0.74, 2),
        ("energy", 0.93, 4),
        ("relative", 0.2, 3),
        ("absolute", 1.5, 3),
        ("absolute", 100.0, 1),
        ("fixed", 4, 4),
    ],
)
def test_each_rule_protects_as_many_directions_as_worked_out_by_hand(rule: str, number: float, count: int) -> None:
    assert count_protected(SPECTRUM, rule, number) == count
    axes = orthonormal(normal(5, 5))
    found = protect(100 * axes @ torch.diag(SPECTRUM) @ axes.T, 100, rule, number)
    expected = axes[:, :count] @ axes[:, :count].T
    assert found.basis.shape == (5, count)
    if count != 4:  # the fourth and fifth direction weigh the same
        torch.testing.assert_close(found.basis @ found.basis.T, expected, atol=1e-5, rtol=0)
    assert found.energy == pytest.approx(float(SPECTRUM[:count].sum()) / 16)
    assert found.left_over == pytest.approx(math.sqrt((1 - found.energy) / (1 - count / 5)))


@pytest.mark.parametrize(
    ("tokens", "rule", "number", "message"),
    [
        (4, "energy", 0.9, "4 tokens cannot span an input of 5 dimensions; give a larger corpus"),
        (9, "fixed", 5, "nothing left to train: fixed 5 protects all 5"),
        (9, "energy", 0.999, "nothing left to train"),
        (9, "energy", 1.5, r"k_value is 1.5; energy takes a number in \(0, 1\)"),
        (9, "fixed", 2.5, "fixed takes a whole number"),
        (9, "most", 0.9, "k_rule is 'most'"),
    ],
)
def test_a_rule_that_cannot_hold_says_why(tokens: int, rule: str, number: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        protect(torch.diag(SPECTRUM), tokens, rule, number)


def test_inputs_of_zeros_protect_nothing() -> None:
    with pytest.raises(ValueError, match="all inputs are 0"):
        protect(torch.zeros(3, 3), 9, "energy", 0.9)


def of(tokens: Tensor) -> TokenBatch:
    nothing = torch.empty(0, dtype=torch.int64)
    return TokenBatch(tokens, nothing, nothing)


def reading(model: GenerativeModel) -> Forward:
    return lambda batch: model.hidden(batch.tokens)


def a_model() -> GenerativeModel:
    own = tiny.config().backbone
    backbone = small_backbone(own.hidden, own.layers, own.heads, own.feed_forward, seed=0)
    return GenerativeModel(backbone, codes=12, seed=0, full_vocabulary=False, dropout=0.0).eval()


def test_maps_that_read_the_same_tensor_share_one_moment() -> None:
    model = a_model()
    groups = distinct_inputs(linear_maps(model.stack), reading(model), of(torch.zeros(1, 5, dtype=torch.int64)))
    short = [tuple(name.rpartition(".")[2] for name in names) for names in groups]
    assert short == 2 * [("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",)]


def test_the_moment_is_that_of_the_inputs_and_neither_padding_nor_order_nor_budget_changes_it() -> None:
    model = a_model()
    maps = linear_maps(model.stack)
    rows = torch.randint(0, 12, (6, 9), generator=torch.Generator().manual_seed(0))
    whole = torch.ones_like(rows, dtype=torch.bool)
    padded = torch.cat([rows, torch.full((6, 4), 12)], dim=1)
    inside = torch.cat([whole, torch.zeros(6, 4, dtype=torch.bool)], dim=1)
    corpora = {
        "at once": [(of(rows), whole)],
        "padded": [(of(padded), inside)],
        "in parts": [(of(rows[3:]), whole[3:]), (of(rows[:3]), whole[:3])],
    }
    found = {
        name: list(input_moments(maps, reading(model), lambda own=own: iter(own))) for name, own in corpora.items()
    }
    found["pass by pass"] = list(input_moments(maps, reading(model), lambda: iter(corpora["at once"]), budget=1))
    for moments in found.values():
        assert [one.tokens for one in moments] == 8 * [54]
        for one, other in zip(moments, found["at once"], strict=True):
            assert one.names == other.names
            torch.testing.assert_close(one.moment, other.moment, rtol=1e-4, atol=1e-4)
            a, b = (protect(part.moment, 54 + 10, "fixed", 6).basis for part in (one, other))
            torch.testing.assert_close(a @ a.T, b @ b.T, atol=1e-5, rtol=0)
    seen: list[Tensor] = []
    handle = maps["layers.0.self_attn.o_proj"].register_forward_pre_hook(lambda _, own: seen.append(own[0]))
    with torch.no_grad():
        model.hidden(rows)
    handle.remove()
    inputs = seen[0].flatten(0, 1)
    torch.testing.assert_close(found["at once"][1].moment, inputs.T @ inputs, rtol=1e-4, atol=1e-4)


def test_an_empty_corpus_is_refused_and_a_long_one_is_cut() -> None:
    model = a_model()
    with pytest.raises(ValueError, match="the corpus holds no tokens"):
        next(input_moments(linear_maps(model.stack), reading(model), lambda: iter(())))
    batches = list(packed_text(iter(range(50)), length=4, batch=3))
    assert [tuple(batch.tokens.shape) for batch, _ in batches] == [(3, 4)] * 4
    assert batches[1][0].tokens[0].tolist() == [12, 13, 14, 15]
    assert len(list(limited(iter(batches), 13))) == 2
