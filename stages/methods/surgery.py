"""`single` with gradient surgery between two objectives: PCGrad (Yu et al., 2020) and Ortho-LoRA (2601.09684).

Both are comparators of GEMS. PCGrad takes all of the adapter as one vector; Ortho-LoRA takes each factor A and each B
apart, so that a conflict in one is not hidden by agreement elsewhere. Token rows follow the plain sum. With one
objective there is no conflict and both are `single`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from models import adapter as lora
from models.generative import GenerativeModel
from regularizers.surgery import inner, without_conflict
from stages.config import AdapterConfig
from stages.method_config import SurgeryConfig
from stages.methods.contract import Losses, Reads, Schedule, Step
from stages.methods.parts import let_train, objective_backward, rate_at
from stages.methods.single import Single


@dataclass(frozen=True)
class Surgery:
    """One evolving LoRA whose two objectives' gradients are reconciled before AdamW."""

    settings: SurgeryConfig
    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """As `single`."""
        Single(self.adapter, self.evolve_rows).restore(model, lineage)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Adapter and rows go on from the previous stage."""
        self.restore(model, lineage)
        trained = let_train(model, self.evolve_rows)
        return SurgeryStep(trained, lora.matrices(model.stack), self.settings.method, schedule)


class SurgeryStep:
    """AdamW on reconciled gradients.

    Args:
        trained: everything that moves.
        matrices: the part of it that is reconciled, by name.
        method: "pcgrad": all of it as one vector; "ortho_lora": each matrix by itself.
        schedule: rates and bounds.
    """

    def __init__(
        self, trained: Sequence[nn.Parameter], matrices: Mapping[str, nn.Parameter], method: str, schedule: Schedule
    ) -> None:
        self.trained, self.held, self.clip_norm = trained, list(matrices.values()), schedule.clip_norm
        self.optimizer = torch.optim.AdamW(
            trained, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True
        )
        self.rate = torch.optim.lr_scheduler.LambdaLR(self.optimizer, lambda step: rate_at(step, schedule))
        self.groups = [self.held] if method == "pcgrad" else [[matrix] for matrix in self.held]

    def __call__(self, micro_batches: Iterable[Losses]) -> dict[str, float]:
        """Draw the micro-batches, move the weights, return numbers to log."""
        return self._take(micro_batches, {})

    def alone(self, micro_batches: Iterable[Losses], objective: str, factor: float) -> dict[str, float]:
        """A step of which only one objective's reconciled gradients are taken, times `factor`: its part, to look at.

        Args:
            micro_batches: of both objectives.
            objective: whose part it is.
            factor: what its gradients are multiplied by once they are reconciled.
        """
        return self._take(micro_batches, {objective: factor})

    def _take(self, micro_batches: Iterable[Losses], only: Mapping[str, float]) -> dict[str, float]:
        self.optimizer.zero_grad(set_to_none=True)
        gradients: dict[str, dict[nn.Parameter, Tensor]] = {}
        logs: dict[str, float] = {}
        for objective, loss, _ in objective_backward(micro_batches):
            logs[f"ce/{objective}"] = logs.get(f"ce/{objective}", 0.0) + loss
            own = gradients.setdefault(objective, {})
            for matrix in self.held:
                if matrix.grad is not None:
                    own[matrix] = own[matrix] + matrix.grad if matrix in own else matrix.grad
                    matrix.grad = None
        logs["ce"] = sum(logs.values())
        factors = [only.get(objective, 0.0 if only else 1.0) for objective in gradients]
        logs |= _reconcile(self.groups, list(gradients.values()), factors)
        logs["gradient_norm"] = float(nn.utils.clip_grad_norm_(self.trained, self.clip_norm))
        self.optimizer.step()
        self.rate.step()
        return logs


def _reconcile(
    groups: Sequence[Sequence[nn.Parameter]],
    found: Sequence[Mapping[nn.Parameter, Tensor]],
    factors: Sequence[float],
) -> dict[str, float]:
    """Put the reconciled gradients, each times its factor, into `.grad`; share of groups in conflict and the cosine."""
    if len(found) == 1:
        for matrix, gradient in found[0].items():
            matrix.grad = gradient * factors[0]
        return {}
    first, second = found
    conflicts = 0
    with torch.no_grad():
        for group in groups:
            a, b = ([own[matrix] for matrix in group] for own in (first, second))
            a, b, conflict = without_conflict(a, b)
            conflicts += conflict
            for matrix, x, y in zip(group, a, b, strict=True):
                matrix.grad = factors[0] * x + factors[1] * y
        every = [matrix for group in groups for matrix in group]
        a, b = ([own[matrix] for matrix in every] for own in (first, second))
        cosine = inner(a, b) / (inner(a, a) * inner(b, b)).sqrt().clamp_min(1e-30)
    return {"conflicts": conflicts / len(groups), "cosine": float(cosine)}
