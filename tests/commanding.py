"""The command line, typed in this process."""

from __future__ import annotations

import sys

import pytest

from flows import cli


def driftrec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output, error output."""
    monkeypatch.setattr(sys, "argv", ["driftrec", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    code = end.value.code
    return code if isinstance(code, int) else 0, captured.out, captured.err
