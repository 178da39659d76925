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
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from stages.errors import UserError

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

LOOPBACK = ("127.0.0.1", "localhost", "::1")
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


@dataclass(frozen=True)
class Access:
    """Who may ask.

    Attributes:
        hosts: accepted Host headers, `name:port`; empty: any port of a loopback name.
        token: expected after `Authorization: Bearer`; None asks for none.
    """

    hosts: frozenset[str] = frozenset()
    token: str | None = None

    def knows(self, host: str) -> bool:
        """Whether a request's Host header is this service's."""
        if self.hosts:
            return host.lower() in self.hosts
        try:
            split = urlsplit(f"//{host}")
            return split.hostname in LOOPBACK and split.netloc == host and (split.port or 1) > 0
        except ValueError:
            return False


def access(host: str, allowed: str | None, token: str | None = None) -> Access:
    """The rule for a service bound to `host`.

    Args:
        host: address to listen on.
        allowed: `name:port,...` by which clients will call it; needed beyond loopback.
        token: absent: the environment's DRIFTREC_TOKEN.

    Raises:
        UserError: open to other machines without a list of names and a token.
    """
    token = token or os.environ.get(TOKEN_VARIABLE) or None
    hosts = frozenset(name.strip().lower() for name in (allowed or "").split(",") if name.strip())
    if token is not None and len(token) < LEAST_TOKEN:
        raise UserError(f"{TOKEN_VARIABLE}: {len(token)} characters; a token needs at least {LEAST_TOKEN}")
    if host in LOOPBACK:
        return Access(hosts, token)
    if not hosts or token is None:
        missing = "--allowed-hosts name:port" if not hosts else f"a token in {TOKEN_VARIABLE}"
        raise UserError(
            f"--host {host}: other machines could reach the service; that needs {missing}, or use 127.0.0.1"
        )
    if odd := sorted(name for name in hosts if not name.rpartition(":")[2].isdecimal()):
        raise UserError(f"--allowed-hosts {odd[0]}: give name:port, as clients will write it")
    return Access(hosts, token)


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
            if name == b"origin" and urlsplit_netloc(origin) != hosts[0].lower():
                return 403, "requests from other web sites are refused"
        if self.rule.token is not None and scope["path"] not in OPEN:
            given = next((value for name, value in headers if name == b"authorization"), b"")
            if not hmac.compare_digest(given, f"Bearer {self.rule.token}".encode()):
                return 401, "a token is needed: send the header Authorization: Bearer <token>"
        length = next((value for name, value in headers if name == b"content-length"), b"0")
        if not length.isdigit() or int(length[:20]) > LARGEST_BODY:
            return 413, f"the body is too large; at most {LARGEST_BODY} bytes are read"
        return None


def urlsplit_netloc(origin: str) -> str | None:
    """`name:port` of an origin, in lower case; None where it is none (`null`, say)."""
    try:
        return urlsplit(origin).netloc.lower() or None
    except ValueError:
        return None


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
