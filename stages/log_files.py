"""What `logs/` holds: the accepted events as text, the same as numbers, and the manifest that vouches for both.

`log.parquet` is the log. `numbers.parquet` and `names.parquet` are the same rows as `stages.coded` numbered them; they
spare the split a second numbering, and it does without them where they are missing or damaged.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import polars as pl

from stages.coded import NAMED, Coded, Coder
from stages.content import CHUNK, write_parquet
from stages.errors import UserError
from stages.workspace import SCHEMA, Workspace, read_json, sha256_file, temporary_beside, write_json

NUMBERS_FILE, NAMES_FILE = "numbers.parquet", "names.parquet"
HASHES = {"sha256": "log.parquet", "numbers": NUMBERS_FILE, "names": NAMES_FILE}
"""By key of the manifest, the file whose SHA-256 it holds."""


def store_manifest(workspace: Workspace, log: Coded, report: dict[str, Any]) -> None:
    """Write the log's names and the manifest, with the hashes of what stands beside it."""
    folder = workspace.log.parent
    names = [pl.DataFrame({"text": texts}).select(field=pl.lit(name), text="text") for name, texts in log.names.items()]
    hashes = {"names": write_parquet(pl.concat(names), folder / NAMES_FILE)}
    hashes |= {key: sha256_file(folder / file) for key, file in HASHES.items() if key not in hashes}
    write_json(folder / "manifest.json", {"schema": SCHEMA, **hashes, "step": log.step, **report}, seal=True)


def checked_manifest(workspace: Workspace) -> dict[str, Any]:
    """What `stages.log.LogReport` holds, of a log whose file is the one that was written.

    Raises:
        UserError: there is none, or it is another file.
    """
    if not workspace.log.is_file():
        raise UserError(f"{workspace.log}: no log yet; run driftrec ingest first")
    manifest = read_json(workspace.log.with_name("manifest.json"))
    if manifest.get("sha256") != sha256_file(workspace.log):
        raise UserError(f"{workspace.log}: the file is not the one its manifest describes; run driftrec ingest again")
    return {key: value for key, value in manifest.items() if key not in ("schema", "step", *HASHES)}


@contextmanager
def coded_log(workspace: Workspace) -> Iterator[Coded]:
    """The stored log as numbers; a log whose numbers cannot be believed is numbered afresh."""
    folder = workspace.log.parent
    manifest = read_json(folder / "manifest.json")
    if all(_is_whole(folder / file, manifest.get(key)) for key, file in HASHES.items()):
        table = pl.read_parquet(folder / NAMES_FILE)
        names = {name: table.filter(pl.col("field") == name)["text"] for name in NAMED}
        yield Coded(folder / NUMBERS_FILE, manifest["accepted"], names, manifest["step"])
        return
    coder, table = Coder(folder), pl.scan_parquet(workspace.log, glob=False)
    for start in range(0, manifest["accepted"], CHUNK):
        coder.add(table.slice(start, CHUNK).collect())
    afresh = temporary_beside(folder / NUMBERS_FILE)
    try:
        yield coder.as_met(afresh)
    finally:
        afresh.unlink(missing_ok=True)


def _is_whole(path: Path, sha256: str | None) -> bool:
    return path.is_file() and sha256_file(path) == sha256
