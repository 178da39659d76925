"""The service's page, driven in a real browser against a real server on loopback."""

from __future__ import annotations

import json
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import polars as pl
import pytest
import uvicorn

from flows.recommending import recommend
from flows.service import build_app
from flows.serving.guarding import Access
from flows.serving.served import InService
from stages.workspace import Workspace, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from conftest import Trained

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
HOSTILE = "<img src=x onerror=\"document.title='broken'\"><script>document.title='broken'</script> cup"
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")


@contextmanager
def serving(root: Path) -> Iterator[str]:
    """A real server on a free port of the loopback; its address."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        settings = uvicorn.Config(build_app(InService(root), Access()), log_level="warning", server_header=False)
        server = uvicorn.Server(settings)
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join(30)


class Browser:
    """One tab, driven over Chromium's own debugging protocol."""

    def __init__(self, port: int) -> None:
        from websockets.sync.client import connect

        with urlopen(Request(f"http://127.0.0.1:{port}/json/new?about:blank", method="PUT")) as answer:
            tab = json.load(answer)
        self.line = connect(tab["webSocketDebuggerUrl"], max_size=2**26)
        self.number = 0
        self.told: list[dict[str, Any]] = []
        for part in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{part}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        self.number += 1
        self.line.send(json.dumps({"id": self.number, "method": method, "params": params}))
        while (message := json.loads(self.line.recv(timeout=60))).get("id") != self.number:
            self.told.append(message)
        assert "error" not in message, message
        return message["result"]

    def ask(self, script: str) -> Any:
        answer = self.send("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def until(self, script: str) -> None:
        limit = time.monotonic() + 60
        while not self.ask(script):
            assert time.monotonic() < limit, f"never true: {script}\n{self.ask('document.body.innerText')}"
            time.sleep(0.05)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && document.querySelector('#examples button') !== null")

    def lines(self, place: str) -> list[str]:
        """The visible text of each line of a list."""
        return self.ask(f"[...document.querySelectorAll('#{place} li')].map((line) => line.innerText)")

    def asked(self) -> set[str]:
        """Every address the page wanted."""
        found = (message for message in self.told if message.get("method") == "Network.requestWillBeSent")
        return {message["params"]["request"]["url"] for message in found}

    def complaints(self) -> list[Any]:
        """What the browser had to say: refused scripts, errors, exceptions."""
        kinds = ("Log.entryAdded", "Runtime.exceptionThrown")
        return [message["params"] for message in self.told if message.get("method") in kinds]


@pytest.fixture
def browser(tmp_path: Path) -> Iterator[Browser]:
    pytest.importorskip("websockets")
    profile = tmp_path / "profile"
    words = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-dev-shm-usage"
    command = [str(CHROMIUM), *words.split(), "--remote-debugging-port=0", f"--user-data-dir={profile}"]
    with subprocess.Popen([*command, "about:blank"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        found = None
        try:
            place, limit = profile / "DevToolsActivePort", time.monotonic() + 60
            while not (place.exists() and place.read_text().count("\n")):
                assert time.monotonic() < limit, "chromium did not start"
                time.sleep(0.1)
            found = Browser(int(place.read_text().split()[0]))
            yield found
        finally:
            if found is not None:
                found.line.close()
            process.terminate()


@pytest.fixture
def shop(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained workspace in which every third title is hostile."""
    root = tmp_path / "shop"
    shutil.copytree(trained.workspace.root, root, ignore=shutil.ignore_patterns("prefect", "mlartifacts", "mlflow.db"))
    file = Workspace(root).catalogue / "items.parquet"
    items = pl.read_parquet(file).with_row_index("row")
    hostile = pl.when(pl.col("row") % 3 == 0).then(pl.lit(HOSTILE)).otherwise(pl.col("title"))
    items.with_columns(title=hostile).drop("row").write_parquet(file)
    manifest = file.with_name("manifest.json")
    write_json(manifest, {**read_json(manifest), "digest": sha256_file(file)})
    return root


def test_the_page_shows_history_recommendations_and_search_and_lets_a_history_be_built(
    browser: Browser, shop: Path
) -> None:
    user = pl.read_parquet(Workspace(shop).stage_file(0))["user_id"][0]
    plain = recommend(shop, user=user)
    with serving(shop) as address:
        browser.open(address)
        browser.ask(f"at('user').value = '{user}'; at('person').requestSubmit()")
        browser.until("document.querySelectorAll('#next-items li').length === 10")
        shown = browser.lines("next-items")
        for line, (item, title, score) in zip(shown, plain.rows, strict=True):
            assert title in line
            assert item in line
            assert f"{score:.2f}" in line
        assert any("history" in line or "taken beside" in line or "codes shared" in line for line in shown)
        newest_first = plain.history[-20:][::-1]
        assert [line.split("\n")[0] for line in browser.lines("history")] == newest_first
        browser.ask("at('query').value = 'cup'; at('search').requestSubmit()")
        browser.until("document.querySelectorAll('#found-items li').length > 0")
        assert HOSTILE in browser.lines("found-items")[0]
        before = len(browser.lines("history"))
        browser.ask("document.querySelector('#found-items button').click()")
        browser.until(f"document.querySelectorAll('#history li').length === {before + 1}")
        assert browser.lines("history")[0].startswith(HOSTILE)
        browser.until("at('history-note').textContent.includes('put together here')")
        browser.ask("document.querySelector('#history button').click()")
        browser.until(f"document.querySelectorAll('#history li').length === {before}")
        browser.ask("at('user').value = 'no <b>body'; at('person').requestSubmit()")
        browser.until("at('next-note').textContent.includes('Fallback')")
        assert "no <b>body" in browser.ask("at('next-note').textContent")
        # Nothing hostile ran, nothing was refused or failed, nothing was asked of anybody else.
        assert browser.ask("document.title") == "driftrec"
        assert browser.ask("document.querySelectorAll('li img, li script').length") == 0
        assert browser.complaints() == []
        assert [one for one in browser.asked() if not one.startswith((address, "data:"))] == []
    browser.ask("document.querySelector('#examples button').click()")
    browser.until("!at('fault').hidden")
    assert "does not answer" in browser.ask("at('fault').textContent")


def test_everything_on_the_page_can_be_named_and_reached_by_keyboard(browser: Browser, shop: Path) -> None:
    with serving(shop) as address:
        browser.open(f"{address}/?user={pl.read_parquet(Workspace(shop).stage_file(0))['user_id'][0]}&query=cup")
        browser.until("document.querySelectorAll('#found-items li').length > 0")
        browser.until("document.querySelectorAll('#next-items li').length === 10")
        tree = browser.send("Accessibility.getFullAXTree")["nodes"]
    named = [node for node in tree if node.get("role", {}).get("value") in ("button", "textbox", "searchbox", "link")]
    assert len(named) > 20
    assert [node for node in named if not node["name"]["value"].strip()] == []
    roles = {node.get("role", {}).get("value") for node in tree}
    assert {"main", "search", "heading", "list", "status"} <= roles
