"""`driftrec doctor`: what about this machine, installation and workspace would spoil a run, and what to do about it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Literal

from flows import machine
from stages.errors import UserError
from stages.left_overs import left_overs
from stages.workspace import Workspace

LEAST_DISK = 2 * 2**30
LEAST_MEMORY = 4 * 2**30


@dataclass(frozen=True)
class Check:
    """One line of the doctor's.

    Attributes:
        level: `fault` spoils a run, `advice` costs something, `ok` neither.
        subject: what was looked at.
        found: what was seen.
        remedy: what to do; empty where nothing is.
    """

    level: Literal["ok", "advice", "fault"]
    subject: str
    found: str
    remedy: str = ""


def examine(root: Path | None = None) -> list[Check]:
    """Every check, faults included; reads only.

    Args:
        root: a workspace to look at as well.
    """
    checks = [*_pins(), _processor(), *_threads(), _memory(), _disk(root or Path.cwd())]
    return [*checks, *(_workspace(root) if root is not None else ())]


def repaired(root: Path | None) -> Iterator[Check]:
    """End what killed runs left behind: a commit of stages cut short, flow runs that Prefect believes under way.

    A workspace that a living process holds is left alone; one is repaired itself where Prefect is out of reach.

    Raises:
        UserError: no workspace was named, or none is there, or one of another version.
    """
    from flows.experiment import InUseError, exclusive

    if root is None:
        raise UserError("doctor --repair: name the workspace to repair with --workspace")
    if not (root / "workspace.json").exists():
        raise UserError(f"{root}: nothing to repair, no workspace is there; check --workspace")
    workspace = Workspace(root)
    workspace.see_version()
    with ExitStack() as held:
        try:
            held.enter_context(exclusive(workspace))
        except InUseError as error:
            yield Check("advice", "repair", str(error), "repair again once that run has ended")
            return
        yield _made_whole(workspace)
        yield from _closed_runs(workspace)


def _made_whole(workspace: Workspace) -> Check:
    """Everything a kill can leave half done in the workspace itself."""
    from flows.promotion.champion import settle
    from stages.append import finish_commit
    from stages.items import settle_codes

    cut_short = (workspace.stages / "next.json").is_file()
    finish_commit(workspace)
    coded = settle_codes(workspace)
    settle(workspace)
    ended = [what for what, was in (("stages", cut_short), ("item codes", coded)) if was]
    said = f"a commit of {' and of '.join(ended)} was ended" if ended else "stages, item codes and champion are whole"
    return Check("ok", "repair", said)


def _closed_runs(workspace: Workspace) -> Iterator[Check]:
    from flows import crashed
    from flows.reach import OWN, lost_prefect, server_asked

    server = server_asked()
    try:
        for identity, name in crashed.dead_runs(workspace):
            crashed.mark_crashed(identity)
            yield Check("ok", "repair", f"flow run {name} was left running by a kill; marked as crashed on {server}")
    except Exception as error:
        if not lost_prefect(error):
            raise
        found = f"{server} is out of reach; its flow runs were not looked at"
        remedy = (
            "start it, or name another with PREFECT_API_URL or its login with PREFECT_API_AUTH_STRING; repair again"
        )
        yield Check("advice", "repair", found, remedy)
        return
    elsewhere = "where a schedule or a work pool has a server, name that one with PREFECT_API_URL"
    yield Check("ok", "repair", f"no flow run is left open on {server}", elsewhere if server == OWN else "")


def healthy(checks: list[Check]) -> bool:
    """Nothing in `checks` spoils a run."""
    return all(check.level != "fault" for check in checks)


def _pins() -> Iterator[Check]:
    """Each requirement of the installed driftrec against what is installed beside it."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires("driftrec") or []
    except metadata.PackageNotFoundError:
        yield Check(
            "fault", "driftrec", "not installed", "run `make install`, or `pip install -c constraints.txt -e .`"
        )
        return
    for line in lines:
        requirement = Requirement(line)
        if requirement.marker is not None and not requirement.marker.evaluate():
            continue
        yield pin(requirement.name, str(requirement.specifier), machine.installed(requirement.name))


def pin(name: str, wanted: str, version: str | None) -> Check:
    """Whether the installed `version` of `name` is one that driftrec works with."""
    from packaging.specifiers import SpecifierSet

    remedy = f"pip install -c constraints.txt '{name}{wanted}'"
    if version is None:
        return Check("fault", name, f"not installed; {wanted} needed", remedy)
    if not SpecifierSet(wanted).contains(version, prereleases=True):
        return Check("fault", name, f"{version}; {wanted} needed{_reason(name)}", remedy)
    return Check("ok", name, version)


def _reason(name: str) -> str:
    reasons = {
        "fastapi": " (later ones break Prefect's server at its start)",
        "sqlalchemy": " (with 2.1 Prefect's schedules never fire, without an error)",
    }
    return reasons.get(name, "")


def _processor() -> Check:
    found = machine.features()
    shown = ", ".join(found) or "no known features"
    if "amx_bf16" in found or "avx512_bf16" in found:
        return Check("ok", "processor", f"{shown}: bfloat16 in hardware")
    if "avx2" in found:
        return Check("advice", "processor", f"{shown}: training runs in float32", "nothing to do; it is slower")
    return Check("advice", "processor", shown, "expect slow training: neither AVX2 nor bfloat16 was seen")


def _threads() -> Iterator[Check]:
    cores = machine.cores()
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    if wanted.isdigit() and int(wanted) > cores:
        yield Check(
            "advice", "threads", f"OMP_NUM_THREADS={wanted} on {cores} cores", f"export OMP_NUM_THREADS={cores}"
        )
    else:
        yield Check("ok", "threads", f"{wanted or cores} on {cores} cores")


def _memory() -> Check:
    size = machine.memory()
    if size is None:
        return Check("advice", "memory", "size unknown", "")
    if size < LEAST_MEMORY:
        return Check(
            "advice", "memory", f"{size / 2**30:.1f} GiB", "4 GiB are the least for the demo's Prefect and MLflow"
        )
    return Check("ok", "memory", f"{size / 2**30:.1f} GiB")


def _disk(folder: Path) -> Check:
    place = next(path for path in (folder.resolve(), *folder.resolve().parents) if path.exists())
    free = shutil.disk_usage(place).free
    found = f"{free / 2**30:.1f} GiB free at {place}"
    if not os.access(place, os.W_OK):
        return Check("fault", "disk", f"{place} cannot be written", "choose another folder with --workspace")
    if free < LEAST_DISK:
        return Check("fault", "disk", found, "free some space; a run wants at least 2 GiB")
    return Check("ok", "disk", found)


def _unreadable(workspace: Workspace) -> Iterator[UserError]:
    """What ends the commands that read a workspace's settings and decisions."""
    from flows.experiment import remembered_config
    from flows.promotion.champion import in_service
    from flows.promotion.history import read_history, see_end

    if (error := _error_of(workspace.see_version)) is not None:
        yield error
        return
    settings = [partial(remembered_config, workspace.root)] if (workspace.root / "config.json").exists() else []
    decisions = [partial(each, workspace) for each in (see_end, read_history, in_service)]
    for look in (*settings, *decisions):
        if (error := _error_of(look)) is not None:
            yield error


def _error_of(look: Callable[[], object]) -> UserError | None:
    try:
        look()
    except UserError as error:
        return error
    return None


def _faulty(error: UserError) -> Check:
    found, _, remedy = str(error).partition("; ")
    return Check("fault", "workspace", found, remedy)


def _workspace(root: Path) -> Iterator[Check]:
    if not (root / "workspace.json").exists():
        yield Check("advice", "workspace", f"{root} holds none yet", "driftrec demo, or driftrec compare --config ...")
        return
    faults = [_faulty(error) for error in _unreadable(Workspace(root))]
    yield from faults or [Check("ok", "workspace", str(root))]
    left = [str(path.relative_to(root)) for path in left_overs(root)]
    if left:
        yield Check(
            "advice",
            "left-overs",
            f"{len(left)} of killed runs, such as {left[0]}",
            "the next run, or driftrec gc, removes them",
        )
    broken = sorted(path.name for path in (root / "runs").rglob("quarantine/*"))
    if broken:
        yield Check(
            "advice",
            "quarantine",
            f"{len(broken)} damaged checkpoints set aside",
            "they are trained again by themselves",
        )
