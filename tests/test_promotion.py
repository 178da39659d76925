from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from flows.promotion import champion, history
from flows.promotion.gate import verdict
from stages import contest
from stages.config import Config
from stages.contest import Difference, Probe, differences, mean_scores
from stages.errors import UserError
from stages.jobs import Checkpoint, Evaluation, Job
from stages.retrain_config import GateConfig
from stages.train import train_stage
from stages.workspace import Workspace, read_json, sha256_file, write_json
from tests import tiny

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


def settings() -> Config:
    training = {**tiny.config().training.model_dump(), "first_epochs": 1, "epochs": 1}
    return tiny.config(training=training)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    """Three stages of one lineage, trained."""
    workspace = tiny.checkerboard(tmp_path_factory.mktemp("made"))
    train_stage(settings(), workspace, Job("single", 0, "same_stage", 2))
    return workspace


@pytest.fixture
def shop(made: Workspace, tmp_path: Path) -> Workspace:
    """A copy of it, to be changed."""
    shutil.copytree(made.root, tmp_path / "shop")
    return Workspace(tmp_path / "shop")


def committed(workspace: Workspace, stage: int) -> Checkpoint:
    return train_stage(settings(), workspace, Job("single", 0, "same_stage", stage))


def promoted(workspace: Workspace, *stages: int) -> None:
    """The models of these stages go into service after one another."""
    for stage in stages:
        present = champion.settle(workspace)
        rise = "promoted" if present else "first"
        assert champion.promote(workspace, committed(workspace, stage), rise, {"stage": stage}, present)


def back(workspace: Workspace) -> tuple[champion.Champion, champion.Champion]:
    return champion.roll_back(settings(), workspace)


def test_the_champion_moves_by_promotion_and_goes_back_step_by_step(shop: Workspace) -> None:
    assert champion.champion(shop) is None
    promoted(shop, 0, 1, 2)
    assert champion.keep(shop, {"stage": 3}, champion.in_service(shop))
    assert champion.champion(shop) == Job("single", 0, "same_stage", 2)
    for stage in (1, 0):
        assert back(shop)[1].job.stage == stage
        assert champion.champion(shop) == Job("single", 0, "same_stage", stage)
    with pytest.raises(UserError, match="no earlier champion"):
        back(shop)
    decisions = [line["decision"] for line in history.read_history(shop)[0]]
    assert decisions == ["first", "promoted", "promoted", "kept", "rolled_back", "rolled_back"]


def test_a_model_trained_anew_is_laid_on_the_one_it_replaces(shop: Workspace) -> None:
    promoted(shop, 1)
    assert champion.promote(shop, committed(shop, 2), "rebuilt", {"stage": 2}, champion.in_service(shop))
    assert [found.job.stage for found in champion.predecessors(shop)] == [2, 1]
    assert back(shop)[1].job.stage == 1


def test_a_decision_that_another_overtook_is_none(shop: Workspace) -> None:
    promoted(shop, 0, 1)
    before = champion.in_service(shop)
    back(shop)
    lines = history.history_file(shop).read_bytes()
    assert champion.promote(shop, committed(shop, 2), "promoted", {"stage": 2}, before) is None
    assert not champion.keep(shop, {"stage": 2}, before)
    assert history.history_file(shop).read_bytes() == lines
    assert champion.champion(shop) == Job("single", 0, "same_stage", 0)


def test_champion_json_holds_what_a_service_reads(shop: Workspace) -> None:
    promoted(shop, 0)
    made, found = committed(shop, 0), json.loads((shop.root / "champion.json").read_text())
    assert found.pop("since").startswith("20")
    assert len(found.pop("tensors")) == 64
    job = {"method": "single", "seed": 0, "protocol": "same_stage", "stage": 0}
    assert found == {"schema": 1, "job": job, "key": made.key, "digest": made.digest}


def test_a_kill_between_history_and_champion_is_settled(shop: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    promoted(shop, 0)

    def die(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(champion, "write_json", die)
    with pytest.raises(KeyboardInterrupt):
        promoted(shop, 1)
    monkeypatch.undo()
    assert champion.champion(shop) == Job("single", 0, "same_stage", 0)
    settled = champion.settle(shop)
    assert settled is not None
    assert settled.job.stage == 1
    assert champion.in_service(shop) == settled


def test_no_one_goes_back_to_a_lineage_that_is_damaged_anywhere(shop: Workspace) -> None:
    promoted(shop, 1, 2)
    before = (shop.root / "champion.json").read_bytes()
    first = next(shop.checkpoints.glob("*-first-*"))
    (first / "added.txt").touch()
    with pytest.raises(UserError, match=r"-first-.*files missing or added: added\.txt.*the champion stays"):
        back(shop)
    (first / "added.txt").unlink()
    tensors = shop.checkpoints / champion.predecessors(shop)[1].key / "adapter_model.safetensors"
    tensors.write_bytes(tensors.read_bytes()[:-1] + b"?")
    with pytest.raises(UserError, match=r"stage01.*altered: adapter_model"):
        back(shop)
    assert (shop.root / "champion.json").read_bytes() == before


def test_a_checkpoint_trained_again_to_the_same_tensors_can_be_gone_back_to(shop: Workspace) -> None:
    promoted(shop, 1, 2)
    folder = shop.checkpoints / champion.predecessors(shop)[1].key
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "adapter_model.safetensors").unlink()
    assert not committed(shop, 1).reused
    assert (folder / "manifest.json").read_bytes() != manifest, "the seconds of two trainings agree"
    assert back(shop)[1].job.stage == 1


def test_other_tensors_under_the_same_name_are_not_gone_back_to(shop: Workspace) -> None:
    promoted(shop, 1, 2)
    folder = shop.checkpoints / champion.predecessors(shop)[1].key
    path, manifest = folder / "adapter_model.safetensors", read_json(folder / "manifest.json")
    path.write_bytes(path.read_bytes()[:-4] + b"\0\0\0\0")
    row = next(row for row in manifest["files"] if row["name"] == path.name)
    row["sha256"] = sha256_file(path)
    write_json(folder / "manifest.json", manifest)
    with pytest.raises(UserError, match="its tensors are not those that went into service"):
        back(shop)


def test_what_an_earlier_version_decided_is_told_by_the_manifest_alone(shop: Workspace) -> None:
    promoted(shop, 1, 2)
    path = history.history_file(shop)
    old = [json.loads(line) for line in path.read_text().splitlines()]
    for line in old:
        line.pop("digest", None)
        del line["champion"]["tensors"]
    (shop.root / history.END).unlink()
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    folder = shop.checkpoints / old[0]["champion"]["key"]
    manifest = (folder / "manifest.json").read_bytes()
    (folder / "manifest.json").write_bytes(manifest + b"\n")
    with pytest.raises(UserError, match="did not note to which tensors"):
        back(shop)
    (folder / "manifest.json").write_bytes(manifest)
    assert back(shop)[1].job.stage == 1


def test_a_roll_back_whose_line_rotted_is_not_undone(shop: Workspace) -> None:
    promoted(shop, 0, 1)
    back(shop)
    path, file = history.history_file(shop), champion.champion_file(shop)
    text, served = path.read_bytes(), file.read_bytes()
    last = text.splitlines(keepends=True)[-1]
    for lost in (len(last), len(last) // 2, 2):
        path.write_bytes(text[:-lost])
        for work in (champion.settle, back, lambda place: champion.keep(place, {"stage": 2}, None)):
            with pytest.raises(UserError, match=r"history\.jsonl: decision 3, .* is altered or gone; .*; or remove"):
                work(shop)
        assert (path.read_bytes(), file.read_bytes()) == (text[:-lost], served)
    for rotten in (b"", *(bytes([ord("\n") ^ 1 << bit]) for bit in range(8))):
        path.write_bytes(text[:-1] + rotten)
        assert champion.settle(shop) == champion.in_service(shop)
        assert champion.keep(shop, {"stage": 2}, champion.in_service(shop))
        decisions = [line["decision"] for line in history.read_history(shop)[0]]
        assert decisions == ["first", "promoted", "rolled_back", "kept"]
        assert file.read_bytes() == served
        path.write_bytes(text)
        (shop.root / history.END).unlink()
        champion.settle(shop)


def test_a_decision_cut_short_anywhere_before_it_was_in_force_never_was_or_is_whole(shop: Workspace) -> None:
    promoted(shop, 0)
    path = history.history_file(shop)
    before = {name: (shop.root / name).read_bytes() for name in (history.END, champion.FILE)}
    first = path.read_bytes()
    promoted(shop, 1)
    text = path.read_bytes()
    for length in [*range(len(first), len(text), 40), len(text) - 1, len(text)]:
        path.write_bytes(text[:length])
        for name, content in before.items():
            (shop.root / name).write_bytes(content)
        stage = int(length >= len(text) - 1)
        settled = champion.settle(shop)
        assert settled is not None
        assert settled.job.stage == stage, length
        assert champion.settle(shop) == champion.in_service(shop) == settled
        assert champion.keep(shop, {"stage": 2}, settled)
        assert len(history.read_history(shop)[0]) == stage + 2


def test_a_kill_before_the_end_of_the_history_is_named_is_settled(
    shop: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    promoted(shop, 0)

    def die(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(history, "write_json", die)
        with pytest.raises(KeyboardInterrupt):
            promoted(shop, 1)
    assert champion.champion(shop) == Job("single", 0, "same_stage", 0)
    settled = champion.settle(shop)
    assert settled is not None
    assert settled.job.stage == 1
    assert read_json(shop.root / history.END)["lines"] == 2


def test_a_history_whose_end_nobody_named_is_read_and_named_by_the_next_run(
    shop: Workspace, caplog: pytest.LogCaptureFixture
) -> None:
    promoted(shop, 0, 1)
    end = shop.root / history.END
    whole = end.read_bytes()
    for content in (None, b"", whole[:-20], whole.replace(b": 2", b": 3")):
        end.unlink() if content is None else end.write_bytes(content)
        caplog.clear()
        assert champion.settle(shop) == champion.in_service(shop)
        assert ("history_end.json: unreadable" in caplog.text) == (content is not None)
        assert end.read_bytes() == whole


def test_a_history_that_was_moved_away_leaves_the_champion_and_begins_anew(shop: Workspace) -> None:
    promoted(shop, 0, 1)
    history.history_file(shop).rename(shop.root / "old.jsonl")
    present = champion.settle(shop)
    assert present is not None
    assert present.job.stage == 1
    assert champion.keep(shop, {"stage": 2}, present)
    assert [line["decision"] for line in history.read_history(shop)[0]] == ["kept"]


def test_a_champion_of_another_version_is_named(workspace: Workspace) -> None:
    write_json(champion.champion_file(workspace), {"schema": 2, "model": "x"})
    with pytest.raises(UserError, match="not a champion of this version"):
        champion.champion(workspace)
