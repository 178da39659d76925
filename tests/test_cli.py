"""Every command begins without delay and ends with one line and its exit code."""

from __future__ import annotations

import errno
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows.experiment import exclusive
from stages.errors import UserError
from tests.commanding import driftrec

if TYPE_CHECKING:
    from conftest import Trained

pytestmark = pytest.mark.usefixtures("environment_left_alone")


def test_help_answers_within_a_second_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "polars", "prefect", "mlflow", "numpy", "pydantic", "matplotlib", "sklearn")
    script = f"import flows.cli, sys; sys.exit(sum(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what the command costs, whatever else the machine is doing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    commands = ("demo", "ingest", "split", "train", "compare", "recommend", "report", "analyse", "resume", "doctor")
    for command in (*commands, "retrain", "rollback", "history", "serve-flows", "serve", "search", "ui"):
        assert re.search(rf"\b{command}\b", done.stdout)


def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = driftrec(monkeypatch, capsys, "compare", "--config", tmp_path / "none.toml")
    assert (code, out) == (2, "")
    assert err == f"driftrec: {tmp_path / 'none.toml'}: no such config file; see configs/ for examples\n"


def test_mistakes_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    for words, message in (
        (["--methods", "sinlge"], "did you mean 'single'"),
        (["--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
    ):
        place = tmp_path / "untouched"
        code, _, err = driftrec(
            monkeypatch, capsys, "compare", "--config", trained.config, "--workspace", place, *words
        )
        assert code == 2
        assert message in err
        assert not place.exists()


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("two\nlines"), 2, "driftrec: two lines\n"),
        (KeyboardInterrupt(), 130, "driftrec resume"),
        (OSError(errno.ENOSPC, "No space left on device", "/w/x"), 1, "/w/x: no space left"),
        (OSError(errno.EROFS, "Read-only file system", "/w/x"), 1, "read-only"),
        (RuntimeError("write failed: No space left on device (os error 28)"), 1, "no space left; free some"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), 1, "no space left; free some"),
        (OSError("disk is full"), 1, "no space left; free some"),
        (ValueError("boom"), 1, "ValueError: boom"),
    ],
)
def test_every_end_has_its_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    raised: BaseException,
    code: int,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("flows.doctor.examine", fail)
    found, _, err = driftrec(monkeypatch, capsys, "doctor", "--workspace", tmp_path)
    assert found == code
    assert words in err
    assert err.count("\n") == 1


def test_a_defect_leaves_its_traceback_in_the_workspace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("flows.doctor.examine", fail)
    for number in (1, 2):
        _, _, err = driftrec(monkeypatch, capsys, "doctor", "--workspace", tmp_path)
        assert str(tmp_path / f"crash-{number}.log") in err
    assert "Traceback" in (tmp_path / "crash-1.log").read_text()


def test_a_missing_source_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text('name = "x"\nworkspace = "unused"\n[[log.sources]]\npath = "missing.csv"\n')
    command = [sys.executable, "-m", "flows.cli", "compare", "-c", str(config), "-w", str(tmp_path / "w")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("driftrec: ")
    assert "missing.csv" in lines[0]


def test_a_workspace_in_use_keeps_its_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained
) -> None:
    root = trained.workspace.root
    before = (root / "config.json").read_bytes()
    other = trained.config.with_name("other.toml")
    other.write_text(trained.config.read_text().replace("bootstrap = 100", "bootstrap = 101"))
    with exclusive(trained.workspace):
        for command in ("compare", "train", "ingest", "split"):
            code, _, err = driftrec(monkeypatch, capsys, command, "-c", other, "-w", root)
            assert code == 2
            assert "in use by process" in err
    assert (root / "config.json").read_bytes() == before


def test_log_lines_may_be_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    words = ("--log-format", "json", "ingest", "-c", trained.config, "-w", tmp_path / "w")
    _, _, err = driftrec(monkeypatch, capsys, *words)
    assert all(json.loads(line)["logger"].startswith("flows") for line in err.splitlines())
    assert err.count("\n") >= 3
    assert driftrec(monkeypatch, capsys, "--log-format", "xml", "doctor")[0] == 2
