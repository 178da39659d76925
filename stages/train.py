"""One stage of one lineage, whatever the method: put the model together, train it (`stages.fit`), commit it."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from models import adapter as lora
from models.backbone import Backbone, compute_device, pretrained_backbone, small_backbone, wants_bfloat16
from models.generative import GenerativeModel
from models.words import Vocabulary, WordVocabulary
from stages.checkpoint import quarantine, size_of, tensors_digest, trained_tensors, write_checkpoint
from stages.commit import FIRST, checkpoint_folder, folders_of, lineage_jobs, links, method_of
from stages.config import Config
from stages.dataset import Dataset, load_dataset
from stages.errors import UserError
from stages.file_time import at_files
from stages.fit import Fit, Progress, drift, moving, reproducible
from stages.jobs import Checkpoint, Job
from stages.lineage import Parents, fault_in_lineage
from stages.locks import held
from stages.memory import forget_peak_memory, peak_memory
from stages.methods.contract import Schedule, Stateful
from stages.past import past_of
from stages.search_examples import query_vocabulary
from stages.stage_examples import stage_examples
from stages.stored import Stored, stored
from stages.workspace import Workspace, digest_of, read_json, sha256_file


def train_stage(config: Config, workspace: Workspace, job: Job, progress: Progress = lambda _: None) -> Checkpoint:
    """Train `job`'s last stage from the checkpoints before it, or return it where it is committed already.

    Args:
        config: the experiment.
        workspace: prepared by `split_stages` and `build_semantic_ids`; earlier stages of the lineage are trained first.
        job: method, seed, protocol and stage.
        progress: called after every optimiser step with `method, stage, epoch, step, steps, loss`.

    Raises:
        UserError: the workspace is not prepared, or the settings do not fit the backbone.
    """
    dataset = load_dataset(config, workspace)
    if not 0 <= job.stage < dataset.stages:
        raise UserError(f"stage {job.stage} does not exist; the log has stages 0 to {dataset.stages - 1}")
    lineage = lineage_jobs(config, job)
    chain = links(config, dataset, job)
    folders = folders_of(config, workspace, job, chain)
    parents, reused = Parents(), False
    for part, link, folder in zip(lineage, chain, folders, strict=True):
        look = partial(fault_in_lineage, folder, link, parents)
        reused = _committed_or_trained(config, workspace, dataset, part, folder, look, progress)
        parents.add(folder)
    done = _checkpoint(job, folders[-1], reused)
    if lineage[-1].stage == job.stage:
        return done
    return replace(done, seconds=0.0, trained_parameters=0, bytes=0, targets=0)


def lineage_folders(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> list[Path]:
    """The verified checkpoints of `job`'s model, stage 0 first; in an exported model some of them are not there.

    Raises:
        UserError: one is missing or damaged.
    """
    return stored(config, workspace, dataset, job).folders


def folders_read(config: Config, job: Job, folders: list[Path]) -> list[Path]:
    """Those of a lineage's checkpoints that putting `job`'s model together opens."""
    ends = method_of(config, job.method).reads == "ends"
    return list(dict.fromkeys([folders[0], folders[-1]])) if ends else folders


def restore_model(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> GenerativeModel:
    """`job`'s model in eval mode, with its adapter folded in."""
    return put_together(stored(config, workspace, dataset, job), dataset, job)


def put_together(found: Stored, dataset: Dataset, job: Job) -> GenerativeModel:
    """The model of verified checkpoints in eval mode, with its adapter folded in.

    Raises:
        UserError: the settings do not fit the backbone or the checkpoints.
    """
    model = bare_model(found.config, dataset, job.seed)
    try:
        method_of(found.config, job.method).restore(model, found.folders)
    except ValueError as error:
        raise UserError(f"method {job.method}, stage {job.stage}: {error}") from None
    lora.fold(model.stack)
    return model.eval()


def bare_model(config: Config, dataset: Dataset, seed: int, vocabulary: Vocabulary | None = None) -> GenerativeModel:
    """Backbone and code rows before anything was trained.

    Args:
        config: the experiment.
        dataset: its prepared log.
        seed: of the new rows, and of `small`'s weights.
        vocabulary: reads the log's queries, as `stages.search_examples.query_vocabulary` gives it; absent: found there.

    Raises:
        UserError: the backbone cannot be loaded or contradicts the settings.
    """
    settings = config.backbone
    vocabulary = query_vocabulary(config, dataset) if vocabulary is None else vocabulary
    try:
        backbone = _backbone(config, seed, len(vocabulary) if isinstance(vocabulary, WordVocabulary) else 0)
        model = GenerativeModel(
            backbone,
            codes=sum(dataset.catalogue.sizes),
            seed=seed,
            full_vocabulary=settings.vocabulary == "full",
            dropout=settings.dropout,
            searching=vocabulary is not None,
        )
        return model.to(compute_device(settings.device))
    except ValueError as error:
        raise UserError(str(error)) from None


def _backbone(config: Config, seed: int, text: int) -> Backbone:
    own = config.backbone
    if own.path is not None:
        with at_files():
            return pretrained_backbone(own.path)
    return small_backbone(own.hidden, own.layers, own.heads, own.feed_forward, seed, text)


def _committed_or_trained(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    folder: Path,
    look: Callable[[], str | None],
    progress: Progress,
) -> bool:
    """Whether the checkpoint was there already."""
    reused = look() is None
    if not reused:
        lock = workspace.locks / f"{job.protocol}-{job.method}-seed{job.seed}.lock"
        with held(lock):  # looked at again under the lock: another process may have committed or set aside meanwhile
            fault = look()
            reused = fault is None
            if fault is not None and folder.exists():
                quarantine(folder, fault)
            if not reused:
                _train(config, workspace, dataset, job, progress)
    return reused


def _checkpoint(job: Job, folder: Path, reused: bool) -> Checkpoint:
    state = read_json(folder / "state.json")
    return Checkpoint(
        job=job,
        key=folder.name,
        digest=sha256_file(folder / "manifest.json"),
        seconds=state["seconds"],
        trained_parameters=state["trained_parameters"],
        bytes=size_of(folder),
        peak_memory=state["peak_memory"],
        targets=state["targets"],
        reused=reused,
    )


@dataclass(frozen=True)
class Beginning:
    """A stage about to be trained.

    Attributes:
        fit: model, step and examples.
        lineage: the checkpoints it starts from, stage 0 first.
    """

    fit: Fit
    lineage: list[Path]


def begin_stage(config: Config, workspace: Workspace, dataset: Dataset, job: Job, steps: int = 0) -> Beginning:
    """Put `job`'s last stage together as it is trained: the same bytes every time.

    Args:
        config: the experiment.
        workspace: holds the lineage before the stage.
        dataset: the prepared log.
        job: method, seed, protocol and stage.
        steps: the least length of the schedule, whose rate ends at 0; the stage's own where that is longer.

    Raises:
        UserError: a checkpoint before it is missing or damaged, or the settings do not fit the backbone.
    """
    seed = derived_seed(job.seed, job.stage)
    method = method_of(config, job.method)
    vocabulary = query_vocabulary(config, dataset)
    examples = stage_examples(config, dataset, job, method.data == "all", vocabulary)
    model = bare_model(config, dataset, job.seed, vocabulary)
    model.dropout = config.backbone.dropout if job.stage == 0 and not model.pretrained else 0.0
    folders = lineage_folders(config, workspace, dataset, replace(job, stage=job.stage - 1)) if job.stage else []
    rate = _rate(job, method.every_weight)
    schedule = _schedule(config, job, rate, examples.windows, seed)
    schedule = replace(schedule, steps=max(schedule.steps, steps))
    if job.stage:
        schedule = replace(schedule, past=past_of(config, workspace, dataset, job, vocabulary))
    try:
        step = method.begin(model, folders, schedule)
    except ValueError as error:
        raise UserError(f"method {job.method}, stage {job.stage}: {error}") from None
    return Beginning(Fit(config, model, step, examples, seed, rate), folders)


def _train(config: Config, workspace: Workspace, dataset: Dataset, job: Job, progress: Progress) -> None:
    started = time.perf_counter()
    measured = forget_peak_memory()
    beginning = begin_stage(config, workspace, dataset, job)
    model, examples = beginning.fit.model, beginning.fit.examples
    parents = {folder.name: tensors_digest(folder) for folder in beginning.lineage}
    before = moving(model)
    with reproducible(beginning.fit.seed):
        training = beginning.fit.run(_epochs(config, job), job, progress)
    moved_by = drift(before, moving(model))
    moved = sum(value.numel() for value in before.values())
    tensors = trained_tensors(model)
    if job.method == FIRST and not tensors.adapter:
        lora.attach(model.stack, config.adapter.rank, config.adapter.alpha, config.adapter.targets, beginning.fit.seed)
        tensors = replace(tensors, adapter=lora.snapshot(model.stack))
    report: dict[str, Any] = {}
    if isinstance(step := beginning.fit.step, Stateful):
        start = {name.removeprefix("stack."): value for name, value in before.items()}
        tensors = replace(tensors, backbone=step.stored(start, tensors.backbone), kept=step.kept())
        report = step.report()
    chain = links(config, dataset, job)
    state = {
        "schema": 1,
        "job": asdict(job),
        "key": chain[-1].key,
        "inputs": chain[-1].inputs,
        "codes": dataset.note_of_codes(job.stage),
        "seconds": time.perf_counter() - started,
        "trained_parameters": moved,
        "targets": sum(examples.targets.values()),
        "validation_targets": sum(examples.validation_targets.values()),
        "unseen_code_rows": examples.unseen_rows,
        "peak_memory": peak_memory() if measured else None,
        "precision": "bfloat16" if wants_bfloat16(config.backbone.precision, model.device) else "float32",
        "device": model.device.type,
        "threads": torch.get_num_threads(),
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "parents": parents,
        **moved_by,
        **report,
        **training,
    }
    if config.backbone.path is not None:
        state["backbone_path"] = config.backbone.path
    if dataset.interactions.query is not None:
        state["targets_by_objective"] = examples.targets
    place = folders_of(config, workspace, job, chain)[-1]
    write_checkpoint(place, tensors, config.adapter, state, fence=partial(_same_parents, beginning.lineage, parents))


def _same_parents(folders: Sequence[Path], parents: Mapping[str, str]) -> None:
    """A lock alone is not enough: a stopped process that goes on must not commit what rests on tensors now gone."""
    for folder in folders:
        if not folder.exists() or tensors_digest(folder) != parents[folder.name]:
            raise UserError(
                f"{folder}: changed while a stage was being trained from it; nothing was committed, "
                "run the same command again"
            )


def _epochs(config: Config, job: Job) -> int:
    return config.training.first_epochs if job.stage == 0 else config.training.epochs


def _rate(job: Job, every_weight: bool) -> str:
    """The setting of `training` that is the stage's peak rate."""
    if job.stage == 0:
        return "first_learning_rate"
    return "full_learning_rate" if every_weight else "learning_rate"


def _schedule(config: Config, job: Job, rate: str, windows: int, seed: int) -> Schedule:
    own = config.training
    return Schedule(
        steps=_epochs(config, job) * -(-windows // own.batch_size),
        learning_rate=getattr(own, rate),
        warmup=own.warmup,
        weight_decay=own.weight_decay,
        clip_norm=own.clip_norm,
        seed=seed,
    )


def derived_seed(seed: int, *place: int | str) -> int:
    """A 63-bit seed that depends on the run's seed and the place it is used at, and on nothing else."""
    return int(digest_of([seed, *place])[:15], 16)


def training_log(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> dict[str, Any]:
    """`state.json` of the last checkpoint in `job`'s lineage."""
    folder = checkpoint_folder(config, workspace, dataset, job)
    return json.loads((folder / "state.json").read_text(encoding="utf-8"))
