"""A committed stage on disk: tensors as safetensors, state as JSON, a manifest of SHA-256, published by one rename.

A folder is complete or absent. It is verified before anything in it is parsed: a missing, added or altered file makes
it unusable, and it is moved to `quarantine/` so that the stage is trained again.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from models import adapter as lora
from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.errors import UserError
from stages.file_time import at_files
from stages.workspace import (
    Stamp,
    digest_of,
    is_settled,
    make_folder,
    need_space,
    read_json,
    remember_in,
    sha256_file,
    stamp_if_there,
    sync_folder,
    temporary_beside,
)

log = logging.getLogger("stages.checkpoint")
MANIFEST = "manifest.json"
ADAPTER, ROWS, BACKBONE = "adapter_model.safetensors", "token_rows.safetensors", "backbone.safetensors"
KEPT = "kept.safetensors"


@dataclass(frozen=True)
class Tensors:
    """What a stage trained.

    Attributes:
        adapter: LoRA matrices by `<module>.lora_A.weight`; empty without an adapter.
        rows: `input_rows` and `output_rows` (C, d); empty if they did not train.
        backbone: every trained weight of the stack; empty if none trained.
        kept: what the method's next stage needs besides weights; usually empty.
    """

    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    backbone: Mapping[str, Tensor] = field(default_factory=dict)
    kept: Mapping[str, Tensor] = field(default_factory=dict)


def trained_tensors(model: GenerativeModel) -> Tensors:
    """The model's adapter, and whatever else of it requires a gradient."""
    rows = {name: value.detach() for name, value in model.rows().items() if value.requires_grad}
    plain = {
        name: value.detach()
        for name, value in model.stack.named_parameters()
        if value.requires_grad and "parametrizations" not in name
    }
    return Tensors(adapter=lora.snapshot(model.stack), rows=rows, backbone=plain)


@at_files()
def read_tensors(folder: Path, prefix: str = "model") -> Tensors:
    """Load a verified checkpoint's tensors.

    Raises:
        UserError: a stored value is not finite, or not float32.
    """
    parts = {name: load_file(folder / name) if (folder / name).exists() else {} for name in (ADAPTER, ROWS, BACKBONE)}
    for file, tensors in parts.items():
        for name, value in tensors.items():
            if value.dtype != torch.float32:
                raise UserError(
                    f"{folder / file}: {name} has type {value.dtype}, not float32; remove the folder and train again"
                )
            if not torch.isfinite(value).all():
                raise UserError(f"{folder / file}: {name} holds NaN or infinity; remove the folder and train again")
    return Tensors(adapter=lora.own_names(parts[ADAPTER], prefix), rows=parts[ROWS], backbone=parts[BACKBONE])


@at_files()
def write_checkpoint(
    folder: Path,
    tensors: Tensors,
    adapter: AdapterConfig,
    state: Mapping[str, Any],
    prefix: str = "model",
    fence: Callable[[], None] = lambda: None,
) -> str:
    """Publish a checkpoint at `folder`; the first committer wins and a later one is discarded.

    Args:
        folder: its final name.
        tensors: what was trained.
        adapter: shape of the LoRA, for peft's own settings file.
        state: contents of state.json.
        prefix: name of the stack inside the model, as peft spells it.
        fence: called when all is written and nothing is published yet; raises where the commit is no longer wanted.

    Returns:
        SHA-256 of the manifest.

    Raises:
        UserError: not enough free space.
    """
    make_folder(folder.parent)
    parts = (tensors.adapter, tensors.rows, tensors.backbone, tensors.kept)
    need_space(folder.parent, sum(t.numel() * t.element_size() for part in parts for t in part.values()))
    with _publishing(folder) as temporary:
        if tensors.adapter:
            save_file(lora.peft_names(tensors.adapter, prefix), temporary / ADAPTER)
            settings = lora.peft_config(adapter.rank, adapter.alpha, adapter.targets)
            (temporary / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        for name, part in ((ROWS, tensors.rows), (BACKBONE, tensors.backbone), (KEPT, tensors.kept)):
            if part:
                save_file({key: value.contiguous() for key, value in part.items()}, temporary / name)
        text = json.dumps(state, indent=2, allow_nan=False)
        (temporary / "state.json").write_text(text, encoding="utf-8")
        _write_manifest(temporary)
        fence()
    return sha256_file(folder / MANIFEST)


@contextmanager
def _publishing(folder: Path) -> Iterator[Path]:
    temporary = temporary_beside(folder)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError:
            if not (folder / MANIFEST).exists():
                raise
        sync_folder(folder.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _write_manifest(folder: Path) -> None:
    files = sorted(path for path in folder.iterdir())
    for path in files:
        _sync_file(path)
    rows = [{"name": p.name, "size": p.stat().st_size, "sha256": sha256_file(p)} for p in files]
    (folder / MANIFEST).write_text(json.dumps({"schema": 1, "files": rows}, indent=2), encoding="utf-8")
    _sync_file(folder / MANIFEST)
    sync_folder(folder)


def _sync_file(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


@at_files()
def fault_of(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be used, or None if every file is as its manifest says."""
    if not (folder / MANIFEST).exists():
        return "no manifest"
    try:
        manifest = read_json(folder / MANIFEST)
        expected = {str(row["name"]): (int(row["size"]), str(row["sha256"])) for row in manifest["files"]}
        schema = manifest["schema"]
    except (UserError, KeyError, TypeError, ValueError):
        return "unreadable manifest"
    if schema != 1:
        return f"manifest schema {schema}, this version reads 1"
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != expected.keys():
        return f"files missing or added: {', '.join(sorted(found ^ expected.keys()))}"
    wrong = [
        name
        for name, (size, digest) in expected.items()
        if (folder / name).stat().st_size != size or sha256_file(folder / name) != digest
    ]
    return f"altered: {', '.join(wrong)}" if wrong else None


def tensors_digest(folder: Path) -> str:
    """SHA-256 over the digests of a checkpoint's tensor files: what a later stage trains from.

    Times and memory in state.json differ between two trainings of the same bytes, so the manifest's own hash would not
    do: a stage trained again to the same tensors must not make its children stale.

    Raises:
        UserError: no readable manifest.
    """
    stamp = stamp_if_there(f"{folder}/{MANIFEST}")
    known = _tensors.get(folder)
    if known is not None and known[0] == stamp:
        return known[1]
    digest = _tensors_named(folder)
    if stamp is not None and is_settled(stamp):
        _tensors[folder] = stamp, digest
    return digest


@at_files()
def _tensors_named(folder: Path) -> str:
    rows = read_json(folder / MANIFEST)["files"]
    return digest_of({row["name"]: row["sha256"] for row in rows if row["name"].endswith(".safetensors")})


_tensors: dict[Path, tuple[Stamp, str]] = {}
"""By folder: what `tensors_digest` gave while its manifest was this one."""
remember_in(_tensors)


def other_inputs(folder: Path, inputs: Mapping[str, Any]) -> str | None:
    """Why the checkpoint in `folder` is not the one its name promises, or None.

    Args:
        folder: a checkpoint whose files are as its manifest says.
        inputs: what its key is the digest of, as `stages.commit.links` says.
    """
    made_with = read_json(folder / "state.json").get("inputs")
    if not isinstance(made_with, dict):
        return "written by an earlier version, which did not note what it was made with"
    wanted = json.loads(json.dumps(inputs))
    wrong = sorted(name for name in wanted.keys() | made_with.keys() if wanted.get(name) != made_with.get(name))
    return f"it was made with another {', '.join(wrong)}" if wrong else None


def stale_parent(folder: Path, parents: Mapping[str, str]) -> str | None:
    """Why the checkpoint in `folder` no longer follows from its lineage, or None.

    Args:
        folder: a checkpoint whose files are as its manifest says.
        parents: `tensors_digest` by name of the checkpoints before it, as they are now.
    """
    trained_from = read_json(folder / "state.json").get("parents")
    if not isinstance(trained_from, dict):
        return "written by an earlier version, which did not note what its parents' tensors were"
    if trained_from.keys() != parents.keys():
        return "its parents are other checkpoints now"
    changed = [name for name, digest in parents.items() if trained_from[name] != digest]
    return f"its parent {changed[0]} holds other tensors than it was trained from" if changed else None


def quarantine(folder: Path, reason: str) -> Path:
    """Move a bad checkpoint (or file) aside to `runs/quarantine`, with the reason written beside it."""
    place = folder.parent.parent / "quarantine"
    place.mkdir(parents=True, exist_ok=True)
    target = next(p for n in range(10_000) if not (p := place / f"{folder.name}.{n}").exists())
    os.rename(folder, target)
    (place / f"{target.name}.reason.txt").write_text(reason + "\n", encoding="utf-8")
    log.warning("%s: %s; moved to %s and made again", folder, reason, target)
    return target


def size_of(folder: Path) -> int:
    """Bytes of all files in a checkpoint."""
    return sum(path.stat().st_size for path in folder.iterdir())
