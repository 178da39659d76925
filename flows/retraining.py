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
from flows.promotion.gate import verdict
from flows.promotion.history import Entry, read_history
from flows.recommending import favourite
from flows.steps import evaluate, train
from flows.terminal import watcher
from stages.config import load_config
from stages.errors import UserError
from stages.jobs import BASELINES, SEARCH_BASELINES, Checkpoint, Evaluation, Job
from stages.workspace import Workspace, read_json

if TYPE_CHECKING:
    from stages.append import Intake
    from stages.contest import Difference, Probe

__all__ = ["answers", "decide", "evaluate", "grow", "mirror", "rebuild", "take", "train"]
"""What `flows.retrain.work` asks of whoever does the steps: this module, or `flows.tasks` with the same as tasks."""
log = logging.getLogger("flows.retraining")


@dataclass(frozen=True)
class Match:
    """One decision to make.

    Attributes:
        stage: whose tests decide.
        challenger: the model that wants to go into service.
        champion: the one that is; None where there is none.
        baselines: asked about the same users, for the record.
    """

    stage: int
    challenger: Job
    champion: Job | None
    baselines: tuple[Job, ...]

    def trained(self) -> list[Job]:
        """Models with checkpoints, the challenger first."""
        return [self.challenger, *([] if self.champion is None else [self.champion])]


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

    grow_catalogue(plan.config, plan.workspace)
    steps.give_ids(plan)
    anew = outdated(plan)
    jobs = [*awaited(plan), *([] if anew is None else [anew])]
    steps.see_room(plan, jobs, exports=jobs)


def outdated(plan: Plan) -> Job | None:
    """The champion's job, where its checkpoint is not the one its data and settings give now: it must be rebuilt."""
    from stages.commit import checkpoint_folder
    from stages.dataset import load_dataset

    present = champion.settle(plan.workspace)
    if present is None:
        return None
    dataset = load_dataset(plan.config, plan.workspace)
    folder = checkpoint_folder(plan.config, plan.workspace, dataset, present.job)
    return None if folder.name == present.key else present.job


def rebuild(plan: Plan, checkpoint: Checkpoint) -> Entry:
    """Note that the champion was trained anew, on rebuilt stages or by changed settings."""
    job = checkpoint.job
    why = f"the data or settings of {name(job)} changed, so it was trained anew"
    line = {"stage": job.stage, "challenger": None, "why": why}
    champion.promote(plan.workspace, checkpoint, "rebuilt", line)
    return _last(plan)


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
    return _match(plan, *due[0], present and present.job) if due else None


def awaited(plan: Plan) -> list[Job]:
    """The challengers of all decisions that are due, oldest first."""
    match = next_match(plan)
    return [] if match is None else [match.challenger, *(job for _, job in _due(plan, match.challenger.stage))]


def _due(plan: Plan, seen: int) -> list[tuple[int, Job]]:
    """(stage, challenger) for every appended stage nothing is decided on, of challengers newer than stage `seen`."""
    ahead, lineage = _ahead(plan), _lineage(plan)
    ruled = ("first", "promoted", "kept")
    decided = {line["stage"] for line in read_history(plan.workspace)[0] if line["decision"] in ruled}
    appended = [row["index"] for row in read_json(plan.workspace.stages / "manifest.json").get("appended", [])]
    open_ones = [index for index in appended if index not in decided and index - ahead > seen]
    return [(index, lineage.at(index - ahead)) for index in open_ones]


def _ahead(plan: Plan) -> int:
    """How many stages before the one that tests it a challenger ends."""
    return int(plan.config.retrain.protocol == "next_stage")


def _lineage(plan: Plan) -> Lineage:
    return Lineage(plan.methods[0], plan.seeds[0], plan.config.retrain.protocol)


def _match(plan: Plan, stage: int, challenger: Job, present: Job | None) -> Match:
    from stages.interactions import used_objectives

    searching = "search" in used_objectives(plan.workspace, plan.config.search.objectives)
    names = (name for name in BASELINES if searching or name not in SEARCH_BASELINES)
    baselines = tuple(replace(challenger, method=name) for name in names)
    return Match(stage, challenger, present, baselines)


def _first(plan: Plan) -> Match | None:
    """A champion to begin with: the best method of the last report, or the configured one trained up to here."""
    last, ahead = len(read_json(plan.workspace.stages / "manifest.json")["stages"]) - 1, _ahead(plan)
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


def decide(plan: Plan, match: Match, checkpoint: Checkpoint, tests: Sequence[Evaluation], answered: Probe) -> Entry:
    """Hold the challenger against the gate, write the decision down, and move the champion if it passed.

    Args:
        plan: the retraining.
        match: who meets whom.
        checkpoint: the challenger's.
        tests: of challenger, champion and baselines on the stage's tests.
        answered: the challenger's answers to single users.

    Returns:
        The history's line.
    """
    from stages.contest import differences, mean_scores

    own = plan.config.retrain.gate
    by_job = {test.job: test for test in tests}
    found: dict[str, Difference] | None = None
    if match.champion is not None:
        pair = by_job[match.challenger], by_job[match.champion]
        found = differences(plan.workspace, *pair, own, plan.config.evaluation.bootstrap)
    judged = verdict(found, answered, own)
    means = {name(test.job): mean_scores(plan.workspace, test, own.metric) for test in tests}
    silent = {name(test.job) for test in tests if test.job.method in SEARCH_BASELINES and own.objective != "search"}
    others = {objective for found_of in means.values() for objective in found_of} - {own.objective}
    line: Entry = {
        "stage": match.stage,
        "why": _sentence(match, judged.passed, judged.why),
        "challenger": {"job": asdict(checkpoint.job), "key": checkpoint.key, "digest": checkpoint.digest},
        "metric": own.metric,
        "scores": {model: by.get(own.objective) for model, by in means.items() if model not in silent},
        "other_scores": {kind: {m: by[kind] for m, by in means.items() if kind in by} for kind in sorted(others)},
        "differences": None if found is None else {part: asdict(value) for part, value in found.items()},
        "probe": asdict(answered),
        "sampled_users": plan.config.evaluation.users,
    }
    if judged.passed:
        champion.promote(plan.workspace, checkpoint, "first" if match.champion is None else "promoted", line)
    else:
        champion.keep(plan.workspace, line)
    log.info(line["why"])
    return _last(plan)


def _last(plan: Plan) -> Entry:
    return read_history(plan.workspace)[0][-1]


def _sentence(match: Match, passed: bool, why: str) -> str:
    challenger = name(match.challenger)
    if passed:
        return f"{challenger} goes into service: {why}"
    if match.champion is None:
        return f"{challenger} does not go into service, and nothing else is: {why}"
    return f"{name(match.champion)} stays in service, {challenger} does not replace it: {why}"


def name(job: Job) -> str:
    """A model in words."""
    return f"{job.method} after stage {job.stage}"


def mirror(plan: Plan, line: Entry) -> None:
    """Copy a decision into MLflow."""
    mirrored(plan.workspace, plan.config.name, line)


def mirrored(workspace: Workspace, experiment: str, line: Entry) -> None:
    """Copy a decision into MLflow, and earlier ones it missed; a store that fails only costs a warning."""
    try:
        mirror_store.record_decisions(workspace, experiment)
        copies.note(workspace, "mlflow")
    except Exception as error:
        words = " ".join(str(error).split())[:300] or type(error).__name__
        log.warning("MLflow does not have the decision on stage %s (%s); the next run records it", line["stage"], words)


def summary(intake: Intake, lines: Sequence[Entry]) -> str:
    """The whole run in Markdown."""
    return "\n".join([intake.sentence(), "", *(told(lines) or ["- nothing to decide"])])


def told(lines: Sequence[Entry]) -> list[str]:
    """Decisions as a list in Markdown."""
    return [f"- **{line['decision']}**: {line['why']}" for line in lines]


def rows(lines: Sequence[Entry]) -> list[dict[str, Any]]:
    """The history as a table, newest last."""
    return [
        {
            "at": line["at"],
            "decision": line["decision"],
            "stage": line["stage"],
            "champion": name(Job(**line["champion"]["job"])) if line["champion"] else "none",
            "why": line["why"],
        }
        for line in lines
    ]
