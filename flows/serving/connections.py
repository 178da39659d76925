"""Open connections of the service: how long one may keep it waiting, and how many there may be. Over uvicorn's HTTP.

A client that sends nothing, half a header, or takes no answer would otherwise hold its connection for ever, until the
process has no descriptor left for anybody.
"""

from __future__ import annotations

import asyncio
import json
import logging
import math
import resource
import time
from collections.abc import Iterable
from typing import Any

from uvicorn.protocols.http.h11_impl import H11Protocol

LIMIT = 10.0
"""Seconds in which a whole request header must have arrived, and in which some of an answer must be taken."""
MOST = 1000
"""Connections open at once, at most."""
QUEUE = 64
"""Connections that are taken at a time; asyncio may go over the limit by so many."""
IDLE = 1.0
"""Seconds after an answer from which a connection that brought nothing since may be closed for a newcomer."""
SHARE = 0.75
"""Of the process's descriptors; the rest is for models, logs, and connections about to be refused."""
EXHAUSTED = "socket.accept() out of system resource"
"""What asyncio says, thousands of times a second, where there is no descriptor left."""
log = logging.getLogger("flows")


def most() -> int:
    """Connections that may be open at once in this process."""
    descriptors = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return MOST if descriptors == resource.RLIM_INFINITY else max(1, min(MOST, int(descriptors * SHARE)))


class Seldom:
    """True at most once in `seconds`, for what would fill a log.

    Args:
        seconds: between two.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds, self._last = seconds, -seconds

    def __call__(self) -> bool:
        """Whether it is time again."""
        now = time.monotonic()
        if now - self._last < self.seconds:
            return False
        self._last = now
        return True


_full = Seldom(1.0)


class Punctual(H11Protocol):
    """uvicorn's protocol, which waits for nobody longer than `LIMIT`, and has no more than `most` open."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Take the connection, in place of the longest idle one where need be, or say that there are too many."""
        super().connection_made(transport)
        self._stalled, self._looks = self._waits(), 0
        self._timer: asyncio.TimerHandle | None = None
        if len(self.connections) > (allowed := most()) and not self._take_place():
            if _full():
                log.warning("%d connections are open, as many as there may be; more are refused", allowed)
            transport.write(REFUSAL)
            transport.close()
        else:
            self._look_again()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget it."""
        if self._timer is not None:
            self._timer.cancel()
        super().connection_lost(exc)

    def _take_place(self) -> bool:
        """Close the connection that has been idle longest since its last answer; False where none is for `IDLE`."""
        longest = _idle_longest(self.connections)
        if self.loop.time() - _idle_since(longest) < IDLE:
            return False
        longest.timeout_keep_alive_handler()
        return True

    def _look_again(self) -> None:
        self._timer = self.loop.call_later(LIMIT / 2, self._look)

    def _look(self) -> None:
        """Close the connection that has waited for the same thing since the look before the last one."""
        found = self._waits()
        self._looks = self._looks + 1 if found is not None and found == self._stalled else 0
        self._stalled = found
        if self._looks < 2:
            self._look_again()
        elif found is not None and found[1]:
            self.transport.abort()  # what the client does not take would keep a mere close waiting
        else:
            self.transport.close()

    def _waits(self) -> tuple[object, int] | None:
        """(last request, bytes not taken) where the client is to act; None while it is answered, or sends a body."""
        untaken = self.transport.get_write_buffer_size()
        if untaken or self.cycle is None or self.cycle.response_complete:
            return self.cycle, untaken
        return None


def _idle_longest(connections: Iterable[Any]) -> Any:
    return min(connections, key=_idle_since)


def _idle_since(connection: Any) -> float:
    """When, by the loop's clock, it was last answered; infinity for one that is asked, closed, new or takes nothing."""
    waiting: asyncio.TimerHandle | None = connection.timeout_keep_alive_task
    gone, untaken = connection.transport.is_closing(), connection.transport.get_write_buffer_size()
    return math.inf if waiting is None or gone or untaken else waiting.when() - connection.timeout_keep_alive


def _refusal() -> bytes:
    body = json.dumps({"error": "too many connections are open; try again later"}).encode()
    head = ("HTTP/1.1 503 Service Unavailable", "content-type: application/json", "retry-after: 1", "connection: close")
    return "\r\n".join([*head, f"content-length: {len(body)}", "", ""]).encode() + body


REFUSAL = _refusal()


def quieten(loop: asyncio.AbstractEventLoop) -> None:
    """Let asyncio's message about descriptors through at most once a second."""
    due = Seldom(1.0)

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        if context.get("message") != EXHAUSTED:
            loop.default_exception_handler(context)
        elif due():
            log.warning("no descriptor is left for another connection; raise ulimit -n, or see what holds them")

    loop.set_exception_handler(handle)
