"""`lora_moe`: LoRA experts under a router, half of them meant for each objective (Dou et al., 2023).

A comparator of GEMS: it keeps the objectives apart by experts and not by gradient subspaces. One mixture goes on from
stage to stage, as `single` does.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models import mixture
from models.generative import GenerativeModel
from models.mixture import MixtureLinear
from regularizers.balance import localized_balance
from stages.checkpoint import read_tensors
from stages.config import AdapterConfig
from stages.method_config import LoraMoeConfig
from stages.methods.contract import Losses, Reads, Schedule, SharedLosses, Step
from stages.methods.full_finetune import FullFinetune
from stages.methods.parts import adamw_step, let_rows_train, load_rows

TYPES = ("recommendation", "search")
"""Objectives by the type number of experts and samples; experts take turns."""


@dataclass(frozen=True)
class LoraMoe:
    """W_0 x + s Σ_e softmax(R x)_e B_e A_e x on the maps of `settings.targets`."""

    settings: LoraMoeConfig
    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Stage 0's model with its adapter folded in, and from stage 1 on under the newest mixture."""
        if len(lineage) > 1:
            self._attached(model, lineage, seed=0)
        else:
            self._start(model, lineage)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Mixture and rows go on from the previous stage; after stage 0 the mixture is fresh."""
        mixtures = self._attached(model, lineage, schedule.seed)
        trained = mixture.matrices(mixtures)
        for parameter in trained.values():
            parameter.requires_grad_(True)
        for one in mixtures.values():
            one.inside = model.inside
        chosen = [*trained.values(), *let_rows_train(model, self.evolve_rows)]
        return moe_step(chosen, list(mixtures.values()), self.settings, schedule)

    def _start(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        FullFinetune(self.adapter, self.evolve_rows).restore(model, lineage[:1])
        load_rows(model, lineage)
        model.requires_grad_(False)

    def _attached(self, model: GenerativeModel, lineage: Sequence[Path], seed: int) -> dict[str, MixtureLinear]:
        self._start(model, lineage)
        own = self.settings
        mixtures = mixture.attach(model.stack, own.experts, own.rank, own.alpha, own.targets, seed)
        if len(lineage) > 1:
            stored = read_tensors(lineage[-1]).backbone
            with torch.no_grad():
                for name, parameter in mixture.matrices(mixtures).items():
                    parameter.copy_(stored[name])
        model.requires_grad_(False)
        return mixtures


def moe_step(
    trained: Sequence[nn.Parameter], mixtures: Sequence[MixtureLinear], settings: LoraMoeConfig, schedule: Schedule
) -> Step:
    """AdamW on the losses and, weighted, the localized balance of every mixture.

    Args:
        trained: what moves.
        mixtures: whose routing is balanced.
        settings: balance and its weight.
        schedule: rates and bounds.
    """
    plain = adamw_step(trained, schedule)

    def step(micro_batches: Iterable[Losses]) -> dict[str, float]:
        found: list[float] = []

        def with_balance() -> Iterable[Losses]:
            for losses in micro_batches:
                names = list(losses)
                balance = mean_balance(mixtures, names, settings)
                share = sum(losses.shares.values()) if isinstance(losses, SharedLosses) else 1.0
                found.append(float(balance.detach()) * share)
                # The gradient of the first loss carries the balance; the number that is logged stays the loss's own.
                extra = settings.balance_weight * share * balance
                yield {names[0]: losses[names[0]] + (extra - extra.detach()), **{n: losses[n] for n in names[1:]}}

        logs = plain(with_balance())
        return logs | {"balance": sum(found)}

    return step


def mean_balance(mixtures: Sequence[MixtureLinear], objectives: Sequence[str], settings: LoraMoeConfig) -> Tensor:
    """Mean localized balance of the mixtures over the forward passes since it was asked last, which it forgets.

    Args:
        mixtures: each with one pass an objective.
        objectives: of those passes, in their order.
        settings: δ and which formula.
    """
    types = [TYPES.index(name) if name in TYPES else 0 for name in objectives]
    terms = []
    for one in mixtures:
        mass = torch.cat(one.routed).T  # (E, S)
        samples = [kind for kind, rows in zip(types, one.routed, strict=True) for _ in range(len(rows))]
        experts = [number % len(TYPES) for number in range(len(mass))]
        terms.append(localized_balance(mass, experts, samples, settings.skew, settings.balance))
        one.routed.clear()
    return torch.stack(terms).mean()
