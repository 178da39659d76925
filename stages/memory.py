"""How much memory this process has held at most, where the system tells."""

from __future__ import annotations

from pathlib import Path


def forget_peak_memory() -> bool:
    """Start the measurement of `peak_memory` anew; False where the system cannot."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        return False
    return True


def peak_memory() -> int | None:
    """Resident bytes of this process at most since `forget_peak_memory`; None where the system does not say."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), None)
