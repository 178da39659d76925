"""What driftrec asks of the machine it runs on."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

PASSES = """
import resource, sys, threading
import numpy as np
from flows.machine import keep_freed_memory

def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

def passes(count):
    for _ in range(count):
        parts = [np.ones(2**18) for _ in range(4)]  # 2 MiB each
        del parts

def measured():
    passes(3)
    before = faults()
    passes(20)
    print(faults() - before)

if sys.argv[1] == "keep":
    keep_freed_memory()
thread = threading.Thread(target=measured)
thread.start()
thread.join()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc's allocator is set")
def test_a_thread_that_keeps_freed_memory_is_given_no_fresh_pages() -> None:
    def fresh_pages(how: str) -> int:
        done = subprocess.run([sys.executable, "-c", PASSES, how], capture_output=True, text=True, check=True)
        return int(done.stdout)

    assert fresh_pages("keep") < 100 < fresh_pages("leave")
