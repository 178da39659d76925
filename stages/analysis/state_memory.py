"""Bytes of optimiser state and gradients on the same linear maps: GEMS, AdamW on every weight, LoRA under AdamW.

Counted on tensors that a real step of the real model allocated, beside what the formulas predict. Weights, activations
and token rows, which all three share, are left out; GEMS's protected inputs are a constant of the stage and stand in
its `state.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models import adapter as lora
from models.generative import GenerativeModel
from models.input_moments import linear_maps
from regularizers.subspace import state_floats
from stages.config import AdapterConfig
from stages.method_config import GemsConfig
from stages.methods.contract import Losses, Schedule
from stages.methods.gems_stack import default_rank
from stages.methods.gems_step import GemsStep

FLOAT = 4
"""Bytes of a float32."""
SCHEDULE = Schedule(steps=2, learning_rate=1e-4, warmup=0, weight_decay=0, clip_norm=1, seed=0)
Batch = Callable[[], Iterable[Losses]]
"""One batch's micro-batches, drawn anew at each call."""


@dataclass(frozen=True)
class Footprint:
    """What one way of training holds beside the weights and activations.

    Attributes:
        name: of the way.
        part: `state`: moments and bases; `gradients`: `.grad` at their largest; `projected`: GEMS's gradients in their
            subspaces; `adapter`: LoRA's own weights.
        counted: bytes of the tensors.
        predicted: bytes by the formula.
    """

    name: str
    part: str
    counted: int
    predicted: int


def footprints(model: GenerativeModel, batch: Batch, adapter: AdapterConfig, settings: GemsConfig) -> list[Footprint]:
    """GEMS, AdamW and LoRA in turn on `model`, whose weights move by a few small steps.

    Args:
        model: with plain weights.
        batch: losses of `model`, by objective.
        adapter: LoRA's shape.
        settings: GEMS's; without its null space, and a rank of any size allowed.
    """
    rank = settings.rank or default_rank(model.own_embedding.shape[1])
    own = settings.model_copy(update={"null_space": "off", "allow_large_state": True})
    return [
        *gems_footprint(linear_maps(model.stack), batch, own, rank),
        *adamw_footprint(linear_maps(model.stack), batch),
        *lora_footprint(model.stack, batch, adapter),
    ]


def gems_footprint(maps: Mapping[str, nn.Linear], batch: Batch, settings: GemsConfig, rank: int) -> list[Footprint]:
    """Two steps of GEMS: 4·Σ_s (short·r_s + 2·long·r_s) bytes of state a map, of the subspaces that are open."""
    for module in maps.values():
        module.weight.requires_grad_(True)
    step = GemsStep(maps, [], settings, rank, {}, SCHEDULE)
    weights = [module.weight for module in maps.values()]
    peak = _peak(weights, lambda: [step(batch()) for _ in range(2)])
    state = sum(len(s.names) * state_floats(s.rows, s.cols, s.widths) for s in step.stacks)
    images = sum(len(s.names) * s.rows * s.frame(0).shape[1] for s in step.stacks) * len(step.objectives)
    return [
        Footprint("gems", "state", step.state_bytes(), FLOAT * state),
        Footprint("gems", "gradients", peak, FLOAT * sum(weight.numel() for weight in weights)),
        Footprint("gems", "projected", step.projected_bytes, FLOAT * images),
    ]


def adamw_footprint(maps: Mapping[str, nn.Linear], batch: Batch) -> list[Footprint]:
    """A step of AdamW on every weight: two moments and a gradient of the weights' size."""
    weights = [module.weight for module in maps.values()]
    for weight in weights:
        weight.requires_grad_(True)
    size = FLOAT * sum(weight.numel() for weight in weights)
    state, peak = _adamw(weights, batch)
    return [Footprint("adamw", "state", state, 2 * size), Footprint("adamw", "gradients", peak, size)]


def lora_footprint(stack: nn.Module, batch: Batch, settings: AdapterConfig) -> list[Footprint]:
    """A step of AdamW on a LoRA: r·(m + n) weights a map, as many gradients, twice as many moments."""
    shapes = [tuple(m.weight.shape) for n, m in linear_maps(stack).items() if n.rpartition(".")[2] in settings.targets]
    size = FLOAT * sum(settings.rank * (m + n) for m, n in shapes)
    lora.attach(stack, settings.rank, settings.alpha, settings.targets, seed=0)
    matrices = list(lora.matrices(stack).values())
    state, peak = _adamw(matrices, batch)
    held = sum(matrix.nbytes for matrix in matrices)
    lora.fold(stack)
    return [
        Footprint("lora", "adapter", held, size),
        Footprint("lora", "state", state, 2 * size),
        Footprint("lora", "gradients", peak, size),
    ]


def _adamw(parameters: Sequence[Tensor], batch: Batch) -> tuple[int, int]:
    """Bytes of moments, and of gradients at their largest, in a step of AdamW."""
    optimizer = torch.optim.AdamW(parameters, lr=SCHEDULE.learning_rate, fused=True)
    optimizer.zero_grad(set_to_none=True)

    def backward() -> None:
        for losses in batch():
            torch.stack(list(losses.values())).sum().backward()

    peak = _peak(parameters, backward)
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    optimizer.zero_grad(set_to_none=True)
    return sum(value.nbytes for value in moments if value.dim()), peak  # without the step counts, a number each


def _peak(parameters: Sequence[Tensor], work: Callable[[], object]) -> int:
    """Bytes of `.grad` at their largest while `work` runs."""
    largest = 0

    def seen(_: Tensor) -> None:
        nonlocal largest
        largest = max(largest, sum(p.grad.nbytes for p in parameters if p.grad is not None))

    handles = [parameter.register_post_accumulate_grad_hook(seen) for parameter in parameters]
    try:
        work()
    finally:
        for handle in handles:
            handle.remove()
    return largest
