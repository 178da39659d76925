"""Helper processes: they share a run's work, change none of its numbers, and never outlive it."""

from __future__ import annotations

import os
import signal
import subprocess
import time
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from flows import machine, steps, workers
from flows.continual import follow_all
from flows.experiment import open_workspace
from flows.plan import Lineage, Plan
from stages.config import BackboneConfig
from tests import tiny


def tiny_plan(root: Path, count: int = 1, seeds: tuple[int, ...] = (0,)) -> Plan:
    workspace = tiny.checkerboard(root)
    config = tiny.config(training={"first_epochs": 2, "epochs": 1}, backbone={"hidden": 16, "layers": 1, "heads": 2})
    config, workspace = open_workspace(config, workspace.root)
    return Plan(config, workspace, ("frozen", "single"), seeds, count=3, workers=count)


@given(st.integers(1, 12), st.integers(2, 8))
def test_every_helper_takes_every_lineage_once_and_the_last_goes_backwards(lineages: int, count: int) -> None:
    plan = [Lineage("single", seed, "same_stage") for seed in range(lineages)]
    for number in range(1, count):
        assert sorted(workers.share(plan, number, count), key=lambda one: one.seed) == plan
    assert workers.share(plan, count - 1, count) == plan[::-1]


def test_a_process_a_core_for_a_small_model_and_one_for_any_larger(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(machine, "cores", lambda: 4)
    monkeypatch.setattr(machine, "memory", lambda: 64 * 2**30)
    small = tiny.config(backbone={"device": "cpu"})
    assert workers.fitting(small, 10) == 4
    assert workers.fitting(small, 3) == 3
    monkeypatch.setattr(machine, "memory", lambda: 5 * 2**30)
    assert workers.fitting(small, 10) == 2
    large = small.model_copy(update={"backbone": BackboneConfig(path="somewhere")})
    assert workers.fitting(large, 10) == 1


def test_two_processes_give_the_numbers_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    alone, together = tiny_plan(tmp_path / "one"), tiny_plan(tmp_path / "two", count=2)
    _, expected = follow_all(alone, steps)
    _, found = follow_all(together, steps)
    assert {(test.path, test.digest) for test in found} == {(test.path, test.digest) for test in expected}
    assert not (together.workspace.root / "runs" / "helper-1.log").read_text().count("Traceback")


def test_a_helper_does_all_the_work_when_left_alone_and_ends_with_the_run(tmp_path: Path) -> None:
    plan = tiny_plan(tmp_path, count=2)
    helper = workers._started(plan, 1, threads=1)
    assert helper.wait(timeout=120) == 0
    workers._ended(helper)
    made = {path.name for path in plan.workspace.evaluations.glob("*.parquet")}
    _, tests = follow_all(replace(plan, workers=1), steps)
    assert {Path(test.path).name for test in tests} == made


def test_a_helper_whose_run_is_gone_ends_at_once(tmp_path: Path) -> None:
    helper = workers._started(tiny_plan(tmp_path, count=2, seeds=tuple(range(40))), 1, threads=1)
    time.sleep(1)
    assert helper.stdin is not None
    helper.stdin.close()  # as the kernel does when the run is killed
    assert helper.wait(timeout=60) == 1


def test_a_killed_helper_costs_nothing_but_its_help(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    plan = tiny_plan(tmp_path, count=2)
    started: list[subprocess.Popen[str]] = []
    begin = workers._started

    def begin_and_kill(*arguments: object) -> subprocess.Popen[str]:
        started.append(begin(*arguments))  # type: ignore[arg-type]
        os.kill(started[0].pid, signal.SIGKILL)
        return started[0]

    with pytest.MonkeyPatch.context() as patch, caplog.at_level("WARNING"):
        patch.setattr(workers, "_started", begin_and_kill)
        _, tests = follow_all(plan, steps)
    assert tests
    assert "ended early" in caplog.text
