"""The bench every fault is tried on: a tiny experiment, children to break it in, and what must hold afterwards."""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from multiprocessing.process import BaseProcess
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.generated import TINY, write_experiment
from stages.checkpoint import fault_of
from stages.config import Config, load_config
from stages.errors import UserError
from stages.left_overs import left_overs
from stages.workspace import Workspace, digest_of, read_json, sha256_file

OFF = {"DRIFTREC_PREFECT": "off", "OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "MPLBACKEND": "Agg"}
LIMIT = 300.0
"""Seconds after which a child counts as hung."""
TRAINING = """
[training]
batch_size = 16
first_epochs = 3
epochs = 3
[evaluation]
matrix_users = 0
bootstrap = 100
"""


@dataclass(frozen=True)
class Row:
    """One row of the fault table.

    Attributes:
        number: its number in the table.
        fault: what is injected.
        expected: what must come of it (R resumes bit-identically, E clear error, D degraded and said, Q counted).
        scenario: yields "" for each run that passed and a sentence for each that did not; `count` is a wish.
        quick, full: that wish for the quick subset (0: not part of it) and for the whole table.
        note: what the injection leaves out.
    """

    number: int
    fault: str
    expected: str
    scenario: Callable[[Bench, int, Random], Iterator[str]]
    quick: int
    full: int
    note: str = ""


Lineage = tuple[str, int, str, int]
"""Method, seed, protocol and last stage."""
LINEAGES: tuple[Lineage, ...] = (("single", 0, "same_stage", 1), ("peso", 0, "next_stage", 1))


@dataclass(frozen=True)
class Undisturbed:
    """A run without a fault: what it leaves, its seconds, and where it is."""

    print: dict[str, Any]
    seconds: float
    root: Path


@dataclass
class Child:
    """A process under test."""

    process: BaseProcess
    out: Path
    began: float = field(default_factory=time.monotonic)

    def signal(self, number: int) -> None:
        """Send a signal, if it still runs."""
        if self.process.is_alive() and self.process.pid is not None:
            with suppress(ProcessLookupError):  # it ended since it was asked
                os.kill(self.process.pid, number)

    def end(self, limit: float = LIMIT) -> int:
        """Its exit code, negative for a signal; a hung one is killed and gives -99."""
        self.process.join(limit)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()
            return -99
        code = self.process.exitcode
        return -98 if code is None else code

    def waits_for(self, words: str, limit: float = LIMIT) -> bool:
        """Whether it says `words` before it ends or the time is up."""
        until = time.monotonic() + limit
        while time.monotonic() < until and self.process.is_alive() and words not in self.said:
            time.sleep(0.02)
        return words in self.said

    def stops(self, limit: float = LIMIT) -> bool:
        """Whether it is stopped by a signal before it ends or the time is up."""
        until = time.monotonic() + limit
        while time.monotonic() < until and self.process.is_alive():
            if "\nState:\tT" in Path(f"/proc/{self.process.pid}/status").read_text(encoding="utf-8"):
                return True
            time.sleep(0.02)
        return False

    @property
    def said(self) -> str:
        """Both output streams."""
        return self.out.read_text(encoding="utf-8", errors="replace") if self.out.exists() else ""

    def cause(self) -> str:
        """The one line that says why it ended."""
        lines = [line for line in self.said.splitlines() if line.startswith("driftrec: ")]
        return lines[-1] if len(lines) == 1 else f"{len(lines)} lines of cause"


class Bench:
    """A folder for all trials of one row.

    Args:
        folder: empty.
        commands: many whole commands will be run, which need Prefect and MLflow; without them the start is quicker.
        warm: import both beforehand; absent: as `commands`.
    """

    def __init__(self, folder: Path, commands: bool = True, warm: bool | None = None) -> None:
        self.folder = folder
        self.number = 0
        self.context = multiprocessing.get_context("forkserver")
        self.commands = commands
        warm = commands if warm is None else warm
        self.context.set_forkserver_preload(["benchmarks.faults.child", *(["benchmarks.faults.warm"] * warm)])
        self.source = folder / "source"
        self.first_inputs = ""
        self._known: dict[str, Undisturbed] = {}
        self._template: Path | None = None

    @property
    def config_file(self) -> Path:
        """The tiny experiment: two stages, 60 users, 40 items."""
        path = self.source / "tiny.toml"
        if not path.exists():
            write_experiment(self.source, "tiny", TINY + TRAINING, users=60, items=40)
            self.first_inputs = self.inputs()
        return path

    @property
    def config(self) -> Config:
        """Its settings."""
        return load_config(self.config_file)

    def place(self) -> Path:
        """A path that nothing is at."""
        self.number += 1
        return self.folder / f"trial-{self.number}"

    def fresh(self) -> Path:
        """A workspace that holds the read log, its stages and codes, and an empty tracking store."""
        if self._template is None:
            self._template = self.folder / "template"
            child = self.command(["split"], self._template)
            if child.end():
                raise RuntimeError(f"the template could not be made: {child.said[-2000:]}")
            from stages.items import build_semantic_ids

            build_semantic_ids(self.config, Workspace(self._template))
            if self.commands:
                self.launch(work="answers", root=str(self._template)).end()
        place = self.place()
        shutil.copytree(self._template, place)
        return place

    def launch(self, **task: Any) -> Child:
        """Start a child; see `benchmarks.faults.child.run`."""
        from benchmarks.faults import child

        self.number += 1
        out = self.folder / f"out-{self.number}.txt"
        task = {**task, "out": str(out), "env": {**OFF, **task.get("env", {})}}
        process = self.context.Process(target=child.run, args=(task,))
        process.start()
        return Child(process, out)

    def command(self, words: list[str], root: Path, **task: Any) -> Child:
        """Start `driftrec words` on the tiny experiment in the workspace `root`."""
        where = ["--workspace", str(root)]
        config = [] if words[0] in ("report", "resume", "gc", "recommend") else ["--config", str(self.config_file)]
        return self.launch(command=[*words, *config, *where], **task)

    def train(self, root: Path, **task: Any) -> Child:
        """Start `driftrec train -m single`: two stages, two protocols, tests, report, record."""
        return self.command(["train", "-m", "single", "--workers", "1"], root, **task)

    def learn(self, root: Path, jobs: Sequence[Lineage] = LINEAGES, config: Config | None = None, **task: Any) -> Child:
        """Train and test whole lineages, without a report."""
        return self.launch(work="learn", config=config or self.config, root=str(root), jobs=list(jobs), **task)

    @property
    def learned(self) -> Undisturbed:
        """What `learn` leaves, undisturbed."""
        return self._undisturbed("learn", self.learn)

    @property
    def reported(self) -> Undisturbed:
        """What `train` leaves, undisturbed."""
        return self._undisturbed("train", self.train)

    def _undisturbed(self, name: str, work: Callable[[Path], Child]) -> Undisturbed:
        return self.known(name, work, self.fresh, fingerprint)

    def known(
        self,
        name: str,
        work: Callable[[Path], Child],
        start: Callable[[], Path],
        seen: Callable[[Path], dict[str, Any]],
    ) -> Undisturbed:
        """What `work` leaves undisturbed, as `seen` sees it; done once, in the workspace that `start` makes."""
        if name not in self._known:
            root = start()
            child = work(root)
            if code := child.end():
                raise RuntimeError(f"the undisturbed run failed: exit {code}: {child.said[-2000:]}")
            seconds = time.monotonic() - child.began
            self._known[name] = Undisturbed(seen(root), seconds, root)
        return self._known[name]

    def resumed(self, root: Path, report: bool = False) -> str:
        """ "" if the same work ends well now, leaves the bytes of an undisturbed run, and nothing else is wrong."""
        child = self.train(root) if report else self.learn(root)
        if code := child.end():
            return f"the next run ended with {code}: {child.said[-300:]}"
        want, have = (self.reported if report else self.learned).print, fingerprint(root)
        wrong = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
        if wrong:
            return f"differs in {', '.join(wrong)[:200]}"
        left = [str(path.relative_to(root)) for path in left_overs(root)]
        return f"left {left[0]}" if left else sound(root)

    def inputs(self) -> str:
        """Digest of the raw files; no run may change it."""
        return digest_of({path.name: sha256_file(path) for path in sorted(self.source.iterdir()) if path.is_file()})


def fingerprint(root: Path) -> dict[str, Any]:
    """Digests of everything that must come out alike: tensors and losses, measurements, the report's numbers."""
    place, found = Workspace(root), {}
    for folder in sorted(place.checkpoints.glob("[!.]*")):
        state = read_json(folder / "state.json")
        losses = [[float(value).hex() for value in row.values()] for row in state["training"]]
        epochs = [row["validation_loss"] and float(row["validation_loss"]).hex() for row in state["epochs"]]
        tensors = {path.name: sha256_file(path) for path in sorted(folder.glob("*.safetensors"))}
        found[folder.name] = digest_of([tensors, losses, epochs, state["best_epoch"]])
    for side in sorted(place.evaluations.glob("[!.]*.json")):
        found[side.stem] = read_json(side)["digest"]
    pointer = place.reports / "latest.json"
    if pointer.exists():
        report = read_json(place.reports / read_json(pointer)["report"] / "report.json")
        numbers = [report[key] for key in ("rows", "differences", "matrix", "continual", "digests", "stages")]
        found["report"] = digest_of(numbers)
    return found


def sound(root: Path) -> str:
    """What must hold after any fault, as a sentence about the first thing that does not."""
    place = Workspace(root)
    for folder in sorted(place.checkpoints.glob("[!.]*")):
        if fault := fault_of(folder):
            return f"{folder.name} is visible and {fault}"
    for lock in (root / "run.lock", *place.locks.glob("*.lock")):
        if lock.exists() and not _free(lock):
            return f"{lock.name} is still held"
    for path in sorted(root.rglob("*.json")):
        if ".tmp-" in str(path) or "quarantine" in path.parts:
            continue
        try:
            read_json(path)
        except UserError as error:
            return str(error)
    return ""


def _free(lock: Path) -> bool:
    with lock.open("a") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
    return True


def refused(child: Child, words: str, codes: tuple[int, ...] = (1, 2)) -> str:
    """ "" if the child ended with an error code, one line of cause that holds `words`, and no traceback."""
    code = child.end()
    if code not in codes:
        return f"exit {code}, not {codes}: {child.said[-300:]}"
    if "Traceback" in child.said:
        return "a traceback was shown"
    cause = child.cause()
    return "" if words.lower() in cause.lower() else f"{words!r} is not in: {cause[:300]}"


def tree(root: Path) -> str:
    """Digest of every path and content below `root`."""
    files = sorted(path for path in root.rglob("*") if path.is_file() and not path.is_symlink())
    parts = {str(path.relative_to(root)): sha256_file(path) for path in files}
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()


def flipped(path: Path, rng: Random) -> None:
    """Flip one bit somewhere in the file."""
    content = bytearray(path.read_bytes())
    place = rng.randrange(len(content) * 8)
    content[place // 8] ^= 1 << (place % 8)
    path.write_bytes(content)


def user_error(work: Callable[[], Any], words: str) -> str:
    """ "" if `work` raises a UserError that holds `words`."""
    try:
        work()
    except UserError as error:
        return "" if words.lower() in str(error).lower() else f"{words!r} is not in: {str(error)[:300]}"
    return f"nothing was refused; {words!r} was expected"


KILL, TERM, INT = signal.SIGKILL, signal.SIGTERM, signal.SIGINT
