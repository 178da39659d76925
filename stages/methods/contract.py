"""What a method is: two verbs over a bare model and the checkpoints of its past."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias, runtime_checkable

from torch import Tensor

from models.generative import GenerativeModel
from models.input_moments import TokenStream

Losses: TypeAlias = Mapping[str, Tensor]
"""Loss of one micro-batch by objective, each already divided by the targets of the whole batch."""

Step: TypeAlias = Callable[[Iterable[Losses]], dict[str, float]]
"""One optimiser step: draws the micro-batches' losses one by one, moves the weights, returns numbers to log."""

Reads: TypeAlias = Literal["ends", "all"]
"""Stage 0's and the newest checkpoint, which hold all there is, or every one, as each adds to those before it."""


class SharedLosses(dict[str, Tensor]):
    """`Losses` that also say what each objective weighs in this micro-batch: its share of the whole batch's targets.

    Args:
        losses: by objective.
        shares: by objective; over all micro-batches and objectives of a batch they sum to 1.
    """

    def __init__(self, losses: Mapping[str, Tensor], shares: Mapping[str, float]) -> None:
        super().__init__(losses)
        self.shares = dict(shares)


@runtime_checkable
class Stateful(Protocol):
    """A step with something to tell or to keep beside the weights."""

    def report(self) -> dict[str, Any]:
        """What belongs into `state.json`."""
        ...

    def stored(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The stack's weights in the form this method's `restore` reads, from those at the stage's start and end."""
        ...

    def kept(self) -> dict[str, Tensor]:
        """Tensors the next stage needs; empty if it needs none."""
        ...


@runtime_checkable
class LooksAhead(Protocol):
    """A step that may want to know how its move does on a batch it is not trained on at that moment."""

    def watch(self, held_out: Callable[[], Iterable[Losses]]) -> None:
        """Told once, before the first step, where another batch's losses come from: at the weights as they are."""
        ...


@dataclass(frozen=True)
class Past:
    """What a stage may look back on besides checkpoints.

    Attributes:
        tokens: each earlier stage's training windows as token numbers, in a seeded order; the stage just before first.
        folder: where something computed from them may be stored.
    """

    tokens: Sequence[TokenStream]
    folder: Path


@dataclass(frozen=True)
class Schedule:
    """How one stage is optimised.

    Attributes:
        steps: optimiser steps if nothing stops early.
        learning_rate: peak rate.
        warmup: share of the steps over which the rate rises; it then falls to 0 as a cosine.
        weight_decay: AdamW's, decoupled.
        clip_norm: bound on the norm of all gradients together.
        seed: of anything a method draws (a fresh adapter).
        past: what the stage may look back on; None at stage 0.
    """

    steps: int
    learning_rate: float
    warmup: float
    weight_decay: float
    clip_norm: float
    seed: int
    past: Past | None = None


class Method(Protocol):
    """A rule for updating the model at a stage; its memory is the lineage of checkpoints, never itself."""

    @property
    def data(self) -> Literal["none", "stage", "all"]:
        """Whose events it trains on: nobody's, the stage's, or all stages' so far."""
        ...

    @property
    def every_weight(self) -> bool:
        """It moves the whole backbone, so `training.full_learning_rate` applies."""
        ...

    @property
    def reads(self) -> Reads:
        """Which checkpoints of a lineage `restore` opens."""
        ...

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Make the bare `model` the one that stood at the end of `lineage` (stage 0 first, at least one)."""
        ...

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Make the bare `model` the one the next stage starts from, choose what trains, return its step."""
        ...
