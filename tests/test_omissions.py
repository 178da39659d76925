"""What is kept of GEMS's gate, and what a report's notes say where a stage left it nothing to learn from."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from stages.config import Protocol
from stages.dataset import load_dataset
from stages.evaluate import test_queries as asked
from stages.fit import Fit
from stages.jobs import Checkpoint, Job
from stages.method_config import BUILT_IN, GemsConfig
from stages.methods.contract import Losses
from stages.omissions import omission_notes
from stages.stage_examples import stage_examples
from stages.train import bare_model
from stages.workspace import Workspace, write_json
from tests import searching, tiny

BOTH, WARMING = ["search", "recommendation"], [{"step": step, "ce": 1.0} for step in range(1, 8)]


def waiting(tmp_path: Path, *states: dict[str, Any], opening: str = "The learning gate") -> list[str]:
    """The notes with this opening that a workspace with these `state.json` files gives."""
    space, trained = Workspace(tmp_path), []
    for place, state in enumerate(states):
        write_json(space.checkpoints / f"key{place}" / "state.json", state)
        trained.append(Checkpoint(Job(**state["job"]), f"key{place}", "d", 1.0, 1, 1, None, 1, reused=False))
    notes = omission_notes(tiny.config(), space, {}, trained)
    return [note for note in notes if note.startswith(opening)]


def state_of(
    method: str, settings: dict[str, Any], objectives: list[str], rows: list[dict[str, Any]]
) -> dict[str, Any]:
    own = {"gems": {"objectives": objectives, "protected": {}}, "training": rows}
    return {"job": asdict(Job(method, 0, "same_stage", 1)), "inputs": {"method": settings}, **own}


@pytest.mark.parametrize(
    ("gate", "objectives", "lessons", "said"),
    [
        ("hypergradient", BOTH, 0, True),
        ("lookahead", BOTH, 0, True),
        ("hypergradient", BOTH, 1, False),
        ("hypergradient", ["search"], 0, False),
        ("constant", BOTH, 0, False),
    ],
)
def test_a_gate_that_never_left_its_warm_up_is_told_of(
    gate: str, objectives: list[str], lessons: int, said: bool, tmp_path: Path
) -> None:
    rows = WARMING + [{"step": 7, "hypergradient/search": 0.1}] * lessons
    found = waiting(tmp_path, state_of("gems", {"method": "gems", "gate": gate}, objectives, rows))
    assert [("gate of gems never left its warm-up" in note, "gate_warmup" in note) for note in found] == [
        (True, True)
    ] * said


@pytest.mark.parametrize("method", ["gems", "galore", "gems_one_subspace"])
def test_a_method_of_one_subspace_has_no_gate_that_could_wait(method: str, tmp_path: Path) -> None:
    own = BUILT_IN[method]
    assert isinstance(own, GemsConfig)
    found = waiting(tmp_path, state_of(method, own.model_dump(mode="json"), BOTH, WARMING))
    assert len(found) == (own.subspaces == "three")


def test_the_steps_of_a_thinned_log_are_counted_and_not_its_rows(tmp_path: Path) -> None:
    settings = {"method": "gems", "gate": "hypergradient", "subspaces": "three"}
    thinned = [{"step": step, "ce": 1.0} for step in range(1, 4001, 20)]
    states = (state_of("gems", settings, BOTH, thinned), state_of("gems", settings, BOTH, WARMING))
    (note,) = waiting(tmp_path, *states)
    assert "in a stage of at most 3,981 steps" in note
    whole = {**states[0], "every_step": {"alpha/search": [0.5] * 3999}}
    (note,) = waiting(tmp_path, whole)
    assert "in a stage of at most 3,999 steps" in note


def test_a_lesson_between_two_rows_of_a_thinned_log_counts(tmp_path: Path) -> None:
    settings = {"method": "gems", "gate": "hypergradient", "subspaces": "three"}
    state = state_of("gems", settings, BOTH, [{"step": 1, "ce": 1.0}, {"step": 21, "ce": 1.0}])
    assert len(waiting(tmp_path, state)) == 1
    taught = {**state, "every_step": {"hypergradient/search": [None] * 24 + [0.1]}}
    assert waiting(tmp_path, taught) == []


def test_a_gates_numbers_are_kept_of_every_step_and_others_of_every_nth(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=1)
    config = tiny.config(training={"batch_size": 1, "patience": 30})
    dataset, job = load_dataset(config, workspace), Job("first", 0, "same_stage", 0)
    calls = count(1)

    def step(losses: Iterable[Losses]) -> dict[str, float]:
        number = next(calls)
        lesson = {"hypergradient/search": number / 3} if number > 2 else {}
        return {"ce": 1.0, "rate": 0.1, "alpha/search": number / 7, "alpha_entropy": 0.5, **lesson}

    fit = Fit(config, bare_model(config, dataset, 0), step, stage_examples(config, dataset, job, False, None), seed=0)
    found = fit.run(20, job, lambda _: None)
    steps = 20 * fit.examples.windows
    assert steps >= 400
    assert [row["step"] for row in found["training"]] == list(range(1, steps + 1, steps // 200))
    columns = found["every_step"]
    assert columns.keys() == {"alpha/search", "alpha_entropy", "hypergradient/search"}
    assert columns["alpha/search"] == pytest.approx([n / 7 for n in range(1, steps + 1)], rel=1e-5)
    assert columns["hypergradient/search"][:2] == [None, None]
    assert columns["hypergradient/search"][2:] == pytest.approx([n / 3 for n in range(3, steps + 1)], rel=1e-5)
    per_step = len(json.dumps({"every_step": columns}, indent=2)) / steps
    assert per_step < 100
    plain = Fit(config, fit.model, lambda _: {"ce": 1.0}, fit.examples, seed=0)
    assert "every_step" not in plain.run(1, job, lambda _: None)


def test_a_stage_that_could_protect_nothing_is_told_of(tmp_path: Path) -> None:
    held, free = (BUILT_IN[name].model_dump(mode="json") for name in ("gems", "gems_no_null_space"))
    states = [state_of("gems", held, BOTH, WARMING), state_of("gems_no_null_space", free, BOTH, WARMING)]
    (note,) = waiting(tmp_path, *states, opening="Null space")
    assert note.startswith("Null space: gems protected nothing at stage 1: the stages before hold fewer tokens than")


def test_a_protected_text_is_called_by_its_files_name(tmp_path: Path) -> None:
    digest = "5a2ee076" * 8
    state = state_of("gems", BUILT_IN["gems"].model_dump(mode="json") | {"corpus": digest}, BOTH, WARMING)
    state["gems"] |= {"corpus": "glosses.txt", "protected": {"q": {"k_over_n": 0.5, "k": 8}}}
    (note,) = waiting(tmp_path, state, opening="Null space")
    assert "the inputs of the text glosses.txt give" in note
    assert digest not in note


def test_targets_that_users_had_before_are_counted_and_a_test_without_any_other_is_told_of(tmp_path: Path) -> None:
    """One walk over three items, made again in the next stage."""
    walk: list[searching.Row] = [("a", f"i0{place}", 10 * place, None) for place in range(3)]
    walk.append(("a", "i02", 20, "find thing2"))
    space = searching.log(tmp_path, [walk, walk])
    tested: dict[Protocol, set[int]] = {"same_stage": {0, 1}, "next_stage": {1}}
    leaving, asking = (tiny.config(search={"repeats": repeats}) for repeats in ("leave_out", "ask"))
    some, *none = (note for note in omission_notes(leaving, space, tested, []) if "their users had before" in note)
    assert some == (
        "Left out of the tests as items their users had before: 1 of 2 targets (same-stage, recommendation), "
        "1 of 2 targets (same-stage, search)."
    )
    assert none == [
        f"Nothing is left to test of next-stage {objective}: all {count} targets are items their users had before; set "
        'search.repeats = "ask".'
        for objective, count in (("recommendation", 3), ("search", 1))
    ]
    dataset, job = load_dataset(leaving, space), Job("single", 0, "next_stage", 0)
    counts = [[len(asked(own, dataset, job, 1, None, name)) for name in BOTH] for own in (leaving, asking)]
    assert counts == [[0, 0], [1, 3]]
    assert not any("had before" in note for note in omission_notes(asking, space, tested, []))
    alone = tiny.config(search={"objectives": ["recommendation"]})
    assert not any("had before" in note for note in omission_notes(alone, space, tested, []))
