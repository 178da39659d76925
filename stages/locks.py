"""One holder at a time: locks that the kernel frees with their process, so none is ever stale."""

from __future__ import annotations

import fcntl
import logging
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from stages.workspace import make_folder

log = logging.getLogger("stages.locks")


@contextmanager
def held(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, waiting for it; the log says for whom.

    The file is never deleted: two processes could then hold two files of one name. It is opened anew for each holder
    and not inherited by a process started meanwhile, so only the holder's end frees it.
    """
    make_folder(path.parent)
    with path.open("a+", encoding="utf-8") as handle:
        if not try_lock(handle):
            level = logging.INFO if _of_this_run(handle) else logging.WARNING
            log.log(level, "%s: waiting for %s", path, holder_of(handle))
            fcntl.flock(handle, fcntl.LOCK_EX)
        sign(handle)
        try:
            yield
        finally:
            handle.truncate(0)


def try_lock(handle: IO[str]) -> bool:
    """Take the lock if it is free."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def sign(handle: IO[str]) -> None:
    """Write into a lock file who holds it."""
    handle.truncate(0)
    started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    handle.write(f"process {os.getpid()} on {socket.gethostname()} since {started}\n")
    handle.flush()


def _of_this_run(handle: IO[str]) -> bool:
    """Whether the holder is this process's parent, child or sibling: they share one run's work."""
    handle.seek(0)
    words = handle.read().split()
    if len(words) < 2 or not words[1].isdecimal():
        return False
    family = {os.getpid(), os.getppid()}
    return int(words[1]) in family or _parent(words[1]) in family


def _parent(pid: str) -> int | None:
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("PPid:")), None)


def holder_of(handle: IO[str]) -> str:
    """Who holds a lock, as its file says; a stopped process is called so, since it may not end by itself."""
    handle.seek(0)
    text = handle.read().strip()
    words = text.split()
    if len(words) < 2 or not words[1].isdecimal():
        return text or "another process"
    try:
        status = Path(f"/proc/{words[1]}/status").read_text(encoding="utf-8")
    except OSError:
        return text
    return f"{text} (stopped; continue or end it)" if "\nState:\tT" in status else text
