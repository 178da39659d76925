"""What a workspace remembers: the config it was made with, the last command, and which models are trained."""

from __future__ import annotations

import copy
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.config import Config, explain
from stages.errors import UserError
from stages.jobs import Checkpoint, Job
from stages.locks import holder_of, sign, try_lock
from stages.shapes import shaped
from stages.workspace import Workspace, read_json, write_json

DATA_TABLES = ("log", "catalogue", "stages", "items")
SETTLED = ("catalogue", "stages", "items", "adapter", "training", "retrain", "analysis", "methods", "compare", "seeds")
"""Tables that a trained model is asked without: its checkpoint holds the settings it was trained under."""
log = logging.getLogger("flows")
_held: set[Path] = set()
"""Workspaces that this process holds."""


def open_workspace(config: Config, folder: Path | None) -> tuple[Config, Workspace]:
    """Claim the workspace for `config` and write the resolved config into it.

    Args:
        config: as loaded.
        folder: overrides `config.workspace`.

    Returns:
        The config with the workspace it really uses, and that workspace.

    Raises:
        UserError: the folder belongs to another experiment, or its data was read and cut by other rules.
    """
    root = folder if folder is not None else Path(config.workspace).expanduser()
    config = config.model_copy(update={"workspace": str(root)})
    workspace = Workspace(root)
    workspace.claim(config.name)
    found, values = see_fit(config, workspace)
    write_json(root / "config.json", {**found, "schema": 1, "config": {**values, "workspace": "."}}, seal=True)
    return config, workspace


def see_fit(config: Config, workspace: Workspace) -> tuple[dict[str, Any], dict[str, Any]]:
    """Refuse what `open_workspace` refuses; nothing is written.

    Returns:
        What of `config.json` stays as it is, and the settings to write into it, places relative to the workspace.

    Raises:
        UserError: as `open_workspace`.
    """
    root = workspace.root
    workspace.see_place()
    workspace.check(config.name)
    values = _with_places(config.model_dump(mode="json"), lambda path: os.path.relpath(path, root.resolve()))
    stored = root / "config.json"
    found = _settings(stored) if stored.exists() else {}
    changed = _changed_data(found["config"], values) if found else None
    if changed and _has_runs(workspace):
        raise UserError(
            f"{root}: this workspace was made with other settings in [{changed}], and its models rest on them; "
            "choose another workspace, or delete this one"
        )
    if changed:
        found.pop("log_digest", None)
    return found, values


def remembered_config(root: Path, answering: bool = False) -> tuple[Config, Workspace]:
    """The config a workspace was last used with, its source paths made absolute again.

    Args:
        root: of the workspace.
        answering: for a model that is there already; settings of `SETTLED` that break a rule of this version count as
            absent, with a warning.

    Raises:
        UserError: not a workspace, one in which nothing has run, or one whose settings break a rule of this version.
    """
    workspace, stored = made(root), root / "config.json"
    values = _with_places(_settings(stored)["config"], lambda path: os.path.normpath(root.resolve() / path))
    values["workspace"] = str(root)
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        fault = f"{stored}: this version of driftrec refuses {explain(error)}"
        remedy = f"mend the config file and run `driftrec resume -w {root}`, which writes its settings anew"
        found = _without_refused(values) if answering else None
        if found is None:
            raise UserError(f"{fault}; {remedy}") from None
        log.warning("%s; no answer rests on it; %s", fault, remedy)
        config = found
    workspace.claim(config.name)
    return config, workspace


def _without_refused(values: dict[str, Any]) -> Config | None:
    """The settings but those of `SETTLED` that break a rule; None where others do."""
    values = copy.deepcopy(values)
    while values:
        try:
            return Config.model_validate(values)
        except ValidationError as error:
            places = [problem["loc"] for problem in error.errors()]
        if any(place[:1] not in [(table,) for table in SETTLED] for place in places):
            return None
        for place in places:
            _drop(values, place)
    return None


def _drop(values: dict[str, Any], place: tuple[int | str, ...]) -> None:
    """Take the setting at `place` away, or the narrowest table around it that is there."""
    way: list[tuple[dict[str, Any], str]] = []
    table: Any = values
    for part in map(str, place):
        if isinstance(table, dict) and part in table:
            way.append((table, part))
            table = table[part]
    if way:
        del way[-1][0][way[-1][1]]


def made(root: Path) -> Workspace:
    """A workspace in which something has run.

    Raises:
        UserError: none is there, or one of another version.
    """
    workspace = Workspace(root)
    workspace.see_version()
    if not (root / "config.json").exists():
        raise UserError(
            f"{root}: no driftrec workspace (config.json is missing); run `driftrec demo` or `compare` first"
        )
    return workspace


def check_log(workspace: Workspace, digest: str) -> None:
    """Note the log's digest; refuse another log once models rest on the first.

    Raises:
        UserError: the log's rows changed since the workspace was made.
    """
    stored = workspace.root / "config.json"
    found = _settings(stored)
    if found.get("log_digest", digest) != digest and _has_runs(workspace):
        raise UserError(
            f"{workspace.root}: the log's rows changed since this workspace was made (digest {digest[:12]}, "
            f"was {found['log_digest'][:12]}); choose another workspace, or let `driftrec retrain` take new rows"
        )
    write_json(stored, {**found, "log_digest": digest}, seal=True)


def remember_command(workspace: Workspace, command: str, arguments: dict[str, Any], flow_run: str | None) -> None:
    """Write what `driftrec resume` needs to `last_command.json`.

    Args:
        workspace: where.
        command: name of the flow.
        arguments: its JSON arguments besides the workspace; a `config` path is stored relative to the workspace.
        flow_run: Prefect's id of the run, for marking it as crashed if it never ends.
    """
    kept = {**arguments, "config": os.path.relpath(arguments["config"], workspace.root.resolve())}
    what = {"schema": 1, "command": command, "arguments": kept, "flow_run": flow_run}
    write_json(workspace.root / "last_command.json", what, seal=True)


def last_command(root: Path) -> tuple[str, dict[str, Any], str | None]:
    """The last flow of a workspace, its arguments and Prefect's id of the run.

    Raises:
        UserError: nothing has run there.
    """
    stored = root / "last_command.json"
    if not stored.exists():
        raise UserError(f"{root}: nothing to resume there; start with `driftrec compare --config ...`")
    found = _command(stored)
    arguments = {**found.arguments, "config": os.path.normpath(root.resolve() / str(found.arguments["config"]))}
    return found.command, arguments, found.flow_run


def last_flow_run(workspace: Workspace) -> str | None:
    """Prefect's id of the workspace's last run, however it ended; None where nothing has run."""
    stored = workspace.root / "last_command.json"
    return _command(stored).flow_run if stored.exists() else None


@dataclass(frozen=True)
class _Command:
    command: str
    arguments: dict[str, Any]
    flow_run: str | None = None


def _command(path: Path) -> _Command:
    wrong = "not a command that ran", "remove it and start the command anew"
    found = shaped(_Command, read_json(path), path, *wrong)
    shaped(str, found.arguments.get("config"), path, *wrong)
    return found


@dataclass(frozen=True)
class Trained:
    """A model that was trained in a workspace.

    Attributes:
        job: method, seed, protocol and stage.
        key: its checkpoint's folder; None where an earlier version trained it.
    """

    job: Job
    key: str | None = None


def trained_file(workspace: Workspace) -> Path:
    """Where `remember_trained` lists them; replaced in one step with every stage that is committed."""
    return workspace.root / "runs" / "trained.json"


def remember_trained(workspace: Workspace, checkpoint: Checkpoint) -> None:
    """Add a committed stage to `runs/trained.json`, from which `recommend` chooses; made anew it replaces itself."""
    stored = trained_file(workspace)
    known = trained_models(workspace)
    new = Trained(checkpoint.job, checkpoint.key)
    if new not in known:
        models = [found for found in known if found.job != new.job] + [new]
        write_json(stored, [{**vars(found.job), "key": found.key} for found in models])


def trained_models(workspace: Workspace) -> list[Trained]:
    """Every model trained in the workspace, in the order in which they were committed.

    Raises:
        UserError: the file that lists them is not what a run writes.
    """
    stored = trained_file(workspace)
    found = read_json(stored) if stored.exists() else []
    wrong = "not a list of trained models", "remove it and run the command again that trained them"
    rows = shaped(list[_Row], found, stored, *wrong)
    return [Trained(Job(row.method, row.seed, row.protocol, row.stage), row.key) for row in rows]


@dataclass(frozen=True)
class _Row(Job):
    key: str | None = None


def trained_jobs(workspace: Workspace) -> list[Job]:
    """The jobs of `trained_models`."""
    return [found.job for found in trained_models(workspace)]


class InUseError(UserError):
    """Another process holds the workspace."""


@contextmanager
def exclusive(workspace: Workspace, reentrant: bool = False) -> Iterator[None]:
    """Hold the workspace for one flow: two ephemeral Prefect servers on one database lock each other out.

    The lock file is never deleted; the kernel frees the lock with the process.

    Args:
        workspace: what to hold.
        reentrant: for a flow that a command of this process may hold the workspace for already.

    Raises:
        InUseError: another process holds it; the message says which.
        UserError: the folder cannot be written.
    """
    place = workspace.root.resolve()
    if reentrant and is_held(workspace):
        yield
        return
    workspace.create()
    try:
        opened = (workspace.root / "run.lock").open("a+", encoding="utf-8")
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(
            f"{workspace.root}: cannot write the workspace: {error.strerror}; choose another folder"
        ) from None
    with opened as handle:
        if not try_lock(handle):
            raise InUseError(f"{workspace.root}: in use by {holder_of(handle)}; wait, or choose another workspace")
        sign(handle)
        _held.add(place)
        try:
            yield
        finally:
            _held.discard(place)


@dataclass(frozen=True)
class _Place:
    path: str


@dataclass(frozen=True)
class _Source(_Place):
    join: list[_Place]


@dataclass(frozen=True)
class _Table:
    sources: list[_Source]


@dataclass(frozen=True)
class _Tables:
    log: _Table
    catalogue: _Table


@dataclass(frozen=True)
class _Settings:
    config: _Tables


def _settings(path: Path) -> dict[str, Any]:
    """config.json, in which every place that is made relative or absolute is there."""
    remedy = f"move it away and run `driftrec resume -w {path.parent}`, which writes it anew from the config file"
    found = read_json(path, remedy)
    shaped(_Settings, found, path, "not the settings of a workspace", remedy)
    return found


def is_held(workspace: Workspace) -> bool:
    """Whether this process holds the workspace."""
    return workspace.root.resolve() in _held


def _has_runs(workspace: Workspace) -> bool:
    """Until something was trained, settings of the data may still be mended."""
    return (workspace.root / "runs").exists()


def _changed_data(found: dict[str, Any], wanted: dict[str, Any]) -> str | None:
    """The first table about the data that differs; a moved file does not count, its digest speaks for it."""
    before, after = (_with_places(values, os.path.basename) for values in (found, wanted))
    return next((name for name in DATA_TABLES if _defaults(name) | before.get(name, {}) != after[name]), None)


def _defaults(table: str) -> dict[str, Any]:
    """What an earlier version, which did not write a setting yet, went by."""
    known: Any = Config.model_fields[table].annotation
    fields = {name: field for name, field in known.model_fields.items() if not field.is_required()}
    return {name: field.get_default(call_default_factory=True) for name, field in fields.items()}


def _with_places(values: dict[str, Any], change: Callable[[str], str]) -> dict[str, Any]:
    """A copy of a dumped config with every source path changed."""
    values = copy.deepcopy(values)
    log = values["log"]
    for key in ("blocks", "index", "sequences"):
        if log.get(key):
            log[key] = change(log[key])
    analysis = values.get("analysis", {})  # a workspace of an earlier version has none
    if analysis.get("text"):
        analysis["text"] = change(analysis["text"])
    for source in [*log["sources"], *values["catalogue"]["sources"]]:
        source["path"] = change(source["path"])
        for join in source["join"]:
            join["path"] = change(join["path"])
    return values
