"""Rows 16, 18 to 21 and 39: numbers that run away, odd stages and items, leakage."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import polars as pl

from benchmarks.faults.harness import LINEAGES, Bench, Row, refused, sound, user_error
from benchmarks.faults.intake import config as log_config
from benchmarks.faults.intake import written
from stages.append import grow_catalogue
from stages.checkpoint import ADAPTER, tensors_digest
from stages.commit import checkpoint_folders
from stages.config import Config
from stages.dataset import load_dataset
from stages.evaluate import evaluate_stage, recommender, test_queries
from stages.items import build_semantic_ids
from stages.jobs import Checkpoint, Evaluation, Job
from stages.queries import training_targets
from stages.summary import summarise
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
            problem = refused(child, "became")
            named = re.search(r"in epoch \d+, in the batch of .*windows \d+", child.cause())
            problem = problem or ("" if named else f"no batch is named: {child.cause()[:300]}")
            yield problem or ("something was committed" if left else "") or bench.resumed(root)
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
                yield undefined(settings, place, done, evaluation) or sound(place.root)
            shutil.rmtree(place.root)


def undefined(settings: Config, place: Workspace, done: Checkpoint, tested: Evaluation) -> str:
    """ "" if the report has the stage, numbers for what has test users, and none or null (not 0) for what has none."""
    first = Job("first", 0, "same_stage", 0)
    before = evaluate_stage(settings, place, first, tested=0)
    report = summarise(settings, place, [before, tested], [train_stage(settings, place, first), done])
    if [cost["stage"] for cost in report["costs"]] != [0, 1]:
        return "the stage is not in the report"
    rows = [row for row in report["rows"] if row["stage"] == tested.tested]
    wrong = [row for row in rows if (row["value"] is None) != (row["users"] == 0)]
    if wrong or bool(tested.queries) != any(row["users"] for row in rows):
        return f"{tested.queries} tests, and the report says {(wrong or rows)[:1]}"
    return ""


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
        values["evaluation"] |= {"beam": 40}
        settings, own = Config.model_validate(values), Workspace(place)
        prepare(settings, own)
        job = Job("single", 0, "same_stage", 1)
        train_stage(settings, own, job)
        done = evaluate_stage(settings, own, job, tested=1)
        codes = pl.read_parquet(own.catalogue / "items.parquet")["codes"]
        problem = (
            "" if done.queries and codes.null_count() == 0 else f"{done.queries} tests, {codes.null_count()} uncoded"
        )
        yield problem or all_new(settings, own, job, bool(number % 2))
        shutil.rmtree(place)


def all_new(settings: Config, place: Workspace, job: Job, items: bool) -> str:
    """ "" if all that stage 0's model is asked of stage 1 counts as new, and stage 1's can list every item there is."""
    ahead = Job("first", 0, "next_stage", 0)
    train_stage(settings, place, ahead)
    tests = pl.read_parquet(place.root / evaluate_stage(settings, place, ahead, tested=1).path)
    share = {name: float(tests[name].mean() or 0) for name in ("new_item", "reachable", "new_user")}
    want = {"new_item": float(items), "reachable": float(not items), "new_user": float(not items)}
    dataset = load_dataset(settings, place)
    known, before = dataset.catalogue.known(1), dataset.catalogue.known(0)
    if share != want or (known > before) != items:
        return f"shares {share}, not {want}; {known - before} new items"
    listed = recommender(settings, place, dataset, job).recommend([np.arange(3)], known).items[0]
    lacking = set(range(known)) - set(listed.tolist())
    return f"{len(lacking)} of {known} items can never be listed: {sorted(lacking)[:9]}" if lacking else ""


def prepare(settings: Config, place: Workspace) -> None:
    """Log, stages and codes."""
    from stages.log import read_log
    from stages.split import split_stages

    read_log(settings, place)
    split_stages(settings, place)
    build_semantic_ids(settings, place)


def without_codes(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Codes that run out, items that share one, items missing from the item table, and gone from it later."""
    begin = 1_700_000_000
    for _ in range(count):
        rows = [(f"u{n % 9}", f"i{rng.randrange(40)}", begin + n) for n in range(300)]
        path = written(bench.place() / "log.csv", rows)
        table = bench.place() / "items.csv"
        written(table, [(f"i{n}", "the same title", "") for n in range(30)], ("item_id", "title", "text"))
        for levels, codes, words in ((2, 2, "codes_per_level"), (3, 64, "")):
            place = bench.place()
            values = log_config(place, path).model_dump(mode="json")
            values |= {"catalogue": {"sources": [{"path": str(table)}]}}
            values["items"] |= {"levels": levels, "codes_per_level": codes, "dimensions": 4}
            values["backbone"] |= {"hidden": 16, "layers": 1, "heads": 2, "feed_forward": 32}
            values["training"] |= {"first_epochs": 1, "epochs": 1}
            values["evaluation"] |= {"beam": 40}
            settings = Config.model_validate(values)
            if words:
                yield user_error(lambda s=settings, p=place: prepare(s, Workspace(p)), words)
                continue
            prepare(settings, Workspace(place))
            yield shared(Workspace(place), len({row[1] for row in rows})) or used(settings, Workspace(place))
            # Half of the table goes: what is in the log keeps its codes, whatever they were made of.
            before = sha256_file(place / "catalogue" / "items.parquet")
            written(table, [(f"i{n}", "the same title", "") for n in range(10)], ("item_id", "title", "text"))
            grow_catalogue(settings, Workspace(place))
            build_semantic_ids(settings, Workspace(place))
            same = sha256_file(place / "catalogue" / "items.parquet") == before
            yield ("" if same else "items moved as others left the table") or used(settings, Workspace(place))


def shared(place: Workspace, wanted: int) -> str:
    """ "" if every item of the log has codes of its own, and the manifest counts how many the others tell apart."""
    manifest = read_json(place.catalogue / "manifest.json")
    codes = np.array(pl.read_parquet(place.catalogue / "items.parquet")["codes"].to_list())
    distinct = [len(np.unique(codes[:, : depth + 1], axis=0)) for depth in range(codes.shape[1])]
    if (manifest["items"], distinct[-1]) != (wanted, wanted):
        return f"{manifest['items']} items with {distinct[-1]} codes, {wanted} are in the log"
    if manifest["prefixes"] != distinct or manifest["collisions"]["items_sharing"]:
        return f"the manifest counts {manifest['prefixes']}, {manifest['collisions']}; there are {distinct}"
    return "" if distinct[-2] < wanted - 9 else "items of one text were coded apart: nothing was tried"


def used(settings: Config, place: Workspace) -> str:
    """ "" if a model trains on these items, is tested, and lists each of them once."""
    job = Job("single", 0, "same_stage", 1)
    train_stage(settings, place, job)
    done = evaluate_stage(settings, place, job, tested=1)
    dataset = load_dataset(settings, place)
    known = dataset.catalogue.known(1)
    listed = recommender(settings, place, dataset, job).recommend([np.arange(3)], known).items[0].tolist()
    return (
        "" if done.queries and sorted(listed) == list(range(known)) else f"{len(set(listed))} of {known} items listed"
    )


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


TABLE = (
    Row(
        16, "NaN or infinite loss, NaN gradient, loss spike", "stops, nothing committed; spike survives", runaway, 2, 40
    ),
    Row(18, "stages empty, of one user, one item, short users", "D: carried over, recorded, null", odd_stages, 1, 5),
    Row(19, "stages of unseen items or unseen users only", "D: codes given, listed, new slice 100 %", unseen, 1, 10),
    Row(
        20,
        "codes run out, equal texts, items not in the table or gone from it",
        "E naming the remedy; counted, trained, listed",
        without_codes,
        1,
        10,
    ),
    Row(
        21,
        "one user with a million events",
        "done within 3 GiB",
        one_giant,
        0,
        2,
        "`driftrec split` alone, RLIMIT_AS; no ceiling can be configured, so none is checked before work",
    ),
    Row(39, "leakage probes", "pass", leakage, 1, 10, "probe e is tests/test_notes.py's"),
)
