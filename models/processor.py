"""What the system tells of its processor: nothing where it is not Linux."""

from __future__ import annotations

from pathlib import Path


def told(key: str) -> str | None:
    """The first processor's `key` in /proc/cpuinfo."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((line.partition(":")[2].strip() for line in lines if line.partition(":")[0].strip() == key), None)


def features() -> set[str]:
    """Its instruction sets."""
    return set((told("flags") or "").split())
