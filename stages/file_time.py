"""How long files are read and written, for a profile that asks; otherwise nothing is measured."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

_spent: ContextVar[list[float] | None] = ContextVar("seconds at files", default=None)


@contextmanager
def timed_files() -> Iterator[list[float]]:
    """Gather the seconds of every `at_files` within: a list to be summed."""
    seconds: list[float] = []
    before = _spent.set(seconds)
    try:
        yield seconds
    finally:
        _spent.reset(before)


@contextmanager
def at_files() -> Iterator[None]:
    """What runs within, or in the function this decorates, is at files; of two nested ones the outer counts."""
    seconds = _spent.get()
    if seconds is None:
        yield
        return
    outer, started = _spent.set(None), time.perf_counter()
    try:
        yield
    finally:
        seconds.append(time.perf_counter() - started)
        _spent.reset(outer)
