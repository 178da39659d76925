import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.trie import Trie
from tests import reference


def catalogues(max_items: int = 40) -> st.SearchStrategy[list[tuple[int, ...]]]:
    return st.integers(1, 4).flatmap(
        lambda levels: st.lists(st.tuples(*[st.integers(0, 5)] * levels), min_size=1, max_size=max_items)
    )


def matrix(codes: list[tuple[int, ...]]) -> np.ndarray:
    return np.array(codes, dtype=np.int64)


def walk(trie: Trie, prefix: tuple[int, ...]) -> int | None:
    """The node of a prefix, found edge by edge through `expand`."""
    node = 0
    for code in prefix:
        _, codes, children = trie.expand(torch.tensor([node]))
        found = children[codes == code]
        if not len(found):
            return None
        node = int(found[0])
    return node


@given(catalogues())
def test_exactly_the_prefixes_of_the_catalogue_have_nodes_and_exactly_their_codes_follow(codes):
    trie, following = Trie.build(matrix(codes)), reference.trie_prefixes(codes)
    for prefix, allowed in following.items():
        node = walk(trie, prefix)
        assert node is not None
        assert trie.expand(torch.tensor([node]))[1].tolist() == sorted(allowed)
        assert walk(trie, (*prefix, max(allowed) + 1)) is None
    by_depth = [sum(len(prefix) == depth for prefix in following) for depth in range(trie.levels)]
    assert np.diff(trie.level_first).tolist() == [*by_depth, len(set(codes))]
    assert [trie.max_children(depth) for depth in range(trie.levels)] == [
        max(len(allowed) for prefix, allowed in following.items() if len(prefix) == depth)
        for depth in range(trie.levels)
    ]


@given(catalogues())
def test_a_leaf_names_all_items_of_its_id_in_rising_order(codes):
    trie, named = Trie.build(matrix(codes)), reference.trie_items(codes)
    leaves = torch.tensor([walk(trie, prefix) for prefix in named])
    rows, items = trie.items(leaves)
    assert rows.tolist() == [row for row, numbers in enumerate(named.values()) for _ in numbers]
    assert items.tolist() == [number for numbers in named.values() for number in numbers]
    assert sorted(items.tolist()) == list(range(len(codes)))


@given(catalogues(), st.data())
def test_padded_children_say_the_same_as_the_flat_expansion(codes, data):
    trie = Trie.build(matrix(codes))
    count = trie.level_first[-1]
    picked = data.draw(st.lists(st.integers(-1, count - 1), min_size=4, max_size=4))
    nodes = torch.tensor(picked).reshape(2, 2)
    padded, children, mask = trie.children(nodes)
    rows, flat, flat_children = trie.expand(nodes.flatten())
    assert padded[mask].tolist() == flat.tolist()
    assert children[mask].tolist() == flat_children.tolist()
    assert mask.flatten(0, 1).sum(dim=1).tolist() == torch.bincount(rows, minlength=4).tolist()
    assert (children[~mask] == -1).all()
    assert (padded[~mask] == 0).all()
    assert padded.shape[-1] == max(1, int(mask.sum(-1).max()))


@given(catalogues(), st.randoms())
def test_the_order_of_items_moves_no_node(codes, random):
    shuffled = random.sample(codes, len(codes))
    one, other = Trie.build(matrix(codes)), Trie.build(matrix(shuffled))
    assert torch.equal(one.first, other.first)
    assert torch.equal(one.code, other.code)
    assert torch.equal(one.leaf_first, other.leaf_first)


@settings(deadline=None)
@given(catalogues(), st.data())
def test_an_edge_is_covered_exactly_when_all_leaves_below_it_are_named(codes, data):
    trie, paths = Trie.build(matrix(codes)), sorted(set(codes))
    named = [data.draw(st.sets(st.integers(0, len(paths) - 1))) for _ in range(2)]
    pairs = [(row, leaf) for row, leaves in enumerate(named) for leaf in leaves]
    rows, leaves = torch.tensor(pairs, dtype=torch.long).reshape(-1, 2).T
    for depth, found in enumerate(trie.covered(rows, leaves)):
        nodes = (trie.first[found.parents] + found.places + 1).tolist()
        expected = set()
        for row, chosen in enumerate(named):
            for prefix in {path[: depth + 1] for path in paths}:
                below = {leaf for leaf, path in enumerate(paths) if path[: depth + 1] == prefix}
                if below <= chosen:
                    expected.add((row, walk(trie, prefix)))
        assert set(zip(found.rows.tolist(), nodes, strict=True)) == expected
        assert len(nodes) == len(expected)


def test_a_trie_of_the_items_known_leaves_later_items_out():
    codes = matrix([(0, 1), (0, 2), (3, 1)])
    assert Trie.build(codes[:2]).expand(torch.tensor([0]))[1].tolist() == [0]
    assert Trie.build(codes).expand(torch.tensor([0]))[1].tolist() == [0, 3]


def test_a_leaf_and_an_absent_node_have_no_children():
    trie = Trie.build(matrix([(4,), (7,)]))
    assert trie.expand(torch.tensor([1, -1, 2]))[0].tolist() == []
    assert trie.items(torch.tensor([-1, 2]))[1].tolist() == [1]


def test_an_empty_catalogue_allows_nothing():
    trie = Trie.build(np.empty((0, 3), dtype=np.int64))
    assert trie.expand(torch.tensor([0]))[1].tolist() == []
    assert not trie.children(torch.tensor([[0, -1]]))[2].any()
    assert trie.levels == 3


def test_memory_is_counted_in_full():
    trie = Trie.build(matrix([(0, 0), (0, 1), (0, 1)]))
    # 4 nodes + 1, 3 edges, 2 leaves + 1, 3 items, eight bytes each
    assert trie.bytes() == 8 * (5 + 3 + 3 + 3)
    assert trie.to("cpu").bytes() == trie.bytes()


@pytest.mark.parametrize("codes", [np.array([[0, -1]]), np.array([0, 1]), np.empty((3, 0), dtype=np.int64)])
def test_codes_that_are_no_semantic_ids_are_refused(codes):
    with pytest.raises(ValueError, match="codes must be"):
        Trie.build(codes)
