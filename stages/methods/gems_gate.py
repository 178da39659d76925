"""GEMS's gate in its step: the weights α, and what it learns from: how the loss after a step hangs on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor

from regularizers import gate as gates
from stages.method_config import GemsConfig
from stages.methods.contract import Losses
from stages.methods.gems_stack import Stack
from stages.methods.parts import objective_backward

NORM_DECAY = 0.9
"""Of the running gradient norms and losses."""
MLP = ("phi", "first", "second", "steps", "square")
"""Stored tensors of the trained gate."""


@dataclass(frozen=True)
class Batch:
    """Sums over one batch's micro-batches, by objective.

    Attributes:
        losses: as the loop gives them: Σ cross-entropy / targets of the whole batch.
        shares: targets of the objective / targets of the whole batch.
    """

    losses: dict[str, float]
    shares: dict[str, float]


def delayed_slopes(stacks: Sequence[Stack], factors: Mapping[str, float], scale: float, rate: float) -> list[float]:
    """∂L/∂α of the step before, from this step's own gradients at the moved weights.

    Args:
        stacks: with this step's images, and the directions moved along at the one before.
        factors: of each objective's gradient in the shared loss.
        scale: a.
        rate: η of the step before.
    """
    slope = [0.0, 0.0]
    for stack in stacks:
        later = sum(
            (stack.through(stack.images[name]) * factor for name, factor in factors.items()),
            torch.zeros_like(stack.first),
        )
        for j in (1, 2):
            part = stack.part(j)
            contribution = cast(Tensor, stack.moved)[..., part] * scale
            slope[j - 1] += float(gates.hypergradient(later[..., part], contribution, rate))
    return slope


def slopes_ahead(stacks: Sequence[Stack], scale: float, rate: float) -> Tensor:
    """(2,) ∂L_j/∂α of the step just taken, from the gradient of one loss L_j that was left in `.grad`; it is dropped.

    Args:
        stacks: with the directions moved along.
        scale: a.
        rate: η of this step.
    """
    slope = torch.zeros(2)
    for stack in stacks:
        moved = cast(Tensor, stack.moved)
        for i, weight in enumerate(stack.weights):
            if weight.grad is not None:
                later = stack.orient(weight.grad) @ stack.reach[i]  # (rows, R)
                for j in (1, 2):
                    part = stack.part(j)
                    slope[j - 1] += float(gates.hypergradient(later[:, part], moved[i][:, part] * scale, rate))
            weight.grad = None
    return slope


class FusionGate:
    """α (2,) of each step in the order of the step's objectives, and the state it is chosen from.

    Args:
        settings: of the method.
        seed: of the MLP's first weights.
    """

    def __init__(self, settings: GemsConfig, seed: int) -> None:
        self.settings = settings
        self.mlp = gates.fresh_gate(settings.gate_hidden, torch.Generator().manual_seed(seed))
        self.usual, self.z = torch.zeros(2), torch.zeros(3, 2)
        self.last_rate = torch.zeros(())
        self.held_out: Callable[[], Iterable[Losses]] | None = None

    @property
    def warmup(self) -> int:
        """Steps for which a trained gate keeps to one half."""
        return self.settings.refresh_every if self.settings.gate_warmup is None else self.settings.gate_warmup

    def alpha(self, step: int, losses: Tensor, norms: Tensor, samples: Tensor) -> Tensor:
        """α of a batch that holds both objectives.

        Args:
            step: number of the step, from 0.
            losses: (2,) token means.
            norms: (2,) of the gradients, each within its own subspace.
            samples: (2,) shares of the batch's targets.
        """
        if step <= self.warmup or not bool(self.usual.any()):
            self.usual = torch.where(self.usual > 0, NORM_DECAY * self.usual + (1 - NORM_DECAY) * losses, losses)
        self.z = gates.features(losses, self.usual, norms, samples)
        if self.settings.gate in gates.LEARNED and step < self.warmup:
            return torch.full((2,), 0.5)
        return self._chosen()

    def learn(self, step: int, stacks: Sequence[Stack], factors: Mapping[str, float]) -> list[float] | None:
        """Against the hypergradient of the step before, which is returned; None where nothing is learnt.

        Args:
            step: number of the step, from 0; nothing is learnt before the warm-up is over.
            stacks: with this step's images.
            factors: of each objective's gradient in the shared loss; both objectives are there.
        """
        ready = all(stack.moved is not None and len(stack.widths) == 3 for stack in stacks)
        if self.settings.gate != "hypergradient" or len(factors) < 2 or not ready or step <= self.warmup:
            return None
        return self._taught(delayed_slopes(stacks, factors, self.settings.scale, float(self.last_rate)))

    def look_ahead(
        self,
        step: int,
        stacks: Sequence[Stack],
        rate: float,
        factors: Callable[[Mapping[str, float]], Mapping[str, float]],
    ) -> tuple[Tensor, list[float]] | None:
        """Ask the moved weights how the shared loss of another batch hangs on α, learn, and move them by the rest.

        Args:
            step: number of the step, from 0.
            stacks: that have just moved, fused by both objectives.
            rate: η of this step.
            factors: of each objective's gradient in the shared loss, from the objectives' shares of a batch's targets.

        Returns:
            The change of α (2,) and the slope; None where the gate is of another kind or not ready, or the other batch
            holds one objective only.
        """
        own = self.settings
        ready = all(len(stack.widths) == 3 for stack in stacks) and step >= self.warmup
        if own.gate != "lookahead" or self.held_out is None or not ready:
            return None
        slopes, shares = dict[str, Tensor](), dict[str, float]()
        with torch.enable_grad():
            for name, _, share in objective_backward(self.held_out()):
                slopes[name] = slopes.get(name, torch.zeros(2)) + slopes_ahead(stacks, own.scale, rate)
                shares[name] = shares.get(name, 0.0) + share
        if len(shares) < 2:
            return None
        total = sum(shares.values())
        shares = {name: share / total for name, share in shares.items()}
        weights = factors(shares)
        before = self._chosen()
        # The loop's losses are sums over a batch's targets: over its share each is a token mean.
        slope = self._taught(torch.stack([slopes[j] * (weights[j] / shares[j]) for j in shares]).sum(dim=0).tolist())
        change = self._chosen() - before
        for stack in stacks:
            stack.shift([0.0, *(own.scale * float(c) for c in change)], rate)
        return change, slope

    def _taught(self, slope: list[float]) -> list[float]:
        own = self.settings
        self.mlp = gates.learned(self.mlp, self.z, torch.tensor(slope), own.gate_temperature, own.gate_learning_rate)
        return slope

    def _chosen(self) -> Tensor:
        return gates.weights(self.settings.gate, self.mlp.phi, self.z, self.settings.gate_temperature)

    def tensors(self) -> dict[str, Tensor]:
        """All state."""
        held = {f"gate.{name}": getattr(self.mlp, name) for name in MLP}
        return held | {"usual": self.usual, "z": self.z, "rate": self.last_rate}

    def load(self, held: Mapping[str, Tensor], carry: bool) -> None:
        """Put back what `tensors` gave; with `carry` the MLP and its Adam alone.

        Args:
            held: stored tensors.
            carry: they are of the stage before, whose losses and rate are not this one's.
        """
        self.mlp = replace(self.mlp, **{name: held[f"gate.{name}"].clone() for name in MLP})
        if not carry:
            self.usual, self.z, self.last_rate = (held[name].clone() for name in ("usual", "z", "rate"))
