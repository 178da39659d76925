"""The model in service: `champion.json`, moved only by a decision that `history.jsonl` holds already.

The history is written first. A kill between the two leaves a champion.json that is one decision behind, and `settle`
catches up.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from flows.promotion.history import Entry, append_line, read_history
from stages.checkpoint import fault_of
from stages.errors import UserError
from stages.jobs import Checkpoint, Job
from stages.workspace import Workspace, read_json, sha256_file, write_json

FILE = "champion.json"
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
    """

    job: Job
    key: str
    digest: str
    since: str

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
    """
    lines, _ = read_history(workspace)
    if not lines:
        return in_service(workspace)
    served = _served(lines)
    decided = _champion(served[-1], Path("history.jsonl")) if served else None
    if decided is not None and decided != in_service(workspace):
        write_json(champion_file(workspace), decided.as_json())
    return decided


def promote(workspace: Workspace, checkpoint: Checkpoint, decision: str, line: Entry) -> Champion:
    """Put a committed checkpoint into service.

    Args:
        workspace: where.
        checkpoint: what was trained.
        decision: `first`, `promoted` or `rebuilt`.
        line: more of the decision, for the history.
    """
    new = Champion(checkpoint.job, checkpoint.key, checkpoint.digest, now())
    append_line(workspace, {"at": new.since, "decision": decision, **line, "champion": new.as_json()})
    write_json(champion_file(workspace), new.as_json())
    return new


def keep(workspace: Workspace, line: Entry) -> Champion | None:
    """Note that the champion stays."""
    stays = in_service(workspace)
    shown = None if stays is None else stays.as_json()
    append_line(workspace, {"at": now(), "decision": "kept", **line, "champion": shown})
    return stays


def roll_back(workspace: Workspace) -> tuple[Champion, Champion]:
    """Put the champion before the present one back into service.

    Returns:
        The champion taken out of service, and the one that is back.

    Raises:
        UserError: there was none before, or its checkpoint is gone or damaged.
    """
    present = settle(workspace)
    served = _served(read_history(workspace)[0])
    if present is None or len(served) < 2:
        raise UserError(f"{workspace.root}: no earlier champion to go back to; `driftrec history` lists the decisions")
    earlier = _champion(served[-2], Path("history.jsonl"))
    folder = workspace.checkpoints / earlier.key
    fault = fault_of(folder) or (None if sha256_file(folder / "manifest.json") == earlier.digest else "trained anew")
    if fault:
        raise UserError(f"{folder}: {fault}; the champion stays, train that stage again or retrain forward")
    back = Champion(earlier.job, earlier.key, earlier.digest, now())
    why = f"asked for by `driftrec rollback`; stage {present.job.stage}'s model was taken out of service"
    line = {"at": back.since, "decision": "rolled_back", "stage": back.job.stage, "why": why}
    append_line(workspace, {**line, "challenger": None, "champion": back.as_json()})
    write_json(champion_file(workspace), back.as_json())
    return present, back


def now() -> str:
    """The present instant, ISO, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _served(lines: list[Entry]) -> list[dict[str, Any]]:
    """The champions that a roll back can reach, the present one last."""
    stack: list[dict[str, Any]] = []
    for line in lines:
        if line["decision"] == "rolled_back":
            stack[-2:] = [line["champion"]]
        elif line["decision"] == "rebuilt":
            stack[-1:] = [line["champion"]]
        elif line["decision"] in RISES:
            stack.append(line["champion"])
    return stack


def _champion(found: dict[str, Any], path: Path) -> Champion:
    try:
        return Champion(Job(**found["job"]), found["key"], found["digest"], found["since"])
    except (KeyError, TypeError) as error:
        raise UserError(f"{path}: not a champion of this version ({error}); run `driftrec retrain` anew") from None
