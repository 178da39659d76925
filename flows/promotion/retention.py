"""`driftrec gc`: what a workspace no longer needs, and taking it away.

A checkpoint is kept while anything rests on it: the champion, the latest report, a kept checkpoint's own lineage, or
its place among the newest of its method, seed and protocol, and so are those that a roll back reaches. What is left are
stages of settings since changed, and of models since taken out of service.
"""

from __future__ import annotations

import logging
import shutil
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from flows.mirror import patience, within
from flows.promotion.champion import champion_file, predecessors
from stages.checkpoint import MANIFEST
from stages.errors import UserError
from stages.left_overs import left_overs
from stages.workspace import Workspace, forget, read_json

KEEP = 2
log = logging.getLogger("flows.retention")


@dataclass(frozen=True)
class Removal:
    """Something to take away.

    Attributes:
        path: where it is.
        size: bytes.
        why: nothing needs it.
        first: called before the files go: whoever names them must not name what is not there.
    """

    path: Path
    size: int
    why: str
    first: Callable[[], None] = lambda: None


def removable(workspace: Workspace, keep: int = KEEP, reports: bool = False) -> list[Removal]:
    """What could go, in the order of paths; reads only.

    Args:
        workspace: to look at.
        keep: newest checkpoints kept of each method, seed and protocol, besides everything they rest on.
        reports: also what only the latest report names.

    Raises:
        UserError: `keep` below 1, or the champion is named but damaged or not to be found.
    """
    if keep < 1:
        raise UserError(f"--keep {keep}: the newest checkpoint of each lineage stays; give 1 or more")
    states = {path.name: _state(path) for path in sorted(workspace.checkpoints.glob("*")) if (path / MANIFEST).exists()}
    jobs = {} if reports else _latest_jobs(workspace)
    roots = {row["key"] for row in jobs.get("checkpoints", ())} | _champions(workspace, states) | _newest(states, keep)
    kept = _with_parents(roots, states)
    named = {Path(row["path"]).stem for row in jobs.get("evaluations", ())}
    old = [workspace.checkpoints / name for name in states if name not in kept]
    tests = [
        path for path in sorted(workspace.evaluations.glob("*.*")) if path.name.partition(".")[0] not in named and jobs
    ]
    aside = sorted((workspace.root / "runs" / "quarantine").glob("*"))
    dead = left_overs(workspace.root)
    moments = sorted((workspace.root / "null_space").glob("*.safetensors"))
    found = [
        *(Removal(path, _size(path), "no report, champion or newer stage rests on it") for path in old),
        *(Removal(path, _size(path), "not in the latest report") for path in tests if path not in dead),
        *(Removal(path, _size(path), "damaged, made again since") for path in aside),
        *(Removal(path, _size(path), "left by a killed run") for path in dead),
        *(Removal(path, _size(path), "second moments, measured again where a stage needs them") for path in moments),
    ]
    return sorted(found, key=lambda removal: removal.path)


def superseded(workspace: Workspace, experiment: str, keep: int) -> list[Removal]:
    """Models registered in the workspace's MLflow besides the one in service and the `keep` newest; reads only.

    Going back to one of them registers it anew: its checkpoints stay.
    """
    from flows.promotion import registry

    try:
        old = within(patience(), partial(registry.old_versions, workspace, experiment, keep))
    except Exception as error:  # MLflow is a mirror: whatever is wrong with it, the rest can go
        log.warning("MLflow does not say which models it holds (%s); they all stay", " ".join(str(error).split())[:300])
        return []
    return [
        Removal(
            version.files,
            _size(version.files),
            f"version {version.number} in MLflow, no longer in service",
            partial(registry.forget_version, workspace, experiment, version),
        )
        for version in old
    ]


def remove(removals: Iterable[Removal]) -> int:
    """Take them away; a checkpoint's manifest goes first, so that a kill in between leaves no half one.

    Returns:
        Bytes freed.
    """
    freed = 0
    for removal in removals:
        removal.first()
        if removal.path.is_dir() and not removal.path.is_symlink():
            (removal.path / MANIFEST).unlink(missing_ok=True)
            shutil.rmtree(removal.path)
            forget(removal.path)
        else:
            removal.path.unlink(missing_ok=True)
        freed += removal.size
    return freed


def _state(folder: Path) -> dict[str, Any]:
    """state.json, or nothing where it cannot be read: such a checkpoint is made again when it is needed."""
    try:
        return read_json(folder / "state.json")
    except UserError:
        return {}


def _latest_jobs(workspace: Workspace) -> dict[str, Any]:
    pointer = workspace.reports / "latest.json"
    if not pointer.exists():
        return {}
    jobs = workspace.reports / str(read_json(pointer)["report"]) / "jobs.json"
    return read_json(jobs) if jobs.exists() else {}


def _champions(workspace: Workspace, states: Mapping[str, dict[str, Any]]) -> set[str]:
    """Checkpoints of the model in service and of those that a roll back reaches."""
    found = predecessors(workspace)
    if found and found[0].key and not states.get(found[0].key):
        raise UserError(
            f"{champion_file(workspace)}: its model {found[0].key} is not among the checkpoints, or damaged; "
            "nothing was removed, run `driftrec retrain` first"
        )
    return {champion.key for champion in found} & states.keys()


def _newest(states: Mapping[str, dict[str, Any]], keep: int) -> set[str]:
    lineages: dict[tuple[Any, ...], list[tuple[int, str]]] = defaultdict(list)
    for name, state in states.items():
        job = state.get("job")
        if job:
            lineages[(job["protocol"], job["method"], job["seed"])].append((job["stage"], name))
    last = {lineage: sorted({stage for stage, _ in found})[-keep:] for lineage, found in lineages.items()}
    return {name for lineage, found in lineages.items() for stage, name in found if stage in last[lineage]}


def _with_parents(names: set[str], states: Mapping[str, dict[str, Any]]) -> set[str]:
    parents = {parent for name in names for parent in states.get(name, {}).get("parents", ())}
    return names | parents


def _size(path: Path) -> int:
    files = [path] if path.is_file() else [each for each in path.rglob("*") if each.is_file()]
    return sum(file.stat().st_size for file in files)
