"""PESO (Yoo et al., 2025): `single` plus λ Σ_g KL(softmax(v_g) ‖ softmax(v_g at the previous stage's end)), eq. 12."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models import adapter as lora
from models.generative import GenerativeModel
from regularizers.proximal import proximal_term
from stages.config import AdapterConfig
from stages.method_config import PesoConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.parts import Penalty, adamw_step, let_train
from stages.methods.single import Single


@dataclass(frozen=True)
class Peso:
    """One evolving LoRA, held near the adapter the previous stage ended with."""

    settings: PesoConfig
    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """As `single`."""
        Single(self.adapter, self.evolve_rows).restore(model, lineage)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Start at the anchor: the previous stage's adapter, and its token rows under `anchor = adapter+tokens`."""
        self.restore(model, lineage)
        trained = let_train(model, self.evolve_rows)
        held: dict[str, nn.Parameter] = dict(lora.matrices(model.stack))
        modules = len(lora.adapter_of(model.stack))
        if self.settings.anchor == "adapter+tokens" and self.evolve_rows:
            held.update(model.rows())
        return adamw_step(trained, schedule, proximal_penalty(held, self.settings, modules))


def proximal_penalty(held: Mapping[str, nn.Parameter], settings: PesoConfig, modules: int) -> Penalty:
    """The term toward the values `held` has now, evaluated once an optimiser step.

    Args:
        held: trained matrices by name.
        settings: strength, penalty, reduction, scale.
        modules: wrapped linear maps, for `reduction = "mean"`.

    Returns:
        Adds λ·∇term to every `.grad`; logs `proximal_nats` (Σ_g KL, unscaled), `proximal_loss` (what was added, λ and
        scale included), `grad_ratio` = ‖∇proximal_loss‖ / ‖∇CE‖ and `grad_ratio_max`, the largest over matrices.
    """
    anchors = {name: value.detach().clone() for name, value in held.items()}

    def penalty() -> dict[str, float]:
        term = proximal_term(held, anchors, settings.penalty, settings.reduction, settings.scale, modules)
        gradients = {name: value.grad for name, value in held.items() if value.grad is not None}
        before = torch.stack([gradient.norm() for gradient in gradients.values()])
        pull = torch.stack([term.gradients[name].norm() for name in gradients]) * settings.strength
        for name, gradient in gradients.items():
            gradient.add_(term.gradients[name].to(gradient.dtype), alpha=settings.strength)
        return {
            "proximal_nats": float(term.nats),
            "proximal_loss": settings.strength * float(term.value),
            "grad_ratio": _ratio(pull.norm(), before.norm()),
            "grad_ratio_max": float((pull / before.clamp_min(1e-30)).max()),
        }

    return penalty


def _ratio(above: Tensor, below: Tensor) -> float:
    return float(above / below.clamp_min(1e-30))
