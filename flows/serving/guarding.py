"""Who may ask, and how much at once: a layer between the server and the service that needs no framework.

It refuses a Host that is not this service's (a web page elsewhere could otherwise reach it under a name of its own), a
foreign Origin, a missing token where one is set, and a body that is too large or too slow. Every answer gets headers
that keep a browser from loading, framing or guessing anything.
"""

from __future__ import annotations

import asyncio
import hmac
import json
import os
import re
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any

from stages.errors import UserError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
HOST = re.compile(r"([a-z0-9_](?:[a-z0-9._-]*)|\[[0-9a-f:.]+\])(?::([0-9]{1,5}))?")
"""A Host header: a name, or an address, and a port."""
SCHEMES = {"http": 80, "https": 443}
LARGEST_BODY = 256 * 1024
"""Bytes of a request's body at most."""
SLOWEST_BODY = 10.0
"""Seconds in which a body must have arrived."""
LEAST_TOKEN = 16
"""Characters of a token at least."""
TOKEN_VARIABLE = "DRIFTREC_TOKEN"
OPEN = ("/", "/health")
"""Paths that need no token: they tell nothing of the log."""
HEADERS = (
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (b"cache-control", b"no-store"),
    (b"cross-origin-resource-policy", b"same-origin"),
)
SHUT = (b"content-security-policy", b"default-src 'none'; frame-ancestors 'none'")
"""For every answer that does not bring a policy of its own."""


Place = tuple[str, int]
"""Name in lower case, and port."""


def places(host: str, ports: tuple[int, ...] = (80, 443)) -> frozenset[Place]:
    """What a Host header may mean: clients leave out the port that belongs to their scheme. Empty where it is none.

    Args:
        host: `name` or `name:port`.
        ports: meant where none is given.
    """
    found = HOST.fullmatch(host.lower())
    if found is None:
        return frozenset()
    name, port = found[1].strip("[]"), found[2]
    if port is None:
        return frozenset((name, each) for each in ports)
    return frozenset({(name, int(port))} if 0 < int(port) < 65536 else ())


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: accepted places, by which clients call the service.
        token: expected after `Authorization: Bearer`; None asks for none.
        near: whether loopback names are accepted at any port, too.
    """

    hosts: frozenset[Place] = frozenset()
    token: str | None = None
    near: bool = True

    def knows(self, host: str) -> bool:
        """Whether a request's Host header is this service's."""
        meant = places(host)
        return bool(meant & self.hosts) or (self.near and any(name in LOOPBACK for name, _ in meant))


def access(host: str, allowed: str | None, token: str | None = None) -> Access:
    """The rule for a service bound to `host`.

    Args:
        host: address to listen on.
        allowed: `name:port,...` by which clients will call it, without a port 80 and 443; needed beyond loopback.
        token: absent: the environment's DRIFTREC_TOKEN.

    Raises:
        UserError: open to other machines without a list of names and a token, or a name is none.
    """
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    named = [name.strip() for name in (allowed or "").split(",") if name.strip()]
    hosts = frozenset[Place]().union(*map(places, named))
    if token is not None and len(token) < LEAST_TOKEN:
        raise UserError(f"{TOKEN_VARIABLE}: {len(token)} characters; a token needs at least {LEAST_TOKEN}")
    if odd := [name for name in named if not places(name)]:
        raise UserError(f"--allowed-hosts {odd[0]}: give name or name:port, as in http://NAME:PORT/")
    if host in LOOPBACK:
        return Access(hosts, token)
    if not hosts or token is None:
        missing = "--allowed-hosts name:port" if not hosts else f"a token in {TOKEN_VARIABLE}"
        raise UserError(
            f"--host {host}: other machines could reach the service; that needs {missing}, or use 127.0.0.1"
        )
    return Access(hosts, token, near=False)


class Guard:
    """The layer around `app`.

    Args:
        app: the service.
        rule: who may ask.
        note: told (method, path, status, seconds) after each request, refused ones included.
    """

    def __init__(self, app: App, rule: Access, note: Callable[[Scope, int, float], None]) -> None:
        self.app, self.rule, self.note = app, rule, note

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        clock = asyncio.get_running_loop().time
        started, status = clock(), 500

        async def dressed(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                given = list(message.get("headers", []))
                own = () if any(name == SHUT[0] for name, _ in given) else (SHUT,)
                message = {**message, "headers": [*given, *HEADERS, *own]}
            await send(message)

        try:
            await self._answer(scope, receive, dressed)
        finally:
            self.note(scope, status, clock() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(scope)
        if refusal is not None:
            await refuse(send, *refusal)
            return
        try:
            async with asyncio.timeout(SLOWEST_BODY):
                body = await _whole_body(receive)
        except TimeoutError:
            await refuse(send, 408, f"the body did not arrive within {SLOWEST_BODY:.0f} seconds")
            return
        if body is None:
            await refuse(send, 413, f"the body is too large; at most {LARGEST_BODY} bytes are read")
            return
        await self.app(scope, _replayed(body, receive), send)

    def _refusal(self, scope: Scope) -> tuple[int, str] | None:
        headers: list[tuple[bytes, bytes]] = scope["headers"]
        hosts = [value.decode("latin-1") for name, value in headers if name == b"host"]
        if len(hosts) != 1 or not self.rule.knows(hosts[0]):
            return 403, "the Host header is not this service's; call it by the address it printed"
        for name, value in headers:
            origin = value.decode("latin-1")
            if name == b"origin" and not place_of(origin) & places(hosts[0]):
                return 403, "requests from other web sites are refused"
        if self.rule.token is not None and scope["path"] not in OPEN:
            given = next((value for name, value in headers if name == b"authorization"), b"")
            if not hmac.compare_digest(given, f"Bearer {self.rule.token}".encode()):
                return 401, "a token is needed: send the header Authorization: Bearer <token>"
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > LARGEST_BODY:
            return 413, f"the body is too large; at most {LARGEST_BODY} bytes are read"
        return None


def place_of(origin: str) -> frozenset[Place]:
    """Where the page of an origin came from; empty where that is nowhere (`null`, say)."""
    scheme, _, host = origin.lower().partition("://")
    return places(host, (SCHEMES[scheme],)) if scheme in SCHEMES else frozenset()


async def refuse(send: Send, status: int, sentence: str) -> None:
    """Answer with an error of one sentence."""
    body = json.dumps({"error": sentence}).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())]
    headers += [(b"connection", b"close")] if status in (408, 413) else []
    headers += [(b"www-authenticate", b"Bearer")] if status == 401 else []
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})


async def _whole_body(receive: Receive) -> bytes | None:
    """The body, or None as soon as it is too large."""
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return b"".join(parts)
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        if size > LARGEST_BODY:
            return None
        if not message.get("more_body", False):
            return b"".join(parts)


def _replayed(body: bytes, receive: Receive) -> Receive:
    """Gives the body that was read already once, then what the server says."""
    given = False

    async def replay() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
