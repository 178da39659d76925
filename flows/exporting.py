"""The way to `flows.pyfunc` for everybody but MLflow: its import makes MLflow warn of type hints of its own."""

from __future__ import annotations

import warnings
from pathlib import Path


def export_model(root: Path, folder: Path, method: str | None = None, seed: int | None = None) -> Path:
    """`flows.pyfunc.export_model`, which see."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*type hint")
        from flows import pyfunc

    return pyfunc.export_model(root, folder, method, seed)
