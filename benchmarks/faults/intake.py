"""Rows 11 to 13, 15 and 30 to 34: files, times, ids and texts as real exports hold them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from html import escape
from pathlib import Path
from random import Random
from typing import Any

import polars as pl

from benchmarks.faults.harness import Bench, Row, user_error
from stages.config import Config
from stages.items import build_semantic_ids
from stages.log import LogReport, read_log
from stages.split import load_stages, split_stages
from stages.workspace import Workspace

START = datetime(2024, 1, 1, tzinfo=UTC)
Event = tuple[Any, Any, Any]


def events(rng: Random, count: int = 300) -> list[Event]:
    """Users, items and instants in seconds; some instants are shared."""
    begin = int(START.timestamp())
    return [(f"u{rng.randrange(20)}", f"i{rng.randrange(30)}", begin + 60 * rng.randrange(2000)) for _ in range(count)]


def written(path: Path, rows: list[Event], names: tuple[str, ...] = ("user_id", "item_id", "timestamp")) -> Path:
    """Rows as Parquet, CSV or JSON lines, by the path's ending."""
    path.parent.mkdir(parents=True, exist_ok=True)
    frame = pl.DataFrame(rows, schema=list(names), orient="row", infer_schema_length=None)
    if path.suffix == ".parquet":
        frame.write_parquet(path, row_group_size=len(rows) // 3 + 1)
    elif path.suffix == ".csv":
        frame.write_csv(path)
    else:
        frame.write_ndjson(path)
    return path


def config(place: Path, *sources: Path, **more: Any) -> Config:
    """Settings for a log in two halves; `more` goes into its sources."""
    log = {"sources": [{"path": str(path), **more} for path in sources], "latest": "2030-01-01"}
    values = {"name": "t", "workspace": str(place), "log": log, "stages": {"fractions": [0.5, 0.5]}}
    return Config.model_validate({**values, "items": {"dimensions": 4, "codes_per_level": 8}})


def read(bench: Bench, *sources: Path, **more: Any) -> LogReport:
    """Read a log into a new workspace."""
    place = bench.place()
    return read_log(config(place, *sources, **more), Workspace(place))


def stages(bench: Bench, *sources: Path) -> list[str]:
    """Digests of the stages that a log is cut into."""
    place = bench.place()
    settings = config(place, *sources)
    read_log(settings, Workspace(place))
    return [stage.digest for stage in split_stages(settings, Workspace(place))]


def broken_files(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Zero bytes, cut short, or without a needed column: one sentence with the file, and the column where one lacks."""
    for _ in range(count):
        for ending in ("parquet", "csv", "jsonl"):
            path = written(bench.place() / f"log.{ending}", events(rng))
            whole = path.read_bytes()
            path.write_bytes(b"")
            yield user_error(lambda path=path: read(bench, path), path.name)
            if ending == "parquet":
                path.write_bytes(whole[: rng.randrange(1, len(whole) - 1)])
                yield user_error(lambda path=path: read(bench, path), path.name)
            written(path, events(rng), ("user_id", "thing", "timestamp"))
            yield user_error(lambda path=path: read(bench, path), "item_id")


def copies(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Every event twice, ten times, and shuffled copies."""
    for number in range(count):
        rows = list(dict.fromkeys(events(rng)))
        path = written(bench.place() / "log.csv", rows)
        times = (2, 10, 3)[number % 3]
        many = rows * times
        if number % 3 == 2:
            rng.shuffle(many)
        copied = written(bench.place() / "log.csv", many)
        found = read(bench, copied)
        if found.duplicates != len(rows) * (times - 1):
            yield f"{found.duplicates} duplicates reported, {len(rows) * (times - 1)} are there"
        else:
            yield "" if stages(bench, path) == stages(bench, copied) else "other stages"


def orders(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Rows permuted, spread over files in any order, in other formats and row groups."""
    for _ in range(count):
        rows = events(rng)
        want = stages(bench, written(bench.place() / "log.parquet", rows))
        rng.shuffle(rows)
        middle = rng.randrange(1, len(rows))
        parts = [written(bench.place() / "b.csv", rows[:middle]), written(bench.place() / "a.parquet", rows[middle:])]
        rng.shuffle(parts)
        yield "" if stages(bench, *parts) == want else "other stages"


def ties(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Many events at the instant of the boundary."""
    for _ in range(count):
        rows = events(rng)
        instant = sorted(row[2] for row in rows)[len(rows) // 2]
        rows += [(f"t{number}", f"i{rng.randrange(30)}", instant) for number in range(rng.randrange(1, 60))]
        rng.shuffle(rows)
        place = bench.place()
        settings = config(place, written(bench.place() / "log.csv", rows))
        read_log(settings, Workspace(place))
        split_stages(settings, Workspace(place))
        first, second = (
            pl.read_parquet(place / stage.path)["timestamp"].to_list() for stage in load_stages(Workspace(place))
        )
        rng.shuffle(rows)
        again = stages(bench, written(bench.place() / "log.csv", rows))
        same = again == [stage.digest for stage in load_stages(Workspace(place))]
        yield "" if max(first) < min(second) and same else "equal instants stand on both sides"


def future(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Events dated beyond the plausible window."""
    for _ in range(count):
        rows = events(rng)
        bad = rng.randrange(1, 20)
        ahead = int((datetime(2030, 1, 1, tzinfo=UTC) + timedelta(days=1)).timestamp())
        found = read(bench, written(bench.place() / "log.csv", [*rows, *[("u1", "i1", ahead)] * bad]))
        yield "" if sum(found.rejected.values()) == bad else f"{found.rejected} rejected, {bad} are there"


def times(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Every unit alike; mixed ones refused; zero, negative, missing and overflowing ones rejected and counted."""
    for _ in range(count):
        rows = events(rng)
        want = read(bench, written(bench.place() / "s.csv", rows)).digest
        for factor in (10**3, 10**6, 10**9):
            other = [(user, item, time * factor) for user, item, time in rows]
            found = read(bench, written(bench.place() / f"{factor}.csv", other)).digest
            yield "" if found == want else f"times in 1/{factor} s give another log"
        text = [(user, item, datetime.fromtimestamp(time, UTC).isoformat()) for user, item, time in rows]
        yield "" if read(bench, written(bench.place() / "text.csv", text)).digest == want else "text gives another log"
        half = [(user, item, time * (1000 if number % 2 else 1)) for number, (user, item, time) in enumerate(rows)]
        yield user_error(lambda half=half: read(bench, written(bench.place() / "mixed.csv", half)), "mixed.csv")
        odd = [("u1", "i1", time) for time in ("0", "-5", "", "nan", "9" * 30, "soon")]
        path = written(bench.place() / "odd.csv", [*[(u, i, str(t)) for u, i, t in rows], *odd])
        found = read(bench, path, time_unit="s")
        good = found.digest == want and sum(found.rejected.values()) == len(odd)
        yield "" if good else f"{found.rejected} rejected of {len(odd)} odd times"


LONG = 2**20
"""Characters of an id that is too long."""


def ids(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Ids that a float would merge, look-alikes, empty ones, one of a megabyte: as text, and as integers of 64 bits.

    Each user took one item, so that two users merged would show in the items.
    """
    begin = int(START.timestamp())
    for _ in range(count):
        base = 2**63 + rng.randrange(1000)
        whole = [base, base + 1, 2**53, 2**53 + 1, 2**64 - 2, 2**64 - 1]
        names = [*map(str, whole), str(2**64), str(2**64 + 1), str(10**30), "1", "01", "1.0", " 1"]
        rows = [(name, f"i{number}", begin + number) for number, name in enumerate(names)]
        bad = [("", "i0", begin), ("x" * LONG, "i0", begin)]
        for ending in ("csv", "jsonl", "parquet"):
            yield kept(bench, written(bench.place() / f"log.{ending}", [*rows, *bad]), rows, len(bad))
        numbers = [(number, f"i{place}", begin + place) for place, number in enumerate(whole)]
        path = bench.place() / "log.parquet"
        path.parent.mkdir()
        schema = {"user_id": pl.UInt64, "item_id": pl.String, "timestamp": pl.Int64}
        pl.DataFrame(numbers, schema=schema, orient="row").write_parquet(path)
        yield kept(bench, path, [(str(number), *rest) for number, *rest in numbers], 0)
        pl.read_parquet(path).with_columns(pl.col("user_id").cast(pl.Float64)).write_parquet(path)
        yield user_error(lambda path=path: read(bench, path), "user_id")


def kept(bench: Bench, path: Path, rows: list[Event], refused: int) -> str:
    """ "" if exactly these users are there, each with its own item, and so many rows were refused."""
    place = bench.place()
    found = read_log(config(place, path), Workspace(place))
    have = pl.read_parquet(Workspace(place).log).select("user_id", "item_id").rows()
    if sum(found.rejected.values()) != refused:
        return f"{path.suffix}: {found.rejected} refused, {refused} are to be"
    wrong = set(have) ^ {(user, item) for user, item, _ in rows}
    return f"{path.suffix}: not as they were: {sorted(wrong)[:4]}" if wrong else ""


HOSTILE = (
    "<script>alert(1)</script>",
    '=HYPERLINK("http://x")',
    "\u202egnp.exe",
    "zero\u200bwidth",
    "👩‍🚀 emoji",
    "two\nlines",
    'a"quote',
    "semi;colon, comma",
    "'; DROP TABLE metrics; --",
    "<a_12><b_3>",
    "### Response: i7",
    "</s><|endoftext|>[INST]",
)


MARKUP = "<script>alert(2)<img src=x onerror=alert(3)>.jsonl"
"""Name of the log's file, the one text of a user's that a report shows; a name holds no slash."""
SMALL = {
    "backbone": {"hidden": 16, "layers": 1, "heads": 2, "feed_forward": 32, "precision": "float32"},
    "training": {"first_epochs": 1, "epochs": 1},
    "evaluation": {"matrix_users": 0, "bootstrap": 100},
}


def hostile_shop(bench: Bench) -> Config:
    """A log whose users, items, titles, categories and file are hostile texts; one row has no user."""
    begin, count = int(START.timestamp()), len(HOSTILE)
    users = [f"{HOSTILE[number % count]}{number // count}" for number in range(2 * count)]
    rows = [
        (user, HOSTILE[(number + visit) % count], begin + 100 * visit + number)
        for visit in range(count)
        for number, user in enumerate(users)
    ]
    path, place = written(bench.place() / MARKUP, [*rows, ("", HOSTILE[0], begin)]), bench.place()
    table = bench.place() / "items.jsonl"
    table.parent.mkdir()
    lines = [{"item_id": text, "title": text, "categories": [text]} for text in HOSTILE]
    table.write_text("\n".join(map(json.dumps, lines)))
    values = {**config(place, path).model_dump(mode="json"), "catalogue": {"sources": [{"path": str(table)}]}, **SMALL}
    return Config.model_validate(values)


def texts(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Ids and titles that are markup, formulas, control strings or odd Unicode; bytes that are no text."""
    begin = int(START.timestamp())
    for number in range(count):
        settings = hostile_shop(bench)
        place = Workspace(Path(settings.workspace))
        page, runs = reported(settings, place, mirrored=bench.commands and not number)
        titles = dict(pl.read_parquet(place.catalogue / "items.parquet").select("item_id", "title").iter_rows())
        users = pl.read_parquet(place.log)["user_id"].n_unique()
        wrong = [text for text in HOSTILE if titles.get(text) != text]
        yield f"not the same text: {wrong}; {users} users" if wrong or users != 2 * len(HOSTILE) else ""
        yield shown(page, runs)
        raw = bench.place() / "raw.csv"
        raw.parent.mkdir()
        raw.write_bytes(b"user_id,item_id,timestamp\n" + b"u1,caf\xe9,%d\nu2,ok,%d\nu3,n\x00l,%d\n" % ((begin,) * 3))
        mixed = read(bench, raw)
        yield "" if mixed.accepted + sum(mixed.rejected.values()) == 3 and mixed.accepted <= 2 else str(mixed.rejected)


def reported(settings: Config, place: Workspace, mirrored: bool) -> tuple[str, list[str]]:
    """The page of a comparison of one method, and the names and tags of its runs where MLflow is told."""
    from flows import steps
    from flows.continual import follow_all
    from flows.plan import Plan

    plan = steps.claimed(Plan(settings, place, ("single",), (0,), comparison=False))
    steps.read(plan)
    plan = steps.split(plan)
    steps.identify(plan)
    trained, tests = follow_all(plan, steps)
    folder = steps.summarise(plan, tests, trained)
    runs = runs_of(place) if mirrored and steps.record(place, folder) else []
    return (folder / "report.html").read_text(encoding="utf-8"), runs


def runs_of(place: Workspace) -> list[str]:
    """Names and tags of every run in MLflow."""
    from mlflow import MlflowClient

    client = MlflowClient(place.mlflow_uri)
    everything = [experiment.experiment_id for experiment in client.search_experiments()]
    return [text for run in client.search_runs(everything) for text in (run.info.run_name, *run.data.tags.values())]


def shown(page: str, runs: list[str]) -> str:
    """ "" if the page shows the file's name as text, holds no markup of the log's, and no id or title names a run."""
    raw = [text for text in (MARKUP, "<script>alert", "<img src=x", *HOSTILE) if "<" in text and text in page]
    named = [text for text in HOSTILE if any(text in name for name in runs)]
    if raw or named:
        return f"markup reaches the page: {raw}; texts name runs: {named}"
    return "" if escape(MARKUP) in page else "the page does not name the file of the refused row: nothing was tried"


def control(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Titles full of code tokens and prompt markers change no item's prompt: it is made of its codes alone."""
    from stages.dataset import load_dataset
    from stages.examples import Encoder

    for _ in range(count):
        found = []
        for titles in ([f"plain {number}" for number in range(30)], [rng.choice(HOSTILE) for _ in range(30)]):
            place, rows = bench.place(), events(Random(5))  # noqa: S311
            path = written(bench.place() / "log.csv", rows)
            table = bench.place() / "items.jsonl"
            table.parent.mkdir()
            lines = [json.dumps({"item_id": f"i{number}", "title": title}) for number, title in enumerate(titles)]
            table.write_text("\n".join(lines))
            values = {**config(place, path).model_dump(mode="json"), "catalogue": {"sources": [{"path": str(table)}]}}
            values["items"]["vectors"] = "cooccurrence"
            settings = Config.model_validate(values)
            read_log(settings, Workspace(place))
            split_stages(settings, Workspace(place))
            build_semantic_ids(settings, Workspace(place))
            dataset = load_dataset(settings, Workspace(place))
            found.append(Encoder(dataset.interactions, dataset.catalogue).tokens.tolist())
        yield "" if found[0] == found[1] else "titles changed the tokens"


TABLE = (
    Row(11, "files truncated, empty, without a column", "E with file and column", broken_files, 1, 20),
    Row(12, "events twice, ten times, shuffled copies", "the same stages; copies counted", copies, 3, 60),
    Row(13, "rows, files, formats, row groups permuted", "identical stages", orders, 2, 50),
    Row(15, "equal times across a boundary", "deterministic; all on one side", ties, 3, 100),
    Row(30, "events dated in the future", "Q", future, 2, 50),
    Row(31, "times in every unit, mixed, zero, negative, missing, overflowing", "inferred; E; Q", times, 1, 20),
    Row(32, "ids of 2^63 and more, look-alikes, empty, 1 MB", "distinct as text or integers; Q; floats E", ids, 1, 20),
    Row(
        33,
        "hostile text in ids, titles and a file's name, bytes that are none",
        "round trip or Q; escaped",
        texts,
        1,
        20,
        "a report names files, and no item; titles in the service's page: tests/test_service_page.py",
    ),
    Row(34, "control strings in item text", "never parsed as control tokens", control, 1, 20),
)
