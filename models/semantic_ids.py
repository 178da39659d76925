"""Quantizer codes made into semantic IDs: one last code tells items apart that share all the others."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

IntArray: TypeAlias = npt.NDArray[np.int64]
Prefix: TypeAlias = tuple[int, ...]

_CODE = re.compile(r"<[a-z]+_(\d{1,9})>")


@dataclass(frozen=True)
class Collisions:
    """How many items cannot be told apart by their semantic ID.

    Attributes:
        shared_ids: IDs with two or more items.
        items_sharing: items under those IDs.
        largest_group: most items of any ID; 1 where every item has its own, 0 without items.
    """

    shared_ids: int
    items_sharing: int
    largest_group: int


@dataclass(frozen=True)
class ShippedIndex:
    """Semantic IDs that came with the data, codes renumbered densely level by level.

    Attributes:
        rows: item id -> row of `codes`.
        codes: (n, L) dense codes.
        values: for each level, the original code behind each dense one, rising.
    """

    rows: dict[str, int]
    codes: IntArray
    values: tuple[tuple[int, ...], ...]


def assign_ids(
    prefixes: IntArray,
    capacity: int,
    taken: IntArray | None = None,
    nearest: Callable[[int], IntArray] | None = None,
    names: Sequence[str] | None = None,
) -> IntArray:
    """Semantic IDs (n, L) from quantizer codes (n, L - 1), in row order.

    The last code is the item's rank among the items that share its first L - 1 codes, so an ID depends on earlier rows
    only and a later item never moves anyone's. An item whose group is full goes to the nearest other code of level
    L - 1 whose group has room.

    Args:
        prefixes: quantizer codes, rows in the order (first stage, item id).
        capacity: codes of the last level.
        taken: (m, L) IDs given earlier by this function.
        nearest: row -> codes of level L - 1 by rising distance, asked for items whose group is full; absent: a full
            group is an error.
        names: item ids for the error message.

    Raises:
        ValueError: a group is full and nothing near it has room.
    """
    before = np.empty((0, prefixes.shape[1] + 1), dtype=np.int64) if taken is None else taken
    joined = np.concatenate([before[:, :-1], prefixes])
    ids = np.column_stack([joined, _ranks(joined)])
    full = np.flatnonzero(ids[len(before) :, -1] >= capacity)
    if full.size:
        _place(ids, len(before), len(before) + int(full[0]), capacity, nearest, names)
    return ids[len(before) :]


def _ranks(prefixes: IntArray) -> IntArray:
    """Rank of each row among the equal rows, in row order."""
    groups = np.unique(prefixes, axis=0, return_inverse=True)[1].reshape(-1)
    order = np.argsort(groups, kind="stable")
    sizes = np.bincount(groups)
    ranks = np.empty(len(groups), dtype=np.int64)
    ranks[order] = np.arange(len(groups)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
    return ranks


def _place(
    ids: IntArray,
    offset: int,
    start: int,
    capacity: int,
    nearest: Callable[[int], IntArray] | None,
    names: Sequence[str] | None,
) -> None:
    """Give rows `start` … their IDs one by one, in place: each move fills another group."""
    members: Counter[Prefix] = Counter(map(tuple, ids[:start, :-1].tolist()))
    for row in range(start, len(ids)):
        own: Prefix = tuple(ids[row, :-1].tolist())
        chosen = own
        if members[own] >= capacity:
            order = [] if nearest is None else nearest(row - offset).tolist()
            others = ((*own[:-1], code) for code in order)
            chosen = next((prefix for prefix in others if members[prefix] < capacity), None)
            if chosen is None:
                name = row - offset if names is None else names[row - offset]
                raise ValueError(
                    f"semantic id {own} is shared by more than {capacity} items (codes_per_level of the last level) "
                    f"and no other code of its last level has room for item {name}; raise levels or codes_per_level"
                )
        ids[row] = (*chosen, members[chosen])
        members[chosen] += 1


def collisions(codes: IntArray) -> Collisions:
    """Count the items of codes (n, L) that share their ID."""
    sizes = np.unique(codes, axis=0, return_counts=True)[1] if len(codes) else np.zeros(0, dtype=np.int64)
    shared = sizes[sizes > 1]
    return Collisions(len(shared), int(shared.sum()), int(sizes.max(initial=0)))


def read_index(index: Mapping[str, Sequence[str]]) -> ShippedIndex:
    """Parse a shipped index such as `{"42": ["<a_128>", "<b_72>"]}`.

    Raises:
        ValueError: no items, rows of different lengths, or something that is not a code.
    """
    if not index:
        raise ValueError("the index names no items; it should map item ids to lists of codes")
    rows = {item: row for row, item in enumerate(index)}
    levels = len(next(iter(index.values())))
    parsed = [_parse(item, codes, levels) for item, codes in index.items()]
    columns = [np.unique(column, return_inverse=True) for column in np.array(parsed, dtype=np.int64).T]
    return ShippedIndex(
        rows=rows,
        codes=np.column_stack([dense.reshape(-1) for _, dense in columns]).astype(np.int64),
        values=tuple(tuple(values.tolist()) for values, _ in columns),
    )


def _parse(item: str, codes: object, levels: int) -> list[int]:
    if not isinstance(codes, list | tuple) or len(codes) != levels or not codes:
        raise ValueError(f"item {item!r}: every item needs {levels} codes like the first, got {codes!r}")
    found = [_CODE.fullmatch(code) if isinstance(code, str) else None for code in codes]
    if any(match is None for match in found):
        raise ValueError(f"item {item!r}: a code looks like '<a_128>', got {codes!r}")
    return [int(match[1]) for match in found if match is not None]
