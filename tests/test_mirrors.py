"""Prefect shows and schedules; where it is out of reach the run goes on without it."""

from __future__ import annotations

import socket
from pathlib import Path
from typing import Any

import httpx
import pytest

from flows import running
from flows.reach import lost_prefect
from stages.errors import UserError


def unreachable() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{listener.getsockname()[1]}/api"


def wrapped(inner: BaseException) -> RuntimeError:
    try:
        raise RuntimeError("a task failed") from inner
    except RuntimeError as error:
        return error


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (httpx.ConnectError("refused"), True),
        (wrapped(httpx.ReadTimeout("slow")), True),
        (RuntimeError("Failed to reach API at http://127.0.0.1:1/api"), True),
        (RuntimeError("shapes differ"), False),
        (UserError("no such file"), False),
        (None, False),
    ],
)
def test_only_what_says_that_prefect_is_gone_counts_as_that(error: BaseException | None, lost: bool) -> None:
    assert lost_prefect(error) is lost


def test_a_flow_that_loses_prefect_is_finished_plainly_and_another_error_is_not(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    called: list[dict[str, Any]] = []
    monkeypatch.setattr(running, "run_plainly", lambda name, arguments: called.append(arguments) or name)

    def lose(**_: Any) -> str:
        raise httpx.ConnectError("refused")

    def mistake(**_: Any) -> str:
        raise UserError("unknown method")

    monkeypatch.setitem(running.FLOWS, "compare", lose)
    assert running.run("compare", {"config": Path("x")}) == "compare"
    assert called == [{"config": Path("x")}]
    assert "going on without it" in caplog.text
    monkeypatch.setitem(running.FLOWS, "compare", mistake)
    with pytest.raises(UserError):
        running.run("compare", {})


def test_a_silent_server_is_replaced_by_one_of_the_runs_own(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    seen: list[str | None] = []
    monkeypatch.setitem(running.FLOWS, "compare", lambda **_: seen.append(PREFECT_API_URL.value()) or "done")
    with temporary_settings({PREFECT_API_URL: unreachable()}):
        assert running.run("compare", {}) == "done"
        assert PREFECT_API_URL.value() is not None
    assert seen == [None]
    assert "does not answer" in caplog.text
