"""Clients that keep the service waiting, over real sockets."""

from __future__ import annotations

import asyncio
import logging
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from typing import Any

import pytest
import uvicorn

from flows import service
from flows.serving import connections

LIMIT = 0.6
ASK = b"GET / HTTP/1.1\r\nhost: x\r\n\r\n"


async def answer(scope: Any, receive: Any, send: Any) -> None:
    """`/`: a word; `/long`: more than the kernel takes for a client that does not read."""
    if scope["type"] != "http":
        return
    body = b"well" if scope["path"] == "/" else bytes(32 * 2**20)
    if scope["path"] == "/slow":
        await asyncio.sleep(LIMIT * 3)
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"%d" % len(body))]})
    await send({"type": "http.response.body", "body": body})


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[uvicorn.Server]:
    """A server with the service's settings, little patience and room for three."""
    monkeypatch.setattr(connections, "LIMIT", LIMIT)
    monkeypatch.setattr(connections, "MOST", 3)
    found = uvicorn.Server(service.settings_of(answer))
    listener = socket.create_server(("127.0.0.1", 0))
    found.config.port = listener.getsockname()[1]
    thread = threading.Thread(target=found.run, args=([listener],))
    thread.start()
    until = time.monotonic() + 20
    while not found.started and time.monotonic() < until:
        time.sleep(0.01)
    yield found
    found.should_exit = True
    thread.join(20)
    listener.close()


def calling(server: uvicorn.Server) -> socket.socket:
    return socket.create_connection(("127.0.0.1", server.config.port), timeout=10)


def well_answered(client: socket.socket) -> None:
    """Ask, and read the answer whole."""
    client.sendall(ASK)
    told = b""
    while not told.endswith(b"well"):
        more = client.recv(65536)
        assert more, "the server closed the connection"
        told += more


def closed_after(client: socket.socket) -> float:
    """Seconds until the server closes it."""
    started = time.monotonic()
    while client.recv(65536):
        pass
    return time.monotonic() - started


@pytest.mark.parametrize("said", [b"", b"GET / HT", b"GET / HTTP/1.1\r\nhost: x\r\n"])
def test_who_brings_no_whole_header_is_cut_off(server: uvicorn.Server, said: bytes) -> None:
    with calling(server) as client:
        client.sendall(said)
        assert LIMIT * 0.8 < closed_after(client) < LIMIT * 4


def test_who_sends_a_header_byte_by_byte_is_cut_off(server: uvicorn.Server) -> None:
    started = time.monotonic()
    with calling(server) as client, suppress(ConnectionError):
        client.sendall(b"GET /")
        while time.monotonic() < started + LIMIT * 10:
            client.sendall(b"x")
            time.sleep(LIMIT / 10)
    assert time.monotonic() < started + LIMIT * 5


def test_who_goes_on_with_a_body_after_the_answer_is_cut_off(server: uvicorn.Server) -> None:
    started = time.monotonic()
    with calling(server) as client, suppress(ConnectionError):
        client.sendall(b"POST / HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        while time.monotonic() < started + LIMIT * 10:
            client.sendall(b"x")
            time.sleep(LIMIT / 10)
    assert time.monotonic() < started + LIMIT * 5


def test_who_asks_often_on_one_connection_keeps_it(server: uvicorn.Server) -> None:
    with calling(server) as client:
        for _ in range(40):
            well_answered(client)
            time.sleep(LIMIT / 10)


def test_who_asks_once_and_then_half_is_cut_off(server: uvicorn.Server) -> None:
    with calling(server) as client:
        well_answered(client)
        client.sendall(ASK[:-2])
        assert closed_after(client) < LIMIT * 4


def test_who_takes_no_answer_is_cut_off(server: uvicorn.Server) -> None:
    with calling(server) as client:
        client.sendall(b"GET /long HTTP/1.1\r\nhost: x\r\n\r\n")
        until = time.monotonic() + 10
        while not server.server_state.total_requests and time.monotonic() < until:
            time.sleep(0.02)
        while server.server_state.connections and time.monotonic() < until:
            time.sleep(0.02)
        assert not server.server_state.connections


def test_who_waits_for_a_slow_answer_gets_it(server: uvicorn.Server) -> None:
    with calling(server) as client:
        client.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        assert client.recv(100).startswith(b"HTTP/1.1 200")


def test_beyond_the_limit_one_is_told_so_and_the_others_are_served(
    server: uvicorn.Server, caplog: pytest.LogCaptureFixture
) -> None:
    with ExitStack() as stack, caplog.at_level(logging.WARNING, "flows"):
        clients = [stack.enter_context(calling(server)) for _ in range(3)]
        well_answered(clients[0])
        for _ in range(4):
            with calling(server) as more:
                told = more.recv(65536)
            assert told.startswith(b"HTTP/1.1 503")
            assert b"too many connections" in told
        well_answered(clients[1])
    assert sum("3 connections are open" in line for line in caplog.messages) == 1


def told_first(client: socket.socket) -> bytes:
    """The first line of an answer."""
    with suppress(ConnectionError):
        client.sendall(ASK)
    return client.recv(65536).partition(b"\r\n")[0]


def test_at_the_limit_a_newcomer_takes_the_place_of_who_is_idle_longest(
    server: uvicorn.Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connections, "IDLE", LIMIT)
    with ExitStack() as stack:
        silent, first, second = (stack.enter_context(calling(server)) for _ in range(3))
        for client in (first, second):
            well_answered(client)
            time.sleep(0.05)
        newcomer = stack.enter_context(calling(server))
        assert told_first(newcomer) == b"HTTP/1.1 503 Service Unavailable"  # nobody has been idle for long
        silent.sendall(b"GET /slow HTTP/1.1\r\nhost: x\r\n\r\n")
        time.sleep(LIMIT)
        newcomer = stack.enter_context(calling(server))
        assert told_first(newcomer) == b"HTTP/1.1 200 OK"
        assert first.recv(1) == b""
        well_answered(second)
        assert silent.recv(65536).startswith(b"HTTP/1.1 200 OK")


def test_the_limit_stays_below_the_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    for limit, allowed in ((1024, 768), (64, 48), (10**6, 1000), (resource.RLIM_INFINITY, 1000)):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
        assert connections.most() == allowed


def test_a_lack_of_descriptors_is_said_once_a_second(caplog: pytest.LogCaptureFixture) -> None:
    loop = asyncio.new_event_loop()
    connections.quieten(loop)
    for _ in range(500):
        loop.call_exception_handler({"message": connections.EXHAUSTED})
    loop.call_exception_handler({"message": "something else"})
    loop.close()
    assert len(caplog.messages) == 2
    assert "no descriptor is left" in caplog.messages[0]
