"""The model in service: `champion.json`, moved only by a decision that `history.jsonl` holds already.

The history is written first. A kill between the two leaves a champion.json that is one decision behind, and `settle`
catches up; it follows no history that has lost a decision. Whoever writes either holds `champion.lock`, for as long as
that takes and no longer: a roll back waits for no training.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.promotion.history import Entry, append_line, confirm, history_file, read_history
from stages.checkpoint import MANIFEST
from stages.config import Config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.jobs import Checkpoint, Job, Pin
from stages.locks import held
from stages.shapes import shaped
from stages.stored import stored, tensors_of
from stages.workspace import Workspace, read_json, sha256_file, write_json

FILE = "champion.json"
LOCK = "champion.lock"
RISES = ("first", "promoted", "rebuilt")
"""Decisions that put a model into service; `rolled_back` takes the last one off again, `kept` changes nothing."""


@dataclass(frozen=True)
class Champion:
    """The model in service.

    Attributes:
        job: method, seed, protocol and last stage.
        key: its checkpoint's folder below `runs/checkpoints`.
        digest: SHA-256 of that checkpoint's manifest.
        since: ISO instant of the decision.
        tensors: digest of the tensors of its whole lineage; None where an earlier version decided.
    """

    job: Job
    key: str
    digest: str
    since: str
    tensors: str | None = None

    @property
    def pin(self) -> Pin | None:
        """What it is loaded by; None for one without a checkpoint, such as a baseline."""
        return Pin(self.key, self.tensors) if self.key else None

    @property
    def short(self) -> str:
        """The beginning of its checkpoint's digest, which tells two trainings of one stage apart."""
        return self.key.rsplit("-", 1)[-1][:8]

    def is_model(self, other: Champion | None) -> bool:
        """Whether both are the same tensors, whenever they went into service."""
        if other is None or self.key != other.key:
            return False
        noted = None not in (self.tensors, other.tensors)
        return self.tensors == other.tensors if noted else self.digest == other.digest

    def as_json(self) -> dict[str, Any]:
        """The content of champion.json."""
        return {"schema": 1, **asdict(self)}


def champion_file(workspace: Workspace) -> Path:
    """Where the champion is named; a service may watch it, it is replaced in one step."""
    return workspace.root / FILE


def champion(workspace: Workspace) -> Job | None:
    """The job of the model in service; None where none was ever chosen.

    Raises:
        UserError: champion.json is unreadable.
    """
    found = in_service(workspace)
    return None if found is None else found.job


def in_service(workspace: Workspace) -> Champion | None:
    """The model in service with its checkpoint's name; None where none was ever chosen.

    Raises:
        UserError: champion.json is unreadable.
    """
    path = champion_file(workspace)
    return _champion(read_json(path), path) if path.is_file() else None


def settle(workspace: Workspace) -> Champion | None:
    """Bring champion.json up to the last decision of the history, and return it.

    Without a history champion.json stands as it is.

    Raises:
        UserError: the history is not what was written, or lacks its last decision.
    """
    with _writing(workspace):
        return _settled(workspace)


def decided(workspace: Workspace) -> Champion | None:
    """What `settle` returns; nothing is written.

    Raises:
        UserError: as `settle`.
    """
    lines, _ = read_history(workspace)
    if not lines:
        return in_service(workspace)
    stack = served(lines)
    return _champion(stack[-1], history_file(workspace)) if stack else None


def _settled(workspace: Workspace) -> Champion | None:
    found = decided(workspace)
    if read_history(workspace)[0]:
        confirm(workspace)
        if found is not None and found != _readable(workspace):
            write_json(champion_file(workspace), found.as_json())
    return found


def _readable(workspace: Workspace) -> Champion | None:
    """The champion of the file; None where the file is no good: the history writes it anew."""
    try:
        return in_service(workspace)
    except UserError:
        return None


def predecessors(workspace: Workspace, present: Champion | None = None) -> list[Champion]:
    """The model in service and those that a roll back reaches, newest first, each once.

    Where a kill came before champion.json was ever written, the history says who they are.

    Args:
        workspace: where.
        present: the model in service; absent: whom champion.json names.

    Raises:
        UserError: champion.json or the history is unreadable.
    """
    return list(succession(workspace, present))


def succession(workspace: Workspace, present: Champion | None = None) -> Iterator[Champion]:
    """`predecessors`, each looked for when it is asked for: mostly the first one will do."""
    present = present or in_service(workspace)
    found = dict[str, list[Champion]]()
    if present is not None:
        yield present
        found[present.key] = [present]
    for entry in reversed(served(read_history(workspace)[0])):
        earlier = _champion(entry, history_file(workspace))
        same = found.setdefault(earlier.key, [])
        if not any(earlier.is_model(other) for other in same):
            same.append(earlier)
            yield earlier


def promote(
    workspace: Workspace, checkpoint: Checkpoint, decision: str, line: Entry, instead_of: Champion | None
) -> Entry | None:
    """Put a committed checkpoint into service.

    Args:
        workspace: where.
        checkpoint: what was trained.
        decision: `first`, `promoted` or `rebuilt`.
        line: more of the decision, for the history.
        instead_of: the champion that it was held against.

    Returns:
        The history's line; None where another one is in service by now, and nothing was decided.
    """
    with _writing(workspace):
        if _settled(workspace) != instead_of:
            return None
        tensors = tensors_of(workspace.checkpoints / checkpoint.key)
        new = Champion(checkpoint.job, checkpoint.key, checkpoint.digest, now(), tensors)
        whole = {"at": new.since, "decision": decision, **line, "champion": new.as_json()}
        written = append_line(workspace, whole)
        write_json(champion_file(workspace), new.as_json())
        return written


def keep(workspace: Workspace, line: Entry, champion: Champion | None) -> Entry | None:
    """Note that the champion stays.

    Args:
        workspace: where.
        line: more of the decision, for the history.
        champion: the one that stays.

    Returns:
        The history's line; None where another one is in service by now, and nothing was decided.
    """
    with _writing(workspace):
        if _settled(workspace) != champion:
            return None
        shown = None if champion is None else champion.as_json()
        return append_line(workspace, {"at": now(), "decision": "kept", **line, "champion": shown})


def renew(workspace: Workspace) -> None:
    """Write champion.json once more as it is: services look again, for its checkpoints were mended."""
    with _writing(workspace):
        present = in_service(workspace)
        if present is not None:
            write_json(champion_file(workspace), present.as_json())


def roll_back(config: Config, workspace: Workspace) -> tuple[Champion, Champion]:
    """Put the champion before the present one back into service.

    Args:
        config: the workspace's.
        workspace: where.

    Returns:
        The champion taken out of service, and the one that is back.

    Raises:
        UserError: there was none before, or it cannot be loaded as it was.
    """
    with _writing(workspace):
        present = _settled(workspace)
        stack = served(read_history(workspace)[0])
        if present is None or len(stack) < 2:
            raise UserError(
                f"{workspace.root}: no earlier champion to go back to; `driftrec history` lists the decisions"
            )
        earlier = _champion(stack[-2], history_file(workspace))
        fault = fault_of(config, workspace, earlier) or _unsure(workspace, earlier)
        if fault is not None:
            raise UserError(f"{fault}; the champion stays")
        back = replace(earlier, since=now())
        gone = f"stage {present.job.stage}'s model"
        if present.job == back.job:
            gone += f" {present.short}"
        why = f"asked for by `driftrec rollback`; {gone} was taken out of service"
        line = {"at": back.since, "decision": "rolled_back", "stage": back.job.stage, "why": why}
        append_line(workspace, {**line, "challenger": None, "champion": back.as_json()})
        write_json(champion_file(workspace), back.as_json())
        return present, back


def fault_of(config: Config, workspace: Workspace, champion: Champion) -> str | None:
    """Why a champion cannot be put together from the tensors that went into service, or None."""
    try:
        dataset = load_dataset(config, workspace, answering=True)
        stored(config, workspace, dataset, champion.job, champion.pin)
    except UserError as error:
        return str(error)
    return None


def _unsure(workspace: Workspace, champion: Champion) -> str | None:
    """Why nobody can say whether the tensors are those that served: an earlier version noted the manifest's hash."""
    folder = workspace.checkpoints / champion.key
    if champion.tensors is not None or not champion.key or sha256_file(folder / MANIFEST) == champion.digest:
        return None
    return f"{folder}: trained anew, and the version that decided did not note to which tensors"


def now() -> str:
    """The present instant, ISO, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def served(lines: list[Entry]) -> list[dict[str, Any]]:
    """The champions that a roll back can reach, the present one last."""
    stack: list[dict[str, Any]] = []
    for line in lines:
        if line["decision"] == "rolled_back":
            stack[-2:] = [line["champion"]]
        elif line["decision"] in RISES:
            stack.append(line["champion"])
    return stack


def named(lines: Sequence[Entry]) -> list[Champion]:
    """The champions that decisions name, those without one left out."""
    return [_champion(line["champion"], Path("history.jsonl")) for line in lines if line["champion"]]


@contextmanager
def _writing(workspace: Workspace) -> Iterator[None]:
    """Hold history and champion.json for the moment of a decision."""
    with held(workspace.root / LOCK):
        yield


def _champion(found: Any, path: Path) -> Champion:
    return shaped(Champion, found, path, "not a champion of this version", "run `driftrec retrain` anew")
