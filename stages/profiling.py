"""Where the time of a training step goes: a trace for a viewer and a one-page summary, from the loop as it is.

Watches from outside: torch's profiler counts steps by the loop's own progress calls, and hooks on every module name
what runs inside it. A profiled stage commits the same bytes as any other.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook
from torch.profiler import ProfilerActivity, profile, record_function, schedule
from transformers import PreTrainedModel

from models.adapter import LowRank
from models.backbone import compute_device
from stages.commit import method_of
from stages.config import Config
from stages.dataset import load_dataset
from stages.file_time import timed_files
from stages.fit import MICRO_TOKENS, Progress
from stages.jobs import Checkpoint, Job
from stages.search_examples import query_vocabulary
from stages.stage_examples import Examples, stage_examples
from stages.train import train_stage
from stages.workspace import Workspace, replacing

PREFIX, MASK = "driftrec/", "create_causal_mask"
"""Begins the name of every range that stands for a part of the step; what transformers' models make their mask with."""
SKIPPED, WATCHED = 3, 6
"""Optimiser steps before the watched ones (the last of them warms the profiler up), and those."""
REST = "python and the rest"
ASKED = ("attention", "head", "adapter", "optimiser", "penalty", "masking")
"""Parts that every page names, also where a step has none of them."""


@dataclass(frozen=True)
class Filling:
    """What a stage's batches are made of, as shares of the tokens processed.

    Attributes:
        tokens: processed in an epoch, padding included.
        useful: share whose next token is a target.
        padding: share that only fills a batch's rows up.
    """

    tokens: int
    useful: float
    padding: float


def profile_stage(
    config: Config, workspace: Workspace, job: Job, progress: Progress = lambda _: None
) -> tuple[Checkpoint, Path | None]:
    """`stages.train.train_stage`, watched.

    Args:
        config: the experiment.
        workspace: prepared as for training.
        job: method, seed, protocol and stage.
        progress: as for training.

    Returns:
        The checkpoint, and the folder with `trace.json` (chrome://tracing, Perfetto) and `summary.md`; None where the
        stage was committed already or had too few steps to watch.

    Raises:
        UserError: as training.
    """
    moments: list[float] = [time.perf_counter()]
    own = profile(
        activities=[ProfilerActivity.CPU], schedule=schedule(wait=SKIPPED - 1, warmup=1, active=WATCHED, repeat=1)
    )

    def watched(news: Mapping[str, Any]) -> None:
        moments.append(time.perf_counter())
        own.step()
        progress(news)

    with own, _named_modules(), timed_files() as at_files:
        checkpoint = train_stage(config, workspace, job, watched)
    moments.append(time.perf_counter())
    if len(moments) - 2 < SKIPPED + WATCHED:
        return checkpoint, None
    folder = workspace.root / "runs" / "profiles" / checkpoint.key
    with replacing(folder / "trace.json") as temporary:
        own.export_chrome_trace(str(temporary))
    spent = shares(own.events() or [])
    text = summary(config, job, spent, filling_of(config, workspace, job), moments, sum(at_files))
    with replacing(folder / "summary.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    return checkpoint, folder


@contextmanager
def _named_modules() -> Iterator[None]:
    """Every call of a module that stands for a part of the step, or makes a mask, becomes a range of that name."""
    ranges: list[record_function] = []
    makers: dict[str, Callable[..., Any]] = {}  # by module of transformers, what it makes its mask with

    def enter(module: nn.Module, _: Any) -> None:
        home = sys.modules[type(module).__module__]
        if isinstance(module, PreTrainedModel) and home.__name__ not in makers and hasattr(home, MASK):
            makers[home.__name__] = getattr(home, MASK)
            setattr(home, MASK, _named(makers[home.__name__], "masking"))
        if (name := _part_of(module)) is not None:
            ranges.append(record_function(PREFIX + name))
            ranges[-1].__enter__()

    def leave(module: nn.Module, _inputs: Any, _output: Any) -> None:
        if _part_of(module) is not None:
            ranges.pop().__exit__(None, None, None)

    handles = register_module_forward_pre_hook(enter), register_module_forward_hook(leave)
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        for home, make in makers.items():
            setattr(sys.modules[home], MASK, make)


def _named(call: Callable[..., Any], name: str) -> Callable[..., Any]:
    def named(*args: Any, **kwargs: Any) -> Any:
        with record_function(PREFIX + name):
            return call(*args, **kwargs)

    return named


def _part_of(module: nn.Module) -> str | None:
    """The part of a step that a module's call belongs to, by class: backbones name theirs alike."""
    if isinstance(module, LowRank):
        return "adapter"
    if isinstance(module, PreTrainedModel):
        return "norms, positions"  # what of the stack is in none of its other parts
    kind = type(module).__name__
    return next(
        (name for end, name in (("Attention", "attention"), ("MLP", "feed-forward")) if kind.endswith(end)), None
    )


def shares(events: Iterable[Any]) -> dict[str, float]:
    """Microseconds by part of the step, largest first.

    An operator counts for the innermost range it runs in; one of the backward pass for the range in which its forward
    operator ran, found by autograd's sequence number.

    Args:
        events: of torch's profiler.
    """
    ordered = sorted((event for event in events if not event.is_async), key=lambda event: event.time_range.start)
    forward = {event.sequence_nr: part for event in ordered if event.sequence_nr >= 0 and (part := _range(event))}
    spent: Counter[str] = Counter()
    for event in ordered:
        spent[_range(event) or _backward(event, forward) or REST] += event.self_cpu_time_total
    return dict(spent.most_common())


def _range(event: Any) -> str | None:
    """The innermost named range around an event."""
    while event is not None:
        if event.name.startswith(PREFIX):
            return event.name.removeprefix(PREFIX)
        if event.name.startswith("Optimizer.step"):
            return "optimiser"
        event = event.cpu_parent
    return None


def _backward(event: Any, forward: Mapping[int, str]) -> str | None:
    """The part whose backward pass an event belongs to."""
    while event is not None:
        if event.name.startswith("autograd::engine::evaluate_function"):
            return forward.get(event.sequence_nr, "backward, unassigned")
        event = event.cpu_parent
    return None


def filling_of(config: Config, workspace: Workspace, job: Job) -> Filling:
    """What the batches of `job`'s last stage hold."""
    dataset = load_dataset(config, workspace)
    everything = job.stage > 0 and method_of(config, job.method).data == "all"
    examples = stage_examples(config, dataset, job, everything, query_vocabulary(config, dataset))
    own = config.training
    return filling(
        examples, own.batch_size, own.micro_batch_size, MICRO_TOKENS[compute_device(config.backbone.device).type]
    )


def filling(examples: Examples, size: int, micro: int | None = None, most: int = 2**31, seed: int = 0) -> Filling:
    """Shares of one epoch's tokens.

    Args:
        examples: with at least one window.
        size: windows a batch.
        micro: windows a backward pass.
        most: tokens a backward pass, where `micro` is None.
        seed: of the batches' order.
    """
    tokens = useful = padding = 0
    batches = examples.epoch(size, np.random.default_rng(seed))
    pieces = (piece for batch in batches for piece in examples.micro_batches(batch, micro, most))
    for name, own in (part for piece in pieces for part in piece.items()):
        part = examples.parts[name]
        batch = part.batch(part.training, own)
        tokens += batch.tokens.numel()
        useful += len(batch.labels)
        padding += int((batch.tokens == part.encoder.bos).sum()) - len(own)  # all but the first of each row
    return Filling(tokens, useful / tokens, padding / tokens)


def summary(
    config: Config, job: Job, spent: Mapping[str, float], filled: Filling, moments: list[float], at_files: float
) -> str:
    """One page about one stage.

    Args:
        config: the experiment.
        job: what was trained.
        spent: microseconds by part, over the watched steps.
        filled: shares of the tokens.
        moments: seconds at the start, after every optimiser step, and at the end.
        at_files: seconds of them that files were read and written.
    """
    spent = {**spent, **{part: 0.0 for part in ASKED if part not in spent}}
    total = sum(spent.values())
    steps = np.diff(moments[1:-1])[SKIPPED - 1 :][:WATCHED]
    before, after = moments[1] - moments[0], moments[-1] - moments[-2]
    lines = [
        f"# Profile: {job.method}, seed {job.seed}, {job.protocol.replace('_', ' ')}, stage {job.stage}",
        "",
        f"- {WATCHED} steps watched of {len(moments) - 2}, after {SKIPPED}: {1e3 * np.median(steps):.1f} ms a step "
        f"under the profiler, {torch.get_num_threads()} threads, layout {config.training.layout}",
        f"- useful: {filled.useful:.1%} of the {filled.tokens:,} tokens of an epoch stand before a target",
        f"- padding: {filled.padding:.1%} of them",
        f"- of {moments[-1] - moments[0]:.1f} s, {before:.1f} s until the first step was done (reading, building, a "
        f"first validation) and {after:.1f} s after the last (validating, writing)",
        f"- I/O: {at_files / (moments[-1] - moments[0]):.1%} of them, {at_files:.2f} s (log, catalogue and checkpoints "
        "read and checked, the new checkpoint written)",
        "",
        "| part of a step, forward and backward | share | ms |",
        "|---|---|---|",
    ]
    lines += [f"| {part} | {time / total:.1%} | {time / 1e3 / WATCHED:.2f} |" for part, time in spent.items()]
    return "\n".join([*lines, "", "`trace.json` beside this page opens in https://ui.perfetto.dev.", ""])
