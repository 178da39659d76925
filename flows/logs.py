"""How a log line looks: text for people, one JSON object a line for machines; and how a signal ends a command."""

from __future__ import annotations

import json
import logging
import os
import signal
import threading
import time
from types import FrameType

from stages.errors import UserError

FORMATS = ("text", "json")
VARIABLE = "DRIFTREC_LOG_FORMAT"
PACKAGES = ("flows", "stages")
"""Whose lines a command shows."""
GRACE = 9.0
"""Seconds that a signalled command has to close what it holds; then it ends as it stands."""


class JsonLines(logging.Formatter):
    """One object a line: time (UTC, ISO), level, logger, message."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON; an exception's text is part of the message."""
        message = record.getMessage()
        if record.exc_info:
            message += "\n" + self.formatException(record.exc_info)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        line = {"time": stamp, "level": record.levelname.lower(), "logger": record.name, "message": message}
        return json.dumps(line, ensure_ascii=False)


def choose_format(name: str | None) -> None:
    """Make `name` this command's log format; None keeps what DRIFTREC_LOG_FORMAT says, or text.

    Raises:
        UserError: neither text nor json.
    """
    found = name or os.environ.get(VARIABLE) or "text"
    if found not in FORMATS:
        raise UserError(f"log format {found!r}: give text or json (--log-format or {VARIABLE})")
    os.environ[VARIABLE] = found


def as_json() -> bool:
    """Whether lines are JSON."""
    return os.environ.get(VARIABLE) == "json"


def formatter() -> logging.Formatter:
    """Of the chosen format."""
    return JsonLines() if as_json() else logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S")


def end_on_signals() -> None:
    """SIGTERM ends the command like Ctrl-C, with code 143; further signals do not disturb the closing."""

    def end(number: int, _: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        code = 128 + number
        last = threading.Timer(GRACE, os._exit, [code])
        last.daemon = True
        last.start()
        raise SystemExit(code)

    signal.signal(signal.SIGTERM, end)
    signal.signal(signal.SIGINT, end)
