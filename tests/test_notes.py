"""A report's notes: what a reader must know, what was left out, and what each method did with what it had."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import polars as pl

from stages.jobs import Checkpoint, Job
from stages.summary import summarise
from stages.workspace import Workspace, write_json
from tests import tiny
from tests.measured import crowd, measured, settings


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
