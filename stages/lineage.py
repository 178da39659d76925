"""Whether a checkpoint can be used: its files, what it was made with, and what it was trained from.

A lineage of hundreds of stages is looked through at each of them. What this process has found good is not read again
while every file of the folder keeps its number, size and times, and while the checkpoints before it keep their tensors;
another process reads and hashes everything anew.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from stages.checkpoint import fault_of, other_inputs, stale_parent, tensors_digest
from stages.commit import Link
from stages.workspace import Stamp, is_settled, read_json, remember_in, stamp_if_there, stamp_of

Stamps: TypeAlias = tuple[Stamp, ...]
"""Of a folder, whose own shows that a file came or went, and of every file in it, in the order of their names."""
LEFT_OUT = "left_out.json"
"""Beside an exported model's checkpoints: the digest of the tensors of those that it does not read, by name."""
_good: dict[Path, tuple[Stamps, str, str]] = {}
"""By folder: its files, its key, and the digest of its parents, when it was found good."""
_whole: dict[Path, Stamps] = {}
"""By folder: its files when they were as its manifest says."""
_listed: dict[Path, tuple[Stamp, tuple[str, ...]]] = {}
"""By folder: what it was when these were the paths of its files."""
remember_in(_good)
remember_in(_whole)
remember_in(_listed)


@dataclass
class Parents:
    """The checkpoints of a lineage so far.

    Attributes:
        tensors: digest of their tensors by name, oldest first.
        chain: one digest of all of them, made anew with each.
    """

    tensors: dict[str, str] = field(default_factory=dict)
    chain: str = ""

    def add(self, folder: Path) -> None:
        """The next checkpoint, whose files are as its manifest says."""
        self.note(folder.name, tensors_digest(folder))

    def note(self, name: str, tensors: str) -> None:
        """The next checkpoint, by its name and the digest of its tensors."""
        self.tensors[name] = tensors
        self.chain = hashlib.sha256(f"{self.chain} {name} {tensors}".encode()).hexdigest()


def fault_in_lineage(folder: Path, link: Link, parents: Parents) -> str | None:
    """Why the checkpoint in `folder` cannot be used after `parents`, or None.

    Args:
        folder: where it should be.
        link: what its key is the digest of.
        parents: the checkpoints before it, as they are now.
    """
    # Looked at before the files are read, so that a write meanwhile shows at the next look.
    stamps = _stamps(folder)
    found = stamps, link.key, parents.chain
    if stamps and _good.get(folder) == found:
        return None
    fault = fault_in_files(folder) or other_inputs(folder, link.inputs) or stale_parent(folder, parents.tensors)
    if fault is None and is_settled(*stamps):
        _good[folder] = found
    return fault


def fault_in_files(folder: Path) -> str | None:
    """`stages.checkpoint.fault_of`, whose hashing this process does not repeat while the files stay what they were."""
    stamps = _stamps(folder)
    if stamps and _whole.get(folder) == stamps:
        return None
    fault = fault_of(folder)
    if fault is None and is_settled(*stamps):
        _whole[folder] = stamps
    return fault


def left_out(checkpoints: Path) -> dict[str, str]:
    """The digest of the tensors of checkpoints that were not exported with a model, by name; mostly none."""
    noted = checkpoints / LEFT_OUT
    return read_json(noted) if noted.exists() else {}


def _stamps(folder: Path) -> Stamps:
    """Nothing where the folder, or a file that it lists, is not there."""
    own = stamp_if_there(folder)
    if own is None:
        return ()
    known = _listed.get(folder)
    if known is None or known[0] != own:
        known = own, tuple(sorted(str(path) for path in folder.iterdir())) if folder.is_dir() else ()
        if is_settled(own):
            _listed[folder] = known
    try:
        return own, *map(stamp_of, known[1])
    except FileNotFoundError:
        return ()
