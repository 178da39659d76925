"""The rows of a report: means and intervals over stages, slices, seeds and pairs of methods, and their costs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from stages.errors import UserError
from stages.jobs import Checkpoint, Evaluation, Job
from stages.statistics import bootstrap_means, interval
from stages.summary import summarise
from stages.workspace import Workspace, sha256_file
from tests.measured import Query, crowd, measured, pick, settings


def everything(space: Workspace, shares: dict[str, float], seeds: Sequence[int] = (0, 1)) -> list[Evaluation]:
    return [
        measured(space, Job(method, seed, "same_stage", stage), stage, crowd(share + 0.1 * stage, 20 * stage))
        for method, share in shares.items()
        for seed in (seeds if method != "popularity" else (0,))
        for stage in range(3)
    ]


def test_the_mean_leaves_stage_zero_out_and_weighs_stages_alike(space: Workspace) -> None:
    report = summarise(settings(), space, everything(space, {"single": 0.5}), [])
    leading = {"slice": "all", "metric": "hit_at_10", "seed": None}
    assert pick(report["rows"], stage=0, **leading)["value"] == pytest.approx(0.5)
    mean = pick(report["rows"], stage="mean", **leading)
    assert mean["value"] == pytest.approx((0.6 + 0.7) / 2)
    assert mean["users"] == 60  # 40 a stage, 20 of them in both
    assert mean["low"] < mean["value"] < mean["high"]


def test_a_row_of_one_stage_is_the_plain_bootstrap_of_its_users(space: Workspace) -> None:
    queries = crowd(0.3, users=200)
    report = summarise(settings(), space, [measured(space, Job("single", 0, "same_stage", 1), 1, queries)], [])
    row = pick(report["rows"], stage=1, seed=0, slice="all", metric="mrr")
    low, high = interval(bootstrap_means(np.array([[float(rank)] for _, rank, _, _ in queries]), 500, 1))
    assert (row["low"], row["high"]) == pytest.approx((low[0], high[0]), abs=0.02)


def test_slices_hold_the_users_they_name(space: Workspace) -> None:
    queries: list[Query] = [("a", 1, True, False), ("a", 0, False, False), ("b", 0, False, True), ("c", 2, False, True)]
    report = summarise(settings(), space, [measured(space, Job("single", 0, "same_stage", 1), 1, queries)], [])
    rows = {row["slice"]: row for row in report["rows"] if row["seed"] == 0 and row["metric"] == "hit_at_5"}
    rows = {name: (row["value"], row["users"]) for name, row in rows.items() if row["stage"] == "mean"}
    assert rows == {
        "all": (0.5, 3),  # a has a half, c all
        "all_events": (0.5, 3),
        "new_item": (1.0, 1),
        "new_user": (0.5, 2),
        "returning_user": (0.5, 1),
    }


def test_the_event_mean_weighs_busy_users_more(space: Workspace) -> None:
    queries: list[Query] = [("a", 1, False, False)] * 3 + [("b", 0, False, False)]
    report = summarise(settings(), space, [measured(space, Job("single", 0, "same_stage", 1), 1, queries)], [])
    values = {part: pick(report["rows"], stage=1, seed=0, slice=part, metric="mrr") for part in ("all", "all_events")}
    assert values["all"]["value"] == 0.5
    assert values["all_events"]["value"] == 0.75


def test_a_slice_without_targets_is_null(space: Workspace) -> None:
    queries: list[Query] = [("a", 1, False, False), ("b", 0, False, False)]
    report = summarise(settings(), space, [measured(space, Job("single", 0, "same_stage", 1), 1, queries)], [])
    row = pick(report["rows"], stage="mean", seed=None, slice="new_item", metric="hit_at_10")
    assert (row["value"], row["low"], row["high"], row["users"]) == (None, None, None, 0)
    json.dumps(report, allow_nan=False)


def test_differences_have_the_sign_of_the_better_method_and_holm_over_the_table(space: Workspace) -> None:
    shares = {"single": 0.3, "peso": 0.6, "frozen": 0.3, "popularity": 0.05}
    report = summarise(settings(), space, everything(space, shares), [])
    leading = {"stage": "mean", "slice": "all", "metric": "hit_at_10"}
    better, same, worse = (pick(report["differences"], method=m, **leading) for m in ("peso", "frozen", "popularity"))
    assert better["value"] == pytest.approx(0.3)
    assert 0 < better["low"] < better["high"]
    assert better["p_holm"] == pytest.approx(3 * 2 / 501)
    assert (same["value"], same["low"], same["high"], same["p_holm"]) == (0, 0, 0, 1)
    assert worse["high"] < 0
    assert (worse["users"], worse["seeds"]) == (60, 2)
    assert {row["method"] for row in report["differences"]} == {"peso", "frozen", "popularity"}
    assert not [row for row in report["differences"] if row["slice"] != "all" and row["stage"] != "mean"]


def test_without_single_the_first_method_is_what_the_others_are_compared_with(space: Workspace) -> None:
    report = summarise(settings(), space, everything(space, {"popularity": 0.2, "peso": 0.6, "frozen": 0.3}), [])
    leading = {"stage": "mean", "slice": "all", "metric": "hit_at_10"}
    assert report["reference"] == "peso"
    assert pick(report["differences"], method="frozen", **leading)["value"] == pytest.approx(-0.3)
    assert {(row["method"], row["reference"]) for row in report["differences"]} == {
        ("frozen", "peso"),
        ("popularity", "peso"),
    }
    assert "Differences are to peso, the first of the methods: single is not among them." in report["notes"]


def test_training_seeds_widen_the_interval_of_their_mean(space: Workspace) -> None:
    cells = [
        measured(space, Job("single", seed, "same_stage", 1), 1, crowd(share, users=400))
        for seed, share in enumerate((0.2, 0.5, 0.8))
    ]
    report = summarise(settings(), space, cells, [])
    width = {
        row["seed"]: row["high"] - row["low"]
        for row in report["rows"]
        if (row["stage"], row["slice"], row["metric"]) == (1, "all", "hit_at_10")
    }
    assert width[None] > 3 * width[1]


def test_next_stage_rows_stand_under_the_tested_stage(space: Workspace) -> None:
    cells = [measured(space, Job("single", 0, "next_stage", j - 1), j, crowd(0.25 * j)) for j in (1, 2)]
    stray = measured(space, Job("single", 0, "next_stage", 0), 2, crowd(1.0))
    report = summarise(settings(), space, [*cells, stray], [])
    values = {row["stage"]: row["value"] for row in report["rows"] if row["metric"] == "mrr" and row["seed"] is None}
    assert values == {1: 0.25, 2: 0.5, "mean": 0.375}
    assert pick(report["continual"], metric="next_perf")["value"] == pytest.approx(0.375)
    assert [(row["stage"], row["value"]) for row in report["oracle"]] == [(1, 0.25), (2, 0.5)]


def test_recall_is_reported_for_baskets_only(space: Workspace) -> None:
    cells = [measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))]
    for baskets in (False, True):
        report = summarise(settings(baskets=baskets), space, cells, [])
        assert ("recall_at_10" in {row["metric"] for row in report["rows"]}) == baskets


def test_costs_name_speed_from_the_headline_evaluation(space: Workspace) -> None:
    job = Job("single", 0, "same_stage", 1)
    trained = Checkpoint(job, "k", "d", 12.5, 1000, 4000, 5000, 77, reused=False)
    report = summarise(settings(), space, [measured(space, job, 1, crowd(0.5))], [trained])
    row = pick(report["costs"], method="single", stage=1)
    assert (row["train_seconds"], row["queries_per_second"], row["targets"]) == (12.5, 20.0, 77)


def test_stage_zero_stands_for_the_mean_where_it_alone_was_tested(space: Workspace) -> None:
    report = summarise(settings(), space, [measured(space, Job("single", 0, "same_stage", 0), 0, crowd(0.25))], [])
    leading = {"slice": "all", "metric": "hit_at_10", "seed": None}
    assert pick(report["rows"], stage="mean", **leading)["value"] == 0.25
    assert "same-stage: only stage 0 was tested; it stands in the place of the mean." in report["notes"]


def test_an_empty_stage_is_not_among_those_of_the_mean(space: Workspace) -> None:
    full, empty = (measured(space, Job("single", 0, "same_stage", stage), stage, crowd(0.5)) for stage in (1, 2))
    frame = pl.read_parquet(space.root / empty.path).clear()
    frame.write_parquet(space.root / empty.path)
    empty = replace(empty, queries=0, digest=sha256_file(space.root / empty.path))
    report = summarise(settings(), space, [full, empty], [])
    assert "Means over stages: tested stages 1, each with the same weight." in report["notes"]
    assert pick(report["rows"], stage="mean", slice="all", metric="mrr", seed=None)["value"] == 0.5


def test_a_changed_evaluation_file_is_refused(space: Workspace) -> None:
    cell = measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))
    with (space.root / cell.path).open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(UserError, match="not the evaluation that was measured"):
        summarise(settings(), space, [cell], [])
