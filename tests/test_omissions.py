"""What a report's notes say of GEMS's learning gate, where a stage left it nothing to learn from."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from stages.jobs import Checkpoint, Job
from stages.method_config import BUILT_IN, GemsConfig
from stages.omissions import omission_notes
from stages.workspace import Workspace, write_json
from tests import tiny

BOTH, WARMING = ["search", "recommendation"], [{"step": step, "ce": 1.0} for step in range(1, 8)]


def waiting(tmp_path: Path, *states: dict[str, Any]) -> list[str]:
    """The notes on the gate that a workspace with these `state.json` files gives."""
    space, trained = Workspace(tmp_path), []
    for place, state in enumerate(states):
        write_json(space.checkpoints / f"key{place}" / "state.json", state)
        trained.append(Checkpoint(Job(**state["job"]), f"key{place}", "d", 1.0, 1, 1, None, 1, reused=False))
    notes = omission_notes(tiny.config(), space, [], trained)
    return [note for note in notes if note.startswith("The learning gate")]


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
