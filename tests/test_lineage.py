"""What a checkpoint's key holds, and what happens when its parents are no longer what it was trained from."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from stages import checkpoint, lineage
from stages import workspace as places
from stages.checkpoint import ROWS, _write_manifest, fault_of, tensors_digest
from stages.commit import FIRST_ONLY, LATER_ONLY, checkpoint_folders, commit_keys, links
from stages.config import Config, TrainingConfig
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import evaluate_stage
from stages.jobs import Job
from stages.train import lineage_folders, train_stage
from stages.workspace import Workspace, read_json, sha256_file, write_json
from tests import tiny

QUICK: dict[str, Any] = {"first_epochs": 1, "epochs": 1}
LAST = Job("single", 0, "same_stage", 2)
OTHER = {
    "batch_size": 8,
    "micro_batch_size": 4,
    "history_length": 7,
    "layout": "per_prefix",
    "targets_per_window": 3,
    "first_epochs": 2,
    "epochs": 2,
    "first_learning_rate": 1e-4,
    "learning_rate": 1e-4,
    "full_learning_rate": 1e-4,
    "warmup": 0.5,
    "weight_decay": 0.3,
    "clip_norm": 0.01,
    "temperature": 0.5,
    "label_smoothing": 0.3,
    "patience": 1,
    "token_rows": "freeze",
}
"""A value of every training setting that differs from the tiny experiment's."""


def quick(**training: Any) -> Config:
    return tiny.config(training={**tiny.config().training.model_dump(), **QUICK, **training})


def folders(config: Config, workspace: Workspace) -> list[Path]:
    return checkpoint_folders(config, workspace, load_dataset(config, workspace), LAST)


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    workspace = tiny.checkerboard(tmp_path_factory.mktemp("lineage"))
    train_stage(quick(), workspace, LAST)
    return workspace


@pytest.fixture
def copy(board: Workspace, tmp_path: Path) -> Workspace:
    shutil.copytree(board.root, tmp_path / "w")
    return Workspace(tmp_path / "w")


def keys(workspace: Workspace, method: str, **training: Any) -> list[str]:
    config = quick(**training)
    return commit_keys(config, load_dataset(config, workspace), Job(method, 0, "same_stage", 1))


@pytest.mark.parametrize("setting", sorted(TrainingConfig.model_fields))
def test_a_stage_s_key_changes_with_exactly_the_settings_it_reads(setting: str, board: Workspace) -> None:
    changed = {setting: OTHER[setting]}
    first, later = (
        [before != after for before, after in zip(keys(board, method), keys(board, method, **changed), strict=True)]
        for method in ("single", "full_finetune")
    )
    assert first[0] == later[0] == (setting not in LATER_ONLY)
    assert first[1] == (setting != "full_learning_rate")
    assert later[1] == (setting != "learning_rate")


def test_what_stage_0_does_not_read_leaves_its_bytes_alone(board: Workspace, tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path)
    config = quick(**{name: OTHER[name] for name in LATER_ONLY})
    train_stage(config, workspace, Job("frozen", 0, "same_stage", 0))
    assert tensors_digest(folders(config, workspace)[0]) == tensors_digest(folders(quick(), board)[0])
    assert FIRST_ONLY.isdisjoint(LATER_ONLY)


def test_the_place_of_a_local_backbone_is_not_part_of_the_key_but_its_settings_are(
    board: Workspace, tmp_path: Path
) -> None:
    found = []
    for name, content in (("here", "{}"), ("there", "{}"), ("changed", '{"rope_theta": 1}')):
        (tmp_path / name).mkdir()
        (tmp_path / name / "model.safetensors").write_bytes(b"weights")
        (tmp_path / name / "config.json").write_text(content)
        config = tiny.config(backbone={"path": str(tmp_path / name)})
        found.append(commit_keys(config, load_dataset(config, board), LAST))
    assert found[0] == found[1]
    assert found[0] != found[2]


def test_only_where_thin_products_may_apply_does_a_key_say_so(board: Workspace, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    for method, backbone, expected in (
        ("single", {}, [False, False]),
        ("single", {"hidden": 512}, [False, True]),
        ("single", {"feed_forward": 2**18 // tiny.config().backbone.hidden}, [False, True]),
        ("single", {"path": str(tmp_path)}, [True, True]),
    ):
        config = tiny.config(backbone=backbone)
        job = Job(method, 0, "same_stage", 1)
        inputs = [link.inputs for link in links(config, load_dataset(config, board), job)]
        assert ["adapter_backward" in each for each in inputs] == expected, backbone


def replace_with_other_tensors(place: Path) -> None:
    """Valid files at `place`, made with the same settings, whose tensors are not the same (another processor's)."""
    tensors = load_file(place / ROWS)
    save_file({name: value + 1e-3 for name, value in tensors.items()}, place / ROWS)
    (place / "manifest.json").unlink()
    _write_manifest(place)


def test_a_checkpoint_made_with_other_settings_is_named_by_the_field_and_trained_again(copy: Workspace) -> None:
    first, second, _ = folders(quick(), copy)
    before = tensors_digest(second)
    for name, settings in (("training", quick(learning_rate=1e-4)), ("adapter, parent", quick_adapter(2))):
        other = Workspace(copy.root.with_name(name[:7]))
        shutil.copytree(copy.root, other.root)
        train_stage(settings, other, LAST)
        shutil.rmtree(second)
        shutil.copytree(folders(settings, other)[1], second)
        with pytest.raises(UserError, match=f"{second.name}: it was made with another {name}"):
            lineage_folders(quick(), copy, load_dataset(quick(), copy), LAST)
        train_stage(quick(), copy, LAST)
        assert tensors_digest(second) == before
    assert fault_of(first) is None


def quick_adapter(rank: int) -> Config:
    return quick().model_copy(update={"adapter": quick().adapter.model_copy(update={"rank": rank})})


def test_a_child_of_a_replaced_parent_is_stale_and_trained_again(copy: Workspace) -> None:
    first, second, third = folders(quick(), copy)
    before = {path.name: tensors_digest(path) for path in (second, third)}
    replace_with_other_tensors(first)
    assert fault_of(first) is None
    with pytest.raises(UserError, match=f"{second.name}.*its parent .*first.* holds other tensors"):
        lineage_folders(quick(), copy, load_dataset(quick(), copy), LAST)
    train_stage(quick(), copy, LAST)
    assert {path.name for path in (copy.root / "runs" / "quarantine").iterdir() if path.is_dir()} == {
        f"{second.name}.0",
        f"{third.name}.0",
    }
    assert all(tensors_digest(path) != before[path.name] for path in (second, third))
    assert read_json(third / "state.json")["parents"] == {path.name: tensors_digest(path) for path in (first, second)}


def test_a_parent_trained_again_to_the_same_tensors_leaves_its_children_alone(copy: Workspace) -> None:
    first, *later = folders(quick(), copy)
    manifest = (first / "manifest.json").read_bytes()
    (first / "backbone.safetensors").write_bytes(b"rot")
    times = [(path / "manifest.json").stat().st_mtime_ns for path in later]
    done = train_stage(quick(), copy, LAST)
    assert done.reused
    assert (first / "manifest.json").read_bytes() != manifest  # its seconds differ
    assert [(path / "manifest.json").stat().st_mtime_ns for path in later] == times


def test_nothing_is_committed_from_a_parent_that_changed_meanwhile(copy: Workspace) -> None:
    first, _, third = folders(quick(), copy)
    shutil.rmtree(third)

    def swap(_: object) -> None:
        """What a second writer does while the third stage is being trained."""
        replace_with_other_tensors(first)

    with pytest.raises(UserError, match=f"{first.name}: changed while a stage was being trained"):
        train_stage(quick(), copy, LAST, progress=swap)
    assert not third.exists()
    assert list(copy.checkpoints.glob(".tmp-*")) == []
    assert fault_of(first) is None


def test_a_measurement_of_other_tensors_or_of_a_damaged_file_is_made_again(copy: Workspace) -> None:
    config = quick()
    done = evaluate_stage(config, copy, LAST, tested=2)
    path, side = copy.root / done.path, (copy.root / done.path).with_suffix(".json")
    assert evaluate_stage(config, copy, LAST, tested=2) == done
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    again = evaluate_stage(config, copy, LAST, tested=2)
    assert again.digest == done.digest
    side.write_text(side.read_text().replace('"queries": ', '"queries": 1'))
    assert evaluate_stage(config, copy, LAST, tested=2).queries == done.queries
    assert len(list((copy.root / "runs" / "quarantine").glob("*.reason.txt"))) == 2
    before = read_json(side)
    write_json(side, {**before, "model": "another"}, seal=True)
    assert evaluate_stage(config, copy, LAST, tested=2).digest == done.digest
    assert read_json(side)["model"] == before["model"]


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files hashed from now on; what this process knows is forgotten, and file times count at once."""
    names: list[str] = []

    def noted(path: Path) -> str:
        names.append(path.name)
        return sha256_file(path)

    for module in (checkpoint, places):
        monkeypatch.setattr(module, "sha256_file", noted)
    monkeypatch.setattr(places, "SETTLED", -(10**18))
    for known in (lineage._good, lineage._whole, lineage._listed, places._hashed, places._read, checkpoint._tensors):
        known.clear()
    return names


def test_what_this_process_found_good_is_not_hashed_again_until_a_file_changes(
    copy: Workspace, hashed: list[str]
) -> None:
    def look() -> None:
        lineage_folders(quick(), copy, load_dataset(quick(), copy), LAST)

    look()
    assert {"adapter_model.safetensors", "backbone.safetensors", "state.json", "items.parquet"} <= set(hashed)
    hashed.clear()
    look()
    assert hashed == []
    damaged = folders(quick(), copy)[1] / "adapter_model.safetensors"
    before, content = damaged.stat(), bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool that restores times would leave it
    with pytest.raises(UserError, match=r"altered: adapter_model\.safetensors"):
        look()
    with pytest.raises(UserError, match="altered"):
        look()


@pytest.mark.parametrize("settled", [-(10**18), 10**8])
def test_what_is_done_to_a_folder_between_two_looks_of_one_process_is_noticed(
    copy: Workspace, hashed: list[str], monkeypatch: pytest.MonkeyPatch, settled: int
) -> None:
    monkeypatch.setattr(places, "SETTLED", settled)
    folder = folders(quick(), copy)[1]

    def fault() -> str | None:
        time.sleep(0.02)  # the file system's clock moves in steps
        return lineage.fault_in_files(folder)

    assert fault() is None
    (folder / "more.txt").write_text("more")
    assert fault() == "files missing or added: more.txt"
    (folder / "more.txt").unlink()
    assert fault() is None
    os.rename(folder / "state.json", copy.root / "state.json")
    assert fault() == "files missing or added: state.json"
    shutil.copy(copy.root / "state.json", folder)
    assert fault() is None
    shutil.copytree(folder, copy.root / "other")
    with (copy.root / "other" / "state.json").open("r+b") as handle:
        handle.write(b"[")
    os.replace(copy.root / "other" / "state.json", folder / "state.json")
    assert fault() == "altered: state.json"
    shutil.rmtree(folder)
    assert fault() == "no manifest"


def test_a_file_written_a_moment_ago_is_hashed_again_since_its_times_could_hide_a_write(
    copy: Workspace, hashed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(places, "SETTLED", 10**18)
    for _ in range(2):
        hashed.clear()
        lineage_folders(quick(), copy, load_dataset(quick(), copy), LAST)
        assert "adapter_model.safetensors" in hashed
        assert "items.parquet" in hashed


def test_a_good_checkpoint_is_looked_at_anew_where_its_parents_tensors_changed(
    copy: Workspace, hashed: list[str]
) -> None:
    lineage_folders(quick(), copy, load_dataset(quick(), copy), LAST)
    first, second, _ = folders(quick(), copy)
    replace_with_other_tensors(first)
    with pytest.raises(UserError, match=f"{second.name}.*holds other tensors"):
        lineage_folders(quick(), copy, load_dataset(quick(), copy), LAST)


def test_a_sealed_file_that_was_altered_is_refused(tmp_path: Path) -> None:
    write_json(tmp_path / "a.json", {"value": (1, 2.5), "name": "é"}, seal=True)
    assert read_json(tmp_path / "a.json") == {"value": [1, 2.5], "name": "é"}
    text = (tmp_path / "a.json").read_text()
    (tmp_path / "a.json").write_text(text.replace("2.5", "2.6"))
    with pytest.raises(UserError, match="altered since it was written"):
        read_json(tmp_path / "a.json")
