import json
import math
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from stages import continual_metrics as continual
from stages.config import Config
from stages.errors import UserError
from stages.jobs import Checkpoint, Evaluation, Job
from stages.metrics import query_metrics
from stages.statistics import bootstrap_means, interval
from stages.summary import summarise
from stages.workspace import Workspace, sha256_file, write_json
from tests import tiny

# One query a user: (user, rank, new item, new user).
Query = tuple[str, int, bool, bool]


def settings(**evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "name": "small",
            "workspace": "unused",
            "log": {"kind": "blocks", "blocks": "unused"},
            "evaluation": {"bootstrap": 500, **evaluation},
        }
    )


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    stages = [{"index": number} for number in range(3)]
    write_json(workspace.stages / "manifest.json", {"schema": 1, "stages": stages, "digest": "s", "log_digest": "l"})
    write_json(workspace.catalogue / "manifest.json", {"schema": 1, "digest": "c", "source": "shipped"})
    return workspace


def measured(
    space: Workspace,
    job: Job,
    tested: int,
    queries: Sequence[Query],
    matrix: bool = False,
    searches: Sequence[Query] = (),
) -> Evaluation:
    users, ranks, new_items, new_users = zip(*queries, *searches, strict=True)
    queries = [*queries, *searches]
    alone = np.ones(len(queries), dtype=np.int64)
    frame = pl.DataFrame(
        {
            "user": users,
            "new_item": new_items,
            "new_user": new_users,
            "reachable": [rank > 0 for rank in ranks],
            "objective": ["recommendation"] * (len(queries) - len(searches)) + ["search"] * len(searches),
            **query_metrics(np.arange(len(queries)), np.array(ranks), alone, alone),
        }
    )
    path = space.evaluations / f"{job.protocol}-{job.method}-{job.seed}-{job.stage}-{tested}-{matrix}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    name = str(path.relative_to(space.root))
    return Evaluation(job, tested, name, sha256_file(path), 2.0, len(queries), sampled=False, matrix=matrix)


def crowd(share: float, offset: int = 0, users: int = 40) -> list[Query]:
    """`share` of the users find their target in place 1, the others not at all."""
    return [(f"u{n + offset}", int(n < share * users), n % 4 == 0, n % 2 == 0) for n in range(users)]


def pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]


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


R = np.array([[0.5, 0.2, 0.1], [0.4, 0.6, 0.3], [0.3, 0.5, 0.7]])


def test_continual_metrics_by_hand() -> None:
    assert continual.average_performance(R) == pytest.approx(0.5)
    assert continual.learning_accuracy(R) == pytest.approx(0.6)
    assert continual.next_performance(R) == pytest.approx(0.25)
    assert continual.backward_transfer(R) == pytest.approx((-0.2 - 0.1) / 2)
    assert continual.forgetting(R) == pytest.approx((0.2 + 0.1) / 2)
    assert continual.forward_transfer(R, np.array([np.nan, 0.1, 0.1])) == pytest.approx((0.1 + 0.2) / 2)
    assert continual.retained_accuracy(R) == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert continual.harmonic(0.6, 0.3) == pytest.approx(0.4)
    assert continual.harmonic(0.0, 0.0) == 0
    assert math.isnan(continual.backward_transfer(np.array([[0.5]])))


def test_the_matrix_fills_its_gaps_with_headline_cells_on_the_same_users(space: Workspace) -> None:
    """The sample is users 0 … 19; on users 20 … 39 the headline cells hold other numbers that must not leak in."""
    cells = []
    for i in range(3):
        for j in range(3):
            job = Job("single", 0, "same_stage", i)
            sample = crowd(R[i, j], users=20)
            if i == j:
                cells.append(measured(space, job, j, sample + crowd(1.0, offset=20, users=20)))
            else:
                cells.append(measured(space, job, j, sample, matrix=True))
    report = summarise(settings(), space, cells, [])
    found = {(row["trained"], row["tested"]): row for row in report["matrix"] if row["metric"] == "hit_at_10"}
    assert {place: row["value"] for place, row in found.items()} == pytest.approx(dict(np.ndenumerate(R)))
    assert {row["users"] for row in found.values()} == {20}
    values = {row["metric"]: row["value"] for row in report["continual"]}
    assert values["bwt"] == pytest.approx(continual.backward_transfer(R))
    assert values["learning_accuracy"] == pytest.approx(0.6)
    assert values["next_perf"] == pytest.approx(0.25)
    assert values["fwt"] is None  # recent popularity was not measured
    assert pick(report["rows"], seed=0, stage=0, slice="all", metric="mrr")["value"] == pytest.approx(0.75)


def test_what_is_kept_is_counted_for_each_objective_apart(space: Workspace) -> None:
    turned = R.T
    cells = [
        measured(space, Job("single", 0, "same_stage", i), j, crowd(R[i, j]), i != j, searches=crowd(turned[i, j]))
        for i in range(3)
        for j in range(3)
    ]
    report = summarise(settings(), space, cells, [])
    assert list(dict.fromkeys(row["objective"] for row in report["continual"])) == ["recommendation", "search"]
    for objective, cells_of in (("recommendation", R), ("search", turned)):
        values = {row["metric"]: row["value"] for row in report["continual"] if row["objective"] == objective}
        assert values["bwt"] == pytest.approx(continual.backward_transfer(cells_of))
        assert values["forgetting"] == pytest.approx(continual.forgetting(cells_of))
        assert values["next_perf"] == pytest.approx(continual.next_performance(cells_of))
        found = [row for row in report["matrix"] if (row["objective"], row["metric"]) == (objective, "hit_at_10")]
        assert {(row["trained"], row["tested"]): row["value"] for row in found} == pytest.approx(
            dict(np.ndenumerate(cells_of))
        )


def test_forward_transfer_is_measured_against_recent_popularity(space: Workspace) -> None:
    cells = [
        measured(space, Job(method, 0, "next_stage", j - 1), j, crowd(share))
        for method, share in (("single", 0.5), ("recent_popularity", 0.2))
        for j in (1, 2)
    ]
    report = summarise(settings(), space, cells, [])
    assert pick(report["continual"], method="single", metric="fwt")["value"] == pytest.approx(0.3)
    assert pick(report["continual"], method="recent_popularity", metric="fwt")["value"] == 0


def test_costs_name_speed_from_the_headline_evaluation(space: Workspace) -> None:
    job = Job("single", 0, "same_stage", 1)
    trained = Checkpoint(job, "k", "d", 12.5, 1000, 4000, 5000, 77, reused=False)
    report = summarise(settings(), space, [measured(space, job, 1, crowd(0.5))], [trained])
    row = pick(report["costs"], method="single", stage=1)
    assert (row["train_seconds"], row["queries_per_second"], row["targets"]) == (12.5, 20.0, 77)


def test_what_a_reader_must_know_is_in_the_notes(space: Workspace) -> None:
    cells = [measured(space, Job("peso", 0, "same_stage", 1), 1, crowd(0.5))]
    report = summarise(settings(users=40), space, cells, [])
    notes = " ".join(report["notes"])
    for phrase in (
        "seeded sample of 40",
        "Training seeds: 1",
        "Differences are to peso",
        "known in advance",
        "500 draws",
    ):
        assert phrase in notes
    assert report["differences"] == []
    assert report["sampled_users"] == 40
    assert report["catalogue_known_in_advance"] is True


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


def test_rows_left_out_of_the_log_are_in_the_report_and_its_notes(space: Workspace) -> None:
    counts = {"rows": 1200, "filtered": 30, "rejected": {"timestamp zero": 2, "missing item_id": 1}}
    counts |= {"duplicates": 7, "accepted": 1160, "units": {"a.csv": "ms", "b.csv": "s"}}
    write_json(space.log.with_name("manifest.json"), {"schema": 1, **counts, "catalogue_rejected": {"bad": 4}})
    pl.DataFrame({"event": ["search", "recommendation", "search"]}).write_parquet(space.log)
    report = summarise(settings(), space, [measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))], [])
    assert report["log"] == counts
    notes = "\n".join(report["notes"])
    assert "1,200 rows read, 30 filtered by `where`, 3 rejected: timestamp zero (2), missing item_id (1)" in notes
    assert "rejects/log.parquet, 7 duplicates dropped, 1,160 events kept; times read as ms, s." in notes
    assert "Item table: 4 rejected: bad (4); they are in rejects/catalogue.parquet." in notes
    assert "Searches: 2 events. A history ends where its target's moment begins" in notes


def test_skipped_users_are_counted_for_every_stage_tested(tmp_path: Path) -> None:
    space = tiny.checkerboard(tmp_path, stages=2, users=5, length=4)
    rows = [("short", "i00"), ("short", "i01"), ("shorter", "i02"), *[("long", f"i0{n}") for n in range(3)]]
    tiny.write_stage(space, 1, rows)
    cells = [measured(space, Job("single", 0, "same_stage", stage), stage, crowd(0.5)) for stage in (0, 1)]
    notes = summarise(settings(), space, cells, [])["notes"]
    said = "fewer than three baskets in the stage: 0 users at stage 0, 2 users at stage 1."
    assert [note for note in notes if note.endswith(said)]


def test_codes_met_for_the_first_time_are_counted_once_for_a_stage(space: Workspace) -> None:
    trained = []
    for method, stage, count in (("single", 0, 9), ("single", 1, 3), ("peso", 1, 3), ("peso", 2, 1)):
        job = Job(method, 0, "same_stage", stage)
        trained.append(Checkpoint(job, f"{method}{stage}", "d", 1.0, 1, 1, None, 1, reused=False))
        state = {"job": asdict(job), "unseen_code_rows": count}
        write_json(space.checkpoints / f"{method}{stage}" / "state.json", state)
    trained.append(replace(trained[-1], key="gone"))
    trained.append(replace(trained[0], job=Job("frozen", 0, "same_stage", 2)))  # stage 0's checkpoint, met again
    cells = [measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))]
    notes = summarise(settings(), space, cells, trained)["notes"]
    assert notes[-1].endswith(": 3 tokens at stage 1, 1 tokens at stage 2.")


def test_what_gems_kept_and_where_it_met_one_objective_is_said_once(space: Workspace) -> None:
    trained = []
    for method, stage, objectives, corpus, shares in (
        ("gems", 1, ["recommendation"], "previous_stage", (0.25, 0.5)),
        ("gems", 2, ["search", "recommendation"], "previous_stage", (0.75, 0.5)),
        ("gems_keep", 2, ["search", "recommendation"], "previous_stage", (0.3, 0.3)),
        ("worded", 2, ["search", "recommendation"], "/somewhere/glosses.txt", (0.1, 0.2)),
    ):
        job = Job(method, 0, "same_stage", stage)
        trained.append(Checkpoint(job, f"{method}{stage}", "d", 1.0, 1, 1, None, 1, reused=False))
        own = {"objectives": objectives, "single_objective": len(objectives) < 2}
        own |= {"protected": {str(place): {"k_over_n": s, "k": round(200 * s)} for place, s in enumerate(shares)}}
        inputs = {"method": {"null_space": "orthogonal", "corpus": corpus}}
        state = {"job": asdict(job), "inputs": inputs, "gems": own}
        write_json(space.checkpoints / f"{method}{stage}" / "state.json", state)
    cells = [measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))]
    notes = summarise(settings(), space, cells, trained)["notes"]
    assert "One objective alone, recommendation, at stage 1: there gems trained the shared subspace only." in notes
    said = [note for note in notes if note.startswith("Null space: ")]
    assert len(said) == 2
    assert said[0].startswith(
        "Null space: gems, gems_keep kept what the inputs of the stage before give, "
        "50 of 200 (25.0%) to 150 of 200 (75.0%) of the directions that a map reads"
    )
    assert said[1].startswith(
        "Null space: worded kept what the inputs of the text glosses.txt give, 20 of 200 (10.0%) to "
    )


def test_what_other_methods_for_two_objectives_did_with_one_is_said_once_a_kind(space: Workspace) -> None:
    trained = []
    for method, kind, stage, objectives in (
        ("pcgrad", "pcgrad", 1, ["recommendation"]),
        ("by_matrix", "ortho_lora", 2, ["recommendation"]),
        ("lora_moe", "lora_moe", 1, ["recommendation"]),
        ("lora_moe", "lora_moe", 2, ["recommendation", "search"]),
        ("single", "single", 1, ["recommendation"]),
        ("osf", "osf", 1, ["search"]),
    ):
        job = Job(method, 0, "same_stage", stage)
        trained.append(Checkpoint(job, f"{method}{stage}", "d", 1.0, 1, 1, None, 1, reused=False))
        rows = [{"step": 0, "ce": 1.0, f"ce/{name}": 1.0} for name in objectives]
        state = {"job": asdict(job), "inputs": {"method": {"method": kind}}, "training": rows}
        write_json(space.checkpoints / f"{method}{stage}" / "state.json", state)
    trained.append(Checkpoint(Job("single", 0, "same_stage", 0), "first0", "d", 1.0, 1, 1, None, 1, reused=False))
    first = {"job": asdict(trained[-1].job), "inputs": {"method": None}, "training": [{"step": 0, "ce/search": 1.0}]}
    write_json(space.checkpoints / "first0" / "state.json", first)
    cells = [measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))]
    notes = summarise(settings(), space, cells, trained)["notes"]
    assert [note for note in notes if note.startswith("One objective alone")] == [
        "One objective alone, recommendation, at stage 1, 2: there pcgrad, by_matrix had no two gradients to reconcile "
        "and trained as `single` does.",
        "One objective alone, recommendation, at stage 1: there lora_moe sent the one objective through all experts, "
        "balanced to give those meant for the other a share of (1 - skew) / (1 + skew).",
    ]


def test_a_changed_evaluation_file_is_refused(space: Workspace) -> None:
    cell = measured(space, Job("single", 0, "same_stage", 1), 1, crowd(0.5))
    with (space.root / cell.path).open("ab") as handle:
        handle.write(b"x")
    with pytest.raises(UserError, match="not the evaluation that was measured"):
        summarise(settings(), space, [cell], [])
