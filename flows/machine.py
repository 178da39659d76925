"""What the numbers were made with: versions, processor, memory, disk."""

from __future__ import annotations

import ctypes
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from models import processor
from stages.errors import UserError

LIBRARIES = (
    "driftrec",
    "torch",
    "transformers",
    "peft",
    "polars",
    "numpy",
    "scikit-learn",
    "prefect",
    "mlflow",
    "fastapi",
    "sqlalchemy",
)
FORMATS = {"bfloat16": "bfloat16 autocast over float32 weights"}
"""Names of number formats in words; any other is called by its own name."""
KEPT = 2**25
"""Bytes of freed memory that a service holds on to, for each of its threads that rank."""
MMAP_THRESHOLD, TRIM_THRESHOLD = -3, -1
"""Numbers of glibc's mallopt for the size from which memory is mapped for itself, and for what is given back."""
FEATURES = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")


def versions() -> dict[str, str | None]:
    """Python's and each library's version; None where it is not installed."""
    return {"python": platform.python_version()} | {name: installed(name) for name in LIBRARIES}


def installed(name: str) -> str | None:
    """Version of a distribution, or None."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def description() -> dict[str, Any]:
    """Processor, cores this process may use, memory in bytes, thread setting; no host name, no user name."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": processor.told("model name") or platform.processor() or "unknown",
        "cores": cores(),
        "features": features(),
        "memory_bytes": memory(),
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
    }


def keep_freed_memory() -> None:
    """Let glibc hold on to what a pass has freed, up to `KEPT`, for the next pass.

    Otherwise each one is given fresh pages, which the kernel has to clear. Another C library is left as it is.
    """
    if platform.libc_ver()[0] == "glibc":
        library = ctypes.CDLL(None)
        for name in (MMAP_THRESHOLD, TRIM_THRESHOLD):
            library.mallopt(name, KEPT)


def arithmetic(precision: str, device: str) -> str:
    """The sentence every run logs before it trains, about this machine's number format and where it computes.

    Raises:
        UserError: the device is not there.
    """
    from models.backbone import compute_device, wants_bfloat16

    try:
        place = compute_device(device)
    except ValueError as error:
        raise UserError(str(error)) from None
    form = FORMATS["bfloat16"] if wants_bfloat16(precision, place) else "float32"
    return f"training in {form} on {'a GPU' if place.type == 'cuda' else 'the CPU'} (precision = {precision})"


def _place(device: str, threads: int) -> str:
    return "on a GPU" if device == "cuda" else f"on {threads} CPU {'thread' if threads == 1 else 'threads'}"


def trained_in(states: Iterable[dict[str, Any]]) -> str | None:
    """The sentence of a report about its checkpoints' number formats and threads, whichever machine made them.

    Args:
        states: contents of state.json; `precision`, `device` and `threads` are read.

    Returns:
        None where no checkpoint says.
    """
    ways = {
        (state["precision"], _place(state.get("device", "cpu"), state["threads"]))
        for state in states
        if {"precision", "threads"} <= set(state)
    }
    named = [f"in {FORMATS.get(form, form)} {place}" for form, place in sorted(ways)]
    several = "; checkpoints made in different ways stand side by side" if len(named) > 1 else ""
    return f"Trained {' and '.join(named)}{several}." if named else None


def git_sha() -> str | None:
    """Commit of the checkout this code runs from, marked where files differ from it; None outside of one."""
    folder = Path(__file__).resolve().parent
    if not (folder.parent / ".git").exists():
        return None
    describe = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(describe, capture_output=True, text=True, timeout=10, check=True)  # noqa: S603
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def memory() -> int | None:
    """Bytes of memory, None where the system does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, OSError, ValueError):
        return None


def features() -> list[str]:
    """Which of the instruction sets that matter here the processor has; empty where the system does not say."""
    found = processor.features()
    return [name for name in FEATURES if name in found]
