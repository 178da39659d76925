"""Bytes of optimiser state and gradients on the same linear maps: GEMS, AdamW on every weight, LoRA under AdamW.

Counted on tensors that a real step of the real model allocated, beside what the formulas predict. Weights, activations
and token rows, which all three share, are left out; GEMS's protected inputs are a constant of the stage and stand in
its `state.json`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from models import adapter as lora
from models.generative import GenerativeModel
from models.input_moments import linear_maps
from regularizers.subspace import state_floats
from stages.config import AdapterConfig
from stages.method_config import GemsConfig
from stages.methods.contract import Losses, Schedule
from stages.methods.gems_arrivals import quietest_step
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
        part: `state`: moments and bases; `gradients`: whole ones at their largest, for GEMS in the step that makes the
            fewest bases anew, `first gradients` those of its first, which makes all; `projected`: GEMS's gradients in
            their subspaces; `adapter`: LoRA's own weights.
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
    rank = settings.rank_at(model.own_embedding.shape[1])
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
    weights = [module.weight for module in maps.values()]
    held, pieces = list[GemsStep](), list[Losses]()

    def counted() -> Iterator[Losses]:
        for losses in batch():
            pieces.append(losses)
            yield losses

    with _Peak(weights, lambda: sum(step.whole_bytes() for step in held)) as peak:
        step = GemsStep(maps, [], settings, rank, {}, SCHEDULE)
        held.append(step)
        step(counted())
        first = peak.taken()
        number, whole = quietest_step(step.stacks, settings)
        step.step.fill_(number)
        step(batch())
        later = peak.taken()
    sizes = [weight.numel() for weight in weights]
    more = max(sizes) if sum(len(losses) for losses in pieces) > len(step.objectives) else 0  # of the next piece
    state = sum(len(s.names) * state_floats(s.rows, s.cols, s.widths) for s in step.stacks)
    images = sum(len(s.names) * s.rows * s.frame(0).shape[1] for s in step.stacks) * len(step.objectives)
    return [
        Footprint("gems", "state", step.state_bytes(), FLOAT * state),
        Footprint("gems", "first gradients", first, FLOAT * (len(step.objectives) * sum(sizes) + more)),
        Footprint("gems", "gradients", later, FLOAT * (len(step.objectives) * whole + max(sizes))),
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

    with _Peak(parameters) as held:
        backward()
        peak = held.taken()
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values()]
    optimizer.zero_grad(set_to_none=True)
    return sum(value.nbytes for value in moments if value.dim()), peak  # without the step counts, a number each


class _Peak:
    """Bytes of whole gradients at their largest: `.grad` of `parameters`, and what else is kept of them."""

    def __init__(self, parameters: Sequence[Tensor], kept: Callable[[], int] = lambda: 0) -> None:
        self.parameters, self.kept, self.largest = parameters, kept, 0
        self.handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        self.handles = [parameter.register_post_accumulate_grad_hook(self._seen) for parameter in self.parameters]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def _seen(self, _: Tensor) -> None:
        here = {p.grad.data_ptr(): p.grad.nbytes for p in self.parameters if p.grad is not None}
        self.largest = max(self.largest, sum(here.values()) + self.kept())

    def taken(self) -> int:
        """The largest since the last call."""
        largest, self.largest = self.largest, 0
        return largest
