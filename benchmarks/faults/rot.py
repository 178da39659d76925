"""Row 8: one bit flipped in any file that driftrec reads back. A flip is noticed, in a sentence, or changes nothing."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import polars as pl

from benchmarks.faults.harness import Bench, Child, Row, fingerprint, flipped, sound
from benchmarks.faults.retrains import left, mirrored, retrain, twin
from flows.experiment import last_command
from flows.promotion import copies
from flows.promotion.champion import in_service, settle
from flows.promotion.history import history_file, read_history
from flows.recommending import recommend
from stages import items
from stages.checkpoint import ADAPTER, BACKBONE, KEPT, ROWS, fault_of
from stages.config import Config
from stages.content import content_digest
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import _intact
from stages.log import load_log
from stages.log_files import coded_log
from stages.reading import silent
from stages.split import load_stages
from stages.waiting import load_waiting
from stages.workspace import Workspace, read_json, sha256_file

Look = Callable[[], object]
"""What a run believes of a file; a UserError where it does not, or None."""
SLOW = 20
"""Flips by which the probes are fewer that build a catalogue or a model."""


MIRRORS, LACKING = ("mlflow", "prefect"), 2
"""Who is given the decisions, and how many of the last ones they lack here."""


def rotten(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """`count` single flipped bits in each kind of file; the last of them is what the next run meets."""
    compared = bench.reported if bench.commands else bench.learned
    again = bench.train if bench.commands else bench.learn
    yield from rotted(bench, compared.root, experiment(bench.config), again, fingerprint, count, rng)
    shop = twin(bench, empty=False)
    yield from rotted(bench, shop.root, followed, partial(retrain, bench), outcome, count, rng)


def rotted(
    bench: Bench,
    source: Path,
    kinds: Callable[[Workspace], dict[Path, tuple[Look, int]]],
    again: Callable[[Path], Child],
    print_of: Callable[[Path], dict[str, Any]],
    count: int,
    rng: Random,
) -> Iterator[str]:
    """Flip bits in the files of a copy of a workspace.

    Args:
        bench: for places.
        source: the workspace.
        kinds: the files, how each is read, and by how much fewer flips it is tried.
        again: the command that reads them all.
        print_of: what must come out of it as it is in `source`.
        count: flips of each kind; with 100 or more, the command is run over the last one.
        rng: chooses the bits.
    """
    root = bench.place()
    shutil.copytree(source, root)
    for path, (look, fewer) in kinds(Workspace(root)).items():
        content, want = path.read_bytes(), look()
        damaged = content
        flips = max(2, count // fewer)
        for number in range(flips):
            spoiled(path, content, number, rng)
            damaged = path.read_bytes()
            yield problem_of(path, look, want)
            restored(root, source, path, content, fewer)
        if count >= 100:
            yield mended(bench, source, path.relative_to(root), damaged, again, print_of)


def spoiled(path: Path, content: bytes, number: int, rng: Random) -> None:
    """Flip one bit: first the last byte's lowest, which ends a line or a table, then any."""
    if number:
        flipped(path, rng)
    else:
        path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))


def problem_of(path: Path, look: Look, want: object) -> str:
    """ "" if a look at the damaged file refuses it in a sentence, or finds what was there before."""
    try:
        found = look()
    except UserError as error:
        return "" if len(str(error)) > 20 else f"{path.name}: {error} says nothing"
    except Exception as error:
        return f"{path.name}: {type(error).__name__} instead of a sentence: {str(error)[:200]}"
    return "" if found in (want, None) else f"{path.parent.name}/{path.name}: the damage went unnoticed"


def restored(root: Path, source: Path, path: Path, content: bytes, fewer: int) -> None:
    """The workspace as it was."""
    for aside in (root / "runs").glob("quarantine/*"):
        aside.unlink()
    if fewer > 1:  # such a look writes other files, too
        for part in ("catalogue", "champion.json"):
            if (source / part).is_dir():
                shutil.rmtree(root / part)
                shutil.copytree(source / part, root / part)
            elif (source / part).exists():
                shutil.copyfile(source / part, root / part)
    path.write_bytes(content)


def mended(
    bench: Bench,
    source: Path,
    name: Path,
    damaged: bytes,
    again: Callable[[Path], Child],
    print_of: Callable[[Path], dict[str, Any]],
) -> str:
    """ "" if the command ends in the bytes of the undisturbed one, or is refused in one line that names the file."""
    root = bench.place()
    shutil.copytree(source, root)
    (root / name).write_bytes(damaged)
    child = again(root)
    code, problem = child.end(), ""
    if code == 0:
        want, have = print_of(source), print_of(root)
        wrong = sorted(key for key in want.keys() | have.keys() if want.get(key) != have.get(key))
        problem = f"differs in {', '.join(wrong)[:200]}" if wrong else sound(root)
    elif code not in (1, 2) or "Traceback" in child.said or name.name not in child.cause():
        problem = f"exit {code}: {child.said[-300:]}"
    shutil.rmtree(root)
    return problem and f"{name}, flipped, and the run after it: {problem}"


def experiment(config: Config) -> Callable[[Workspace], dict[Path, tuple[Look, int]]]:
    """The files of a comparison's workspace."""

    def kinds(place: Workspace) -> dict[Path, tuple[Look, int]]:
        """Log, cut, codes, checkpoints, measurements, settings."""
        found: dict[Path, tuple[Look, int]] = {}
        first, last = (sorted(place.checkpoints.glob(f"same_stage-{name}-*"))[0] for name in ("first", "single"))
        for folder, names in ((first, (BACKBONE,)), (last, (ADAPTER, ROWS, KEPT, "adapter_config.json"))):
            found |= {folder / name: (partial(unharmed, folder), 1) for name in names if (folder / name).exists()}
        found |= {last / name: (partial(unharmed, last), 1) for name in ("state.json", "manifest.json")}
        test = next(iter(sorted(place.evaluations.glob("same_stage-single*.parquet"))))
        model = read_json(test.with_suffix(".json"))["model"]
        for path in (test, test.with_suffix(".json")):
            found[path] = partial(_intact, test, test.with_suffix(".json"), model), 1
        found[place.stage_file(1)] = lambda: [load_dataset(config, place).stage_digests, load_stages(place)], 1
        for path in (place.catalogue / "items.parquet", *sorted((place.catalogue / "quantizer").iterdir())):
            found[path] = partial(items._intact, place, silent), 1
        found[place.catalogue / "raw.parquet"] = partial(coded, config, place), SLOW
        found[place.log] = partial(logged, place), 1
        for path in (place.log.with_name("names.parquet"), place.log.with_name("numbers.parquet")):
            found[path] = partial(numbered, place), 1
        for folder in (place.stages, place.catalogue, place.log.parent):
            path = folder / "manifest.json"
            found[path] = partial(sealed, path, tuple(read_json(path))), 1
        for name in ("config.json", "workspace.json", "runs/trained.json"):
            found[place.root / name] = partial(answers, place), SLOW
        if (place.root / "last_command.json").exists():
            found[place.root / "last_command.json"] = partial(last_command, place.root), 1
        return found

    return kinds


def followed(place: Workspace) -> dict[Path, tuple[Look, int]]:
    """The files of a workspace that `retrain` follows: rows that wait, decisions, and who answers."""
    for mirror in MIRRORS:
        copies.note(place, mirror, copies.count(place) - LACKING)
    found: dict[Path, tuple[Look, int]] = {
        path: (partial(waiting, place), 1) for folder in ("open", "held") for path in (place.root / folder).iterdir()
    }
    found[history_file(place)] = partial(decisions, place), 1
    found[place.root / "champion.json"] = partial(answers, place), SLOW
    found[place.root / "runs" / "copies.json"] = partial(given, place), 1
    return found


def outcome(root: Path) -> dict[str, Any]:
    """What a retraining leaves, but for damaged files that it set aside, and the champion as it is read.

    MLflow's decisions count once: a copy has an experiment of its own, which gets them all where their count is lost.
    """
    found = {name: digest for name, digest in left(root).items() if "quarantine" not in name}
    present, (runs, alias) = in_service(Workspace(root)), mirrored(root)
    shown = {"champion": None if present is None else (present.job, present.pin), "mlflow": (sorted(set(runs)), alias)}
    return {**found, **shown}


def unharmed(folder: Path) -> str | None:
    """A checkpoint, where nothing is wrong with it."""
    return None if fault_of(folder) else "whole"


def coded(config: Config, place: Workspace) -> str:
    """The items with their texts and codes, as the next stage would find them."""
    items.build_semantic_ids(config, place)
    return sha256_file(place.catalogue / "items.parquet")


def logged(place: Workspace) -> str:
    """The log's rows."""
    return content_digest(load_log(place)[0])


def numbered(place: Workspace) -> str:
    """The log's rows as the split reads them."""
    with coded_log(place) as log:
        return content_digest(log.whole().drop("block"))


def sealed(path: Path, keys: tuple[str, ...]) -> object:
    """What a manifest says; a flip in the seal's own name leaves a key more, and these as they were."""
    found = read_json(path)
    return [found.get(key) for key in keys]


def waiting(place: Workspace) -> object:
    """The tables outside of the stages; None where a file is damaged, whose rows the sources give."""
    found = load_waiting(place)
    tables = found.open, found.held, found.refused
    return None if found.damaged else ([content_digest(table) for table in tables], sorted(found.files))


def decisions(place: Workspace) -> object:
    """The decisions, and who is in service by them."""
    settle(place)
    return read_history(place)[0], in_service(place)


def given(place: Workspace) -> object:
    """The decisions that the mirrors lack; handed over twice they are told apart, so that more of them do no harm."""
    try:
        return [copies.lacking(place, mirror)[-LACKING:] for mirror in MIRRORS]
    except UserError as error:
        raise ValueError(f"a count of what mirrors have stops the work: {error}") from error


def answers(place: Workspace) -> object:
    """A list for a history, from whoever is in service."""
    item = pl.read_parquet(place.catalogue / "items.parquet", columns=["item_id"])["item_id"][0]
    return recommend(place.root, history=[item], k=5).rows


TABLE = (
    Row(
        8,
        "one bit flipped in any kind of file read back",
        "noticed in a sentence, or nothing changed; R, or E naming the file",
        rotten,
        2,
        200,
        "no optimiser state is kept; candidates of `evaluation.negatives` in tests/test_sampled.py",
    ),
)
