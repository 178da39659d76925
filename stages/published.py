"""Readers for logs published without a clock: PESO's stage blocks, and one line of items a user.

Order is time in both. Nothing is repaired here: a file that breaks its own format is refused whole.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import polars as pl

from stages.errors import UserError
from stages.files import source_files

SHORT_VISIT = 3
Blocks = dict[str, list[str]]


def read_blocks(pattern: str, index: str | None) -> tuple[pl.DataFrame, list[Path], int]:
    """Read `{user: {"previous_block": [item, ...], "current_block": [item, ...]}}`, one file a stage.

    Args:
        pattern: glob of the block files; stage order is the order of the numbers in their names.
        index: semantic-ID index shipped with them; every item must then be in it.

    Returns:
        user_id, item_id and block (Int32) sorted by block and user, in the file's order within a user; the files;
        and how many visits have fewer than three items.

    Raises:
        UserError: a file of another shape, an item that the index lacks, or a `previous_block` that is not exactly the
            user's earlier `current_block`s joined.
    """
    paths = sorted((file.path for file in source_files(pattern)), key=_natural)
    known = None if index is None else set(read_index(index))
    so_far: Blocks = {}
    frames, short = [], 0
    for number, path in enumerate(paths):
        visits = _block(path, so_far, known)
        short += sum(len(items) < SHORT_VISIT for items in visits.values())
        for user, items in visits.items():
            so_far[user] = so_far.get(user, []) + items
        frames.append(_frame(visits).with_columns(block=pl.lit(number, pl.Int32)))
    return pl.concat(frames), paths, short


def read_index(path: str) -> dict[str, list[str]]:
    """A shipped semantic-ID index: item -> its tokens, one a level.

    Raises:
        UserError: unreadable, or items with no tokens or different numbers of them.
    """
    place = _only(path)
    index = _json(place)
    depths = set()
    for item, tokens in index.items():
        if not isinstance(tokens, list) or not tokens or not all(isinstance(token, str) for token in tokens):
            raise UserError(f'{place}: item {item!r} needs a list of tokens such as ["<a_1>", "<b_2>"]')
        depths.add(len(tokens))
    if len(depths) != 1:
        raise UserError(f"{place}: items have {sorted(depths)} tokens; every item needs the same number of levels")
    return index


def read_sequences(path: str) -> tuple[pl.DataFrame, list[Path], int]:
    """Read a text file with `user item item ...` a line, oldest first.

    Returns:
        user_id, item_id and block (null) sorted by user, in the line's order; the file; and how many users have fewer
        than three items.

    Raises:
        UserError: a user without items or on two lines, or text that is not UTF-8.
    """
    place = _only(path)
    try:
        lines = place.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError as error:
        raise UserError(f"{place}: not UTF-8 text ({error.reason} at byte {error.start}); convert it") from None
    visits: Blocks = {}
    for number, line in enumerate(lines, start=1):
        user, *items = line.split() or [""]
        if not user:
            continue
        if not items:
            raise UserError(f"{place}: line {number}: user {user!r} has no items; remove the line")
        if user in visits:
            raise UserError(f"{place}: line {number}: user {user!r} is there twice; join the lines")
        visits[user] = items
    if not visits:
        raise UserError(f"{place}: the file is empty; it needs lines of `user item item ...`")
    short = sum(len(items) < SHORT_VISIT for items in visits.values())
    return _frame(visits).with_columns(block=pl.lit(None, pl.Int32)), [place], short


def _frame(visits: Blocks) -> pl.DataFrame:
    rows = pl.DataFrame(
        {"user_id": list(visits), "item_id": list(visits.values())},
        schema={"user_id": pl.String, "item_id": pl.List(pl.String)},
    )
    # A visit without items would explode to one null row.
    return rows.filter(pl.col("item_id").list.len() > 0).sort("user_id").explode("item_id")


def _natural(path: Path) -> list[tuple[bool, int, str]]:
    """Sort key under which `block_2` comes before `block_10`."""
    parts = re.findall(r"\d+|\D+", path.name)
    return [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in parts]


def _only(path: str) -> Path:
    files = source_files(path)
    if len(files) != 1:
        raise UserError(f"{path}: {len(files)} files match; name one")
    return files[0].path


def _block(path: Path, so_far: Blocks, known: set[str] | None) -> Blocks:
    visits: Blocks = {}
    for user, visit in _json(path).items():
        place = f"{path}: user {user!r}"
        if not user.strip() or not isinstance(visit, dict):
            raise UserError(f'{place}: expected {{"previous_block": [...], "current_block": [...]}} under a user id')
        previous, current = (_items(visit, name, place) for name in ("previous_block", "current_block"))
        if previous != so_far.get(user, []):
            raise UserError(
                f"{place}: previous_block ({len(previous)} items) is not the user's earlier current_blocks joined "
                f"({len(so_far.get(user, []))} items); give every block, in stage order"
            )
        unknown = [] if known is None else [item for item in current if item not in known]
        if unknown:
            raise UserError(f"{place}: item {unknown[0]!r} is not in the semantic-ID index; use the index of this set")
        visits[user] = current
    return visits


def _items(visit: dict[str, Any], name: str, place: str) -> list[str]:
    items = visit.get(name)
    if not isinstance(items, list) or not all(isinstance(item, str) and item.strip() for item in items):
        raise UserError(f"{place}: {name} must be a list of item ids as text")
    return items


def _json(path: Path) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            names = [name for name, _ in pairs]
            doubled = next(name for name in names if names.count(name) > 1)
            raise UserError(f"{path}: {doubled!r} is there twice; join the two")
        return table

    try:
        value = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=unique)
    except (ValueError, OSError) as error:
        raise UserError(f"{path}: not a readable JSON file: {error}") from None
    if not isinstance(value, dict) or not value:
        raise UserError(f"{path}: expected a JSON object with one entry a user or item, and at least one")
    return value
