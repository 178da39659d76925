import gzip
import json
import random
from pathlib import Path
from typing import Any

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from stages.config import Config
from stages.errors import UserError
from stages.log import LogReport, load_log, read_log
from stages.workspace import Workspace

T = 1_700_000_000


def configured(*sources: dict[str, Any], **log: Any) -> Config:
    return Config.model_validate({"name": "t", "workspace": "w", "log": {"sources": list(sources), **log}})


def ingest(tmp_path: Path, *sources: dict[str, Any], **log: Any) -> tuple[pl.DataFrame, LogReport]:
    workspace = Workspace(tmp_path / "w")
    read_log(configured(*sources, **log), workspace)
    return load_log(workspace)


def write(path: Path, text: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def csv(path: Path, *rows: str, header: str = "user_id,item_id,timestamp") -> str:
    return write(path, "\n".join([header, *rows]) + "\n")


def pairs(log: pl.DataFrame) -> list[tuple[str, str]]:
    return log.select("user_id", "item_id").rows()


def test_ids_stay_exactly_the_text_they_were(tmp_path):
    ids = ["1", "01", str(2**63), str(2**64), str(10**30), " x", "1.0", "NA", "=SUM(A1)", "<script>", "\u202eabc", "😀"]
    path = csv(tmp_path / "a.csv", *(f"{name},i,{T + place}" for place, name in enumerate(ids)))
    log, _ = ingest(tmp_path, {"path": path})
    assert log["user_id"].to_list() == ids


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_large_whole_numbers_are_ids_in_jsonl_and_parquet_too(tmp_path, kind):
    path = tmp_path / f"a.{kind}"
    if kind == "jsonl":
        rows = [{"user_id": 2**64, "item_id": "01", "timestamp": T}, {"user_id": 1, "item_id": "1", "timestamp": T + 1}]
        write(path, "".join(json.dumps(row) + "\n" for row in rows))
    else:
        frame = pl.DataFrame(
            {"user_id": [2**64, 1], "item_id": ["01", "1"], "timestamp": [T, T + 1]},
            schema_overrides={"user_id": pl.Int128},
        )
        frame.write_parquet(path)
    log, _ = ingest(tmp_path, {"path": str(path)})
    assert pairs(log) == [(str(2**64), "01"), ("1", "1")]


def test_a_float_id_column_is_refused_and_can_be_cast(tmp_path):
    path = tmp_path / "a.parquet"
    pl.DataFrame({"user": [13085.0], "item_id": ["a"], "timestamp": [T]}).write_parquet(path)
    with pytest.raises(UserError, match=r"a\.parquet: user_id is a column of Float64.*CAST"):
        ingest(tmp_path, {"path": str(path), "columns": {"user_id": "user"}})
    log, _ = ingest(tmp_path, {"path": str(path), "derive": {"user_id": 'CAST(CAST("user" AS BIGINT) AS VARCHAR)'}})
    assert pairs(log) == [("13085", "a")]


def test_rejects_name_file_row_reason_and_show_the_raw_values(tmp_path):
    rows = [
        f"u,i,{T}",
        f",i,{T}",
        f"u, ,{T}",
        "u,i,soon",
        "u,i,0",
        f"u,i,{T},extra",
        f"{'x' * 1001},i,{T}",
        f"n\0l,i,{T}",
        "u",
    ]
    path = csv(tmp_path / "in" / "a.csv", *rows)
    _, report = ingest(tmp_path, {"path": path})
    assert (report.rows, report.accepted) == (9, 1)
    refused = pl.read_parquet(tmp_path / "w" / "rejects" / "log.parquet")
    assert refused.select("file", "row", "reason").rows() == [
        ("a.csv", 2, "user_id missing"),
        ("a.csv", 3, "item_id missing"),
        ("a.csv", 4, "timestamp not readable"),
        ("a.csv", 5, "timestamp zero or negative"),
        ("a.csv", 6, "more fields than columns"),
        ("a.csv", 7, "user_id longer than 1,000 characters"),
        ("a.csv", 8, "user_id holds a null byte"),
        ("a.csv", 9, "item_id missing"),
    ]
    assert refused["timestamp"][2] == "soon"
    assert report.rejected["item_id missing"] == 2
    assert report.rows == report.filtered + sum(report.rejected.values()) + report.duplicates + report.accepted


def test_rejects_of_an_earlier_reading_do_not_linger(tmp_path):
    ingest(tmp_path, {"path": csv(tmp_path / "a.csv", f"u,i,{T}", "u,,1")})
    assert (tmp_path / "w" / "rejects" / "log.parquet").exists()
    ingest(tmp_path, {"path": csv(tmp_path / "a.csv", f"u,i,{T}")})
    assert not (tmp_path / "w" / "rejects" / "log.parquet").exists()


def test_bytes_that_are_not_utf8_reject_their_row_and_latin1_reads_them(tmp_path):
    path = write(tmp_path / "a.csv", f"user_id,item_id,timestamp\nu,caf\xe9,{T}\nu,tea,{T}\n".encode("latin-1"))
    log, report = ingest(tmp_path, {"path": path})
    assert pairs(log) == [("u", "tea")]
    assert report.rejected == {"item_id is not UTF-8 (Latin-1?)": 1}
    log, _ = ingest(tmp_path, {"path": path, "encoding": "latin1"})
    assert pairs(log) == [("u", "café"), ("u", "tea")]


def test_search_events_need_a_query(tmp_path):
    path = csv(tmp_path / "a.csv", f"u,i,{T},lamp", f"u,j,{T}, ", header="user_id,item_id,timestamp,query")
    log, report = ingest(tmp_path, {"path": path, "event": "search"})
    assert log.select("event", "query").rows() == [("search", "lamp")]
    assert report.rejected == {"search without a query": 1}


def test_events_of_an_unknown_kind_are_rejected_and_a_missing_kind_is_a_recommendation(tmp_path):
    path = csv(tmp_path / "a.csv", f"u,i,{T},click", f"u,j,{T},", header="user_id,item_id,timestamp,event")
    log, report = ingest(tmp_path, {"path": path})
    assert log.select("item_id", "event").rows() == [("j", "recommendation")]
    assert report.rejected == {"event is neither recommendation nor search": 1}


def test_where_filters_and_counts_without_rejecting(tmp_path):
    path = csv(tmp_path / "a.csv", f"u,i,{T},5", f"u,j,{T},1", f"u,k,{T},", header="user_id,item_id,timestamp,stars")
    log, report = ingest(tmp_path, {"path": path, "where": "CAST(stars AS INT) >= 3"})
    assert (pairs(log), report.filtered, report.rejected) == ([("u", "i")], 2, {})


def test_distinct_keeps_the_earliest_row_and_may_keep_equal_ones_apart(tmp_path):
    header = "user_id,item_id,timestamp,invoice"
    rows = [f"u,i,{T + 60},A", f"u,i,{T},A", f"u,i,{T},B"]
    path = csv(tmp_path / "a.csv", *rows, header=header)
    log, report = ingest(tmp_path, {"path": path, "distinct": ["invoice", "item_id"]})
    assert log["timestamp"].dt.epoch("s").to_list() == [T, T]
    assert report.duplicates == 1


def test_a_window_function_gives_an_invoice_its_first_minute(tmp_path):
    path = csv(tmp_path / "a.csv", f"u,i,{T + 60},A", f"u,j,{T},A", header="user_id,item_id,time,invoice")
    log, _ = ingest(tmp_path, {"path": path, "derive": {"timestamp": "MIN(time) OVER (PARTITION BY invoice)"}})
    assert log["timestamp"].dt.epoch("s").to_list() == [T, T]


def test_multi_character_separators_and_files_without_header_are_read(tmp_path):
    path = write(
        tmp_path / "ratings.dat", f"1::10::5::{T}\r\n01::11::4::{T + 1}\r\n2::12::3::{T}::9\r\n3::::1::{T}\r\n"
    )
    source = {"path": path, "separator": "::", "header": False, "names": ["user_id", "item_id", "stars", "timestamp"]}
    log, report = ingest(tmp_path, source)
    assert pairs(log) == [("1", "10"), ("01", "11")]
    assert report.rejected == {"item_id missing": 1, "more fields than columns": 1}
    headed = write(tmp_path / "headed.dat", f"user_id::item_id::timestamp\n1::10::{T}\n")
    assert pairs(ingest(tmp_path, {"path": headed, "separator": "::"})[0]) == [("1", "10")]


def test_a_csv_without_header_takes_its_names(tmp_path):
    path = write(tmp_path / "a.csv", f"1,10,{T}\n2,11,{T}\n")
    log, _ = ingest(tmp_path, {"path": path, "header": False, "names": ["user_id", "item_id", "timestamp"]})
    assert pairs(log) == [("1", "10"), ("2", "11")]


def test_gzip_glob_and_partitioned_folders_give_the_same_log(tmp_path):
    rows = [f"u{place},i{place % 3},{T + place}" for place in range(9)]
    _, whole = ingest(tmp_path, {"path": csv(tmp_path / "whole.csv", *rows)})
    packed = tmp_path / "whole.csv.gz"
    packed.write_bytes(gzip.compress((tmp_path / "whole.csv").read_bytes()))
    for part in range(3):
        stripped = [row.split(",", 1)[1] for row in rows[part::3]]
        names = [row.split(",", 1)[0] for row in rows[part::3]]
        for name, row in zip(names, stripped, strict=True):
            csv(tmp_path / "hive" / f"user_id={name}" / "p.csv", row, header="item_id,timestamp")
        csv(tmp_path / "glob" / f"part-{part}.csv", *rows[part::3])
    for path in (packed, tmp_path / "glob" / "part-*.csv", tmp_path / "glob", tmp_path / "hive"):
        assert ingest(tmp_path, {"path": str(path)})[1].digest == whole.digest


def test_side_tables_are_joined_before_derive(tmp_path):
    tags = write(tmp_path / "tags.dat", "id\tname\n1\tcaf\xe9\n".encode("latin-1"))
    path = csv(tmp_path / "a.csv", f"u,i,{T},1", header="user_id,item_id,timestamp,tag")
    join = {"path": tags, "on": "tag", "columns": {"tag": "id"}, "separator": "\t", "encoding": "latin1"}
    source = {"path": path, "event": "search", "derive": {"query": "UPPER(name)"}}
    assert ingest(tmp_path, source | {"join": [join]})[0]["query"].to_list() == ["CAFÉ"]
    write(tmp_path / "tags.dat", "id\tname\n1\ta\n1\tb\n")
    with pytest.raises(UserError, match=r"tags\.dat: tag = '1' is there twice"):
        ingest(tmp_path, source | {"join": [join]})


def test_the_catalogue_is_read_with_its_times_and_categories(tmp_path):
    path = csv(tmp_path / "a.csv", f"u,i,{T}")
    items = csv(
        tmp_path / "items.csv",
        "i,Lamp,Home|Light,2020-01-02",
        "i,Old lamp,,",
        ",x,,",
        header="item_id,title,categories,timestamp",
    )
    config = Config.model_validate(
        {
            "name": "t",
            "workspace": "w",
            "log": {"sources": [{"path": path}]},
            "catalogue": {"sources": [{"path": items}]},
        }
    )
    report = read_log(config, Workspace(tmp_path / "w"))
    raw = pl.read_parquet(tmp_path / "w" / "catalogue" / "raw.parquet")
    assert raw.columns == ["item_id", "title", "text", "categories", "timestamp"]
    assert raw.select("title", "categories").rows() == [("Old lamp", None), ("Lamp", ["Home", "Light"])]
    assert raw["timestamp"].is_null().to_list() == [True, False]
    assert report.catalogue_rejected == {"item_id missing": 1}


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.randoms(use_true_random=False), st.integers(1, 4), st.integers(1, 3))
def test_the_digest_ignores_row_order_files_row_groups_and_copies(tmp_path, rng: random.Random, files, copies):
    rows = [(f"u{place % 7}", f"i{place % 5}", T + place // 4) for place in range(40)]
    unique = len(set(rows))
    shuffled = rows * copies
    rng.shuffle(shuffled)
    for old in tmp_path.glob("p*.parquet"):
        old.unlink()
    schema = ["user_id", "item_id", "timestamp"]
    for part in range(files):
        pl.DataFrame(shuffled[part::files], schema=schema, orient="row").write_parquet(
            tmp_path / f"p{part}.parquet", row_group_size=rng.randint(1, 30)
        )
    _, report = ingest(tmp_path, {"path": str(tmp_path / "p*.parquet")})
    assert (report.accepted, report.duplicates) == (unique, len(shuffled) - unique)
    _, plain = ingest(tmp_path, {"path": csv(tmp_path / "plain.csv", *(f"{u},{i},{t}" for u, i, t in rows))})
    assert report.digest == plain.digest


def test_the_digest_tells_null_from_empty_and_where_values_end(tmp_path):
    digests = set()
    for user, item in (("a", "bc"), ("ab", "c"), ("b", "ac")):
        digests.add(ingest(tmp_path, {"path": csv(tmp_path / "a.csv", f"{user},{item},{T}")})[1].digest)
    assert len(digests) == 3


def test_different_files_may_count_in_different_units(tmp_path):
    csv(tmp_path / "l" / "a.csv", f"u,i,{T}")
    csv(tmp_path / "l" / "b.csv", f"u,j,{T}000")
    log, report = ingest(tmp_path, {"path": str(tmp_path / "l")})
    assert report.units == {"a.csv": "s", "b.csv": "ms"}
    assert log["timestamp"].n_unique() == 1


def test_a_damaged_log_is_not_loaded(tmp_path):
    ingest(tmp_path, {"path": csv(tmp_path / "a.csv", f"u,i,{T}")})
    path = Workspace(tmp_path / "w").log
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(UserError, match="driftrec ingest again"):
        load_log(Workspace(tmp_path / "w"))


BAD = {
    "a missing file": ("nowhere.csv", None, {}, "nowhere.csv: no such file"),
    "an empty file": ("a.csv", b"", {}, "a.csv: the file is empty"),
    "a header alone": ("a.csv", b"user_id,item_id,timestamp\n", {}, "no acceptable row"),
    "a truncated Parquet file": ("a.parquet", b"PAR1abcd", {}, "a.parquet: cannot be read"),
    "a torn JSONL line": ("a.jsonl", b'{"user_id": "u"\n', {}, "a.jsonl: cannot be read"),
    "an unknown ending": ("a.xls", b"x", {}, "set format ="),
    "a missing column": (
        "a.csv",
        b"userid,item_id,timestamp\n1,2,3\n",
        {},
        "no column 'user_id'; did you mean 'userid'",
    ),
    "a wrong mapping": (
        "a.csv",
        b"usr,item_id,timestamp\n1,2,3\n",
        {"columns": {"user_id": "user"}},
        "'user', not there; did you mean 'usr'",
    ),
    "an unknown target": (
        "a.csv",
        b"a,b,c\n1,2,3\n",
        {"columns": {"user": "a"}},
        "columns.user is not driftrec's; did you mean 'user_id'",
    ),
    "SQL that does not parse": ("a.csv", b"a,b\n1,2\n", {"where": "a ++ ) 1"}, "where = .* is not a valid SQL"),
    "SQL with an unknown column": (
        "a.csv",
        b"abc,b\n1,2\n",
        {"derive": {"user_id": "abd || 'x'"}},
        "derive.user_id: .*'abd', not there; did you mean 'abc'",
    ),
    "SQL that fails on the data": (
        "a.csv",
        b"user_id,item_id,timestamp\nx,2,3\n",
        {"where": "CAST(user_id AS INT) > 1"},
        "a.csv: cannot be read: conversion",
    ),
    "an unknown distinct column": (
        "a.csv",
        b"user_id,item_id,timestamp\nx,2,3\n",
        {"distinct": ["item"]},
        "distinct names column 'item'",
    ),
    "a missing side table": (
        "a.csv",
        b"user_id,item_id,timestamp\nx,2,3\n",
        {"join": [{"path": "no.csv", "on": "x"}]},
        "no.csv: no such file",
    ),
    "lines without names": ("a.dat", b"1::2::3\n", {"separator": "::", "header": False}, "needs names"),
    "mixed units": (
        "a.csv",
        f"user_id,item_id,timestamp\nu,i,{T}\nu,i,{T}000\n".encode(),
        {},
        "a.csv: timestamp mixes time units",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_clear_message_and_leaves_no_log(tmp_path, case):
    name, content, source, message = BAD[case]
    if content is not None:
        write(tmp_path / name, content)
    with pytest.raises(UserError, match=message):
        ingest(tmp_path, {"path": str(tmp_path / name), **source})
    assert not Workspace(tmp_path / "w").log.exists()


def test_progress_names_each_file_and_its_unit(tmp_path):
    lines: list[str] = []
    config = configured({"path": csv(tmp_path / "a.csv", f"u,i,{T}")})
    read_log(config, Workspace(tmp_path / "w"), lines.append)
    assert lines[0] == "a.csv: 1 rows, times in s, 0 filtered, 0 rejected"
    assert lines[-1].startswith("log: 1 events of 1 users on 1 items from 1 rows")


def test_another_log_than_the_expected_one_is_refused_before_anything_is_written(tmp_path):
    path = csv(tmp_path / "a.csv", f"u,i,{T}", "u,,1")
    workspace, config = Workspace(tmp_path / "w"), configured({"path": path})
    digest = read_log(config, workspace).digest
    before = {file: file.read_bytes() for file in workspace.root.rglob("*") if file.is_file()}
    assert read_log(config, workspace, expected=digest).digest == digest
    csv(tmp_path / "a.csv", f"u,i,{T}", f"u,j,{T + 1}")
    with pytest.raises(UserError, match=f"the log's rows changed .* was {digest[:12]}.*; choose another workspace"):
        read_log(config, workspace, expected=digest)
    assert {file: file.read_bytes() for file in workspace.root.rglob("*") if file.is_file()} == before
