"""Who may command the Prefect servers that driftrec starts."""

from __future__ import annotations

import http.server
import importlib
import os
import stat
import subprocess
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import login, schedule
from flows.environment import set_defaults
from stages.errors import UserError
from tests.asking import asked, request_for
from tests.test_schedule import alone, free_port

EVIL = "http://evil.example"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """An environment in which nothing is set."""
    found: dict[str, str] = {}
    monkeypatch.setattr(os, "environ", found)
    return found


def test_a_process_and_its_servers_have_one_secret_and_another_process_has_another(bare: dict[str, str]) -> None:
    set_defaults()
    first = bare[login.SENT]
    assert first == bare[login.ASKED_FOR]
    bare.clear()
    set_defaults()
    assert bare[login.SENT] != first


def test_the_login_of_a_lasting_server_is_for_its_owner_s_eyes_and_read_back(
    bare: dict[str, str], tmp_path: Path
) -> None:
    set_defaults(tmp_path)
    login.keep(tmp_path / "prefect")
    first = bare[login.SENT]
    assert stat.S_IMODE((tmp_path / "prefect" / "login").stat().st_mode) == 0o600
    bare.clear()
    set_defaults(tmp_path)
    assert bare[login.SENT] == bare[login.ASKED_FOR] == first


def test_nothing_is_written_by_a_command_that_starts_no_server(bare: dict[str, str], tmp_path: Path) -> None:
    set_defaults(tmp_path / "typo")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", [login.SENT, login.ASKED_FOR])
def test_a_user_s_own_login_counts_for_client_and_server(bare: dict[str, str], name: str) -> None:
    bare[name] = "me:mine"
    set_defaults()
    assert bare[login.SENT] == bare[login.ASKED_FOR] == "me:mine"


def test_another_machine_s_server_and_a_profile_get_no_login_of_ours(bare: dict[str, str], tmp_path: Path) -> None:
    bare["PREFECT_API_URL"] = "https://api.prefect.cloud/api/accounts/1/workspaces/2"
    set_defaults(tmp_path)
    assert login.SENT not in bare
    bare.clear()
    (tmp_path / "prefect").mkdir()
    (tmp_path / "prefect" / "profiles.toml").touch()
    set_defaults(tmp_path)
    assert login.SENT not in bare


@pytest.fixture
def strange() -> Iterator[str]:
    """The address of a server that answers, and asks for a login that nobody has."""
    importlib.import_module("prefect.main")  # the first import sets up logging, and takes off a test's handler

    class Page(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/api/health" else 401)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"true")

        def log_message(self, *_: object) -> None:
            """Quiet."""

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as found:
        threading.Thread(target=found.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{found.server_port}/api"
        found.shutdown()


def test_a_schedule_beside_a_server_of_another_login_is_told_how_to_get_in(
    strange: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PREFECT_API_URL", strange)
    with (
        pytest.raises(UserError, match=r"asks for another login; export PREFECT_API_AUTH_STRING="),
        schedule.api(tmp_path, free_port()),
    ):
        pass


def test_the_doctor_does_without_a_server_of_another_login(strange: str, tmp_path: Path) -> None:
    from benchmarks.growing import opened

    _, workspace = opened(tmp_path)
    words = ["doctor", "-w", str(workspace.root), "--repair"]
    command, env = [sys.executable, "-m", "flows.cli", *words], alone(tmp_path) | {"PREFECT_API_URL": strange}
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    said = " ".join(done.stdout.split())
    assert "its flow runs were not looked at" in said
    assert "its login with PREFECT_API_AUTH_STRING" in said
    assert (done.stderr, done.returncode) == ("", 0)


def test_a_run_uses_a_server_of_its_own_beside_one_of_another_login(
    strange: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from prefect.settings import PREFECT_API_URL, temporary_settings

    from flows import running

    seen = []
    monkeypatch.setitem(running.FLOWS, "compare", lambda **_: seen.append(PREFECT_API_URL.value()) or "done")
    with temporary_settings({PREFECT_API_URL: strange}):
        assert running.run("compare", {}) == "done"
    assert seen == [None]
    assert "asks for another login" in caplog.text


def refusal(request: urllib.request.Request) -> int:
    """The status a server refuses with."""
    with pytest.raises(urllib.error.HTTPError) as found:
        urllib.request.urlopen(request, timeout=30)
    with found.value as error:
        return error.code


def test_no_page_and_no_stranger_commands_the_server_and_our_own_client_does(tmp_path: Path) -> None:
    pool = {"name": "evil", "type": "process"}
    port = free_port()
    with schedule.server(tmp_path, port) as address:
        secret = login.stored(login.home_in(tmp_path))
        assert secret is not None
        assert secret == os.environ[login.SENT]
        for origin, allowed in ((EVIL, None), (f"http://127.0.0.1:{port}", f"http://127.0.0.1:{port}")):
            asking = {"Origin": origin, "Access-Control-Request-Method": "POST"}
            preflight = urllib.request.Request(f"{address}/work_pools/", headers=asking, method="OPTIONS")
            if allowed is None:
                assert refusal(preflight) == 400
            else:
                with urllib.request.urlopen(preflight) as reply:
                    assert reply.headers["access-control-allow-origin"] == allowed
        with urllib.request.urlopen(urllib.request.Request(f"{address}/health", headers={"Origin": EVIL})) as reply:
            assert "access-control-allow-origin" not in reply.headers
        post = urllib.request.Request(f"{address}/work_pools/", b'{"name": "evil", "type": "process"}')
        post.add_header("Content-Type", "application/json")
        post.add_header("Origin", EVIL)
        assert refusal(post) == 403
        # A page under a name of its own that leads to this machine is nobody's foreign Origin, but has no login.
        rebound = urllib.request.Request(f"{address}/csrf-token?client=evil", headers={"Host": "evil.example"})
        assert refusal(rebound) == 401
        asking = request_for(address, "work_pools/", pool, secret)
        asking.remove_header("Authorization")
        assert refusal(asking) == 401
        assert asked(address, "work_pools/filter", {}, secret) == []
        words = ["work-pool", "create", "ours", "--type", "process"]
        env = {**os.environ, "PREFECT_API_URL": address}
        command = [sys.executable, "-m", "prefect", "--no-prompt", *words]
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert [each["name"] for each in asked(address, "work_pools/filter", {}, secret)] == ["ours"]
