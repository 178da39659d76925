"""Queries for a log that has none: each purchase is searched for by a query made of its item's categories.

The recipe of the Amazon product-search sets (Ai et al., 2017): the levels of a category path as one string, letters and
spaces only, lower case, no stop words, stemmed, and of a repeated word the last occurrence; a path of one level gives
none. Krovetz's stemmer needs his dictionary; here runs Harman's S-stemmer, which is its rule for plurals. Letters are
those of any script; stop words and stemmer are English and leave words with other letters as they are.
"""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Sequence

import numpy as np
import polars as pl
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

from stages.errors import UserError

SEED = 0  # queries are drawn once for all seeds of a comparison


def path_query(levels: Sequence[str]) -> str | None:
    """The query of a category path, widest level first; None for a path of one level, or one without words.

    A level without text is none.
    """
    filled = _filled(levels)
    if len(filled) < 2:
        return None
    words = "".join(sign for sign in " ".join(filled).casefold() if sign.isspace() or _is_letter(sign)).split()
    stems = [_singular(word) if word.isascii() else word for word in words if word not in ENGLISH_STOP_WORDS]
    kept = dict.fromkeys(reversed(stems))  # scanned from the end, so that the last occurrence stays
    return " ".join(reversed(list(kept))) or None


def _filled(levels: Sequence[str]) -> list[str]:
    """The levels that hold text."""
    return [level for level in levels if level and not level.isspace()]


def _is_letter(sign: str) -> bool:
    """Whether it is a letter, or a mark upon one: many scripts write their vowels as marks."""
    return unicodedata.category(sign)[0] in "LM"


def _singular(word: str) -> str:
    """Harman's S-stemmer (1991): the first rule whose ending fits decides."""
    if word.endswith("ies") and not word.endswith(("eies", "aies")):
        return word[:-3] + "y"
    if word.endswith("es") and not word.endswith(("aes", "ees", "oes")):
        return word[:-1]
    if word.endswith("s") and not word.endswith(("us", "ss")):
        return word[:-1]
    return word


def item_queries(catalogue: pl.DataFrame, separator: str) -> pl.DataFrame:
    """Every item's distinct queries, from the earliest row that gives it any.

    Args:
        catalogue: item_id, categories and timestamp of the item table's rows.
        separator: parts a category into levels; empty: the list of categories is one path.

    Returns:
        item_id, since (instant from which the row was known; null for always) and queries (list, at least one).
    """
    rows = catalogue.filter(pl.col("categories").list.len() > 0).sort("item_id", "timestamp", nulls_last=False)
    paths = rows["categories"].to_list()
    made = {}  # rows of one category list are many
    for path in map(tuple, paths):
        if path not in made:
            parts = _split(path, separator)
            made[path] = list(dict.fromkeys(query for part in parts if (query := path_query(part)) is not None))
    queries = pl.Series("queries", [made[tuple(path)] for path in paths], dtype=pl.List(pl.String))
    found = rows.select("item_id", pl.col("timestamp").alias("since")).with_columns(queries)
    found = found.filter(pl.col("queries").list.len() > 0)
    return found.unique("item_id", keep="first", maintain_order=True)


def _split(categories: Sequence[str], separator: str) -> list[list[str]]:
    """An item's category paths, each as its levels with text; without a separator the list is one path."""
    paths = [one.split(separator) for one in categories if one] if separator else [list(categories)]
    return [[level.strip() for level in _filled(path)] for path in paths]


def with_category_queries(log: pl.DataFrame, catalogue: pl.DataFrame, separator: str) -> pl.DataFrame:
    """The log with a search beside each purchase whose item has queries, at the same instant.

    The query is drawn by a hash of user, item and instant: other rows change nothing. A category known only after the
    purchase is not used.

    Args:
        log: events in driftrec's columns.
        catalogue: the item table's rows.
        separator: parts a category into levels.

    Raises:
        UserError: the log has searches of its own, or no item has a category path of two levels with words in it.
    """
    if (log["event"] == "search").any():
        raise UserError('log.queries = "categories" is for logs without searches, and this one has some; remove it')
    queries = item_queries(catalogue, separator)
    if queries.is_empty():
        raise UserError(_why_none(catalogue, separator))
    bought = log.join(queries, on="item_id", how="inner", maintain_order="left")
    bought = bought.filter(pl.col("since").is_null() | (pl.col("since") <= pl.col("timestamp")))
    lots = _lots(bought)
    searches = bought.with_columns(
        event=pl.lit("search"), query=pl.col("queries").list.get(pl.Series(lots) % pl.col("queries").list.len())
    )
    return pl.concat([log, searches.select(log.columns)])


def _why_none(catalogue: pl.DataFrame, separator: str) -> str:
    """What is wrong with an item table that gives no query, and the remedy."""
    categories = catalogue["categories"].drop_nulls().unique(maintain_order=True).to_list()
    deep = next((path for own in categories for path in _split(own, separator) if len(path) > 1), None)
    if deep is None:
        return (
            'log.queries = "categories" found no category path of two levels in the item table; check '
            f"catalogue.sources and catalogue.level_separator ({separator!r})"
        )
    shown = f" {separator or '>'} ".join(deep)
    return (
        f'log.queries = "categories" found category paths of two levels, such as {shown}, but no words in them: a '
        "query is made of letters, English stop words left out; map the column that holds names, or remove log.queries"
    )


def _lots(rows: pl.DataFrame) -> np.ndarray:
    """(N,) a number for each row that depends on its user, item and instant alone."""
    parts = [_hashes(rows["user_id"]), _hashes(rows["item_id"]), rows["timestamp"].to_physical().to_numpy()]
    mixed = np.zeros(len(rows), dtype=np.uint64)
    for part in parts:
        mixed = (mixed ^ part.astype(np.uint64)) * np.uint64(0xBF58476D1CE4E5B9)
        mixed ^= mixed >> np.uint64(31)
    return (mixed >> np.uint64(33)).astype(np.int64)


def _hashes(ids: pl.Series) -> np.ndarray:
    """(N,) a hash of each id, computed once an id."""
    names = ids.unique().sort()
    digests = [hashlib.blake2b(f"{SEED}:{name}".encode(), digest_size=8).digest() for name in names]
    known = np.array([int.from_bytes(digest, "big") for digest in digests], dtype=np.uint64)
    return known[names.search_sorted(ids).to_numpy()]
