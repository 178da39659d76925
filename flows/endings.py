"""How a command ends: its exit code, one line about the cause, and a crash file where the defect is ours."""

from __future__ import annotations

import errno
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from flows import logs
from flows.environment import RUNNING_IN
from stages.errors import UserError

INTERRUPTED = "interrupted; `driftrec resume` goes on from the last committed stage"


def ended(command: Callable[[], object]) -> None:
    """Run a command line to its end.

    Exit codes: 0; 2 for the user's mistake; 1 for ours or the machine's; 130 for Ctrl-C; 143 for SIGTERM.
    """
    own_process()
    try:
        command()
    except SystemExit as end:
        _fail(INTERRUPTED, int(end.code)) if end.code in (130, 143) else sys.exit(end.code)
    except UserError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail(INTERRUPTED, 130)
    except Exception as error:
        _fail(_machine_fault(error) or _crash(error), 1)


@contextmanager
def private_files() -> Iterator[None]:
    """Within the block new files are the user's alone, in a process that other people's code started, too."""
    before = os.umask(0o077)
    try:
        yield
    finally:
        os.umask(before)


def own_process() -> None:
    """What belongs to the process and not to a command: rights of new files, and how signals end it."""
    os.umask(0o077)
    logs.end_on_signals()


def _fail(message: str, code: int) -> None:
    sys.stderr.write("driftrec: " + " ".join(message.split()) + "\n")
    sys.exit(code)


DISK_FULL = "no space left; free some and run `driftrec resume`"
DISK_FULL_WORDS = ("no space left", "disk is full", "database or disk is full")
"""How libraries say it that wrap the system's error in one of their own."""


def _machine_fault(error: Exception) -> str | None:
    """The sentence for a disk or memory that fails; None for anything else."""
    if isinstance(error, MemoryError) or "can't allocate memory" in str(error):
        return "out of memory; lower training.micro_batch_size or evaluation.batch_size, then run `driftrec resume`"
    place = RUNNING_IN[-1] if RUNNING_IN else "the disk"
    if not isinstance(error, OSError) or error.errno is None:
        full = any(words in str(error).lower() for words in DISK_FULL_WORDS)
        if not full and "file too large (os error" in str(error).lower():
            return _machine_fault(OSError(errno.EFBIG, "", str(place)))
        return f"{place}: {DISK_FULL}" if full else None
    place = error.filename or place
    faults = {
        errno.ENOSPC: DISK_FULL,
        errno.EDQUOT: "the disk quota is used up; free some space and run `driftrec resume`",
        errno.EROFS: "the file system is read-only; choose another --workspace",
        errno.EFBIG: "a file may not grow that large here (ulimit -f); raise the limit and run `driftrec resume`",
        errno.EIO: "the disk gave an input/output error; look at it, then run `driftrec resume`",
        errno.EACCES: "permission denied; choose another --workspace or mend its rights",
    }
    return f"{place}: {faults[error.errno]}" if error.errno in faults else None


def _crash(error: BaseException) -> str:
    """Write the traceback to a file and say where it is."""
    import tempfile

    text = "".join(traceback.format_exception(error))
    for folder in (*RUNNING_IN[-1:], Path(tempfile.gettempdir())):
        try:
            number = 1 + len(list(folder.glob("crash-*.log")))
            path = folder / f"crash-{number}.log"
            with path.open("x", encoding="utf-8") as handle:
                handle.write(text)
        except OSError:
            continue
        return f"{type(error).__name__}: {error}; this is a defect of driftrec, the full traceback is in {path}"
    return f"{type(error).__name__}: {error}"
