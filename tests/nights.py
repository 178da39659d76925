"""A shop that `retrain` looked at on four nights, and the command line with its output in one line."""

from __future__ import annotations

from pathlib import Path
from typing import TypeAlias

import pytest

from stages.workspace import Workspace
from tests import commanding

FourNights: TypeAlias = tuple[Path, Workspace, list[str]]
"""Config, workspace, and what four runs said: first, quiet, a stage let in, a stage turned away."""
ShopCopy: TypeAlias = tuple[Path, Workspace]
"""Config and workspace of a copy, to be changed."""


def driftrec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output without its line breaks, error output."""
    code, out, err = commanding.driftrec(monkeypatch, capsys, *words)
    return code, " ".join(out.split()), err
