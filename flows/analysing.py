"""`driftrec analyse`: why the methods of a finished comparison differ, measured on the models it left behind."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from flows import mirror
from flows.experiment import exclusive, remembered_config
from flows.reporting.stored import latest_report
from flows.terminal import watcher
from stages.config import PROTOCOLS, Config, Protocol, load_config
from stages.errors import UserError
from stages.jobs import Evaluation, Job
from stages.method_config import AnyMethod, MethodConfig
from stages.settings import nearest
from stages.workspace import Workspace, read_json, sha256_file, write_json

if TYPE_CHECKING:
    from stages.analysis.measured import Scope

FILE = "analysis.json"
LEFT = "Not asked for and not measured: "
FLAT = "No two methods of this workspace differ in one setting of GEMS alone, so there is no sensitivity to draw."


def analyse(
    root: Path | None,
    config: Path | None = None,
    methods: Sequence[str] | None = None,
    seed: int | None = None,
    stages: int | None = None,
    report: str | None = None,
    parts: Sequence[str] | None = None,
) -> Path:
    """Measure conflict, transitions, preservation, sensitivity and memory; write them beside the report.

    Args:
        root: the workspace; absent: the config's.
        config: the experiment's file; absent: the workspace's own copy.
        methods: of the report; absent: all it trained.
        seed: absent: the lowest of the report.
        stages: only the first so many.
        report: folder name below runs/reports; absent: the newest.
        parts: of `stages.analysis.measured.PARTS`; absent: all. The others stay as they were measured before, where
            that was done of the same models in the same way.

    Returns:
        The report's folder, with analysis.json, new figures and a new page; MLflow has the same.

    Raises:
        UserError: no report, or none that trained such a method, seed or stage; models that are gone; no such part.
    """
    _refuse_unknown(parts or ())
    settings, workspace = _experiment(root, config)
    folder = latest_report(workspace, report)
    jobs = read_json(folder / "jobs.json")
    if not jobs["checkpoints"]:
        raise UserError(f"{folder}: this report trained no model; run `driftrec compare` or `train` first")
    with exclusive(workspace):
        whole = read_json(folder / "report.json")
        measured_with = _as_measured(settings, whole)
        earlier = read_json(folder / FILE) if parts and (folder / FILE).exists() else {}
        found = _measured(_scope(measured_with, workspace, jobs, methods, seed, stages), whole, parts, earlier)
        write_json(folder / FILE, found, seal=True)
        from flows.reporting.report import write_page

        watcher().start("drawing")
        write_page(read_json(folder / "report.json"), folder)
        watcher().start("recording in MLflow")
        mirror.record(workspace, folder)
    return folder


def _refuse_unknown(parts: Sequence[str]) -> None:
    from stages.analysis.measured import PARTS

    for part in parts:
        if part not in PARTS:
            raise UserError(f"--parts {part}: no such part{nearest(part, PARTS)}; known: {', '.join(PARTS)}")


def _experiment(root: Path | None, config: Path | None) -> tuple[Config, Workspace]:
    if config is None:
        if root is None:
            raise UserError("driftrec analyse: name the workspace (--workspace) or the experiment (--config)")
        return remembered_config(root)
    settings = load_config(config)
    workspace = Workspace(root if root is not None else Path(settings.workspace).expanduser())
    if not workspace.root.exists():
        raise UserError(f"{workspace.root}: no such workspace; run `driftrec compare --config {config}` first")
    workspace.claim(settings.name)
    return settings, workspace


def _as_measured(config: Config, report: dict[str, Any]) -> Config:
    """`config` with its methods as they were when the report was made: a default may have changed since."""
    adapter: TypeAdapter[MethodConfig] = TypeAdapter(AnyMethod)
    own = {name: adapter.validate_python(table) for name, table in report.get("settings", {}).items()}
    return config.model_copy(update={"methods": {**config.methods, **own}})


def _scope(
    config: Config,
    workspace: Workspace,
    jobs: dict[str, Any],
    methods: Sequence[str] | None,
    seed: int | None,
    stages: int | None,
) -> Scope:
    from stages.analysis.measured import Scope
    from stages.dataset import load_dataset

    trained = [Job(**row["job"]) for row in jobs["checkpoints"]]
    seeds = sorted({job.seed for job in trained})
    if seed is not None and seed not in seeds:
        raise UserError(f"--seed {seed}: the report trained seeds {', '.join(map(str, seeds))}")
    chosen = seeds[0] if seed is None else seed
    present = {job.protocol for job in trained}
    protocol: Protocol = next(name for name in PROTOCOLS if name in present)
    own = [job for job in trained if (job.seed, job.protocol) == (chosen, protocol)]
    names = tuple(dict.fromkeys(job.method for job in own))
    for name in methods or ():
        if name not in names:
            raise UserError(f"--methods {name}: not in this report{nearest(name, names)}; it has {', '.join(names)}")
    last = max(job.stage for job in own)
    if stages is not None and not 1 <= stages <= last + 1:
        raise UserError(f"--stages {stages}: the report has {last + 1}; give a number from 1 to {last + 1}")
    evaluations = tuple(Evaluation(**{**row, "job": Job(**row["job"])}) for row in jobs["evaluations"])
    return Scope(
        config=config,
        workspace=workspace,
        dataset=load_dataset(config, workspace),
        methods=tuple(dict.fromkeys(methods or names)),
        seed=chosen,
        protocol=protocol,
        last=(stages or last + 1) - 1,
        evaluations=evaluations,
        say=watcher().start,
    )


def _measured(
    scope: Scope, report: dict[str, Any], parts: Sequence[str] | None, earlier: dict[str, Any]
) -> dict[str, Any]:
    """The content of analysis.json, for models of this report."""
    from stages.analysis.measured import PARTS, measured
    from stages.analysis.sensitivity import drift_report, sensitivity

    found: dict[str, Any] = {
        "schema": 1,
        "name": scope.config.name,
        "protocol": scope.protocol,
        "seed": scope.seed,
        "stage": scope.last,
        "methods": list(scope.methods),
        "settings": scope.config.analysis.model_dump(exclude={"text"}),
        "text": _digest(scope.config.analysis.text),
        "parts": list(parts or PARTS),
        **measured(scope, parts or PARTS),
    }
    _fill(found, earlier)
    reports = _reports(scope.workspace)
    moved = drift_report(found["preservation"]["drift"], scope.last, report, scope.protocol, scope.seed)
    curves = sensitivity([moved, *reports])
    if not curves:
        found["notes"].append(FLAT)
    return {**found, "sensitivity": curves}


def _fill(found: dict[str, Any], earlier: dict[str, Any]) -> None:
    """Take the parts that are left out from an earlier analysis of the same, and note those that nobody measured."""
    from stages.analysis.measured import PARTS

    if all(earlier.get(key) == found[key] for key in ("protocol", "seed", "stage", "methods", "settings")):
        known = [part for part in earlier.get("parts", PARTS) if part not in found["parts"]]
        if "preservation" in known and earlier.get("text", found["text"]) != found["text"]:
            known.remove("preservation")
        found |= {key: earlier[key] for part in known for key in PARTS[part] if key in earlier}
        kept = [note for note in earlier["notes"] if not note.startswith((LEFT, FLAT))]
        found["parts"], found["notes"] = [*found["parts"], *known], list(dict.fromkeys([*kept, *found["notes"]]))
    if left := [part for part in PARTS if part not in found["parts"]]:
        found["notes"].append(f"{LEFT}{', '.join(left)}.")


def _digest(text: str | None) -> str | None:
    return sha256_file(Path(text)) if text is not None and Path(text).is_file() else None


def _reports(workspace: Workspace) -> list[dict[str, Any]]:
    """Every report of the workspace, the newest first."""
    files = sorted(workspace.reports.glob("*/report.json"), key=lambda path: -path.stat().st_mtime_ns)
    return [read_json(path) for path in files]
