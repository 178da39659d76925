"""Claim: GEMS's optimiser step costs at most 1.3 × AdamW's on all weights, and refreshing bases under 5 % of it.

The same `small` model and batch, two objectives of 32 windows each, under both steps; the gate learns and the inputs of
the batch are protected. Refreshes are spread over the steps (`stagger`): their share is taken over several at once. The
limit of a refresh is that of its matrix products, its orthogonalisation left out.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from unittest.mock import patch

import torch

from benchmarks.measure import Pair, Row, Work, alternate, dearer, flops, report, using_threads
from benchmarks.subjects import SCHEDULE, generated_batch, small
from flows.machine import cores
from models.generative import GenerativeModel, TokenBatch
from models.input_moments import input_moments, linear_maps
from regularizers.null_space import Protection, protect
from stages.method_config import GemsConfig
from stages.methods.contract import SharedLosses
from stages.methods.gems_gate import Batch
from stages.methods.gems_stack import split_parameters
from stages.methods.gems_step import GemsStep
from stages.methods.parts import adamw_step, let_backbone_train

NAME = "gems_step"
SETTINGS = GemsConfig(gate_warmup=1)
CHUNKS, STEPS = 5, 10
Batches = Mapping[str, TokenBatch]


def main() -> None:
    """Measure step and refresh and record the rows."""
    batches = {name: generated_batch(32, 4, 6, seed) for seed, name in enumerate(("search", "recommendation"))}
    plain, held = small(), small()
    adamw = adamw_step(let_backbone_train(plain, rows=True), SCHEDULE)
    gems = gems_step(held, batches["search"])
    ours, rival = (lambda: gems(losses(held, batches))), (lambda: adamw(losses(plain, batches)))
    pair, clock = alternate(ours, rival), alternate(ours, rival, clock="wall", threads=cores())
    full = 8 * sum(module.weight.numel() for module in linear_maps(held.stack).values())
    said = f"state {gems.state_bytes() / 2**20:.1f} MiB, Adam's {full / 2**20:.1f} MiB on the same matrices"
    work, note = Work(flops=flops(lambda: gems(losses(held, batches)))), f"`small`, 2 x 32 windows; {said}"
    step = dearer("GEMS's step", "AdamW on all weights", pair, mark=1.3, work=work, note=note)
    whole = dearer("GEMS's step, wall time", "AdamW on all weights", clock, mark=1.3, work=work, note=note)
    report(NAME, [step, whole, refresh_row(gems, held, batches)])


def gems_step(model: GenerativeModel, corpus: TokenBatch) -> GemsStep:
    """The method's step as `stages.methods.gems` builds it, protecting the inputs of `corpus`."""
    found: dict[str, Protection] = {}
    whole = torch.ones_like(corpus.tokens, dtype=torch.bool)
    maps = linear_maps(model.stack)
    for one in input_moments(maps, lambda batch: model.hidden(batch.tokens), lambda: iter([(corpus, whole)])):
        found |= dict.fromkeys(one.names, protect(one.moment, one.tokens, SETTINGS.k_rule, SETTINGS.k_value))
    let_backbone_train(model, rows=True)
    maps, others = split_parameters(model, model.stack)
    return GemsStep(maps, others, SETTINGS, min(64, model.own_embedding.shape[1] // 4), found, SCHEDULE)


def losses(model: GenerativeModel, batches: Batches) -> Iterator[SharedLosses]:
    """One micro-batch of both objectives, as the training loop hands it to a step."""
    total = sum(len(batch.labels) for batch in batches.values())
    found = {name: model.loss(batch) / total for name, batch in batches.items()}
    yield SharedLosses(found, {name: len(batch.labels) / total for name, batch in batches.items()})


def refresh_row(step: GemsStep, model: GenerativeModel, batches: Batches) -> Row:
    """Seconds of refreshing beside those of the whole steps they are part of."""
    refreshing, whole = [], []
    with using_threads(1):
        for _ in range(CHUNKS):
            start = time.perf_counter()
            refreshing.append(sum(step(losses(model, batches))["refresh_seconds"] for _ in range(STEPS)))
            whole.append(time.perf_counter() - start)
    pair = Pair(tuple(refreshing), tuple(whole), clock="wall", threads=1)
    work = Work(flops=refresh_flops(step, model, batches) * STEPS / SETTINGS.refresh_every)
    note = f"a basis every {SETTINGS.refresh_every} steps, one power step"
    return dearer("GEMS's refreshes", "the steps they are part of", pair, mark=0.05, work=work, calls=STEPS, note=note)


def refresh_flops(step: GemsStep, model: GenerativeModel, batches: Batches) -> float:
    """Operations of refreshing every basis once, from one more step in which all are due."""
    refresh, counted = step._refresh, []

    def watched(present: Sequence[str], batch: Batch) -> float:
        """The step's own refresh, its operations added up."""
        counted.append(flops(lambda: refresh(present, batch)))
        return 0.0

    everything = [[True] * len(stack.names) for stack in step.stacks]
    with patch.object(step, "_due", lambda: everything), patch.object(step, "_refresh", watched):
        step(losses(model, batches))
    return sum(counted)


if __name__ == "__main__":
    main()
