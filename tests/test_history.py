"""history.jsonl: what was decided is read as it was written, or refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows.promotion import history
from stages.errors import UserError
from stages.workspace import Workspace


def test_a_torn_last_line_is_passed_over_and_spoils_no_later_one(workspace: Workspace) -> None:
    history.append_line(workspace, {"decision": "kept", "why": "é"})
    path = history.history_file(workspace)
    with path.open("ab") as handle:
        handle.write(b'{"schema": 1, "decision": "prom')
    assert [len(part) if isinstance(part, list) else part for part in history.read_history(workspace)] == [1, 1]
    history.append_line(workspace, {"decision": "kept"})
    lines, torn = history.read_history(workspace)
    assert ([line["decision"] for line in lines], torn) == (["kept", "kept"], 1)


def written(workspace: Workspace, *decisions: str) -> Path:
    """A history of these decisions."""
    for number, decision in enumerate(decisions):
        history.append_line(workspace, {"decision": decision, "stage": number})
    return history.history_file(workspace)


@pytest.mark.parametrize("before", [b"promoted", b"kept", b"first", b'"stage": 1', b'{"schema"'])
def test_one_altered_letter_of_any_line_is_refused(workspace: Workspace, before: bytes) -> None:
    path = written(workspace, "first", "promoted", "kept")
    text = path.read_bytes()
    path.write_bytes(text.replace(before, bytes([before[0] ^ 1]) + before[1:], 1))
    with pytest.raises(UserError, match=r"history\.jsonl: line \d.* is not what was written; put the file back"):
        history.read_history(workspace)
    with pytest.raises(UserError, match="is not what was written"):
        history.append_line(workspace, {"decision": "kept"})
    path.write_bytes(text)
    assert len(history.read_history(workspace)[0]) == 3


@pytest.mark.parametrize("decisions", [("first",), ("first", "kept", "rolled_back")])
def test_no_altered_bit_of_a_history_goes_unnoticed_or_costs_a_decision(
    workspace: Workspace, decisions: tuple[str, ...]
) -> None:
    path = written(workspace, *decisions)
    text, lines = path.read_bytes(), history.read_history(workspace)[0]
    spared = 0
    for place in range(8 * len(text)):
        altered = bytearray(text)
        altered[place // 8] ^= 1 << place % 8
        path.write_bytes(altered)
        try:
            found = history.read_history(workspace)[0]
        except UserError:
            continue
        assert found == lines, place
        spared += 1
    assert spared == 8, "the last end of line, and nothing else, can be told from what is left"


def test_a_decision_that_is_taken_while_another_process_reads_is_no_fault(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    written(workspace, "first")
    held = history._held

    def slowly(path: Path) -> Any:
        with monkeypatch.context() as patched:
            patched.setattr(history, "_held", held)
            written(workspace, "kept")
        return held(path)

    monkeypatch.setattr(history, "_held", slowly)
    assert [line["decision"] for line in history.read_history(workspace)[0]] == ["first", "kept"]


def test_a_line_taken_out_of_the_middle_is_missed(workspace: Workspace) -> None:
    path = written(workspace, "first", "promoted", "kept")
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(lines[0] + lines[2])
    with pytest.raises(UserError, match="line 2, or one before it"):
        history.read_history(workspace)


def test_lines_of_an_earlier_version_are_read_and_vouched_for_by_the_next(workspace: Workspace) -> None:
    path = history.history_file(workspace)
    path.write_text('{"schema": 1, "decision": "first"}\n{"schema": 1, "decision": "promoted"}\n')
    assert [line["decision"] for line in history.read_history(workspace)[0]] == ["first", "promoted"]
    written(workspace, "kept")
    path.write_bytes(path.read_bytes().replace(b"promoted", b"promotee"))
    with pytest.raises(UserError, match="line 3, or one before it"):
        history.read_history(workspace)


def test_a_history_that_is_not_there_is_empty(tmp_path: Path) -> None:
    assert history.read_history(Workspace(tmp_path)) == ([], 0)
