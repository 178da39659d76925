"""A shop that `retrain` looked at on four nights, and the command line in this process."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TypeAlias

import pytest

from flows import cli
from stages.workspace import Workspace

FourNights: TypeAlias = tuple[Path, Workspace, list[str]]
"""Config, workspace, and what four runs said: first, quiet, a stage let in, a stage turned away."""
ShopCopy: TypeAlias = tuple[Path, Workspace]
"""Config and workspace of a copy, to be changed."""


def driftrec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output, error output."""
    monkeypatch.setattr(sys, "argv", ["driftrec", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    return int(end.value.code or 0), " ".join(captured.out.split()), captured.err
