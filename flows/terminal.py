"""What a person at the terminal sees: a progress bar or quiet lines while it runs, tables afterwards."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flows import logs

if TYPE_CHECKING:
    from rich.console import Console
    from rich.progress import Progress

Say = Callable[..., None]
REPEATED = ("method", "stage")
"""News that the step's own label already tells."""
QUIET = 60.0
"""Seconds a log waits for the next line about one step."""
log = logging.getLogger("flows")


@dataclass
class Watcher:
    """Counts finished steps and shows the one under way."""

    bar: Progress | None = None
    total: int = 0
    done: int = 0
    label: str = ""
    lines: bool = False
    spoke: float = field(default_factory=time.monotonic)
    """When a log last heard from the step under way (monotonic seconds)."""
    listeners: list[Callable[[float], None]] = field(default_factory=list)

    def expect(self, total: int) -> None:
        """A run begins its steps, so many of them; known once the log is split."""
        self.total, self.done = total, 0
        self._draw("")

    def start(self, label: str) -> None:
        """A step begins."""
        self.label = label
        self.spoke = time.monotonic()
        if self.bar is None:
            log.info(label)
        self._draw("")

    def say(self, *details: Any, **more: Any) -> None:
        """A step's own news: a dict of numbers, a text, or keywords."""
        if self.lines:
            log.info(" ".join(map(str, details)))
        numbers: dict[str, Any] = {**more}
        texts = []
        for detail in details:
            if isinstance(detail, dict):
                numbers.update(detail)
            else:
                texts.append(str(detail))
        shown = [
            f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}"
            for key, value in numbers.items()
            if key not in REPEATED
        ]
        self._draw("  ".join([*texts, *shown]))

    def count(self, done: int, total: int) -> None:
        """A step's own count."""
        self._draw(f"{done} of {total}")

    def finish(self) -> None:
        """The step under way is done."""
        self.done += 1
        self._draw("")
        for listener in self.listeners:
            listener(min(100.0, 100.0 * self.done / max(self.total, 1)))

    def _draw(self, detail: str) -> None:
        if self.bar is not None:
            task = self.bar.task_ids[0]
            self.bar.update(
                task, total=self.total or None, completed=self.done, description=self.label, detail=detail[:60]
            )
        elif detail and time.monotonic() - self.spoke >= QUIET:
            self.spoke = time.monotonic()
            log.info("%s: %s", self.label, detail)


_watcher: ContextVar[Watcher | None] = ContextVar("watcher", default=None)


def watcher() -> Watcher:
    """The one watching this command; a flow that nobody watches at a terminal gets one that draws nothing."""
    found = _watcher.get()
    if found is None:
        found = Watcher()
        _watcher.set(found)
    return found


@contextmanager
def watching(lines: bool = False) -> Iterator[Watcher]:
    """Show progress on stderr: a bar on a terminal, log lines elsewhere.

    Args:
        lines: every text that a step says is a line of its own; for short commands whose news is worth keeping.
    """
    console = stderr()
    found = Watcher(lines=lines)
    token = _watcher.set(found)
    try:
        if lines or logs.as_json() or not console.is_terminal:
            with _log_lines():
                yield found
        else:
            # Inside the bar's block, where rich keeps lines above the bar.
            with _bar(console) as found.bar, _log_lines(logging.WARNING):
                yield found
    finally:
        _watcher.reset(token)


def _bar(console: Console) -> Progress:
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    bar = Progress(*columns, TextColumn("[dim]{task.fields[detail]}"), console=console, transient=True)
    bar.add_task("starting", total=None, detail="")
    return bar


@contextmanager
def _log_lines(least: int = logging.INFO) -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    handler.setLevel(least)
    handler.setFormatter(logs.formatter())
    loggers = [logging.getLogger(name) for name in logs.PACKAGES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.removeHandler(handler)
            logger.setLevel(level)


def stdout() -> Console:
    """Console for results; wide enough for the tables when nobody looks (a pipe)."""
    from rich.console import Console

    return _console(Console)


def stderr() -> Console:
    """Console for progress and errors."""
    from rich.console import Console

    return _console(Console, stderr=True)


def _console(kind: type[Console], stderr: bool = False) -> Console:
    stream = sys.stderr if stderr else sys.stdout
    return kind(stderr=stderr, width=None if stream.isatty() else 160, highlight=False, soft_wrap=False)
