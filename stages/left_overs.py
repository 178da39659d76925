"""What killed processes left behind: temporary files and folders whose maker is gone."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from stages.workspace import Stamp, is_left_over, is_settled, remember_in, stamp_of

_plain: dict[Path, Stamp] = {}
"""By folder that held neither folders nor temporary files: what it was then. A file that comes is seen in its stamp."""
remember_in(_plain)
FOREIGN = ("mlartifacts", "prefect")
"""Folders of a workspace that MLflow and Prefect alone write to, and that grow with every run."""


def left_overs(root: Path) -> list[Path]:
    """What killed processes left below `root`, in the order of names; nothing inside another left-over."""
    found: list[Path] = []
    ahead = [root]
    while ahead:
        place = ahead.pop()
        try:
            own = stamp_of(place)
            if _plain.get(place) == own:
                continue
            with os.scandir(place) as entries:
                there = list(entries)
        except OSError:  # it went meanwhile, or is not ours to read
            continue
        temporary = [entry for entry in there if entry.name.startswith(".tmp-")]
        dead = [entry.name for entry in temporary if is_left_over(Path(entry))]
        passed_over = {*dead, *(FOREIGN if place == root else ())}
        folders = [entry for entry in there if entry.is_dir(follow_symlinks=False)]
        found += [place / name for name in dead]
        ahead += [place / entry.name for entry in folders if entry.name not in passed_over]
        if not temporary and not folders and is_settled(own):
            _plain[place] = own
    return sorted(found)


def sweep(root: Path) -> list[Path]:
    """Remove what killed processes left below `root`; what a living one is writing stays."""
    found = left_overs(root)
    for path in found:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
    return found
