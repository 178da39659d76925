"""A long file in parts: the same log as the whole, and no part longer than asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import polars as pl
import pytest

from stages.config import Config, Source
from stages.errors import UserError
from stages.files import source_files
from stages.log import read_log
from stages.long_files import RawFile, raw_file
from stages.rows import EVENT_FIELDS
from stages.workspace import Workspace

T = 1_700_000_000
ROWS, AT_ONCE, PIECE = 1000, 64, 600
DERIVED = {
    "where": "CAST(shop AS BIGINT) < 2",
    "derive": {"named": "item_id || '!'"},
    "columns": {"item_id": "named"},
}
FIRST, MANY = "MIN(t) OVER (PARTITION BY user_id)", "timestamp > CAST(COUNT(item_id) AS VARCHAR)"
FIELDS = ("user_id", "item_id", "timestamp")


def events(count: int = ROWS) -> pl.DataFrame:
    """Rows with some copies and some that no log takes."""
    places = pl.int_range(count, eager=True)
    return pl.DataFrame(
        {
            "user_id": [None if place % 97 == 5 else f"u{place % 41}" for place in places],
            "item_id": [f"é, {place % 13}" if place % 7 else f"i{place % 13}" for place in places],
            "timestamp": T + (places * 7919) % 500 - pl.Series([T if place % 89 == 3 else 0 for place in places]),
            "shop": places % 3,
        }
    )


def stored(path: Path, frame: pl.DataFrame, kind: str) -> Path:
    """The rows as one file: Parquet of small row groups, or CSV with quoted commas and a row too long."""
    if kind == "parquet":
        frame.write_parquet(path, row_group_size=50)
    else:
        lines = frame.write_csv().splitlines()
        path.write_text("\n".join([*lines[:500], lines[500] + ",more", *lines[501:]]), encoding="utf-8")
    return path


def limited(patch: pytest.MonkeyPatch) -> None:
    patch.setattr("stages.long_files.LONG", {"parquet": 0, "csv": 0})
    patch.setattr("stages.long_files.AT_ONCE", AT_ONCE)
    patch.setattr("stages.long_files.PIECE", PIECE)


def opened(path: Path, **settings: Any) -> RawFile:
    source = Source.model_validate({"path": str(path), **settings})
    return raw_file(source, source_files(str(path))[0], EVENT_FIELDS, FIELDS)


def read(root: Path, path: Path, **settings: Any) -> tuple[Any, pl.DataFrame]:
    source = {"path": str(path), **settings}
    config = Config.model_validate({"name": "t", "workspace": "w", "log": {"sources": [source]}})
    workspace = Workspace(root)
    report = read_log(config, workspace)
    return report, pl.read_parquet(workspace.rejects / "log.parquet")


@pytest.mark.parametrize("kind", ["parquet", "csv"])
@pytest.mark.parametrize("settings", [{}, DERIVED])
def test_a_file_in_parts_gives_the_log_and_the_rejects_of_the_whole(tmp_path, monkeypatch, kind, settings):
    path = stored(tmp_path / f"a.{kind}", events(), kind)
    whole, refused = read(tmp_path / "whole", path, time_unit="s", **settings)
    limited(monkeypatch)
    parts, refused_of_parts = read(tmp_path / "parts", path, time_unit="s", **settings)
    assert parts == whole
    assert refused_of_parts.equals(refused)
    assert len(refused) > 9
    assert (whole.filtered > 0) == bool(settings)


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_no_part_is_longer_than_asked_for_however_long_the_file(tmp_path, monkeypatch, kind):
    limited(monkeypatch)
    tallest = []
    for count in (ROWS, 4 * ROWS):
        raw = opened(stored(tmp_path / f"{count}.{kind}", events(count), kind), where="CAST(shop AS BIGINT) < 3")
        heights = [part.frame.height for part in raw.parts()]
        assert sum(heights) == count
        assert heights == [len(times) for times in raw.times()]
        assert [row for part in raw.parts() for row in part.frame["__row"]] == list(range(1, count + 1))
        tallest.append(max(heights))
    # The shortest line of the CSV has 18 bytes, and a piece ends with a whole line.
    assert max(tallest) <= (AT_ONCE if kind == "parquet" else PIECE // 18 + 1)


@pytest.mark.parametrize(
    ("name", "content", "settings"),
    [
        ("newline.csv", b'user_id,item_id,timestamp\nu,"i\nj",1700000000\n', {}),
        ("latin.csv", "user_id,item_id,timestamp\né,i,1700000000\n".encode("latin-1"), {"encoding": "latin1"}),
        ("broken.csv", "user_id,item_id,timestamp\né,i,1700000000\n".encode("latin-1"), {}),
        ("rows.jsonl", b'{"user_id": "u", "item_id": "i", "timestamp": 1700000000}\n', {}),
        ("window.csv", b"user_id,item_id,t\nu,i,1700000000\nu,j,1700000060\n", {"derive": {"timestamp": FIRST}}),
        ("total.csv", b"user_id,item_id,timestamp\nu,i,1700000000\nu,j,1\n", {"where": MANY}),
    ],
)
def test_a_file_whose_rows_hang_together_is_read_whole(tmp_path, monkeypatch, name, content, settings):
    path = tmp_path / name
    path.write_bytes(content)
    whole = [part.frame for part in opened(path, **settings).parts()]
    limited(monkeypatch)
    monkeypatch.setattr("stages.long_files.PIECE", 1)
    parts = [part.frame for part in opened(path, **settings).parts()]
    assert len(parts) == 1
    assert parts[0].equals(whole[0])


def test_quoted_text_is_cut_between_lines_only(tmp_path, monkeypatch):
    path = tmp_path / "a.csv"
    path.write_text('"user_id","item_id","timestamp"\n' + '"a ""b""","i,j",1700000000\n' * 9, encoding="utf-8")
    limited(monkeypatch)
    monkeypatch.setattr("stages.long_files.PIECE", 40)
    parts = [part.frame for part in opened(path).parts()]
    assert len(parts) > 3
    assert pl.concat(parts).select("user_id", "item_id").unique().rows() == [('a "b"', "i,j")]


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_a_long_file_without_rows_or_columns_is_told_as_a_short_one_is(tmp_path, monkeypatch, kind):
    limited(monkeypatch)
    with pytest.raises(UserError, match="no rows"):
        read(tmp_path / "empty", stored_empty(tmp_path / f"empty.{kind}", kind))
    path = stored(tmp_path / f"a.{kind}", events().rename({"user_id": "client"}), kind)
    with pytest.raises(UserError, match=r"no column 'user_id'.*columns\.user_id"):
        read(tmp_path / "named", path)


def stored_empty(path: Path, kind: str) -> Path:
    frame = events(0)
    frame.write_parquet(path) if kind == "parquet" else frame.write_csv(path)
    return path


def test_a_parquet_file_that_counts_in_dates_is_read_in_parts_too(tmp_path, monkeypatch):
    frame = events().drop_nulls().with_columns(pl.from_epoch("timestamp").cast(pl.Datetime("ns")))
    path = stored(tmp_path / "a.parquet", frame, "parquet")
    whole, _ = read(tmp_path / "whole", path)
    limited(monkeypatch)
    assert read(tmp_path / "parts", path)[0] == whole
