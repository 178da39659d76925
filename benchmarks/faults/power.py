"""Row 5: the power goes while driftrec writes. Each write is carried out once and recorded; what the disk may hold
after each of its operations is laid out anew, and the next run must find the old state or the new one.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import polars as pl
import torch

from benchmarks import growing
from benchmarks.faults.disk import KINDS, Disk
from benchmarks.faults.harness import Bench, Row
from benchmarks.growing import NOW, seconds, week, write_rows
from flows.promotion.champion import in_service, promote, settle
from flows.promotion.history import read_history
from stages import items
from stages.append import finish_commit, grow_catalogue, take_new_rows
from stages.checkpoint import Tensors, fault_of, tensors_digest, write_checkpoint
from stages.config import AdapterConfig, Config
from stages.content import content_digest
from stages.errors import UserError
from stages.evaluate import _intact, evaluate_stage
from stages.jobs import Checkpoint, Job
from stages.log import read_log
from stages.reading import silent
from stages.split import load_stages, split_stages
from stages.waiting import Waiting, load_waiting, store_waiting, with_reason
from stages.workspace import Workspace, sha256_file

REFUSED = "refused"
POPULAR = Job("popularity", 0, "same_stage", 1)


@dataclass(frozen=True)
class Subject:
    """Something that driftrec writes.

    Attributes:
        name: in words.
        start: makes the old state of an empty folder.
        work: makes the new state of it; repeated, it ends in that state from wherever it begins.
        seen: what the next run believes without that: the old state's value or the new one's, or it refuses.
        end: all that is there after the work.
    """

    name: str
    start: Callable[[Path], object]
    work: Callable[[Path], object]
    seen: Callable[[Path], object]
    end: Callable[[Path], object]


def power_cut(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """`count` cuts in each of driftrec's writes, spread over all operations and all that may be left of them."""
    for subject in subjects(bench):
        yield from cuts(bench, subject, count, rng)


def cuts(bench: Bench, subject: Subject, count: int, rng: Random) -> Iterator[str]:
    """Write, cut the power, look, and write again."""
    base = bench.place()
    base.mkdir()
    subject.start(base)
    old = believed(subject, copied(base, bench.place()))
    disk = Disk(base)
    with disk.watched():
        subject.work(base)
    new, end = believed(subject, copied(base, bench.place())), subject.end(base)
    every = [(number, kind) for number in range(len(disk.moments)) for kind in KINDS]
    wanted = min(count, len(every))
    for number, kind in (every[place * len(every) // wanted] for place in range(wanted)):
        left = disk.laid_out(disk.moments[number], kind, rng, bench.place())
        problem = after_cut(bench, subject, left, (old, new), end)
        yield problem and f"{subject.name}, {number + 1} of {len(disk.moments)} operations, {kind}: {problem[:300]}"
        shutil.rmtree(left)
    # What the work has said to be done is there whatever of the rest is lost.
    left = disk.laid_out(disk.moments[-1], KINDS[0], rng, bench.place())
    yield "" if believed(subject, left) == new else f"{subject.name}: done, and lost with the power"


def after_cut(bench: Bench, subject: Subject, left: Path, known: tuple[object, object], end: object) -> str:
    """What is wrong with the left state, or with what the repeated work makes of it."""
    try:
        found = believed(subject, copied(left, bench.place()))
        if found not in (*known, REFUSED, None):
            return f"neither the old state nor the new: {found}"
        subject.work(left)
        return "" if subject.end(left) == end else "the repeated work ends in another state"
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def believed(subject: Subject, root: Path) -> object:
    """What the next run sees, or that it refuses to."""
    try:
        return subject.seen(root)
    except UserError:
        return REFUSED


def copied(source: Path, target: Path) -> Path:
    """A copy that may be changed."""
    shutil.copytree(source, target)
    return target


def subjects(bench: Bench) -> Iterator[Subject]:
    """A checkpoint, decisions, the log and its cut, the commit of a stage, rows that wait, codes, a measurement."""
    yield Subject("checkpoint", lambda root: None, commit, checkpoint, checkpoint)
    yield Subject("first decision", lambda root: commit(root, "a"), lambda root: decide(root, "a"), decided, decided)
    yield Subject("next decision", two_models, lambda root: decide(root, "b"), decided, decided)
    shop = bench.place()
    config, first = growing.opened(shop)
    write_rows(
        shop / "events" / "more.csv", [*week(2), ("u00", "i05", seconds(8)), *week(3), ("u1", "i1", seconds(28))]
    )

    def opened(root: Path) -> None:
        shutil.copytree(first.root, root, dirs_exist_ok=True)

    yield Subject("log and cut", lambda root: None, lambda root: ingest(config, root), stages, files)
    for late in ("hold", "rebuild"):
        own = config.model_copy(update={"retrain": config.retrain.model_copy(update={"late": late})})
        yield Subject(
            f"stages and open rows, late rows {late}", opened, lambda root, own=own: take(own, root), stages, files
        )

    def waited(root: Path) -> None:
        opened(root)
        wait(root, 0)

    yield Subject("rows that wait", waited, lambda root: wait(root, 40), waiting, waiting)

    def grown(root: Path) -> None:
        opened(root)
        take(config, root)

    yield Subject("codes of new items", grown, lambda root: grow(config, root), codes, codes)
    yield Subject("measurement", opened, lambda root: measure(config, root), measured, measured)


def commit(root: Path, name: str = "c") -> None:
    """A small checkpoint."""
    rows = {"input_rows": torch.full((3, 2), float(ord(name[0]))), "output_rows": torch.zeros(3, 2)}
    write_checkpoint(Workspace(root).checkpoints / name, Tensors(rows=rows), AdapterConfig(), {"parents": {}})


def checkpoint(root: Path) -> str:
    """The checkpoint's tensors, or that there is none."""
    folder = Workspace(root).checkpoints / "c"
    return (fault_of(folder) or tensors_digest(folder)) if folder.exists() else "none"


def two_models(root: Path) -> None:
    """Two checkpoints, of which the first is in service."""
    commit(root, "a")
    commit(root, "b")
    decide(root, "a")


def decide(root: Path, key: str) -> None:
    """Put a checkpoint into service, where it is not yet."""
    place = Workspace(root)
    present = settle(place)
    if present is None or present.key != key:
        found = Checkpoint(Job("peso", 0, "same_stage", 1), key, key, 1.0, 1, 1, None, 1, False)
        promote(place, found, "promoted", {"stage": 1, "why": "asked for", "challenger": None}, present)


def decided(root: Path) -> object:
    """Who is in service as the file says now and as the history settles it, and who was."""
    place = Workspace(root)
    in_service(place)
    present = settle(place)
    return present and present.key, [line["champion"]["key"] for line in read_history(place)[0]]


def ingest(config: Config, root: Path) -> None:
    """The log and its stages, as `driftrec split` leaves them."""
    read_log(config, Workspace(root))
    split_stages(config, Workspace(root))


def take(config: Config, root: Path) -> None:
    """The rows that are new."""
    take_new_rows(config, Workspace(root), now=NOW)


def stages(root: Path) -> object:
    """The stages' contents; none where none are committed."""
    place = Workspace(root)
    finish_commit(place)
    return [stage.digest for stage in load_stages(place)]


def files(root: Path) -> object:
    """Every file but temporary ones."""
    return {name: digest for name, digest in growing.listing(root).items() if ".tmp-" not in name}


def wait(root: Path, first: int) -> None:
    """Rows in the open stage, and some held and refused, from a row of stage 1 on."""
    rows = pl.read_parquet(Workspace(root).stage_file(1)).select(load_waiting(Workspace(root)).open.columns)[first:]
    parts = rows[:9], with_reason(rows[9:12], "held"), with_reason(rows[12:15], "late")
    store_waiting(Workspace(root), Waiting(*parts))


def waiting(root: Path) -> object:
    """The three tables, and whether one is damaged."""
    found = load_waiting(Workspace(root))
    return [content_digest(part) for part in (found.open, found.held, found.refused)], len(found.damaged)


def grow(config: Config, root: Path) -> None:
    """Codes for the items of new stages."""
    grow_catalogue(config, Workspace(root))
    items.build_semantic_ids(config, Workspace(root))


def codes(root: Path) -> object:
    """The table of items with their codes, where its files are those that its manifest names."""
    whole = items._intact(Workspace(root), silent)
    return whole and sha256_file(Workspace(root).catalogue / "items.parquet")


def measure(config: Config, root: Path) -> None:
    """A baseline's tests."""
    evaluate_stage(config, Workspace(root), POPULAR, tested=1)


def measured(root: Path) -> object:
    """What the next run takes for the measurement; none where it makes it anew."""
    found = sorted(Workspace(root).evaluations.glob("[!.]*.parquet"))
    return [sha256_file(path) for path in found if _intact(path, path.with_suffix(".json"), None)]


TABLE = (
    Row(
        5,
        "power cut in a checkpoint, decision, stage commit, waiting rows, codes, measurement",
        "old or new state, never a mix; the repeated work ends alike",
        power_cut,
        3,
        100,
        "replays the trace of each write without any part of what was not synced; no dm-flakey",
    ),
)
