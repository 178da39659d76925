"""The constrained beam against a search by brute force over every item."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.backbone import small_backbone
from models.beam import beam_search
from models.generative import GenerativeModel
from models.generative_recommender import GenerativeRecommender
from models.prefill import shared_prompts, shared_rows
from models.trie import Trie
from tests import reference

SIZES = (5, 4, 3)
OFFSETS = torch.tensor([0, 5, 9])


def tiny_model(seed: int = 0) -> GenerativeModel:
    backbone = small_backbone(hidden=16, layers=2, heads=2, feed_forward=32, seed=seed)
    model = GenerativeModel(backbone, codes=sum(SIZES), seed=seed, full_vocabulary=False, dropout=0.0)
    with torch.no_grad():
        for rows in model.rows().values():
            rows.mul_(40)  # spread the scores, so that an order is an order and not rounding
    return model.eval()


def random_codes(rng: np.random.Generator, items: int) -> np.ndarray:
    every = np.array(np.meshgrid(*(range(size) for size in SIZES), indexing="ij")).reshape(3, -1).T
    return every[rng.choice(len(every), items, replace=False)].astype(np.int64)


def prompts_of(codes: np.ndarray):
    offsets = OFFSETS.numpy()

    def prompts(histories: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        rows = [[sum(SIZES), *(codes[history] + offsets).ravel()] for history in histories]
        lengths = torch.tensor([len(row) for row in rows])
        padded = [row + [sum(SIZES)] * (int(lengths.max()) - len(row)) for row in rows]
        return torch.tensor(padded), lengths

    return prompts


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(0, 10_000))
def test_a_beam_as_wide_as_the_catalogue_returns_the_brute_force_ranking(items: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, model = random_codes(rng, items), tiny_model()
    histories = [rng.integers(0, items, size) for size in (0, 3, 1)]
    tokens, lengths = prompts_of(codes)(histories)
    with torch.inference_mode():
        leaves, scores = beam_search(model, Trie.build(codes), OFFSETS, tokens, lengths, width=60)
    order = np.lexsort(codes.T[::-1])  # leaf number -> item
    for row, history in enumerate(histories):
        expected = reference.item_scores(model, codes, OFFSETS.tolist(), history.tolist())
        pairs = zip(leaves[row].tolist(), scores[row].tolist(), strict=True)
        found = {int(order[leaf]): score for leaf, score in pairs if leaf >= 0}
        assert found.keys() == set(range(items))
        assert found == pytest.approx(dict(enumerate(expected)), abs=1e-4)
        assert scores[row, :items].tolist() == sorted(scores[row, :items].tolist(), reverse=True)


@settings(max_examples=15, deadline=None)
@given(st.integers(8, 60), st.integers(1, 12), st.integers(0, 10_000))
def test_a_narrow_beam_returns_what_the_slow_beam_returns_and_only_items(items: int, width: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    codes, model = random_codes(rng, items), tiny_model(seed % 3)
    history = rng.integers(0, items, 4)
    tokens, lengths = prompts_of(codes)([history])
    with torch.inference_mode():
        leaves, _ = beam_search(model, Trie.build(codes), OFFSETS, tokens, lengths, width=width)
    order = np.lexsort(codes.T[::-1])
    found = [tuple(codes[order[leaf]]) for leaf in leaves[0].tolist() if leaf >= 0]
    assert found == reference.slow_beam(model, codes, OFFSETS.tolist(), history.tolist(), width)


def recommender(codes: np.ndarray, exclude: bool = False, beam: int = 20) -> GenerativeRecommender:
    return GenerativeRecommender(tiny_model(), codes, SIZES, prompts_of(codes), 20, beam, exclude)


def test_a_batch_of_sixteen_gives_what_sixteen_batches_of_one_give() -> None:
    rng = np.random.default_rng(3)
    codes = random_codes(rng, 50)
    histories = [rng.integers(0, 50, size) for size in range(16)]
    model = recommender(codes)
    together = model.recommend(histories, 10)
    for row, history in enumerate(histories):
        alone = model.recommend([history], 10)
        assert together.items[row].tolist() == alone.items[0].tolist()
        np.testing.assert_allclose(together.scores[row], alone.scores[0], atol=1e-4)


def test_the_history_is_left_out_when_asked_and_only_then() -> None:
    rng = np.random.default_rng(4)
    codes = random_codes(rng, 30)
    history = np.arange(25)
    plain = recommender(codes, beam=30).recommend([history], 30)
    without = recommender(codes, exclude=True, beam=30).recommend([history], 30)
    assert set(plain.items[0].tolist()) == set(range(30))
    assert [i for i in without.items[0].tolist() if i >= 0] == [i for i in plain.items[0].tolist() if i >= 25]


@settings(max_examples=25, deadline=None)
@given(st.integers(1, 60), st.integers(1, 12), st.integers(0, 10_000))
def test_a_full_list_comes_back_without_the_history_wherever_so_many_items_are_left(items, beam, seed) -> None:
    rng = np.random.default_rng(seed)
    codes = random_codes(rng, 60)[rng.integers(0, 60, items)]  # some IDs are shared, many inner nodes lead to one leaf
    histories = [rng.integers(0, items, rng.integers(0, 40)) for _ in range(3)]
    lists = recommender(codes, exclude=True, beam=beam).recommend(histories, beam).items
    for row, history in zip(lists, histories, strict=True):
        found = [item for item in row.tolist() if item >= 0]
        assert len(found) == len(set(found)) == min(beam, items - len(set(history.tolist())))
        assert not set(found) & set(history.tolist())


def test_what_is_left_out_leaves_the_scores_of_the_rest_alone() -> None:
    codes = random_codes(np.random.default_rng(6), 40)
    history = np.arange(15)
    plain = recommender(codes, beam=40).recommend([history], 40)
    without = recommender(codes, exclude=True, beam=40).recommend([history], 25)
    scores = dict(zip(plain.items[0].tolist(), plain.scores[0].tolist(), strict=True))
    found = dict(zip(without.items[0].tolist(), without.scores[0].tolist(), strict=True))
    assert found == pytest.approx({item: scores[item] for item in range(15, 40)}, abs=1e-5)


def test_prompts_that_open_a_longer_one_are_read_off_it() -> None:
    rows = [[9, 1, 2, 3], [9, 1], [9, 2], [9], [9, 1, 2], [9, 2], [9, 1, 3]]
    lengths = torch.tensor([len(row) for row in rows])
    prompts = torch.tensor([row + [9] * (4 - len(row)) for row in rows])
    source = shared_prompts(prompts, lengths)
    for row, found in zip(rows, source.tolist(), strict=True):
        assert rows[found][: len(row)] == row
    assert [len(rows[found]) for found in source.tolist()] == [4, 4, 2, 4, 4, 2, 3]
    assert source.unique().numel() == 3


def test_rolling_histories_of_one_user_give_what_each_gives_alone() -> None:
    codes = random_codes(np.random.default_rng(7), 50)
    walk = np.random.default_rng(8).integers(0, 50, 12)
    histories = [walk[:cut] for cut in (5, 12, 0, 7)] + [walk[::-1]]
    model = recommender(codes)
    together = model.recommend(histories, 10)
    for row, history in enumerate(histories):
        alone = model.recommend([history], 10)
        assert together.items[row].tolist() == alone.items[0].tolist()
        np.testing.assert_allclose(together.scores[row], alone.scores[0], atol=1e-4)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=20))
def test_prompts_in_shared_rows_stand_side_by_side_and_leave_no_row_that_another_could_hold(lengths: list[int]) -> None:
    width = max(lengths)
    taken: dict[int, list[int]] = {}
    for length, (row, start) in zip(lengths, shared_rows(lengths, width), strict=True):
        taken.setdefault(row, []).extend(range(start, start + length))
    assert set(taken) == set(range(len(taken)))
    assert all(sorted(cells) == list(range(len(cells))) for cells in taken.values())
    assert all(len(cells) <= width for cells in taken.values())
    assert sum(len(cells) <= width // 2 for cells in taken.values()) <= 1


def test_unlike_prompts_share_rows_and_are_read_as_each_is_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    codes = random_codes(np.random.default_rng(9), 50)
    rng = np.random.default_rng(10)
    histories = [rng.integers(0, 50, size) for size in (20, 3, 7, 8, 1, 3, 12, 0)]
    histories.append(histories[2][:4])  # opens another one, which shares a row
    model = recommender(codes)
    rows = []
    stack = model.model.stack.forward

    def counted(*arguments: Any, **named: Any) -> Any:
        rows.append(len(named["inputs_embeds"]))
        return stack(*arguments, **named)

    monkeypatch.setattr(model.model.stack, "forward", counted)
    together = model.recommend(histories, 10)
    assert rows == [3, 9, 9]
    for row, history in enumerate(histories):
        alone = model.recommend([history], 10)
        assert together.items[row].tolist() == alone.items[0].tolist()
        np.testing.assert_allclose(together.scores[row], alone.scores[0], atol=1e-4)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_the_library_s_own_beam_search_finds_the_same_items_with_the_same_scores(seed: int) -> None:
    rng, width = np.random.default_rng(seed), 8
    codes, model = random_codes(rng, 55), tiny_model(seed)
    tokens, lengths = prompts_of(codes)([rng.integers(0, 55, 4) for _ in range(6)])
    trie = Trie.build(codes)
    with torch.inference_mode():
        leaves, scores = beam_search(model, trie, OFFSETS, tokens, lengths, width)
    paths = codes[np.lexsort(codes.T[::-1])] + OFFSETS.numpy()
    following = reference.trie_prefixes([tuple(path) for path in paths.tolist()])
    allowed = {prefix: sorted(codes) for prefix, codes in following.items()}
    generated, theirs = reference.generated(reference.causal_lm(model), allowed, tokens, width, len(SIZES))
    for row in range(6):
        assert {tuple(path) for path in paths[leaves[row]]} == {tuple(path) for path in generated[row].tolist()}
    torch.testing.assert_close(scores, theirs, atol=1e-4, rtol=0)


def test_items_that_share_an_id_come_as_one_tie_group_in_catalogue_order() -> None:
    codes = np.array([[0, 1, 2], [1, 0, 0], [0, 1, 2], [2, 2, 1]])
    lists = recommender(codes).recommend([np.array([1])], 4)
    place = lists.items[0].tolist().index(0)
    assert lists.items[0, place + 1] == 2
    assert lists.groups[0, place] == lists.groups[0, place + 1]
    assert len(set(lists.groups[0].tolist())) == 3
    assert lists.scores[0, place] == lists.scores[0, place + 1]


def test_a_shared_id_survives_while_one_of_its_items_is_new() -> None:
    codes = np.array([[0, 1, 2], [1, 0, 0], [0, 1, 2], [2, 2, 1]])
    lists = recommender(codes, exclude=True).recommend([np.array([0])], 4)
    assert sorted(lists.items[0].tolist()) == [-1, 1, 2, 3]


@pytest.mark.parametrize("exclude", [False, True])
def test_an_item_that_is_not_offered_is_read_and_never_returned(exclude: bool) -> None:
    codes = random_codes(np.random.default_rng(6), 12)
    offered = np.arange(12) != 4
    model, prompts = tiny_model(), prompts_of(codes)
    every = GenerativeRecommender(model, codes, SIZES, prompts, 20, 20, exclude)
    without = GenerativeRecommender(model, codes, SIZES, prompts, 20, 20, exclude, offered=offered)
    histories = [np.array([1, 4, 2])]
    all_of_them, found = (own.recommend(histories, 12) for own in (every, without))
    others = all_of_them.items[0] != 4
    kept = found.items[0] >= 0
    assert found.items[0, kept].tolist() == [item for item in all_of_them.items[0, others].tolist() if item >= 0]
    np.testing.assert_allclose(found.scores[0, kept], all_of_them.scores[0, others & (all_of_them.items[0] >= 0)])
    assert without.score(histories, np.array([[4, 5]])).tolist() == every.score(histories, np.array([[4, 5]])).tolist()


def test_a_list_longer_than_the_beam_is_refused() -> None:
    with pytest.raises(ValueError, match=r"k \(5\) exceeds the beam \(4\)"):
        recommender(np.array([[0, 0, 0]]), beam=4).recommend([np.array([0])], 5)


def test_items_of_later_stages_are_left_out_of_the_prompt_where_their_codes_know_later_events() -> None:
    codes = random_codes(np.random.default_rng(5), 12)
    reading = GenerativeRecommender(tiny_model(), codes[:8], SIZES, prompts_of(codes), 20, 20, False)
    careful = GenerativeRecommender(tiny_model(), codes[:8], SIZES, prompts_of(codes), 20, 20, False, unread=True)
    with_new, without = np.array([1, 10, 2, 11]), np.array([1, 2])
    expected = reading.recommend([without], 5).scores
    np.testing.assert_array_equal(careful.recommend([with_new], 5).scores, expected)
    assert np.abs(reading.recommend([with_new], 5).scores - expected).max() > 1e-3
