"""A file of settings or decisions that rotted, or has another shape, is named with its remedy or done without."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.serving.served import load_served
from stages.workspace import read_json, write_json
from tests.standing import Shop


@pytest.fixture
def shop(promoted_shop: Shop, tmp_path: Path) -> Shop:
    """A copy of the promoted shop, to be changed."""
    return promoted_shop.copied(tmp_path)


def test_a_history_is_told_only_of_a_workspace_of_this_version(shop: Shop, driftrec: Any) -> None:
    code, _, error = driftrec("history", "-w", shop.folder / "typo")
    assert (code, "typo: no driftrec workspace (config.json is missing)" in error) == (2, True)
    marker = shop.workspace.root / "workspace.json"
    marker.write_text(marker.read_text().replace('"schema": 1', '"schema": 2'))
    code, _, error = driftrec("history", "-w", shop.workspace.root)
    assert (code, "workspace schema 2, this version reads 1" in error) == (2, True)


def test_a_rotten_count_of_recorded_decisions_stops_no_retraining(shop: Shop) -> None:
    path = shop.workspace.root / "runs" / "copies.json"
    for content in ("{", "[]", '{"schema": 1}'):
        path.write_text(content)
        assert shop.nightly() == []


RETRAIN = ("retrain", "-c", "shop.toml", "-w")
WRONG = [
    ("champion.json", "[]", ("recommend", "--user", "u03", "-w"), "not a champion"),
    ("champion.json", '{"job": {"stage": "2"}}', ("rollback", "-w"), ""),
    ("champion.json", '{"job": {"stage": "2"}}', ("history", "-w"), "not a champion"),
    ("config.json", "[]", ("recommend", "--user", "u03", "-w"), "not the settings"),
    ("config.json", '{"config": {"log": {"sources": [{}]}}}', RETRAIN, "not the settings"),
    ("workspace.json", "[1]", ("rollback", "-w"), "not a workspace's name"),
    ("last_command.json", "{}", ("resume", "-w"), "not a command"),
    ("last_command.json", '{"command": "retrain", "arguments": {}}', ("resume", "-w"), "not a command"),
    ("runs/trained.json", "{}", ("recommend", "--user", "u03", "-m", "single", "-w"), "not a list of trained"),
]


@pytest.mark.parametrize(("name", "content", "command", "said"), WRONG)
def test_a_file_of_another_shape_is_named_with_its_remedy(
    shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch, name: str, content: str, command: tuple[str], said: str
) -> None:
    monkeypatch.chdir(shop.folder)
    path = shop.workspace.root / name
    path.write_text(content)
    code, _, error = driftrec(*command, shop.workspace.root)
    if said:
        assert (code, "defect" in error) == (2, False), error
        (told,) = [line for line in error.splitlines() if line.startswith("driftrec: ")]
        assert f"{name}: {said}" in told
        assert ");" in told, "no remedy"
    else:
        assert (code, shop.served.job.stage) == (0, 1), "the history writes champion.json anew"


REFUSED = {
    "methods.odd": {"odd": {"method": "single", "gone": 1}},
    "seeds": [1, 1],
    "training.gone": {"gone": 1},
    "retrain.gate.users": {"gate": {"users": -1}},
}


@pytest.mark.parametrize("key", REFUSED)
def test_a_stored_setting_that_this_version_refuses_keeps_no_model_from_answering(
    shop: Shop, driftrec: Any, caplog: pytest.LogCaptureFixture, key: str
) -> None:
    answered, path, table = shop.listed(), shop.workspace.root / "config.json", key.partition(".")[0]
    found = read_json(path)
    given = REFUSED[key]
    found["config"][table] = {**found["config"][table], **given} if isinstance(given, dict) else given
    write_json(path, found, seal=True)
    assert shop.listed() == answered
    assert load_served(shop.workspace.root).job == shop.served.job
    assert table in caplog.text
    assert f"`driftrec resume -w {shop.workspace.root}`" in caplog.text
    code, said, _ = driftrec("rollback", "-w", shop.workspace.root)
    assert (code, "newest stage of single" in said) == (0, True)


@pytest.mark.parametrize("rot", ["cut", "empty", "bytes", "edited", "shape"])
@pytest.mark.parametrize(
    "command", [("recommend", "--user", "u03"), ("rollback",), ("serve", "--port", "0"), RETRAIN[:3]]
)
def test_settings_that_rotted_are_named_with_their_remedy(
    shop: Shop, driftrec: Any, monkeypatch: pytest.MonkeyPatch, rot: str, command: tuple[str, ...]
) -> None:
    monkeypatch.chdir(shop.folder)
    path = shop.workspace.root / "config.json"
    whole = path.read_bytes()
    contents = {"cut": whole[:300], "empty": b"", "bytes": b"\xff" + whole, "shape": b'{"config": {"log": 1}}'}
    path.write_bytes({**contents, "edited": whole.replace(b'"beam": 20', b'"beam": 24')}[rot])
    code, _, error = driftrec(*command, "-w", shop.workspace.root)
    assert (code, "defect" in error) == (2, False)
    assert f"{path}: " in error
    assert f"move it away and run `driftrec resume -w {shop.workspace.root}`" in error
