"""The benchmarks' harness: which way a ratio points, whose rows are replaced, which part of the page is rewritten."""

from __future__ import annotations

import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import bench, general_text, results, whole_job, wrk
from benchmarks.measure import Pair, Row, Work, alternate, dearer, faster, flops, report, skip, stored
from models.packed import PackedLinear

TWICE_AS_FAST = Pair(ours=(1.0, 1.0, 2.0), rival=(2.0, 3.0, 4.0), clock="cpu", threads=1)


def test_a_rate_twice_the_rivals_is_a_ratio_of_two_with_the_pairs_spread() -> None:
    row = faster("ours", "theirs", TWICE_AS_FAST, mark=2, unit="users/s", amount=8)
    assert (row.ratio, row.low, row.high, row.met) == (2.0, 2.0, 3.0, True)
    assert (row.ours, row.theirs) == (8.0, 8 / 3)
    assert faster("ours", "theirs", TWICE_AS_FAST, mark=2.1, unit="users/s").met is False


def test_a_rival_that_does_less_in_a_call_is_charged_for_it() -> None:
    row = faster("ours", "theirs", TWICE_AS_FAST, mark=4, unit="users/s", amount=8, rival_amount=4)
    assert (row.ratio, row.met) == (4.0, True)


def test_a_cost_is_ours_over_the_rivals_and_has_to_stay_under_its_mark() -> None:
    row = dearer("ours", "theirs", TWICE_AS_FAST, mark=0.5, calls=10)
    assert (row.ratio, row.better, row.met) == (0.5, "lower", True)
    assert (row.ours, row.theirs) == (100.0, 300.0)
    assert dearer("ours", "theirs", TWICE_AS_FAST, mark=0.4).met is False


def test_both_sides_are_called_equally_often_and_each_goes_first_in_turn() -> None:
    calls: list[str] = []
    pair = alternate(lambda: calls.append("o"), lambda: calls.append("r"), repetitions=3)
    assert "".join(calls) == "or" + "ro" + "or" + "ro" + "or" + "ro"  # once each uncounted, then five pairs
    assert len(pair.ours) == len(pair.rival) == 5
    calls.clear()
    alternate(lambda: calls.append("o"), lambda: calls.append("r"), repetitions=5, warm=True)
    assert "".join(calls) == "ro" + "or" + "ro" + "or" + "ro"


def test_the_wall_clock_sees_a_sleep_and_the_processor_clock_does_not() -> None:
    walls, processor = (
        alternate(lambda: time.sleep(0.01), lambda: None, repetitions=5, clock=clock) for clock in ("wall", "cpu")
    )
    assert min(walls.ours) >= 0.01 > max(processor.ours)


def test_arithmetic_is_counted_two_a_multiply_add() -> None:
    left, right = torch.ones(3, 4), torch.ones(4, 5)
    assert flops(lambda: left @ right) == 2 * 3 * 4 * 5


def test_a_script_replaces_its_own_rows_and_nobody_elses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = tmp_path / "results.json"
    report("one", [Row("a", "x", ratio=1.5, mark=1.0), Row("b", "x", note="no such processor")], place)
    report("two", [Row("c", "x", ratio=2.0)], place)
    report("one", [Row("a", "x", ratio=0.5, mark=1.0)], place)
    assert [(row["script"], row["name"], row["ratio"], row["met"]) for row in stored(place)] == [
        ("two", "c", 2.0, None),
        ("one", "a", 0.5, False),
    ]
    printed = capsys.readouterr().out
    assert "b: not measured: no such processor" in printed
    assert "mark ≥ 1 MISSED" in printed


def test_writing_one_part_of_the_page_leaves_the_other(tmp_path: Path) -> None:
    page, rows = tmp_path / "results.md", tmp_path / "results.json"
    results.replace_part(page, "reports", "measured\n\non a log")
    for ratio in (1.5, 0.5):
        report("one", [Row("a", "x", ratio=ratio, low=0.25, high=2.0, mark=1.0, unit="s", ours=1, theirs=2)], rows)
        results.refresh_benchmarks(rows, page)
    text = page.read_text(encoding="utf-8")
    assert "| a | x | 0.5 [0.25, 2] | ≥ 1 **missed** | 1 s | 2 s | – |" in text
    assert "| 1.5 " not in text
    assert text.startswith("<!-- reports: begin -->\nmeasured\n\non a log\n<!-- reports: end -->\n")
    results.replace_part(page, "reports", "again")
    assert page.read_text(encoding="utf-8") == text.replace("measured\n\non a log", "again")


def test_a_skipped_script_ends_well_and_says_why(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        skip("one", "no data here")
    assert end.value.code == 0
    assert bench.headline("one", capsys.readouterr().out) == "skipped: no data here"


def test_an_unknown_benchmark_is_refused_by_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["nonesuch"]) == 2
    assert "no benchmark nonesuch; known: " in capsys.readouterr().err


def test_every_benchmark_that_is_run_has_its_file_and_says_what_it_measures() -> None:
    for name in bench.SCRIPTS:
        source = (bench.ROOT / "benchmarks" / f"{name}.py").read_text(encoding="utf-8")
        assert source.startswith('"""'), name


def test_the_share_of_the_limit_is_one_for_the_arithmetic_that_sets_it(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import measure

    rates = {"float32": 1e9, "bfloat16": 4e9}
    monkeypatch.setattr(measure, "matmul", lambda threads, clock, number: rates[number])
    monkeypatch.setattr(measure, "stream", lambda threads, clock: 1e8)
    assert measure.share_of_limit(Work(flops=1e9), 1.0, 1) == 1.0
    assert measure.share_of_limit(Work(flops=1e9, number="bfloat16"), 1.0, 1) == 0.25
    assert measure.share_of_limit(Work(flops=1e9, bytes=4e8), 8.0, 1) == 0.5
    row = measure.limited(Row("a", "x"), Work(flops=2e9, number="bfloat16"), 1.0)
    assert (row.limit, row.limits) == (0.5, "bfloat16 matmul 4 GFLOP/s")


def test_a_whole_command_is_timed_with_its_children_s_processor_time_and_a_failed_one_leaves_no_row() -> None:
    busy = "import time; end = time.process_time() + 0.1\nwhile time.process_time() < end: pass"
    spent = whole_job.run([sys.executable, "-c", busy])
    assert spent.processor >= 0.1
    row = whole_job.row(whole_job.JOBS["demo"], replace(spent, wall=120.0))
    assert (row.ratio, row.met, row.ours, row.theirs, row.limit) == (0.5, True, 120, 240, None)
    with pytest.raises(SystemExit, match="exit code 3"):
        whole_job.run([sys.executable, "-c", "raise SystemExit(3)"])


def test_what_wrk_reports_is_read_in_seconds_and_its_script_posts_every_body() -> None:
    driven = wrk.read("measured: 120 3 6000000 20000 40000 90000")
    assert (driven.rate, driven.failed, driven.span) == (20.0, 3, 6.0)
    assert [driven.quantile(share) for share in wrk.SHARES] == [0.02, 0.04, 0.09]
    script = wrk.lua(['{"user": "a"}', '{"user": "b"}'])
    assert r'local bodies = {"{\"user\": \"a\"}", "{\"user\": \"b\"}"}' in script
    assert "ipairs({0.5, 0.95, 0.99})" in script


def test_memory_that_a_call_adds_is_its_highest_mark_and_is_seen_again_by_the_next_call() -> None:
    from benchmarks import scaling

    sizes = [scaling.added(lambda count=count: np.ones(count)) for count in (2**22, 2**20, 2**22)]
    assert [round(size / 2**20) // 8 for size in sizes] == [
        4,
        1,
        4,
    ]  # 32, 8 and 32 MiB, and less than 8 of anything else


def test_a_curve_is_a_table_with_its_formula() -> None:
    from benchmarks import scaling

    text = scaling.table(scaling.Curve("time", "rows", "s", (1_000, 2_000), (0.5, 1.0), "rows"))
    assert text == "| rows | 1,000 | 2,000 |\n|---|---|---|\n| time, s | 0.5 | 1 |\n\nGrows as rows.\n"


def test_a_slope_is_growth_by_100_stages_and_one_odd_stage_does_not_move_it() -> None:
    from benchmarks.soak import Life, slope

    assert slope(np.arange(40) * 0.5) == 50
    flat = np.full(40, 9.0)
    memory, seconds, odd = np.where(np.arange(40) == 20, 900.0, flat), flat + np.arange(40), np.arange(40) % 2 == 1
    life = Life(memory=memory, files=flat, seconds=seconds, wall=2 * seconds, promoted=odd)
    assert life.slopes() == {"memory": 0.0, "files": 0.0, "seconds": 100.0, "wall": 200.0}
    assert life.halves("seconds") == (9 + 14.5, 9 + 34.5)
    assert life.halves("seconds", promoted=True) == (9 + 15, 9 + 35)


def test_glosses_are_read_from_wordnet_s_own_format_and_cut_in_two(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synset = '{:08d} 03 n 02 hot_dog 0 frank 1 001 @ 00001740 n 0000 | a sausage; "eat a frank"  \n'
    for part in general_text.PARTS:
        lines = "".join(synset.format(number) for number in range(5))
        (tmp_path / f"data.{part}").write_text("  1 This software and database is being provided\n" + lines)
    monkeypatch.setattr("sys.argv", ["general_text", str(tmp_path), str(tmp_path / "out")])
    general_text.main()
    kept, held = ((tmp_path / "out" / name).read_text().splitlines() for name in ("glosses.txt", "held_out.txt"))
    assert (len(kept), len(held)) == (18, 2)
    assert {*kept, *held} == {'hot dog, frank: a sausage; "eat a frank"'}


@pytest.mark.parametrize(("word", "code", "said"), [("--help", 0, "usage: "), ("nowhere", 2, "not a readable JSON")])
def test_the_page_s_script_explains_itself_and_writes_nothing_without_a_report(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], word: str, code: int, said: str
) -> None:
    before = results.PAGE.read_bytes()
    monkeypatch.setattr("sys.argv", ["results", word])
    with pytest.raises(SystemExit) as end:
        results.main()
    assert end.value.code == code
    assert said in "".join(capsys.readouterr())
    assert results.PAGE.read_bytes() == before


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")
def test_a_packed_map_is_counted_like_a_plain_one() -> None:
    plain = torch.nn.Linear(30, 50)
    one, x = PackedLinear(plain), torch.ones(4, 7, 30)
    with torch.inference_mode():
        assert flops(lambda: one(x)) == flops(lambda: plain(x)) == 2 * 4 * 7 * 30 * 50
