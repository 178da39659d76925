from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flows.promotion import champion, history
from flows.promotion.gate import verdict
from stages import contest
from stages.contest import Difference, Probe, differences, mean_scores
from stages.errors import UserError
from stages.jobs import Checkpoint, Evaluation, Job
from stages.retrain_config import GateConfig
from stages.workspace import Workspace, sha256_file, write_json

GOOD = Probe(users=50, p50_ms=10.0, p95_ms=20.0, invalid_rate=0.0)


def gain(value: float, low: float, high: float, users: int = 100) -> Difference:
    return Difference(value, low, high, users, 0.5 + value, 0.5)


def passed(found: dict[str, Difference] | None, probe: Probe = GOOD, **rules: Any) -> bool:
    return verdict(found, probe, GateConfig(**rules)).passed


def test_a_challenger_passes_only_if_the_whole_interval_reaches_the_minimum() -> None:
    assert passed({"all": gain(0.02, 0.0, 0.04)})
    assert not passed({"all": gain(0.02, -0.001, 0.04)})
    assert passed({"all": gain(0.02, -0.001, 0.04)}, minimum=-0.01)
    assert not passed({"all": gain(0.02, 0.0, 0.04)}, minimum=0.01)


def test_by_the_mean_the_interval_does_not_matter() -> None:
    assert passed({"all": gain(0.0, -0.5, 0.5)}, decide_by="mean")
    assert not passed({"all": gain(-0.0001, -0.5, 0.5)}, decide_by="mean")


def test_a_slice_that_loses_more_than_the_bound_stops_it_and_a_small_slice_does_not() -> None:
    whole = {"all": gain(0.05, 0.04, 0.06)}
    assert passed(whole | {"new_user": gain(-0.05, -0.2, 0.1)}, worst_slice=0.05)
    assert not passed(whole | {"new_user": gain(-0.051, -0.2, 0.1)}, worst_slice=0.05)
    assert passed(whole | {"new_user": gain(-0.5, -0.9, 0.1, users=29)})
    assert passed(whole | {"new_user": Difference(None, None, None, 0, None, None)})


def test_one_invalid_item_or_a_slow_answer_stops_it_even_without_a_champion() -> None:
    assert passed(None)
    assert not passed(None, Probe(50, 1.0, 2.0, 1e-6))
    slow = Probe(50, 1.0, 1001.0, 0.0)
    assert not passed(None, slow)
    assert passed(None, slow, latency_ms=None)


def test_too_few_users_or_an_undefined_number_keep_the_champion() -> None:
    assert not passed({"all": gain(0.5, 0.4, 0.6, users=29)})
    assert passed({"all": gain(0.5, 0.4, 0.6, users=29)}, users=29)
    assert not passed({"all": Difference(None, None, None, 0, None, None)})
    assert not passed({"all": gain(0.1, float("nan"), float("nan"))})


def test_the_verdict_names_number_interval_and_bound() -> None:
    why = verdict({"all": gain(0.02, -0.001, 0.04)}, GOOD, GateConfig()).why
    assert why == "the lower end of hit_at_10 +0.0200 [-0.0010, +0.0400] on 100 users is below gate.minimum = 0"
    both = verdict({"all": gain(-0.1, -0.2, 0.0)}, Probe(9, 1.0, 2000.0, 0.5), GateConfig()).why
    assert both.count("; ") == 2
    assert "50.00% of the items" in both


def evaluation(workspace: Workspace, name: str, hits: list[float], users: list[str], **columns: Any) -> Evaluation:
    frame = pl.DataFrame(
        {
            "user": users,
            "cut": range(len(users)),
            "hit_at_10": hits,
            "new_item": columns.get("new_item", [False] * len(users)),
            "new_user": columns.get("new_user", [False] * len(users)),
            "reachable": [True] * len(users),
            "objective": ["recommendation"] * len(users),
        }
    )
    path = workspace.evaluations / f"{name}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    place = str(path.relative_to(workspace.root))
    return Evaluation(Job(name, 0, "same_stage", 2), 2, place, sha256_file(path), 1.0, len(users), False)


def test_the_difference_is_a_mean_over_users_with_a_paired_interval(workspace: Workspace) -> None:
    users = ["a", "a", "b", "c"]
    mine = evaluation(workspace, "mine", [1.0, 0.0, 1.0, 0.0], users)
    theirs = evaluation(workspace, "theirs", [0.0, 0.0, 1.0, 0.0], users, new_user=[False, False, True, False])
    found = differences(workspace, mine, theirs, GateConfig(), 200)
    assert found["all"].value == pytest.approx(0.5 / 3)
    assert (found["all"].challenger, found["all"].champion) == (pytest.approx(0.5), pytest.approx(1 / 3))
    assert (found["all"].low, found["all"].users) == (0.0, 3)
    assert (found["new_user"].value, found["new_user"].users, found["new_item"].users) == (0.0, 1, 0)
    assert differences(workspace, theirs, mine, GateConfig(), 200)["all"].value == pytest.approx(-0.5 / 3)
    assert mean_scores(workspace, mine, "hit_at_10") == {"recommendation": pytest.approx(0.5)}


def test_slices_are_those_of_the_champion(workspace: Workspace) -> None:
    mine = evaluation(workspace, "mine", [1.0, 0.0], ["a", "b"])
    theirs = evaluation(workspace, "theirs", [0.0, 0.0], ["a", "b"], new_item=[True, False])
    found = differences(workspace, mine, theirs, GateConfig(), 100)
    assert (found["new_item"].value, found["new_item"].users) == (1.0, 1)


def test_models_asked_different_questions_are_not_compared(workspace: Workspace) -> None:
    mine = evaluation(workspace, "mine", [1.0, 0.0], ["a", "b"])
    theirs = evaluation(workspace, "theirs", [1.0, 0.0], ["a", "c"])
    with pytest.raises(ValueError, match="different queries"):
        differences(workspace, mine, theirs, GateConfig(), 100)


def test_no_test_user_gives_no_number(workspace: Workspace) -> None:
    empty = [evaluation(workspace, name, [], []) for name in ("mine", "theirs")]
    schema = pl.read_parquet(workspace.root / empty[0].path).schema
    assert "user" in schema
    means = np.empty((0, 2 * len(contest.SLICES)))
    assert contest._summed_up(means, 100)["all"] == Difference(None, None, None, 0, None, None)


def committed(workspace: Workspace, stage: int) -> Checkpoint:
    """A checkpoint folder that verifies."""
    key = f"same_stage-single-seed0-stage{stage:02d}"
    folder = workspace.checkpoints / key
    folder.mkdir(parents=True)
    write_json(folder / "manifest.json", {"schema": 1, "files": []})
    job = Job("single", 0, "same_stage", stage)
    return Checkpoint(job, key, sha256_file(folder / "manifest.json"), 1.0, 1, 1, None, 1, False)


def test_the_champion_moves_by_promotion_and_goes_back_step_by_step(workspace: Workspace) -> None:
    assert champion.champion(workspace) is None
    for stage in range(3):
        champion.promote(workspace, committed(workspace, stage), "promoted" if stage else "first", {"stage": stage})
    champion.keep(workspace, {"stage": 3})
    assert champion.champion(workspace) == Job("single", 0, "same_stage", 2)
    for stage in (1, 0):
        assert champion.roll_back(workspace)[1].job.stage == stage
        assert champion.champion(workspace) == Job("single", 0, "same_stage", stage)
    with pytest.raises(UserError, match="no earlier champion"):
        champion.roll_back(workspace)
    decisions = [line["decision"] for line in history.read_history(workspace)[0]]
    assert decisions == ["first", "promoted", "promoted", "kept", "rolled_back", "rolled_back"]


def test_champion_json_holds_what_a_service_reads(workspace: Workspace) -> None:
    made = committed(workspace, 0)
    champion.promote(workspace, made, "first", {})
    found = json.loads((workspace.root / "champion.json").read_text())
    assert found.pop("since").startswith("20")
    job = {"method": "single", "seed": 0, "protocol": "same_stage", "stage": 0}
    assert found == {"schema": 1, "job": job, "key": made.key, "digest": made.digest}


def test_a_kill_between_history_and_champion_is_settled(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    champion.promote(workspace, committed(workspace, 0), "first", {})

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(champion, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        champion.promote(workspace, committed(workspace, 1), "promoted", {})
    monkeypatch.undo()
    assert champion.champion(workspace) == Job("single", 0, "same_stage", 0)
    settled = champion.settle(workspace)
    assert settled is not None
    assert settled.job.stage == 1
    assert champion.in_service(workspace) == settled


def test_no_one_goes_back_to_a_damaged_checkpoint(workspace: Workspace) -> None:
    for stage in range(2):
        champion.promote(workspace, committed(workspace, stage), "promoted" if stage else "first", {})
    (workspace.checkpoints / "same_stage-single-seed0-stage00" / "added.txt").touch()
    before = (workspace.root / "champion.json").read_bytes()
    with pytest.raises(UserError, match="files missing or added"):
        champion.roll_back(workspace)
    assert (workspace.root / "champion.json").read_bytes() == before


def test_a_torn_last_line_is_passed_over_and_spoils_no_later_one(workspace: Workspace) -> None:
    history.append_line(workspace, {"decision": "kept", "why": "é"})
    path = history.history_file(workspace)
    with path.open("ab") as handle:
        handle.write(b'{"schema": 1, "decision": "prom')
    assert [len(part) if isinstance(part, list) else part for part in history.read_history(workspace)] == [1, 1]
    history.append_line(workspace, {"decision": "kept"})
    lines, torn = history.read_history(workspace)
    assert ([line["decision"] for line in lines], torn) == (["kept", "kept"], 1)


def test_a_history_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert history.read_history(Workspace(tmp_path)) == ([], 0)


def test_a_champion_of_another_version_is_named(workspace: Workspace) -> None:
    write_json(champion.champion_file(workspace), {"schema": 2, "model": "x"})
    with pytest.raises(UserError, match="not a champion of this version"):
        champion.champion(workspace)
