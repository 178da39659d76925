"""The quick rows of the fault table: each fault injected for real, in processes of its own. `make faults` runs all."""

from __future__ import annotations

import json
import multiprocessing.forkserver
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.faults.__main__ import commit, line, write
from benchmarks.faults.harness import Bench
from benchmarks.faults.table import TABLE, tried
from benchmarks.results import refresh_faults

QUICK = [row for row in TABLE if row.quick]


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bench]:
    yield Bench(tmp_path_factory.mktemp("faults"), commands=False, warm=True)
    multiprocessing.forkserver._forkserver._stop()  # type: ignore[attr-defined]


def test_the_table_has_every_row_once() -> None:
    assert [row.number for row in TABLE] == list(range(1, 44))
    assert all(row.full >= 1 for row in TABLE)


@pytest.mark.parametrize("row", QUICK, ids=lambda row: f"{row.number}-{row.fault}")
def test_a_fault_ends_as_the_table_says(row, bench: Bench) -> None:
    result = tried(row, bench, row.quick, seed=0)
    assert result["runs"] > 0
    assert result["passes"] == result["runs"], result["note"]


def test_a_row_that_was_not_tried_is_no_pass(tmp_path: Path) -> None:
    result = {"row": 1, "fault": "x", "runs": 0, "passes": 0, "seconds": 0.0, "note": "not injectable here"}
    assert line(result).startswith("none")
    assert line(result | {"runs": 2, "passes": 1}).startswith("FAIL")
    write(tmp_path / "f.json", [result | {"runs": 2, "passes": 2}], partial=False)
    write(tmp_path / "f.json", [{**result, "row": 2}], partial=True)
    assert [row["row"] for row in json.loads((tmp_path / "f.json").read_text())["rows"]] == [1, 2]


def test_the_page_shows_what_failed_and_what_was_not_tried(tmp_path: Path) -> None:
    row = {
        "row": 1,
        "fault": "a | b",
        "expectation": "R",
        "runs": 3,
        "passes": 3,
        "seconds": 1.2,
        "seed": 7,
        "note": "",
    }
    failed = row | {"row": 2, "passes": 2, "note": "Traceback\n  x | y"}
    write(
        tmp_path / "f.json", [row | {"fault": "kill"}, failed, row | {"row": 3, "runs": 0, "passes": 0}], partial=False
    )
    refresh_faults(tmp_path / "f.json", tmp_path / "page.md")
    page = (tmp_path / "page.md").read_text(encoding="utf-8")
    assert "5 of 6 runs passed, " in page
    assert ", seed 7; each row at the commit it names." in page
    assert f"| 1 | kill | R | 3 | 3 | 1 | {commit()} |  |" in page
    assert f"| 2 | a / b | R | 3 | **2** | 1 | {commit()} | Traceback x / y |" in page
    assert f"| 3 | a / b | R | 0 | **0** | 1 | {commit()} |  |" in page
