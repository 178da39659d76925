"""The steps of `retrain` as plain functions: what to decide next, on which numbers, and the decision itself."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows import mirror as mirror_store
from flows import steps
from flows.experiment import trained_jobs
from flows.plan import Lineage, Plan
from flows.promotion import champion, copies
from flows.promotion.champion import Champion
from flows.promotion.gate import verdict
from flows.promotion.history import Entry, read_history
from flows.promotion.telling import name
from flows.recommending import favourite
from flows.steps import evaluate, train
from flows.terminal import watcher
from stages.config import load_config
from stages.errors import UserError
from stages.jobs import BASELINES, SEARCH_BASELINES, Checkpoint, Evaluation, Job, Pin
from stages.stage_files import stage_rows
from stages.stored import tensors_of
from stages.workspace import Workspace, read_json_once

if TYPE_CHECKING:
    from stages.append import Intake
    from stages.contest import Difference, Probe

__all__ = ["answers", "decide", "evaluate", "grow", "mirror", "take", "train"]
"""What `flows.retrain.work` asks of whoever does the steps: this module, or `flows.tasks` with the same as tasks."""
log = logging.getLogger("flows.retraining")


@dataclass(frozen=True)
class Match:
    """One decision to make.

    Attributes:
        stage: whose tests decide.
        challenger: the model that wants to go into service.
        champion: who answers now, and is to be beaten: the champion, or who stands in for a damaged one; None where
            nobody is.
        baselines: asked about the same users, for the record.
        present: the champion, damaged or not; the decision holds only as long as it is in service.
        anew: the challenger is the champion trained anew, by changed settings or on other rows.
    """

    stage: int
    challenger: Job
    champion: Champion | None
    baselines: tuple[Job, ...]
    present: Champion | None
    anew: bool = False

    def tested(self) -> list[tuple[Job, Pin | None]]:
        """Whom to ask on the stage's tests: challenger, champion, baselines."""
        held = [] if self.champion is None else [(self.champion.job, self.champion.pin)]
        return [(self.challenger, None), *held, *((job, None) for job in self.baselines)]

    def names(self) -> list[str]:
        """Those of `tested` in words."""
        known = [name(job) for job, _ in self.tested()]
        return [f"{known[0]}, trained anew", *known[1:]] if self.anew else known


def retrain_plan(config: Path, workspace: Path | None = None) -> Plan:
    """The plan of a retraining; nothing is written yet.

    Raises:
        UserError: config or method is not usable, or the gate could never decide.
    """
    settings = load_config(Path(config))
    own, wanted = settings.retrain, settings.search.objectives
    if wanted is not None and own.gate.objective not in wanted:
        raise UserError(
            f'{config}: retrain.gate.objective = "{own.gate.objective}" is not among search.objectives, so that '
            "nobody is tested on it; name it there, or let the gate look at another"
        )
    sample = settings.evaluation.users
    if own.users is None and sample is not None and sample < own.gate.users:
        raise UserError(
            f"{config}: evaluation.users ({sample}) is below retrain.gate.users ({own.gate.users}), so that no "
            "challenger could ever pass; raise the one, lower the other, or give retrain.users"
        )
    seed = settings.seeds[0] if own.seed is None else own.seed
    return steps.draft_plan(config, workspace, [own.method], [seed], users=own.users, comparison=False)


def take(plan: Plan, new: str | None = None, close_now: bool = False) -> Intake:
    """Read what is new; a workspace without stages is first cut from the log as `compare` would."""
    from stages.append import take_new_rows
    from stages.mending import mend_stages

    if not is_cut(plan.workspace):
        steps.read(plan)
        steps.split(plan)
    watcher().start("new rows")
    for stage in mend_stages(plan.config, plan.workspace):
        log.warning("stage %d was missing or damaged; it is rebuilt, with the same content", stage)
    intake = take_new_rows(plan.config, plan.workspace, new, close_now, progress=watcher().say)
    log.info(intake.sentence())
    if intake.refused:
        log.warning(
            "refused rows: %d, most often: %s; %s lists them, and above retrain.refused_share a run fails",
            intake.refused,
            intake.reason,
            plan.workspace.rejects / "retrain.parquet",
        )
    return intake


def is_cut(workspace: Workspace) -> bool:
    """Whether the log has been cut into stages, if only by a commit that is still to be ended."""
    return any((workspace.stages / name).exists() for name in ("manifest.json", "next.json"))


def grow(plan: Plan) -> None:
    """Codes for the items of new stages, and a look whether what follows has room on the disk."""
    from stages.append import grow_catalogue

    champion.settle(plan.workspace)
    grow_catalogue(plan.config, plan.workspace)
    steps.give_ids(plan)
    anew = outdated(plan)
    jobs = [*awaited(plan), *([] if anew is None else [anew])]
    steps.see_room(plan, jobs, exports=jobs)


def outdated(plan: Plan, rebuilt: Sequence[int] = ()) -> Job | None:
    """The champion's job, where its checkpoints are damaged or are not what its data and settings give now.

    What the history decided about once is not tried again, refused or taken out of service as it may have been.
    Nothing is written.

    Args:
        plan: the retraining.
        rebuilt: stages that a look would put late rows into.
    """
    from stages.commit import checkpoint_folder, lineage_jobs
    from stages.dataset import load_dataset

    present = champion.decided(plan.workspace)
    if present is None or present.pin is None or not _is_known(plan, present.job.method):
        return None
    if rebuilt and min(rebuilt) <= lineage_jobs(plan.config, present.job)[-1].stage:
        return present.job
    dataset = load_dataset(plan.config, plan.workspace, answering=True)
    folder = checkpoint_folder(plan.config, plan.workspace, dataset, present.job)
    if folder.name != present.key:
        tried = _was_decided(plan, folder.name) and _standing(plan) is not None
        return None if tried else present.job
    if champion.fault_of(plan.config, plan.workspace, present) is None:
        return None
    mended = champion.fault_of(plan.config, plan.workspace, replace(present, tensors=None)) is None
    return None if mended and _was_decided(plan, folder.name, tensors_of(folder)) else present.job


def rematch(plan: Plan, checkpoint: Checkpoint) -> Match | None:
    """The decision on the champion trained anew; None where that mended it, to the tensors that were in service."""
    present = champion.settle(plan.workspace)
    if present is not None and present.key == checkpoint.key:
        if champion.fault_of(plan.config, plan.workspace, present) is None:
            champion.renew(plan.workspace)
            log.warning("%s was damaged; it is trained again, to the same tensors", name(present.job))
            return None
        if _was_decided(plan, checkpoint.key, tensors_of(plan.workspace.checkpoints / checkpoint.key)):
            return None
    return _match(plan, len(stage_rows(plan.workspace)) - 1, checkpoint.job, present, anew=True)


def _is_known(plan: Plan, method: str) -> bool:
    """Whether the settings still have a method: a champion of one that is gone stays as it is."""
    try:
        plan.config.method(method)
    except UserError:
        return False
    return True


def _was_decided(plan: Plan, key: str, tensors: str | None = None) -> bool:
    """Whether the history has a checkpoint as challenger or champion; with `tensors` these very ones."""
    lines, _ = read_history(plan.workspace)
    sides = [line[side] for line in lines for side in ("challenger", "champion") if line.get(side)]
    return any(side["key"] == key and tensors in (None, side.get("tensors")) for side in sides)


def _standing(plan: Plan) -> Champion | None:
    """Who answers now: the champion, or the newest one before it that is intact."""
    found = champion.succession(plan.workspace, champion.decided(plan.workspace))
    return next((one for one in found if champion.fault_of(plan.config, plan.workspace, one) is None), None)


def unrecorded(plan: Plan) -> Entry | None:
    """The last decision, where MLflow lacks one: a kill or a store that was away kept it from being recorded."""
    champion.settle(plan.workspace)
    missed = copies.lacking(plan.workspace, "mlflow")
    return missed[-1] if missed else None


def next_match(plan: Plan) -> Match | None:
    """The oldest decision that is due; None where nothing is."""
    present = champion.settle(plan.workspace)
    if present is None and not read_history(plan.workspace)[0]:
        return _first(plan)
    seen = -1 if present is None else present.job.stage
    due = _due(plan, seen)
    return _match(plan, *due[0], present) if due else None


def awaited(plan: Plan) -> list[Job]:
    """The challengers of all decisions that are due, oldest first; asked before new items have their codes."""
    return [job for _, job in upcoming(plan)]


def upcoming(plan: Plan, closed: Sequence[int] = ()) -> list[tuple[int, Job]]:
    """(stage, challenger) of all decisions that are due, oldest first; nothing is written.

    Args:
        plan: the retraining.
        closed: stages that a look would close.
    """
    present = champion.decided(plan.workspace)
    if present is not None or read_history(plan.workspace)[0]:
        return _due(plan, -1 if present is None else present.job.stage, closed)
    first = _first(plan, closed)
    if first is None:
        return []
    return [(first.stage, first.challenger), *_due(plan, first.challenger.stage, closed)]


def _due(plan: Plan, seen: int, closed: Sequence[int] = ()) -> list[tuple[int, Job]]:
    """(stage, challenger) for every appended stage nothing is decided on, of challengers newer than stage `seen`."""
    ahead, lineage = _ahead(plan), _lineage(plan)
    lines, ruled = read_history(plan.workspace)[0], ("first", "promoted", "kept")
    decided = {line["stage"] for line in lines if line["decision"] in ruled and not line.get("anew")}
    rows = read_json_once(plan.workspace.stages / "manifest.json").get("appended", [])
    appended = list(dict.fromkeys([*(row["index"] for row in rows), *closed]))
    open_ones = [index for index in appended if index not in decided and index - ahead > seen]
    return [(index, lineage.at(index - ahead)) for index in open_ones]


def _ahead(plan: Plan) -> int:
    """How many stages before the one that tests it a challenger ends."""
    return int(plan.config.retrain.protocol == "next_stage")


def _lineage(plan: Plan) -> Lineage:
    return Lineage(plan.methods[0], plan.seeds[0], plan.config.retrain.protocol)


def _match(plan: Plan, stage: int, challenger: Job, present: Champion | None, anew: bool = False) -> Match:
    from stages.interactions import used_objectives

    searching = "search" in used_objectives(plan.workspace, plan.config.search.objectives)
    names = (name for name in BASELINES if searching or name not in SEARCH_BASELINES)
    baselines = tuple(replace(challenger, method=name) for name in names)
    return Match(stage, challenger, present and _standing(plan), baselines, present, anew)


def _first(plan: Plan, closed: Sequence[int] = ()) -> Match | None:
    """A champion to begin with: the best method of the last report, or the configured one trained up to here."""
    last, ahead = max([len(stage_rows(plan.workspace)) - 1, *closed]), _ahead(plan)
    trained = [job for job in trained_jobs(plan.workspace) if job.protocol == plan.config.retrain.protocol]
    if trained:
        best = favourite(plan.workspace.root, plan.config.retrain.gate.objective)
        job = max(trained, key=lambda job: (job.method == best, job.stage, -job.seed))
        return _match(plan, min(job.stage + ahead, last), job, None)
    return _match(plan, last, _lineage(plan).at(last - ahead), None) if last >= ahead else None


def answers(plan: Plan, match: Match) -> Probe:
    """How the challenger answers single users."""
    from stages.contest import probe

    watcher().start(f"probe {name(match.challenger)}")
    return probe(plan.config, plan.workspace, match.challenger, match.stage)


def decide(
    plan: Plan, match: Match, checkpoint: Checkpoint, tests: Sequence[Evaluation], answered: Probe
) -> Entry | None:
    """Hold the challenger against the gate, write the decision down, and move the champion if it passed.

    Args:
        plan: the retraining.
        match: who meets whom.
        checkpoint: the challenger's.
        tests: of those of `match.tested()` on the stage's tests.
        answered: the challenger's answers to single users.

    Returns:
        The history's line; None where a roll back came between, and the match is another one.
    """
    from stages.contest import differences, mean_scores

    own = plan.config.retrain.gate
    found: dict[str, Difference] | None = None
    if match.champion is not None:
        found = differences(plan.workspace, tests[0], tests[1], own, plan.config.evaluation.bootstrap)
    judged = verdict(found, answered, own)
    asked = dict(zip(match.names(), tests, strict=True))
    means = {model: mean_scores(plan.workspace, test, own.metric) for model, test in asked.items()}
    silent = {m for m, test in asked.items() if test.job.method in SEARCH_BASELINES and own.objective != "search"}
    others = {objective for found_of in means.values() for objective in found_of} - {own.objective}
    line: Entry = {
        "stage": match.stage,
        "why": _sentence(match, judged.passed, judged.why),
        "challenger": _challenger(plan, checkpoint),
        **({"anew": True} if match.anew else {}),
        "metric": own.metric,
        "scores": {model: by.get(own.objective) for model, by in means.items() if model not in silent},
        "other_scores": {kind: {m: by[kind] for m, by in means.items() if kind in by} for kind in sorted(others)},
        "differences": None if found is None else {part: asdict(value) for part, value in found.items()},
        "probe": asdict(answered),
        "sampled_users": plan.config.evaluation.users,
    }
    written = _written(plan, match, checkpoint, judged.passed, line)
    if written is None:
        log.warning(
            "another model went into service while %s was tested; it is held against that one", match.names()[0]
        )
    else:
        log.info(line["why"])
    return written


def _challenger(plan: Plan, checkpoint: Checkpoint) -> dict[str, Any]:
    tensors = tensors_of(plan.workspace.checkpoints / checkpoint.key)
    return {"job": asdict(checkpoint.job), "key": checkpoint.key, "digest": checkpoint.digest, "tensors": tensors}


def _written(plan: Plan, match: Match, checkpoint: Checkpoint, passed: bool, line: Entry) -> Entry | None:
    """The decision as it stands: it does as long as the champion is the one that the match was made with."""
    if not passed:
        return champion.keep(plan.workspace, line, match.present)
    rise = "rebuilt" if match.anew else "first" if match.present is None else "promoted"
    return champion.promote(plan.workspace, checkpoint, rise, line, match.present)


def _sentence(match: Match, passed: bool, why: str) -> str:
    challenger = match.names()[0] + ("," if match.anew else "")
    if match.present is not None and (match.champion is None or not match.present.is_model(match.champion)):
        why = f"{why}; the champion, {name(match.present.job)}, cannot be loaded"
    if passed:
        return f"{challenger} goes into service: {why}"
    if match.champion is None:
        return f"{challenger} does not go into service, and nothing else is: {why}"
    return f"{name(match.champion.job)} stays in service, {challenger} does not replace it: {why}"


def mirror(plan: Plan, line: Entry) -> None:
    """Copy a decision into MLflow."""
    mirrored(plan.workspace, plan.config.name, line)


def mirrored(workspace: Workspace, experiment: str, line: Entry) -> None:
    """Copy a decision into MLflow, and earlier ones it missed; a store that fails only costs a warning."""
    try:
        count = copies.count(workspace)
        mirror_store.record_decisions(workspace, experiment)
        copies.note(workspace, "mlflow", count)
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("MLflow does not have the decision on stage %s (%s); the next run records it", line["stage"], words)


def summary(intake: Intake, lines: Sequence[Entry]) -> str:
    """The whole run in Markdown."""
    return "\n".join([intake.sentence(), "", *(told(lines) or ["- nothing to decide"])])


def told(lines: Sequence[Entry]) -> list[str]:
    """Decisions as a list in Markdown."""
    return [f"- **{line['decision']}**: {line['why']}" for line in lines]
