"""Looking at a model folder before a library opens it: what would run code, or is not what it claims, is refused."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

LONGEST_HEADER = 16 * 2**20
"""Bytes of a safetensors header; those of the largest public models have a tenth of it."""
LARGEST_CONFIG = 2**20
RUNS_CODE = {
    *("auto_map", "trust_remote_code", "custom_pipelines", "quantization_config", "kernel_config"),
    *("_attn_implementation", "_attn_implementation_internal"),
    *("_experts_implementation", "_experts_implementation_internal"),
}
"""Keys of config.json at any depth that name code or a backend to load."""
WIDTHS = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
    "U16": 2, "U32": 4, "U64": 8, "F8_E4M3": 1, "F8_E5M2": 1,
}  # fmt: skip


def check_model_folder(folder: Path) -> None:
    """Refuse a local model folder whose files would run code or contradict themselves.

    Raises:
        ValueError: no safetensors weights, a key of config.json that names code, or a malformed weight file.
    """
    weights = sorted(folder.glob("*.safetensors"))
    if not weights:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth", ".ckpt"))
        also = f"; {pickles[0]} is a pickle, which can run code, and is never read" if pickles else ""
        raise ValueError(f"{folder}: no *.safetensors weights{also}; convert the model to safetensors")
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        if (folder / name).exists():
            _check_config(folder / name)
    for path in weights:
        check_safetensors(path)


def _check_config(path: Path) -> None:
    if path.stat().st_size > LARGEST_CONFIG:
        raise ValueError(f"{path}: {path.stat().st_size} bytes; a model's settings have at most {LARGEST_CONFIG}")
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a readable JSON file: {error}") from None
    for key in _keys(found):
        if key in RUNS_CODE:
            raise ValueError(f"{path}: {key!r} makes the loader choose or run code; remove the key to use the rest")


def _keys(value: Any) -> list[str]:
    """Every key of nested objects."""
    found, stack = [], [value]
    while stack:
        part = stack.pop()
        if isinstance(part, dict):
            found += [str(key) for key in part]
            stack += list(part.values())
        elif isinstance(part, list):
            stack += part
    return found


def check_safetensors(path: Path) -> None:
    """Refuse a weight file whose header is too long, or whose tensors overlap, leave gaps or contradict their shapes.

    Raises:
        ValueError: it says which.
    """
    size = path.stat().st_size
    with path.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{path}: truncated, its header does not fit into {size} bytes; fetch it again")
        if length > LONGEST_HEADER:
            raise ValueError(f"{path}: a header of {length} bytes; at most {LONGEST_HEADER} are believed")
        text = handle.read(length)
    try:
        header = json.loads(text)
        tensors = [(name, row) for name, row in header.items() if name != "__metadata__"]
        rows = sorted((*map(int, row["data_offsets"]), name, row["dtype"], row["shape"]) for name, row in tensors)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise ValueError(f"{path}: its header is not a table of tensors; fetch it again") from None
    end = 0
    for start, stop, name, dtype, shape in rows:
        if dtype not in WIDTHS:
            raise ValueError(f"{path}: tensor {name} has the unknown type {dtype!r}")
        if start != end or stop - start != WIDTHS[dtype] * math.prod(shape):
            raise ValueError(f"{path}: tensor {name} overlaps another, leaves a gap or is not as large as its shape")
        end = stop
    if end != size - 8 - length:
        raise ValueError(f"{path}: {size - 8 - length} bytes of tensors where the header has {end}; fetch it again")
