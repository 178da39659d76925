"""A checkpoint is whole or absent, and every file of it is checked before it is believed."""

from __future__ import annotations

import json
import os
import shutil
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stages import workspace as places
from stages.checkpoint import ROWS, Tensors, fault_of, quarantine, read_tensors, write_checkpoint
from stages.config import AdapterConfig
from stages.errors import UserError
from stages.workspace import Workspace, replacing, write_json


def written(folder: Path, value: float = 1.0) -> Path:
    rows = {"input_rows": torch.full((3, 2), value), "output_rows": torch.arange(6.0).reshape(3, 2)}
    write_checkpoint(folder, Tensors(rows=rows), AdapterConfig(), {"note": "x"})
    return folder


def test_a_checkpoint_reads_back_bit_for_bit(tmp_path: Path) -> None:
    tensors = read_tensors(written(tmp_path / "c", 0.1))
    assert torch.equal(tensors.rows["input_rows"], torch.full((3, 2), 0.1))
    assert tensors.adapter == {}
    assert fault_of(tmp_path / "c") is None


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_any_flipped_bit_in_any_file_is_noticed(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    folder = written(tmp_path_factory.mktemp("flip") / "c")
    file = data.draw(st.sampled_from(sorted(folder.iterdir())))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) * 8 - 1))
    content[place // 8] ^= 1 << (place % 8)
    file.write_bytes(content)
    if file.name == "manifest.json" and json_equal(folder, content):
        return  # white space
    assert fault_of(folder) is not None or file.name == "manifest.json"


def json_equal(folder: Path, content: bytearray) -> bool:
    try:
        json.loads(content)
    except ValueError:
        return False
    return True


def test_missing_added_and_truncated_files_are_named(tmp_path: Path) -> None:
    cases = {
        "missing": lambda folder: (folder / "state.json").unlink(),
        "added": lambda folder: (folder / "extra.bin").write_bytes(b"x"),
        "truncated": lambda folder: os.truncate(folder / ROWS, 10),
        "manifest": lambda folder: (folder / "manifest.json").unlink(),
    }
    said = {}
    for name, damage in cases.items():
        folder = written(tmp_path / name)
        damage(folder)
        said[name] = fault_of(folder)
    assert said == {
        "missing": "files missing or added: state.json",
        "added": "files missing or added: extra.bin",
        "truncated": f"altered: {ROWS}",
        "manifest": "no manifest",
    }


def test_the_first_committer_wins_and_leaves_no_temporary_folder(tmp_path: Path) -> None:
    folder = written(tmp_path / "c", 1.0)
    before = (folder / ROWS).read_bytes()
    written(folder, 2.0)
    assert (folder / ROWS).read_bytes() == before
    assert [path.name for path in tmp_path.iterdir()] == ["c"]


def test_a_value_that_is_not_finite_is_refused_on_load(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="input_rows holds NaN"):
        read_tensors(written(tmp_path / "c", float("nan")))


def test_a_bad_checkpoint_is_moved_aside_with_its_reason(tmp_path: Path) -> None:
    folder = written(tmp_path / "runs" / "checkpoints" / "c")
    target = quarantine(folder, "altered: x")
    assert not folder.exists()
    assert (target / ROWS).exists()
    assert (target.parent / "c.0.reason.txt").read_text() == "altered: x\n"


def test_a_full_disk_is_said_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(places.shutil, "disk_usage", lambda _: usage(100, 99, 1))
    with pytest.raises(UserError, match="free some space"):
        written(tmp_path / "c")
    assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "value.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"a": float("nan")})
    with pytest.raises(FileNotFoundError), replacing(path) as temporary:
        (temporary / "not a folder").touch()
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["value.json"]


def test_a_workspace_belongs_to_one_experiment_and_one_schema(tmp_path: Path) -> None:
    Workspace(tmp_path / "w").claim("one")
    Workspace(tmp_path / "w").claim("one")
    with pytest.raises(UserError, match="workspace of experiment 'one', not 'two'"):
        Workspace(tmp_path / "w").claim("two")
    write_json(tmp_path / "w" / "workspace.json", {"schema": 99, "name": "one"})
    with pytest.raises(UserError, match="workspace schema 99, this version reads 1"):
        Workspace(tmp_path / "w").claim("one")


def test_a_moved_workspace_still_verifies(tmp_path: Path) -> None:
    folder = written(tmp_path / "a" / "c")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert fault_of(tmp_path / "b" / folder.name) is None
