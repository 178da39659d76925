"""Search and recommendation from one log: what is history, what is a target, and how a query is read."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from models.backbone import CONTROL_TOKENS, small_backbone
from models.generative import GenerativeModel
from models.words import BYTES
from stages.commit import commit_key
from stages.config import PROTOCOLS, Config, Protocol
from stages.dataset import Dataset, load_dataset
from stages.errors import UserError
from stages.evaluate import test_queries as asked
from stages.examples import Encoder, make_windows
from stages.interactions import Interactions, load_interactions
from stages.jobs import Job
from stages.queries import moment_starts, training_targets
from stages.search_examples import Branches, branch_batch, make_branches, mixed_batches, query_vocabulary
from stages.stage_examples import Examples, stage_examples
from tests import searching, tiny
from tests.searching import VISIT, WORDS, dataset


def job(stage: int, protocol: Protocol = "same_stage") -> Job:
    return Job("single", 0, protocol, stage)


def test_an_instants_purchases_come_before_its_searches_and_make_one_moment(tmp_path: Path) -> None:
    own = dataset(tmp_path, [VISIT]).interactions
    assert own.items.tolist()[:3] == [0, 1, 1]
    assert own.searched.tolist() == [False, False, True, True, True, False]
    assert moment_starts(own).tolist() == [0, 1, 1, 3, 3, 5]
    assert own.queries(np.array([2, 3, 4])) == ["red shoe", "blue shoe", "blue shoe"]
    assert own.recommendations.items.tolist() == [0, 1, 4]
    assert own.recommendations_before[[1, 3, 5]].tolist() == [1, 2, 2]


def test_neither_a_search_nor_its_purchase_is_history_of_the_other(tmp_path: Path) -> None:
    config = tiny.config(evaluation={"baskets": True})
    own = dataset(tmp_path, [[("u", "i09", 0, None)], VISIT], config)
    rec, found = (asked(config, own, job(0, "next_stage"), 1, None, kind) for kind in ("recommendation", "search"))
    assert (rec.cut.tolist(), rec.first.tolist(), rec.end.tolist()) == ([1, 2, 6], [1, 2, 6], [2, 3, 7])
    assert (found.cut.tolist(), found.first.tolist(), found.end.tolist()) == ([2, 4], [3, 4], [4, 6])
    windows = make_branches(own.interactions, own.interactions.searched, config.training)
    assert windows.cut.tolist() == [2, 4, 4]


def test_searches_of_one_instant_are_asked_query_by_query(tmp_path: Path) -> None:
    rows: list[searching.Row] = [("u", f"i0{n}", 0, query) for n, query in enumerate("abab")]
    single, together = tiny.config(), tiny.config(evaluation={"baskets": True})
    own = dataset(tmp_path, [[("v", "i09", 0, None)], rows])
    one_by_one = asked(single, own, job(0, "next_stage"), 1, None, "search")
    sets = asked(together, own, job(0, "next_stage"), 1, None, "search")
    assert (one_by_one.end - one_by_one.first).tolist() == [1, 1, 1, 1]
    assert (sets.end - sets.first).tolist() == [2, 2]
    assert set(one_by_one.cut) == set(sets.cut) == {0}
    for first, end in zip(sets.first, sets.end, strict=True):
        assert len(set(own.interactions.queries(np.arange(first, end)))) == 1


ITEMS = st.integers(0, 5)
EVENTS = st.lists(
    st.tuples(st.sampled_from("uv"), ITEMS, st.integers(0, 6), st.sampled_from([None, "a", "b c"])), max_size=14
)


def rows_of(events: list[tuple[str, int, int, str | None]]) -> list[searching.Row]:
    return [(user, f"i{item:02d}", minute, query) for user, item, minute, query in dict.fromkeys(events)]


def examples_of(config: Config, own: Dataset, target: Job) -> Examples:
    return stage_examples(config, own, target, False, query_vocabulary(config, own))


def seen_pairs(examples: Examples, own: Interactions) -> set[tuple[int, int]]:
    """(user, item) of every row that a training example holds, as history or as target."""
    part = examples.parts.get("search")
    rows: set[int] = set()
    if part is not None and isinstance(part.training, Branches):
        rows |= set(part.training.row.tolist())
        rows |= {r for a, b in zip(part.training.start, part.training.end, strict=True) for r in range(a, b)}
    part = examples.parts.get("recommendation")
    if part is not None:
        rows |= {r for a, b in zip(part.training.start, part.training.end, strict=True) for r in range(a, b)}
    return {(int(own.users[row]), int(own.items[row])) for row in rows}


@settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(stages=st.lists(EVENTS.filter(bool), min_size=2, max_size=2), baskets=st.booleans())
def test_a_test_pair_is_in_no_training_example_and_not_in_its_own_history(
    tmp_path_factory: pytest.TempPathFactory, stages: list[list[tuple[str, int, int, str | None]]], baskets: bool
) -> None:
    config = tiny.config(evaluation={"baskets": baskets})
    own = dataset(tmp_path_factory.mktemp("log"), [rows_of(stage) for stage in stages], config)
    log = own.interactions
    if log.query is None:
        return
    for protocol in PROTOCOLS:
        for stage in range(2):
            trained = range(stage) if protocol == "next_stage" else range(stage + 1)
            known = set[tuple[int, int]]()
            for index in trained:
                known |= seen_pairs(examples_of(config, own, job(index, protocol)), log)
            for objective in log.objectives:
                queries = asked(config, own, job(stage, protocol), stage, None, objective)
                for user, cut, first, end in zip(queries.user, queries.cut, queries.first, queries.end, strict=True):
                    history = set(log.items[log.offsets[user] : cut].tolist())
                    targets = [item for item in log.items[first:end].tolist() if item not in history]
                    assert targets  # what the user had met is not asked for; something else is
                    assert not {(int(user), item) for item in targets} & known
                    assert (log.searched[first:end] == (objective == "search")).all()


def arrays_of(examples: Examples) -> list[list[list[int]]]:
    found = []
    for part in examples.parts.values():
        for chosen in range(len(part.training)):
            batch = part.batch(part.training, np.array([chosen]))
            found.append([batch.tokens.tolist(), batch.positions.tolist(), batch.labels.tolist()])
    return found


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_changing_an_event_after_the_cut_changes_no_training_example(protocol: Protocol, tmp_path: Path) -> None:
    later: list[searching.Row] = [("u", "i05", 0, None), ("u", "i06", 5, "green hat"), ("w", "i07", 9, None)]
    other: list[searching.Row] = [("u", "i01", 0, "red shoe"), ("x", "i02", 5, "red hat"), ("u", "i07", 9, "shoe")]
    held_out: list[list[searching.Row]] = [VISIT, VISIT]
    if protocol == "same_stage":  # the last moment of the visit is tested
        held_out[1] = [*VISIT[:-1], ("u", "i09", 30, "blue shoe"), ("u", "i10", 30, None)]
    runs = []
    for name, first, second in (("a", held_out[0], later), ("b", held_out[1], other)):
        own = dataset(tmp_path / name, [first, second])
        runs.append(arrays_of(examples_of(tiny.config(), own, job(0, protocol))))
    assert runs[0] == runs[1] != []


def encoder_of(own: Dataset) -> Encoder:
    return Encoder(own.interactions, own.catalogue, WORDS)


def test_a_training_example_reads_what_a_test_prompt_reads(tmp_path: Path) -> None:
    own = dataset(tmp_path, [VISIT])
    log, encoder = own.interactions, encoder_of(own)
    training = tiny.config(training={"layout": "per_prefix"}).training
    searches = make_branches(log, log.searched, training)
    purchases = make_windows(log, ~log.searched, training)
    for windows, kind in ((searches, True), (purchases, False)):
        for number in range(len(windows)):
            chosen = np.array([number])
            batch = branch_batch(encoder, windows, chosen) if kind else encoder.batch(windows, chosen)  # pyright: ignore
            target = searches.row[number] if kind else purchases.first[number]
            cut = int(searches.cut[number] if kind else target)
            query = log.queries(np.array([target])) if kind else None
            prompt, lengths = encoder.prompts([log.items[:cut]], query, [log.searched[:cut]])
            assert batch.tokens[0, : int(lengths[0])].tolist() == prompt[0].tolist()
            assert batch.positions[0] == lengths[0] - 1
            assert batch.labels.tolist() == encoder.tokens[log.items[target]].tolist()


@pytest.mark.parametrize("alone", [True, False])
def test_what_is_bought_at_one_moment_is_learnt_from_what_came_before_it(tmp_path: Path, alone: bool) -> None:
    history: Any = "recommendation" if alone else "both"
    search = {"rec_history": history, "repeats": "ask"}
    month = [("u", f"i{item:02d}", 40, None) for item in (7, 5, 6)]
    config = tiny.config(search=search, training={"layout": "packed", "targets_per_window": 8})
    later: list[searching.Row] = [("u", "i08", 50, None), ("u", "i09", 60, None)]  # the last two moments are held out
    own = dataset(tmp_path, [[*VISIT, *month, *later, ("u", "i10", 70, None)]], config)
    part = examples_of(config, own, job(0)).parts["recommendation"]
    assert isinstance(part.training, Branches)
    batch, events = part.batch(part.training, np.arange(len(part.training))), part.encoder.interactions
    before = [0, 1, 4] if alone else [0, 1, 1, 2, 3, 4]
    ends = {int(events.items[row]): cut for row, cut in zip(part.training.row, part.training.cut, strict=True)}
    assert {item: events.items[:cut].tolist() for item, cut in ends.items() if 4 < item < 8} == dict.fromkeys(
        (5, 6, 7), before
    )
    # What a target may see is its past, its request and its own codes: what stands in a prompt, and nothing else.
    assert batch.visible is not None
    levels, labels = own.catalogue.codes.shape[1], batch.labels.numpy().reshape(-1, own.catalogue.codes.shape[1])
    lines = batch.positions.numpy().reshape(-1, levels)[:, 0]
    for item in (5, 6, 7):
        (target,) = np.flatnonzero((labels == part.encoder.tokens[item]).all(axis=1))
        line, place = divmod(int(lines[target]), batch.tokens.shape[1])
        prompt, lengths = part.encoder.prompts([events.items[: ends[item]]], None, [events.searched[: ends[item]]])
        assert batch.tokens[line, batch.visible[line, place]].tolist() == prompt[0, : int(lengths[0])].tolist()
    read = config.model_copy(update={"search": config.search.model_copy(update={"own_moment": "read"})})
    assert not isinstance(examples_of(read, own, job(0)).parts["recommendation"].training, Branches)
    assert "own_moment" not in read.search.trained_with()  # what was trained before there was the choice keeps its key
    assert commit_key(read, own, job(0)) != commit_key(config, own, job(0))


def test_purchases_of_moments_of_their_own_are_learnt_in_one_pass(tmp_path: Path) -> None:
    own = dataset(tmp_path, [[row for row in VISIT if row[3] is None]], tiny.config())
    part = examples_of(tiny.config(), own, job(0)).parts["recommendation"]
    assert not isinstance(part.training, Branches)


def test_a_prompt_is_marked_items_then_the_query_then_the_request(tmp_path: Path) -> None:
    own = dataset(tmp_path, [VISIT])
    encoder = encoder_of(own)
    bos, recommended, searched = encoder.bos, encoder.bos + 1, encoder.bos + 2
    find = bos + 3 + CONTROL_TOKENS + BYTES
    tokens, lengths = encoder.prompts([np.array([0, 5]), np.array([], dtype=np.int64)], ["find ab", "item"], [
        np.array([False, True]), np.array([], dtype=bool)])  # fmt: skip
    a = bos + 3 + CONTROL_TOKENS + ord("a")
    item = encoder.tokens[5].tolist()
    expected = [bos, recommended, *encoder.tokens[0].tolist(), searched, *item, find, a, a + 1, searched]
    assert tokens[0].tolist() == expected
    assert tokens[1, : int(lengths[1])].tolist() == [bos, find + 1, searched]
    assert lengths.tolist() == [len(expected), 3]
    plain, sizes = encoder.prompts([np.array([5])])
    assert plain.tolist() == [[bos, recommended, *item, recommended]]
    assert sizes.tolist() == [len(item) + 3]


def test_branches_on_a_shared_history_have_the_loss_of_examples_of_their_own(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    rows: list[searching.Row] = [
        (
            f"u{user}",
            f"i{rng.integers(16):02d}",
            int(minute),
            [None, "find it", "x", "find the red item"][rng.integers(4)],
        )
        for user in range(3)
        for minute in range(12)
        for _ in range(1 + int(rng.integers(2)))
    ]
    own = dataset(tmp_path, [list(dict.fromkeys(rows))])
    log, encoder = own.interactions, encoder_of(own)
    backbone = small_backbone(hidden=16, layers=2, heads=2, feed_forward=32, seed=0, text=len(WORDS))
    codes = int(sum(own.catalogue.sizes))
    model = GenerativeModel(backbone, codes, seed=0, full_vocabulary=False, dropout=0.0, searching=True).eval()
    losses = []
    for layout in ("packed", "per_prefix"):
        windows = make_branches(log, log.searched, tiny.config(training={"layout": layout}).training)
        batch = branch_batch(encoder, windows, np.arange(len(windows)))
        with torch.no_grad():
            losses.append(float(model.loss(batch)))
            apart = sum(float(model.loss(branch_batch(encoder, windows, np.array([n])))) for n in range(len(windows)))
        assert losses[-1] == pytest.approx(apart, rel=1e-5)
    assert len(windows) == int(log.searched.sum())
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(events=EVENTS.filter(bool), size=st.integers(1, 4), history=st.integers(1, 4))
def test_every_target_of_either_objective_is_in_exactly_one_window(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[str, int, int, str | None]], size: int, history: int
) -> None:
    own = dataset(tmp_path_factory.mktemp("log"), [rows_of(events)])
    log, encoder = own.interactions, encoder_of(own)
    settings = tiny.config(training={"targets_per_window": size, "history_length": history}).training
    mask = np.random.default_rng(len(events)).random(len(log.items)) < 0.7
    searches = make_branches(log, mask & log.searched, settings)
    assert sorted(searches.row.tolist()) == np.flatnonzero(mask & log.searched).tolist()
    assert searches.count.sum() == searches.targets
    begins = np.cumsum(searches.count) - searches.count
    for number, begin in enumerate(begins):
        cuts = searches.cut[begin : begin + searches.count[number]]
        opens = log.offsets[log.users[searches.row[begin]]]
        assert (cuts - np.maximum(opens, cuts - history) <= cuts - searches.start[number]).all()
        assert searches.end[number] == cuts.max()
    purchases = make_windows(log, mask & ~log.searched, settings)
    labels = [encoder.batch(purchases, np.array([n])).labels.tolist() for n in range(len(purchases))]
    expected = encoder.tokens[log.items[mask & ~log.searched]].ravel().tolist()
    assert sorted(code for one in labels for code in one) == sorted(expected)
    assert purchases.targets == (mask & ~log.searched).sum()


def test_every_batch_holds_both_objectives_and_every_window_is_drawn_once() -> None:
    rng = np.random.default_rng(0)
    lengths = {"recommendation": rng.integers(1, 50, 30), "search": rng.integers(1, 50, 170)}
    runs = [list(mixed_batches(lengths, 16, np.random.default_rng(seed))) for seed in (1, 1, 2)]
    assert len(runs[0]) == 13
    for batch in runs[0]:
        assert set(batch) == {"recommendation", "search"}
        assert sum(map(len, batch.values())) <= 18
    for name, own in lengths.items():
        drawn = [[part.get(name, np.array([])).tolist() for part in run] for run in runs]
        assert drawn[0] == drawn[1] != drawn[2]
        assert sorted(number for part in drawn[0] for number in part) == list(range(len(own)))


def test_an_objective_without_events_takes_no_part_in_a_batch() -> None:
    lengths = {"recommendation": np.arange(10), "search": np.arange(0)}
    assert all(set(batch) == {"recommendation"} for batch in mixed_batches(lengths, 4, np.random.default_rng(0)))
    assert list(mixed_batches({"search": np.arange(0)}, 4, np.random.default_rng(0))) == []


def test_equal_shares_give_each_objective_half_of_a_batch(tmp_path: Path) -> None:
    own = load_dataset(tiny.config(), searching.ring(tmp_path, stages=1))
    examples = examples_of(tiny.config(), own, job(0))
    chosen = {name: np.arange(len(part.training)) for name, part in examples.parts.items()}
    codes = {name: count * tiny.LEVELS for name, count in examples.targets.items()}
    natural, equal = examples.shares(chosen, False), examples.shares(chosen, True)
    assert natural["search"] == natural["recommendation"] == 1 / sum(codes.values())
    assert {name: codes[name] * share for name, share in equal.items()} == pytest.approx(dict.fromkeys(codes, 0.5))
    assert examples.shares({"search": chosen["search"]}, True) == examples.shares({"search": chosen["search"]}, False)


def test_search_settings_change_no_key_of_a_log_without_searches(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=1)
    changed = tiny.config(search={"mix": "equal", "rec_history": "recommendation", "words": 7})
    keys = {commit_key(own, load_dataset(own, workspace), job(0)) for own in (tiny.config(), changed)}
    assert len(keys) == 1


def test_an_objective_that_the_log_lacks_is_refused(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=1)
    with pytest.raises(UserError, match=r"search\.objectives names search, but the log has no search event"):
        load_interactions(workspace, baskets=False, objectives=["search"])
    with pytest.raises(ValueError, match="must be distinct and at least one"):
        tiny.config(search={"objectives": []})


def test_held_out_moments_train_neither_objective(tmp_path: Path) -> None:
    own = dataset(tmp_path, [VISIT]).interactions
    assert training_targets(own, [0], "same_stage", 0).tolist() == [True, True, True, False, False, False]
