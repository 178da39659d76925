"""A server that ends with the command that started it, however that ends, SIGKILL included.

Between the two stands this module as a process of its own: it leads the server's process group, and the command's end
closes the pipe that is its standard input. It imports nothing but the standard library.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

GRACE = 3.0
"""Seconds a server has to end by itself."""


@contextmanager
def tethered(
    words: Sequence[str], environment: Mapping[str, str], output: Path, grace: float = GRACE
) -> Iterator[subprocess.Popen[bytes]]:
    """`python -m words…` for as long as the block lasts; all that it started is gone afterwards.

    Args:
        words: name of a module, and its arguments.
        environment: of the process.
        output: file for what it says, appended to.
        grace: seconds it has to end by itself.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("ab") as said:
        process = subprocess.Popen(  # noqa: S603
            [sys.executable, "-m", __name__, str(grace), *words],
            env={**environment},
            stdout=said,
            stderr=said,
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        try:
            yield process
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(grace)
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if process.stdin is not None:
                process.stdin.close()


def _follow_to_the_grave(grace: float, gone: threading.Event) -> None:
    """Wait for the command's end, then end the whole group."""
    while os.read(0, 4096):
        pass
    gone.set()
    os.killpg(0, signal.SIGTERM)
    time.sleep(grace)
    os.killpg(0, signal.SIGKILL)


def main() -> None:
    """Run the module named after the grace; its exit code is this process's."""
    grace, *words = sys.argv[1:]
    # The server is told by the same signal to the group; this process goes when it has gone.
    signal.signal(signal.SIGTERM, lambda *_: None)
    server, gone = subprocess.Popen([sys.executable, "-m", *words], stdin=subprocess.DEVNULL), threading.Event()  # noqa: S603
    threading.Thread(target=_follow_to_the_grave, args=(float(grace), gone), daemon=True).start()
    code = server.wait()
    if gone.is_set():
        os.killpg(0, signal.SIGKILL)  # what the server left behind; the command would have seen to it
    sys.exit(code)


if __name__ == "__main__":
    main()
