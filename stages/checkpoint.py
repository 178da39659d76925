"""A committed stage on disk: tensors as safetensors, state as JSON, a manifest of SHA-256, published by one rename.

A folder is complete or absent. It is verified before anything in it is parsed: a missing, added or altered file makes
it unusable, and it is moved to `quarantine/` so that the stage is trained again.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
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
from stages.workspace import need_space, read_json, sha256_file, sync_folder

MANIFEST = "manifest.json"
ADAPTER, ROWS, BACKBONE = "adapter_model.safetensors", "token_rows.safetensors", "backbone.safetensors"


@dataclass(frozen=True)
class Tensors:
    """What a stage trained.

    Attributes:
        adapter: LoRA matrices by `<module>.lora_A.weight`; empty without an adapter.
        rows: `input_rows` and `output_rows` (C, d); empty if they did not train.
        backbone: every trained weight of the stack; empty if none trained.
    """

    adapter: Mapping[str, Tensor] = field(default_factory=dict)
    rows: Mapping[str, Tensor] = field(default_factory=dict)
    backbone: Mapping[str, Tensor] = field(default_factory=dict)


def trained_tensors(model: GenerativeModel) -> Tensors:
    """The model's adapter, and whatever else of it requires a gradient."""
    rows = {name: value.detach() for name, value in model.rows().items() if value.requires_grad}
    plain = {
        name: value.detach()
        for name, value in model.stack.named_parameters()
        if value.requires_grad and "parametrizations" not in name
    }
    return Tensors(adapter=lora.snapshot(model.stack), rows=rows, backbone=plain)


def read_tensors(folder: Path, prefix: str = "model") -> Tensors:
    """Load a verified checkpoint's tensors.

    Raises:
        UserError: a stored value is not finite.
    """
    parts = {name: load_file(folder / name) if (folder / name).exists() else {} for name in (ADAPTER, ROWS, BACKBONE)}
    for file, tensors in parts.items():
        for name, value in tensors.items():
            if not torch.isfinite(value).all():
                raise UserError(f"{folder / file}: {name} holds NaN or infinity; remove the folder and train again")
    return Tensors(adapter=lora.own_names(parts[ADAPTER], prefix), rows=parts[ROWS], backbone=parts[BACKBONE])


def write_checkpoint(
    folder: Path, tensors: Tensors, adapter: AdapterConfig, state: Mapping[str, Any], prefix: str = "model"
) -> str:
    """Publish a checkpoint at `folder`; the first committer wins and a later one is discarded.

    Returns:
        SHA-256 of the manifest.

    Raises:
        UserError: not enough free space.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    parts = (tensors.adapter, tensors.rows, tensors.backbone)
    need_space(folder.parent, sum(t.numel() * t.element_size() for part in parts for t in part.values()))
    with _publishing(folder) as temporary:
        if tensors.adapter:
            save_file(lora.peft_names(tensors.adapter, prefix), temporary / ADAPTER)
            settings = lora.peft_config(adapter.rank, adapter.alpha, adapter.targets)
            (temporary / "adapter_config.json").write_text(json.dumps(settings, indent=2), encoding="utf-8")
        for name, part in ((ROWS, tensors.rows), (BACKBONE, tensors.backbone)):
            if part:
                save_file({key: value.contiguous() for key, value in part.items()}, temporary / name)
        text = json.dumps(state, indent=2, allow_nan=False)
        (temporary / "state.json").write_text(text, encoding="utf-8")
    return sha256_file(folder / MANIFEST)


@contextmanager
def _publishing(folder: Path) -> Iterator[Path]:
    temporary = folder.with_name(f".tmp-{folder.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir(mode=0o700)
    try:
        yield temporary
        _write_manifest(temporary)
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


def fault_of(folder: Path) -> str | None:
    """Why the checkpoint in `folder` cannot be used, or None if every file is as its manifest says."""
    if not (folder / MANIFEST).exists():
        return "no manifest"
    try:
        rows = read_json(folder / MANIFEST)["files"]
        expected = {row["name"]: row for row in rows}
    except (UserError, KeyError, TypeError):
        return "unreadable manifest"
    found = {path.name for path in folder.iterdir()} - {MANIFEST}
    if found != expected.keys():
        return f"files missing or added: {', '.join(sorted(found ^ expected.keys()))}"
    wrong = [name for name, row in expected.items() if sha256_file(folder / name) != row["sha256"]]
    return f"altered: {', '.join(wrong)}" if wrong else None


def quarantine(folder: Path, reason: str) -> Path:
    """Move a bad checkpoint aside, with the reason written beside it."""
    place = folder.parent.parent / "quarantine"
    place.mkdir(parents=True, exist_ok=True)
    target = next(p for n in range(10_000) if not (p := place / f"{folder.name}.{n}").exists())
    os.rename(folder, target)
    (place / f"{target.name}.reason.txt").write_text(reason + "\n", encoding="utf-8")
    return target


def size_of(folder: Path) -> int:
    """Bytes of all files in a checkpoint."""
    return sum(path.stat().st_size for path in folder.iterdir())
