"""The public logs of docs/data.md; a test that needs one is skipped where it is not there."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


def public_log(folder: str = ".") -> Path:
    """A folder below DRIFTREC_DATA; skips the test where the variable is absent or empty, or the folder is missing."""
    root = os.environ.get("DRIFTREC_DATA")
    if not root:
        pytest.skip("DRIFTREC_DATA is not set; docs/data.md says where each public set comes from")
    if not (Path(root) / folder).is_dir():
        pytest.skip(f"DRIFTREC_DATA has no folder {folder}; docs/data.md says where it comes from")
    return Path(root) / folder
