"""The catalogue in service: every item of the log with its text, its first stage and its semantic ID.

What an item is called and which vector it gets is decided by what was known at the end of the stage in which it first
appears; everything fitted is fitted on stage 0 and kept in `catalogue/quantizer/`, so that a later stage adds rows and
changes none. A stage that late rows rebuild moves no code either: items that have one keep it, with their texts, and at
most move to an earlier first stage, which gives them another number; new ones get theirs from what is frozen.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl

from models.semantic_ids import Collisions, assign_ids, collisions, read_index
from stages.config import Config
from stages.errors import UserError
from stages.interactions import coding_order
from stages.item_table import is_mended, mend_item_table, read_item_table
from stages.item_vectors import FITTED, READY, drop_fitted, fit_coder, load_coder, settle_fitted, stage_vectors
from stages.stage_files import read_stages, stage_rows
from stages.workspace import (
    SCHEMA,
    Workspace,
    digest_of,
    read_json,
    read_json_once,
    replacing,
    sha256_file,
    sha256_if_there,
    sync_folder,
    write_json,
)

IntArray: TypeAlias = npt.NDArray[np.int64]
Progress: TypeAlias = Callable[[str], None]

NEXT = "next.json"
_CODES = pl.List(pl.Int64)
_TEXT_COLUMNS = ("title", "text", "categories")


@dataclass(frozen=True)
class ItemReport:
    """What `build_semantic_ids` made.

    Attributes:
        items: items with at least one event.
        catalogue_only: items of the catalogue files without any event; they are left out.
        source: "fitted" here or "shipped" with the data.
        vectors: "tfidf", "cooccurrence" or "encoder"; None for shipped IDs.
        codes_per_level: number of codes at each level, the last, disambiguating one included.
        collisions: items that share an ID.
        extended: items that have their codes from an earlier build.
        digest: SHA-256 of items.parquet.
        reused: everything was there already.
    """

    items: int
    catalogue_only: int
    source: str
    vectors: str | None
    codes_per_level: tuple[int, ...]
    collisions: Collisions
    extended: int
    digest: str
    reused: bool


def build_semantic_ids(config: Config, workspace: Workspace, progress: Progress = lambda _: None) -> ItemReport:
    """Write `catalogue/items.parquet`, its manifest and `catalogue/quantizer/` for the stages of the workspace.

    The same stages, settings and catalogue return the files that are there, once their hashes are checked. Where stages
    were added to those of an earlier build, or late rows rebuilt some, its codes stay, and its frozen quantizer codes
    the new items.

    Raises:
        UserError: a stage file is missing or damaged, the IDs have no room, a shipped index lacks an item, or the item
            table is damaged and gone from the sources.
    """
    stages = read_json_once(workspace.stages / "manifest.json")
    _check_stage_files(workspace, stages)
    settle_codes(workspace)
    digests, ends = ([stage[key] for stage in stages["stages"]] for key in ("digest", "end"))
    inputs = {"recipe": _recipe(config, digests), "stages": digests, "ends": ends}
    inputs["raw"] = mend_item_table(config, workspace)
    earlier = _intact(workspace, progress)
    if earlier is not None and earlier["inputs"] == inputs:
        return _report(earlier, reused=True)
    raw = read_item_table(workspace)
    kept = _kept(config, workspace, earlier, inputs, grown="appended" in stages)
    before = [] if kept is None or earlier is None else earlier["inputs"]["stages"]
    same = kept if digests[: len(before)] == before else None
    items = _with_text(_first_stages(workspace, len(digests), same, len(before)), raw, stages)
    if config.items.index == "shipped":
        frame, facts = _shipped(config, items)
    else:
        frame, facts = _fitted(config, workspace, items, kept, progress)
    frame = _in_order(frame, kept)
    catalogue_only = raw.select("item_id").unique().join(items, on="item_id", how="anti").height
    manifest = _write(workspace, frame, {**facts, "catalogue_only": catalogue_only, "inputs": inputs})
    report = _report(manifest, reused=False)
    sizes = " x ".join(map(str, report.codes_per_level))
    progress(f"{report.items} items as {report.source} codes {sizes}; {report.collisions.items_sharing} share an ID")
    return report


def _recipe(config: Config, stages: Sequence[str]) -> str:
    """Digest of everything that is fitted, or decides what is fitted: settings, stage 0, a shipped index."""
    index = None
    if config.items.index == "shipped":
        index = _digest_if_there(Path(str(config.log.index)))
    first = stages[0] if stages else None
    settings = config.items.model_dump(mode="json")
    return digest_of(
        {"schema": SCHEMA, "items": settings, "baskets": config.evaluation.baskets, "first": first, "index": index}
    )


def _digest_if_there(path: Path) -> str | None:
    return sha256_file(path) if path.is_file() else None


def _check_stage_files(workspace: Workspace, stages: Mapping[str, Any]) -> None:
    for stage in stages["stages"]:
        path = workspace.stage_file(stage["index"])
        if sha256_if_there(path) != stage["sha256"]:
            raise UserError(f"{path}: missing, or not the file that stages/manifest.json names; split the log again")


def _intact(workspace: Workspace, progress: Progress) -> dict[str, Any] | None:
    """The manifest of an earlier build whose files are all unharmed."""
    path = workspace.catalogue / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
    except UserError as error:
        progress(f"{error}; building the catalogue anew")
        return None
    if manifest.get("schema") != SCHEMA:
        raise UserError(f"{path}: schema {manifest.get('schema')!r}, not {SCHEMA}; choose another workspace")
    files = {"items.parquet": manifest["digest"], **manifest["files"]}
    whole = all(sha256_if_there(workspace.catalogue / name) == digest for name, digest in files.items())
    if not whole:
        progress(f"{path.parent}: files differ from their manifest; building them anew")
    return manifest if whole else None


def coded_stages(workspace: Workspace) -> list[str]:
    """Digests of the stages whose items have codes; none where the catalogue's manifest cannot be read."""
    try:
        return list(read_json(workspace.catalogue / "manifest.json")["inputs"]["stages"])
    except (UserError, KeyError):
        return []


def coded_items(workspace: Workspace) -> pl.DataFrame:
    """item_id of every item that has codes; where the catalogue is damaged, of those that it was built of."""
    path, before = workspace.catalogue / "items.parquet", coded_stages(workspace)
    if before and _digest_if_there(path) == read_json(workspace.catalogue / "manifest.json")["digest"]:
        return pl.read_parquet(path, columns=["item_id"])
    rows = stage_rows(workspace)
    same = [place for place, (row, digest) in enumerate(zip(rows, before, strict=False)) if row["digest"] == digest]
    met = read_stages(workspace, range(len(rows)), ["item_id"]).filter(pl.col("stage").is_in(same))
    return met.select("item_id").unique()


def _kept(
    config: Config, workspace: Workspace, earlier: dict[str, Any] | None, inputs: Mapping[str, Any], grown: bool
) -> pl.DataFrame | None:
    """Rows of an intact earlier build of this very log, or None where it was read or cut anew, or by other settings.

    Args:
        config: the experiment.
        workspace: where it is.
        earlier: its manifest.
        inputs: what the catalogue is to be built of now.
        grown: the log has grown by `stages.append`, which adds stages, and late rows to those that are there.
    """
    if earlier is None or earlier["inputs"]["recipe"] != _recipe(config, earlier["inputs"]["stages"]):
        return None
    before, ends = (earlier["inputs"].get(key, []) for key in ("stages", "ends"))
    added = len(inputs["stages"]) > len(before) or is_mended(workspace)
    same = added and inputs["stages"][: len(before)] == before
    rebuilt = grown and len(ends) == len(before) and inputs["ends"][: len(ends)] == ends
    if not (same or rebuilt):
        return None
    rows = pl.read_parquet(workspace.catalogue / "items.parquet")
    return rows.with_columns(coding_order(rows)).sort("coded")


def _in_order(frame: pl.DataFrame, kept: pl.DataFrame | None) -> pl.DataFrame:
    """The items by number, with their place in the order in which they got their codes."""
    frame, order = frame.sort("first_stage", "item_id"), frame.clear().select("item_id", coded=pl.lit(None, pl.Int64))
    order = order if kept is None else kept.select("item_id", pl.col("coded").cast(pl.Int64))
    start = 0 if kept is None else kept.height
    frame = frame.join(order, on="item_id", how="left", maintain_order="left")
    fresh = pl.col("coded").is_null()
    return frame.with_columns(coded=pl.when(fresh).then(start - 1 + fresh.cum_sum().cast(pl.Int64)).otherwise("coded"))


def _first_stages(workspace: Workspace, count: int, kept: pl.DataFrame | None, before: int) -> pl.DataFrame:
    """item_id and first_stage, in the order of item numbers; only stages that are new to `kept` are read.

    Args:
        workspace: with `count` stages.
        count: how many.
        kept: rows of an earlier build of the first `before` of them, as they are now.
        before: how many that was.
    """
    rows = pl.DataFrame(schema={"item_id": pl.String, "stage": pl.Int64})
    if kept is not None:
        rows = kept.select("item_id", stage=pl.col("first_stage").cast(pl.Int64))
    if fresh := range(0 if kept is None else before, count):
        rows = pl.concat([rows, read_stages(workspace, fresh, ["item_id"])])
    if rows["stage"].min() != 0:
        raise UserError("stage 0 has no events, so there is nothing to fit item vectors on; move the first boundary")
    return rows.group_by("item_id").agg(first_stage=pl.col("stage").min()).sort("first_stage", "item_id")


def _with_text(items: pl.DataFrame, raw: pl.DataFrame, stages: Mapping[str, Any]) -> pl.DataFrame:
    """Add title, text and categories as known by the end of each item's first stage."""
    last = len(stages["stages"]) - 1
    ends = pl.DataFrame(
        {
            "first_stage": [stage["index"] for stage in stages["stages"]],
            "end": [
                None if stage["end"] is None else datetime.fromisoformat(stage["end"]) for stage in stages["stages"]
            ],
        },
        schema={"first_stage": pl.Int64, "end": pl.Datetime("us", "UTC")},
    )
    open_end = pl.col("end").is_null() & (pl.col("first_stage") == last)
    known = (
        raw.join(items, on="item_id")
        .join(ends, on="first_stage")
        .filter(pl.col("timestamp").is_null() | open_end | (pl.col("timestamp") < pl.col("end")))
    )
    for column in _TEXT_COLUMNS:
        items = items.join(_most_frequent(known, column), on="item_id", how="left", maintain_order="left")
    return items


def _most_frequent(rows: pl.DataFrame, column: str) -> pl.DataFrame:
    """Each item's most frequent value that is not empty; ties to the one that sorts first."""
    key = pl.col(column).list.join("\x1f") if column == "categories" else pl.col(column)
    return (
        rows.with_columns(key=key)
        .filter(pl.col("key").is_not_null() & (pl.col("key") != ""))
        .group_by("item_id", "key")
        .agg(pl.len().alias("rows"), pl.col(column).first())
        .sort(["item_id", "rows", "key"], descending=[False, True, False])
        .unique("item_id", keep="first", maintain_order=True)
        .select("item_id", column)
    )


def _fitted(
    config: Config, workspace: Workspace, items: pl.DataFrame, kept: pl.DataFrame | None, progress: Progress
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Rows with codes, and what the manifest says of them."""
    coder = fit_coder(config, workspace, items, progress) if kept is None else load_coder(config, workspace)
    done = items.clear().with_columns(codes=pl.Series([], dtype=_CODES)) if kept is None else _met_again(kept, items)
    fresh = items.join(done, on="item_id", how="anti", maintain_order="left")
    everything = pl.concat([done.select(fresh.columns), fresh])
    # Stage by stage, so that what a later stage brings cannot reach an earlier one even by rounding.
    ends = accumulate(fresh["first_stage"].rle().struct.field("len"), initial=done.height)
    vectors = [stage_vectors(config, workspace, coder, everything, range(*ends_of)) for ends_of in pairwise(ends)]
    levels, bound = config.items.levels, config.items.codes_per_level
    prefixes = [np.empty((0, levels - 1), dtype=np.int64), *(coder.quantizer.encode(part) for part in vectors)]
    rows = [row for part in vectors for row in part]
    if empty := sum(not row.any() for row in rows):
        progress(f"{empty} of {len(rows)} items have no {coder.kind} vector; their codes carry no meaning")
    try:
        codes = assign_ids(
            np.concatenate(prefixes),
            bound,
            taken=np.array(done["codes"].to_list(), dtype=np.int64).reshape(done.height, levels),
            nearest=lambda row: coder.quantizer.nearest(rows[row]),
            names=fresh["item_id"].to_list(),
        )
    except ValueError as error:
        raise UserError(f"items.levels = {levels}, items.codes_per_level = {bound}: {error}") from None
    fresh = fresh.with_columns(codes=pl.Series(codes.tolist(), dtype=_CODES))
    facts = {"source": "fitted", "vectors": coder.kind, "quantizer": config.items.quantizer}
    sizes = (*coder.quantizer.sizes, bound)
    return pl.concat([done.select(fresh.columns), fresh]), {**facts, "codes_per_level": sizes, "extended": done.height}


def _met_again(kept: pl.DataFrame, items: pl.DataFrame) -> pl.DataFrame:
    """Rows of an earlier build, as they are but for the first stage, which late rows may have moved."""
    stages = items.select("item_id", "first_stage")
    return kept.drop("first_stage", "coded").join(stages, on="item_id", maintain_order="left")


def _shipped(config: Config, items: pl.DataFrame) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The IDs that came with the data; their codes were fitted on the items of all stages."""
    path = Path(str(config.log.index))
    try:
        index = read_index(read_json(path))
    except (ValueError, AttributeError, TypeError) as error:
        raise UserError(f"{path}: {error}") from None
    missing = items.filter(~pl.col("item_id").is_in(list(index.rows)))["item_id"].to_list()
    if missing:
        raise UserError(
            f"{path}: {len(missing)} items of the log have no semantic ID, first {', '.join(missing[:3])}; "
            'add them or set items.index = "fitted"'
        )
    codes = index.codes[[index.rows[item] for item in items["item_id"]]]
    frame = items.with_columns(codes=pl.Series(codes.tolist(), dtype=_CODES))
    sizes = tuple(len(values) for values in index.values)
    facts = {"source": "shipped", "vectors": None, "quantizer": None, "codes_per_level": sizes}
    return frame, {**facts, "extended": 0, "code_values": index.values, "index_only": len(index.rows) - items.height}


def _write(workspace: Workspace, frame: pl.DataFrame, facts: Mapping[str, Any]) -> dict[str, Any]:
    """Write the rows, then the manifest that vouches for them."""
    path = workspace.catalogue / "items.parquet"
    columns = ["item_id", *_TEXT_COLUMNS, "first_stage", "codes", "coded"]
    codes = np.array(frame["codes"].to_list(), dtype=np.int64)
    ready = workspace.catalogue / READY
    folder = ready if ready.is_dir() else workspace.catalogue / FITTED
    fitted = sorted(folder.iterdir()) if facts["source"] == "fitted" else []
    manifest = {
        "schema": SCHEMA,
        "items": frame.height,
        "levels": codes.shape[1],
        "collisions": asdict(collisions(codes)),
        "prefixes": [len(np.unique(codes[:, :depth], axis=0)) for depth in range(1, codes.shape[1] + 1)],
        **facts,
        "files": {f"{FITTED}/{file.name}": sha256_file(file) for file in fitted if not file.name.startswith(".")},
    }
    with replacing(path) as temporary:
        frame.select(columns).write_parquet(temporary)
        manifest["digest"] = sha256_file(temporary)
        write_json(workspace.catalogue / NEXT, manifest, seal=True)
    settle_codes(workspace)
    return manifest


def settle_codes(workspace: Workspace) -> bool:
    """End a build that a kill cut short: it counts where its rows are there, and the old one where not.

    Returns:
        Whether there was one.
    """
    folder = workspace.catalogue
    decided = folder / NEXT
    if not decided.is_file():
        drop_fitted(workspace)
        return False
    try:
        done = read_json(decided)["digest"] == _digest_if_there(folder / "items.parquet")
    except UserError:
        done = False
    if done:
        settle_fitted(workspace)
        os.replace(decided, folder / "manifest.json")
        sync_folder(folder)
    else:
        decided.unlink()
    drop_fitted(workspace)
    return True


def _report(manifest: Mapping[str, Any], reused: bool) -> ItemReport:
    return ItemReport(
        items=manifest["items"],
        catalogue_only=manifest["catalogue_only"],
        source=manifest["source"],
        vectors=manifest["vectors"],
        codes_per_level=tuple(manifest["codes_per_level"]),
        collisions=Collisions(**manifest["collisions"]),
        extended=manifest["extended"],
        digest=manifest["digest"],
        reused=reused,
    )
