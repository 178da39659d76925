"""Which of GEMS's bases are due, and gradients taken while the backward pass that makes them goes on."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from stages.method_config import GemsConfig
from stages.methods.gems_stack import Stack


def due_maps(stacks: Sequence[Stack], step: int, settings: GemsConfig) -> list[list[bool]]:
    """Which maps of each stack refresh their bases at `step`, counted from 0: all at the first, then spread over T."""
    every, place, due = settings.refresh_every, 0, []
    count = sum(len(stack.names) for stack in stacks)
    for stack in stacks:
        own = [(place + i) * every // count if settings.stagger else 0 for i in range(len(stack.names))]
        due.append([step == 0 or (step + offset) % every == 0 for offset in own])
        place += len(stack.names)
    return due


def quietest_step(stacks: Sequence[Stack], settings: GemsConfig) -> tuple[int, int]:
    """The first of the steps 1 to T - 1 that refreshes the fewest entries of weights, and how many: 0 where it can.

    With more maps than T, and the refreshes spread, every step refreshes some.
    """
    sizes = [stack.rows * stack.cols for stack in stacks]
    found = [
        (sum(size * sum(due) for size, due in zip(sizes, due_maps(stacks, step, settings), strict=True)), step)
        for step in range(1, max(2, settings.refresh_every))
    ]
    entries, step = min(found)
    return step, entries


@dataclass(frozen=True)
class Arriving:
    """The backward pass that is running.

    Attributes:
        objective: whose gradients it makes.
        keep: by stack and map, whether a gradient is wanted whole.
    """

    objective: str
    keep: list[list[bool]]


class Listener:
    """Takes each map's gradient as soon as it is there, so that no whole set of them is ever held.

    The hooks know the listener by a weak reference: weights outlive the step that moves them.

    Args:
        stacks: whose gradients are taken while `now` is set, and left alone else.
    """

    def __init__(self, stacks: Sequence[Stack]) -> None:
        self.stacks = stacks
        self.now: Arriving | None = None
        own: weakref.ref[Listener] = weakref.ref(self)
        for number, stack in enumerate(stacks):
            for layer, weight in enumerate(stack.weights):
                weight.register_post_accumulate_grad_hook(_taking(own, number, layer))


def _taking(own: weakref.ref[Listener], number: int, layer: int) -> Callable[[Tensor], None]:
    def arrived(_: Tensor) -> None:
        listener = own()
        if listener is not None and (now := listener.now) is not None:
            listener.stacks[number].collect(now.objective, layer, now.keep[number][layer])

    return arrived
