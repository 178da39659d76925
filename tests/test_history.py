"""history.jsonl: what was decided is read as it was written, or refused."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from flows.promotion import history
from stages import workspace as places
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


@pytest.mark.parametrize("line", [0, 3, 7])
@pytest.mark.parametrize("settled", [-(10**18), 10**18])
def test_a_line_altered_in_place_between_two_looks_of_one_process_is_noticed(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch, line: int, settled: int
) -> None:
    monkeypatch.setattr(places, "SETTLED", settled)
    path = written(workspace, *["kept"] * 8)
    text, before = path.read_bytes(), path.stat()
    assert len(history.read_history(workspace)[0]) == 8
    altered = text.splitlines(keepends=True)
    altered[line] = altered[line].replace(b"kept", b"kepr")
    with path.open("r+b") as handle:
        handle.write(b"".join(altered))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool that restores times would leave it
    for _ in range(2):
        with pytest.raises(UserError, match="is not what was written"):
            history.read_history(workspace)
    with pytest.raises(UserError, match="is not what was written"):
        history.append_line(workspace, {"decision": "kept"})
    path.write_bytes(text)
    written(workspace, "promoted")
    assert [found["decision"] for found in history.read_history(workspace)[0]] == [*["kept"] * 8, "promoted"]


def test_a_decision_more_is_a_line_more_to_digest_however_long_the_history(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    chained, digests = history._chained, []

    def counted(before: str, line: dict[str, Any]) -> str:
        digests.append(line)
        return chained(before, line)

    monkeypatch.setattr(history, "_chained", counted)
    monkeypatch.setattr(places, "SETTLED", 10**18)  # as if the file were always a moment old
    work = []
    for _ in range(20):
        digests.clear()
        written(workspace, "kept")
        assert history.read_history(workspace)[1] == 0
        work.append(len(digests))
    assert work == [2] * 20, "what is written, and what is read of it"


STEPS = st.lists(
    st.sampled_from(["decide", "look", b'{"schema": 1, "decision": "prom', b"\n", b'{"decision": "first"}', b"x\n"])
)


@given(STEPS)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None, max_examples=60)
def test_what_was_read_before_changes_nothing_of_what_is_read(workspace: Workspace, steps: list[str | bytes]) -> None:
    path = history.history_file(workspace)
    for each in (path, path.with_name(history.END)):
        each.unlink(missing_ok=True)
    path.touch()
    for step in steps:
        if isinstance(step, bytes):
            with path.open("ab") as handle:
                handle.write(step)
        elif step == "decide" and isinstance(seen(path), history._Held):
            history.append_line(workspace, {"decision": "kept"})
        found = seen(path)
        history._begun.clear()
        assert found == seen(path)


def seen(path: Path) -> history._Held | str:
    """What a look gives, or what it says."""
    try:
        return history._checked(path)
    except UserError as error:
        return str(error)
