"""What is fitted on stage 0's items, kept in `catalogue/quantizer/` and never fitted again: vectors and quantizer.

Co-occurrence sees training events only: a user's last two events (baskets, where they are scored as sets) of each stage
are left out.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import polars as pl
from safetensors.numpy import load_file, save_file

from models.quantizer import Quantizer, ResidualKMeans
from models.rqvae import RqVae
from models.vectors import CooccurrenceVectors, EncoderVectors, TextVectors
from stages.config import Config, expand
from stages.errors import UserError
from stages.interactions import stage_events, used_objectives
from stages.workspace import Workspace, make_folder, read_json, replacing, sync_folder, write_json

FITTED, READY = "quantizer", ".next"
"""Folders of `catalogue/`: what its manifest vouches for, and what a fit under way makes to take its place."""
IntArray: TypeAlias = npt.NDArray[np.int64]
FloatArray: TypeAlias = npt.NDArray[np.floating]
Progress: TypeAlias = Callable[[str], None]

SEED = 0  # items are coded once for all seeds of a comparison
HELD_OUT = 2  # validation and test event of a user's stage
_TEXT_SHARE = 0.5
_QUANTIZERS: dict[str, type[ResidualKMeans] | type[RqVae]] = {"kmeans": ResidualKMeans, "rqvae": RqVae}


@dataclass(frozen=True)
class FrozenCoder:
    """How an item becomes the codes before its last one.

    Attributes:
        kind: "tfidf", "cooccurrence" or "encoder".
        vectors: fitted on stage 0's items.
        quantizer: fitted on their vectors.
    """

    kind: str
    vectors: TextVectors | CooccurrenceVectors | EncoderVectors
    quantizer: Quantizer


def fit_coder(config: Config, workspace: Workspace, items: pl.DataFrame, progress: Progress) -> FrozenCoder:
    """Fit vectors and quantizer on the items of stage 0 and save them beside those that are there.

    Args:
        config: the `items` table decides; `evaluation.baskets` decides what is held out.
        workspace: its stages are read, its `catalogue/.next/` is written.
        items: item_id, first_stage, title, text, categories in the order of item numbers.
        progress: told what is fitted.

    Raises:
        UserError: no text where text was asked for, or an encoder that cannot be loaded.
    """
    first = items.filter(pl.col("first_stage") == 0)
    documents = item_documents(first)
    kind = _kind(config, documents)
    progress(f"fitting {kind} vectors and {config.items.quantizer} codes on the {first.height} items of stage 0")
    try:
        vectors = _fit_vectors(kind, config, workspace, items, documents)
    except (OSError, ValueError) as error:
        raise UserError(f'items.vectors = "{kind}": {error}') from None
    rows = vectors.vectors if isinstance(vectors, CooccurrenceVectors) else vectors.transform(documents)
    fit = _QUANTIZERS[config.items.quantizer].fit
    coder = FrozenCoder(kind, vectors, fit(rows, config.items.levels - 1, config.items.codes_per_level, SEED))
    _save(config, workspace, coder)
    return coder


def load_coder(config: Config, workspace: Workspace) -> FrozenCoder:
    """Read what `fit_coder` saved and `settle_fitted` put in place.

    The encoder's path is the config's, for a workspace can be moved and holds none.
    """
    folder = workspace.catalogue / FITTED
    settings, arrays = read_json(folder / "quantizer.json"), load_file(folder / "vectors.safetensors")
    kind = settings["vectors"]
    if kind == "tfidf":
        vectors = TextVectors.from_arrays(arrays, settings["terms"])
    elif kind == "encoder":
        vectors = EncoderVectors.from_arrays(arrays, expand(str(config.items.encoder)))
    else:
        vectors = CooccurrenceVectors.from_arrays(arrays)
    quantizer = _QUANTIZERS[settings["quantizer"]].from_arrays(load_file(folder / "codebooks.safetensors"))
    return FrozenCoder(kind, vectors, quantizer)


def stage_vectors(
    config: Config, workspace: Workspace, coder: FrozenCoder, items: pl.DataFrame, places: range
) -> FloatArray:
    """Vectors (n, d) of the items that one stage brought.

    Args:
        config: as in `fit_coder`.
        workspace: as in `fit_coder`.
        coder: what was fitted.
        items: as in `fit_coder`, but in the order in which they got their codes: those that were fitted on come first.
        places: rows of `items`, all first seen in one stage.
    """
    if not isinstance(coder.vectors, CooccurrenceVectors):
        return coder.vectors.transform(item_documents(items[places.start : places.stop]))
    if places.stop <= len(coder.vectors.vectors):
        return coder.vectors.vectors[places.start : places.stop]
    users, numbers = training_events(config, workspace, items, int(items["first_stage"][places.start]))
    return coder.vectors.transform(users, numbers, places)


def training_events(config: Config, workspace: Workspace, items: pl.DataFrame, stage: int) -> tuple[IntArray, IntArray]:
    """User and item number of the training events of stages 0 … `stage`, each user's oldest first.

    They are recommendation events; a log of searches alone has its searches.

    Left out are each user's last two events of every stage, or with `evaluation.baskets` the last two instants.
    """
    parts = []
    used = used_objectives(workspace, config.search.objectives)
    kinds = ("recommendation",) if "recommendation" in used else used
    for index in range(stage + 1):
        frame = stage_events(workspace, index, kinds)
        together = config.evaluation.baskets and frame["timestamp"].null_count() == 0
        place = pl.col("timestamp").rank("dense") if together else pl.int_range(1, pl.len() + 1)
        frame = frame.with_columns(place=place.over("user_id").cast(pl.Int64))
        parts.append(frame.filter(pl.col("place") <= pl.col("place").max().over("user_id") - HELD_OUT))
    events = (
        pl.concat(parts)
        .sort("user_id", maintain_order=True)
        .join(items.select("item_id").with_row_index("item"), on="item_id", how="left", maintain_order="left")
    )
    return events["user_id"].rle_id().to_numpy().astype(np.int64), events["item"].to_numpy().astype(np.int64)


def item_documents(items: pl.DataFrame) -> list[str]:
    """Title, categories and text of each item in one string; empty where it has none of them."""
    parts = [pl.col("title"), pl.col("categories").list.join(" "), pl.col("text")]
    return items.select(pl.concat_str(parts, separator=" ", ignore_nulls=True).fill_null("")).to_series().to_list()


def _kind(config: Config, documents: list[str]) -> str:
    """`auto` is tfidf where at least half of stage 0's items have a text."""
    if config.items.vectors != "auto":
        return config.items.vectors
    filled = sum(bool(document.strip()) for document in documents)
    return "tfidf" if filled >= _TEXT_SHARE * len(documents) else "cooccurrence"


def _fit_vectors(
    kind: str, config: Config, workspace: Workspace, items: pl.DataFrame, documents: list[str]
) -> TextVectors | CooccurrenceVectors | EncoderVectors:
    dimensions = config.items.dimensions
    if kind == "tfidf":
        return TextVectors.fit(documents, dimensions, SEED)
    if kind == "encoder":
        return EncoderVectors.fit(documents, expand(str(config.items.encoder)), dimensions, SEED)
    users, numbers = training_events(config, workspace, items, 0)
    return CooccurrenceVectors.fit(users, numbers, len(documents), dimensions, SEED)


def _save(config: Config, workspace: Workspace, coder: FrozenCoder) -> None:
    folder = workspace.catalogue / READY
    for name, arrays in (("vectors", coder.vectors.arrays()), ("codebooks", coder.quantizer.arrays())):
        with replacing(folder / f"{name}.safetensors") as temporary:
            save_file({key: np.ascontiguousarray(array) for key, array in arrays.items()}, temporary)
    settings: dict[str, Any] = {"vectors": coder.kind, "quantizer": config.items.quantizer}
    if isinstance(coder.vectors, TextVectors):
        settings["terms"] = coder.vectors.terms
    write_json(folder / "quantizer.json", settings)


def settle_fitted(workspace: Workspace) -> None:
    """Let what was fitted anew take the old one's place, file by file: killed in between, the rest follows."""
    ready, fitted = (workspace.catalogue / name for name in (READY, FITTED))
    if ready.is_dir():
        make_folder(fitted)
        for source in sorted(ready.glob("[!.]*")):
            os.replace(source, fitted / source.name)
        sync_folder(fitted)


def drop_fitted(workspace: Workspace) -> None:
    """Remove what was fitted anew, where that does not count."""
    ready = workspace.catalogue / READY
    if ready.is_symlink():
        ready.unlink()
    shutil.rmtree(ready, ignore_errors=True)
