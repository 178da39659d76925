"""Rows 16, 18 to 22 and 39 to 42: numbers that run away, odd stages, leakage, determinism, memory and long lives."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import polars as pl

from benchmarks.faults.harness import LINEAGES, OFF, Bench, Row, fingerprint, refused, sound, user_error
from benchmarks.faults.intake import config as log_config
from benchmarks.faults.intake import written
from benchmarks.soak import FEWEST, lived
from flows.plain import run_plainly
from stages.checkpoint import ADAPTER, tensors_digest
from stages.commit import checkpoint_folders
from stages.config import Config
from stages.dataset import load_dataset
from stages.evaluate import evaluate_stage, recommender, test_queries
from stages.items import build_semantic_ids
from stages.jobs import Job
from stages.queries import training_targets
from stages.train import train_stage
from stages.workspace import Workspace, read_json, sha256_file

NAN, INF = float("nan"), float("inf")


def runaway(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A loss that is NaN or infinite, a NaN gradient (stopped, nothing committed), a loss a million times too large."""
    for number in range(count):
        root = bench.fresh()
        fault = {"kind": "poison", "at": rng.randrange(1, 6), "value": (NAN, INF, 1.0, 1e6)[number % 4]}
        fault |= {"gradient": number % 4 == 2}
        child = bench.learn(root, LINEAGES[:1], faults=[fault])
        if number % 4 == 3:
            yield ("" if child.end() == 0 else f"a spike ended the run: {child.said[-200:]}") or sound(root)
        else:
            left = list(Workspace(root).checkpoints.glob("[!.]*"))
            yield refused(child, "became") or ("something was committed" if left else "") or bench.resumed(root)
        shutil.rmtree(root)


def board(root: Path, stages: int) -> tuple[Config, Workspace]:
    """The tests' tiny workspace, whose users walk a ring of items."""
    from tests import tiny

    training = {**tiny.config().training.model_dump(), "first_epochs": 2, "epochs": 2}
    return tiny.config(training=training), tiny.checkerboard(root, stages=stages, users=12)


def odd_stages(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A stage that is empty, of one user, of one item, or of users with fewer than three events."""
    from tests import tiny

    for _ in range(count):
        kinds: dict[str, list[tuple[str, str]]] = {
            "empty": [],
            "one user": [("s1u0", f"i{n:02d}") for n in range(9)],
            "one item": [(f"s1u{n}", "i03") for n in range(8)],
            "short": [(f"s1u{n}", f"i{(n + k) % 16:02d}") for n in range(8) for k in range(2)],
        }
        for name, rows in kinds.items():
            settings, place = board(bench.place(), 2)
            tiny.write_stage(place, 1, rows)
            job = Job("single", 0, "same_stage", 1)
            done = train_stage(settings, place, job)
            evaluation = evaluate_stage(settings, place, job, tested=1)
            first, second = checkpoint_folders(settings, place, load_dataset(settings, place), job)
            if done.targets == 0 and sha256_file(first / ADAPTER) != sha256_file(second / ADAPTER):
                yield f"{name}: nothing to train on, but the adapter moved"
            elif done.targets == 0 and evaluation.queries:
                yield f"{name}: tests without targets"
            else:
                yield sound(place.root)
            shutil.rmtree(place.root)


def unseen(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A stage of items, or of users, that nobody has seen before: codes are given, the model trains and is tested."""
    begin = 1_700_000_000
    for number in range(count):
        place = bench.place()
        rows = [(f"u{rng.randrange(12)}", f"i{rng.randrange(20)}", begin + n) for n in range(200)]
        fresh = ("u{}", "new{}") if number % 2 else ("new{}", "i{}")
        rows += [
            (fresh[0].format(rng.randrange(12)), fresh[1].format(rng.randrange(20)), begin + 200 + n)
            for n in range(200)
        ]
        values = log_config(place, written(bench.place() / "log.csv", rows)).model_dump(mode="json")
        values["backbone"] |= {"hidden": 16, "layers": 1, "heads": 2, "feed_forward": 32}
        values["training"] |= {"first_epochs": 1, "epochs": 1}
        settings, own = Config.model_validate(values), Workspace(place)
        prepare(settings, own)
        job = Job("single", 0, "same_stage", 1)
        train_stage(settings, own, job)
        done = evaluate_stage(settings, own, job, tested=1)
        codes = pl.read_parquet(own.catalogue / "items.parquet")["codes"]
        yield "" if done.queries and codes.null_count() == 0 else f"{done.queries} tests, {codes.null_count()} uncoded"
        shutil.rmtree(place)


def prepare(settings: Config, place: Workspace) -> None:
    """Log, stages and codes."""
    from stages.log import read_log
    from stages.split import split_stages

    read_log(settings, place)
    split_stages(settings, place)
    build_semantic_ids(settings, place)


def without_codes(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Codes that run out, items that share one, items missing from the item table."""
    begin = 1_700_000_000
    for _ in range(count):
        rows = [(f"u{n % 9}", f"i{rng.randrange(40)}", begin + n) for n in range(300)]
        path = written(bench.place() / "log.csv", rows)
        table = bench.place() / "items.csv"
        written(table, [(f"i{n}", "the same title", "") for n in range(20)], ("item_id", "title", "text"))
        for levels, codes, words in ((2, 2, "codes_per_level"), (3, 64, "")):
            place = bench.place()
            values = log_config(place, path).model_dump(mode="json")
            values |= {"catalogue": {"sources": [{"path": str(table)}]}}
            values["items"] |= {"levels": levels, "codes_per_level": codes, "dimensions": 4}
            settings = Config.model_validate(values)
            if words:
                yield user_error(lambda s=settings, p=place: prepare(s, Workspace(p)), words)
                continue
            prepare(settings, Workspace(place))
            manifest = read_json(place / "catalogue" / "manifest.json")
            yield "" if "collisions" in manifest and manifest["items"] == len({r[1] for r in rows}) else "items lost"


def one_giant(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """One user with a million events beside a stage ten times the other, under 3 GiB of address space."""
    begin = 1_600_000_000
    for _ in range(count):
        n = 1_000_000
        frame = pl.DataFrame({"user_id": ["giant"] * n, "timestamp": np.arange(begin, begin + n)})
        frame = frame.with_columns(item_id=pl.Series([f"i{value}" for value in np.arange(n) % 500]))
        path = bench.place() / "log.parquet"
        path.parent.mkdir()
        frame.write_parquet(path)
        file = bench.place()
        where = f'[[log.sources]]\npath = "{path}"\n[stages]\nfractions = [0.9, 0.1]\n'
        file.write_text(f'name = "giant"\nworkspace = "unused"\n{where}')
        root = bench.place()
        words = ["split", "--config", str(file), "--workspace", str(root)]
        child = bench.launch(command=words, faults=[{"kind": "memory", "bytes": 3 * 2**30}])
        code = child.end()
        events = (
            sum(stage["events"] for stage in read_json(root / "stages" / "manifest.json")["stages"]) if not code else 0
        )
        yield "" if events == n else f"exit {code}, {events} events: {child.said[-300:]}"
        shutil.rmtree(root, ignore_errors=True)


ABORTS = (
    "memory allocation of",
    "cannot allocate memory for thread-local data",
    "Resource temporarily unavailable",  # a thread that polars could not start
)
"""Last words of polars and of the C library, which end the process themselves where they get no memory."""


def little_memory(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Only a few megabytes of address space beyond what the process has: an error or an abort, and then R."""
    for _ in range(count):
        root = bench.fresh()
        child = bench.learn(root, faults=[{"kind": "memory", "bytes": rng.randrange(2**18, 2**25)}])
        code = child.end()
        gone = code < 0 or any(words in child.said for words in ABORTS)
        said = code == 0 or gone or child.cause().startswith("driftrec: ")
        yield ("" if said else f"exit {code}: {child.said[-300:]}") or sound(root) or bench.resumed(root)
        shutil.rmtree(root)


def leakage(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Probes a, c, d and b: later events changed, times compared, lists searched for later items, labels permuted."""
    from tests import tiny

    for _ in range(count):
        settings, place = board(bench.place(), 3)
        early, last = Job("single", 0, "same_stage", 1), Job("single", 0, "next_stage", 1)
        train_stage(settings, place, early)
        before = [tensors_digest(path) for path in folders(settings, place, early)]
        other, twin = board(bench.place(), 3)
        tiny.write_stage(twin, 2, [(f"x{n}", f"i{rng.randrange(16):02d}") for n in range(40) for _ in range(5)])
        tiny.write_stage_manifest(twin, 3, tag=" changed")
        train_stage(other, twin, early)
        yield "" if before == [tensors_digest(path) for path in folders(other, twin, early)] else "the future leaked"
        dataset = load_dataset(settings, place)
        trained = training_targets(dataset.interactions, range(2), "next_stage", 0)
        queries = test_queries(settings, dataset, last, 2, None, "recommendation")
        latest = dataset.interactions.stages[trained].max()
        yield "" if latest < dataset.interactions.stages[queries.cut].min() else "trained on what is tested"
        begin = bench.learned.root
        own, shop = bench.config, Workspace(begin)
        found = load_dataset(own, shop)
        job = Job("single", 0, "same_stage", 0)
        known = found.catalogue.known(0)
        histories = [np.arange(known)[:5], np.arange(known)[-5:]]
        listed = recommender(own, shop, found, job).recommend(histories, 20).items
        yield "" if known < len(found.catalogue.item_ids) and listed.max() < known else "a later item was recommended"
        yield permuted(bench, rng)


def permuted(bench: Bench, rng: Random) -> str:
    """Probe b: a model trained on shuffled labels scores at chance on them (16 items, so Hit@1 near 1/16)."""
    from tests import tiny

    settings, place = board(bench.place(), 2)
    rows = [(f"s1u{n:03d}", f"i{rng.randrange(16):02d}") for n in range(60) for _ in range(9)]
    tiny.write_stage(place, 1, rows)
    job = Job("single", 0, "same_stage", 1)
    train_stage(settings, place, job)
    done = evaluate_stage(settings, place, job, tested=1)
    hits = float(pl.read_parquet(place.root / done.path)["hit_at_1"].mean() or 0)
    bound = 4 * (1 / 16 * 15 / 16 / done.queries) ** 0.5
    return "" if abs(hits - 1 / 16) < bound else f"Hit@1 {hits:.3f} on shuffled labels, 0.0625 ± {bound:.3f} is chance"


def folders(settings: Config, place: Workspace, job: Job) -> list[Path]:
    """Where the job's lineage is."""
    return checkpoint_folders(settings, place, load_dataset(settings, place), job)


def once(bench: Bench, env: dict[str, str]) -> Path:
    """Train the lineages in a new interpreter with other variables."""
    root = bench.fresh()
    task: dict[str, Any] = {"work": "learn", "config": str(bench.config_file), "root": str(root), "jobs": LINEAGES}
    task |= {"out": str(bench.folder / f"{root.name}.txt")}
    words = [sys.executable, "-m", "benchmarks.faults.child", json.dumps(task)]
    subprocess.run(words, env={**os.environ, **OFF, **env}, check=True, timeout=300)
    return root


def determinism(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """New interpreters with other hash seeds give one hash."""
    for _ in range(count):
        root = once(bench, {"PYTHONHASHSEED": str(rng.randrange(2**32))})
        yield "" if fingerprint(root) == bench.learned.print else "another hash seed gives other bytes"
        shutil.rmtree(root)


def other_processor(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """The same machine told to be one without AVX: metrics within 0.1 of each other (60 users), other bytes allowed."""
    for _ in range(count):
        root = once(bench, {"ATEN_CPU_CAPABILITY": "default", "ONEDNN_MAX_CPU_ISA": "SSE41"})
        gaps = []
        for path in sorted(Workspace(root).evaluations.glob("*.parquet")):
            pair = [pl.read_parquet(place / "runs" / "evaluations" / path.name) for place in (root, bench.learned.root)]
            gaps.append(abs(float(pair[0]["hit_at_10"].mean() or 0) - float(pair[1]["hit_at_10"].mean() or 0)))
        yield "" if gaps and max(gaps) < 0.1 else f"Hit@10 differs by {gaps}"
        shutil.rmtree(root)


def soak(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """`count` retrainings in one process: memory, descriptors and processor time a stage."""
    life = lived(bench.place(), max(count, FEWEST), run_plainly)
    grown, more = (last - first for first, last in map(life.halves, ("memory", "files")))
    # A promotion takes longer than a decision to stay, so each kind is held to itself; NaN where there was none.
    kinds = {said: life.halves("seconds", promoted=kind) for kind, said in ((False, "kept"), (True, "promoted"))}
    slower = [
        f"{early:.2f} to {late:.2f} s where {said}" for said, (early, late) in kinds.items() if late > 1.5 * early
    ]
    flat = grown <= 64 and more <= 0 and not slower
    yield "" if flat else f"from early to late {grown:+.0f} MiB, {more:+.0f} descriptors, {'; '.join(slower)}"


TABLE = (
    Row(
        16, "NaN or infinite loss, NaN gradient, loss spike", "stops, nothing committed; spike survives", runaway, 2, 40
    ),
    Row(18, "stages empty, of one user, one item, short users", "D: carried over, recorded", odd_stages, 1, 5),
    Row(19, "stages of unseen items or unseen users only", "D: codes given, trained, tested", unseen, 1, 10),
    Row(20, "codes run out, equal texts, items not in the table", "E naming the remedy; counted", without_codes, 1, 10),
    Row(21, "one user with a million events", "done within 3 GiB", one_giant, 0, 2),
    Row(22, "memory ceiling", "E, or R after a restart", little_memory, 1, 20, "RLIMIT_AS; no cgroup"),
    Row(39, "leakage probes", "pass", leakage, 1, 10, "probe e is tests/test_summary.py's"),
    Row(40, "same seed, other processes and hash seeds", "one hash", determinism, 0, 5),
    Row(
        41, "a processor without AVX", "metrics within 0.1", other_processor, 0, 1, "library upgrades are not injected"
    ),
    Row(
        42,
        "many retrainings in one process",
        "flat memory, descriptors, time",
        soak,
        12,
        200,
        "time of a kind: stages that kept the champion, stages that promoted",
    ),
)
