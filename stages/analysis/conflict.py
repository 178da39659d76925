"""Conflict between two objectives at a stage: their raw gradients, and the method's updates before and after fusion.

Both are matrices of the shape of a linear map's weight, whatever the method trains: a LoRA enters with the weight it
adapts, so that methods compare. Beside every ρ stands its noise floor, from ρ between two batches of one objective.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, islice
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from models.effective import base_maps, effective_weights
from regularizers.conflict import conflict
from stages.analysis.intervals import column_means
from stages.config import Config
from stages.dataset import Dataset
from stages.fit import Fit, reproducible
from stages.interactions import IntArray
from stages.jobs import Job
from stages.methods.contract import SharedLosses
from stages.methods.gems_paths import own_updates
from stages.methods.surgery import SurgeryStep
from stages.metrics import FloatArray
from stages.stage_examples import Examples
from stages.train import begin_stage
from stages.workspace import Workspace

Matrices: TypeAlias = dict[str, Tensor]
"""By the name of the linear map they belong to."""

Halves: TypeAlias = Mapping[str, tuple[Matrices, Matrices]]
"""Objective -> what two disjoint batches of it gave."""

Pair: TypeAlias = Mapping[str, tuple[IntArray, IntArray]]
"""Objective -> the window numbers of two disjoint batches."""

BEFORE_FUSION, AFTER_FUSION = "update_before_fusion", "update"
"""What an objective's own path proposes, where a method has such paths; what the objective adds to the step taken."""

BETWEEN = "between"
"""Names the pairs of two objectives; a pair within one objective bears its name."""

WARM = 3
"""Steps of the stage that are taken again before an applied update is measured: moments and bases then exist."""


@dataclass(frozen=True)
class Coefficients:
    """ρ of one linear map, over pairs of batches.

    Attributes:
        pair: `between` the objectives, or the objective whose batches were compared.
        name: of the linear map.
        values: one ρ a pair, in the order of the batches, two `between` the objectives; NaN where one side was 0.
    """

    pair: str
    name: str
    values: tuple[float, ...]

    @property
    def known(self) -> list[float]:
        """ρ of the pairs both sides of which had a direction."""
        return [value for value in self.values if not math.isnan(value)]

    @property
    def mean(self) -> float | None:
        """Mean ρ; None where no pair had a direction."""
        return sum(self.known) / len(self.known) if self.known else None

    @property
    def below_zero(self) -> float | None:
        """Share of the pairs whose cosine is negative."""
        return sum(value > 1 for value in self.known) / len(self.known) if self.known else None


def tables_of(found: Sequence[Coefficients]) -> list[FloatArray]:
    """ρ between the objectives and within each of the two, as `above_floor` takes them.

    Args:
        found: of every map, as `coefficients` gives them.

    Returns:
        Three tables (pairs of batches, maps); NaN where no ρ is known.
    """
    names = list(dict.fromkeys(one.name for one in found))
    sides = [BETWEEN, *dict.fromkeys(one.pair for one in found if one.pair != BETWEEN)]
    held = {(one.pair, one.name): one.values for one in found}
    pairs = len(held[sides[1], names[0]])
    return [
        np.stack([_known_mean(np.asarray(held[side, name]).reshape(pairs, -1)) for name in names], axis=1)
        for side in sides
    ]


def above_floor(means: Sequence[FloatArray]) -> FloatArray:
    """Mean ρ between the objectives less `noise_floor`, map by map; of the means of `tables_of` over pairs."""
    between, first, second = means
    return between - noise_floor(first, second)


def noise_floor(first: FloatArray, second: FloatArray) -> FloatArray:
    """ρ to be expected between two objectives of one and the same true gradient: 1 − √(c₁ c₂).

    Two noisy measurements of one vector have the cosine ‖g‖² / (|x₁| |x₂|), the geometric mean of the cosines c within
    each; the mean of the ρ within would find conflict wherever one objective is noisier than the other.

    Args:
        first: mean ρ within one objective.
        second: mean ρ within the other.
    """
    return 1 - np.sqrt(np.maximum(1 - first, 0) * np.maximum(1 - second, 0))


def _known_mean(values: FloatArray) -> FloatArray:
    """Mean of each row over what is not NaN."""
    return column_means(values.T)


def coefficients(found: Iterable[Halves]) -> list[Coefficients]:
    """ρ between the objectives and within each, map by map.

    Args:
        found: one entry a pair of batches, drawn one by one, so that only four sets of matrices are held.

    Raises:
        ValueError: an entry without exactly two objectives.
    """
    return coefficients_by_kind({"": halves} for halves in found).get("", [])


def coefficients_by_kind(found: Iterable[Mapping[str, Halves]]) -> dict[str, list[Coefficients]]:
    """`coefficients` of several kinds of matrices that are measured at once.

    Args:
        found: kind -> what a pair of batches gave, one entry a pair.

    Raises:
        ValueError: an entry without exactly two objectives.
    """
    values: dict[str, dict[tuple[str, str], list[float]]] = {}
    for kinds in found:
        for kind, halves in kinds.items():
            own = values.setdefault(kind, {})
            for place, value in _rhos(halves):
                own.setdefault(place, []).append(value)
    return {
        kind: [Coefficients(pair, name, tuple(rhos)) for (pair, name), rhos in own.items()]
        for kind, own in values.items()
    }


def _rhos(halves: Halves) -> Iterator[tuple[tuple[str, str], float]]:
    """(pair, map) and ρ, for one pair of batches."""
    if len(halves) != 2:
        raise ValueError(f"conflict is between two objectives, got {', '.join(halves) or 'none'}")
    first, second = halves.values()
    sides = [(BETWEEN, first[half], second[half]) for half in (0, 1)]
    sides += [(objective, *own) for objective, own in halves.items()]
    for pair, a, b in sides:
        for name in a:
            yield (pair, name), float(conflict(a[name], b[name]))


def batch_pairs(examples: Examples, pairs: int, size: int, seed: int) -> list[Pair]:
    """Disjoint batches of training windows: objective -> two of them, `pairs` times.

    Args:
        examples: of one stage.
        pairs: how many at most; fewer where an objective has too few windows for two batches each.
        size: windows of a batch at most.
        seed: of the draw.
    """
    counts = {name: len(part.training) for name, part in examples.parts.items()}
    pairs = min([pairs, *(count // 2 for count in counts.values())])
    if pairs == 0:
        return []
    drawn = {}
    for name, windows in counts.items():
        own = min(size, windows // (2 * pairs))
        order = np.random.default_rng([seed % 2**32, len(name)]).permutation(windows)
        drawn[name] = [order[place * own : (place + 1) * own] for place in range(2 * pairs)]
    return [{name: (own[2 * k], own[2 * k + 1]) for name, own in drawn.items()} for k in range(pairs)]


def raw_gradients(fit: Fit, pairs: Sequence[Pair]) -> Iterator[Halves]:
    """∂L/∂W of every linear map at a model's weights, for `coefficients`.

    Args:
        fit: gives the losses of the stage's windows; its model has plain weights (`stages.train.restore_model`).
        pairs: as `batch_pairs` draws them.
    """
    model = fit.model
    maps = base_maps(model.stack)
    model.requires_grad_(False)
    for module in maps.values():
        module.weight.requires_grad_(True)
    model.dropout = 0.0
    model.train()

    def gradient(objective: str, chosen: IntArray) -> Matrices:
        model.zero_grad(set_to_none=True)
        for losses in fit.losses({objective: chosen}):
            losses[objective].backward()
        return {name: _taken(module.weight) for name, module in maps.items()}

    for pair in pairs:
        yield {name: (gradient(name, a), gradient(name, b)) for name, (a, b) in pair.items()}


def _taken(weight: nn.Parameter | Tensor) -> Tensor:
    return torch.zeros_like(weight) if weight.grad is None else weight.grad.detach().clone()


def applied_updates(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    pairs: Sequence[Pair],
) -> Iterator[dict[str, Halves]]:
    """What each objective adds to the method's own step, for `coefficients_by_kind`.

    The stage is begun again and its first `WARM` steps are repeated, which gives the same weights, moments and bases
    every time. From there one step is taken on a batch of one objective, and another, from the same state, on that
    batch with its loss times −1. Half the difference of the two is the part that is odd in the objective's gradient:
    what it alone contributes, preconditioned and projected as the method does it, without the momentum, decay and
    second moments that both steps share. Gradient surgery needs both objectives to have anything to reconcile: there
    the batch holds both, and what is left of the one objective's gradient is taken alone and times −1.

    Args:
        config: the experiment.
        workspace: holds the lineage before `job`'s stage.
        dataset: the prepared log.
        job: of a method that trains; its stage is 1 or later.
        pairs: as `batch_pairs` draws them.

    Yields:
        `AFTER_FUSION`: of the weights; `BEFORE_FUSION`: of the objective's own path alone, where there is one.
    """

    def contributions(objective: str, both: Mapping[str, IntArray]) -> dict[str, Matrices]:
        ahead, back = (_after(config, workspace, dataset, job, objective, both, sign) for sign in (1.0, -1.0))
        return {
            kind: {name: (own[name] - back[kind][name]) / 2 for name in own}
            for kind, own in ahead.items()
            if kind in back
        }

    for pair in pairs:
        batches = [{name: halves[half] for name, halves in pair.items()} for half in (0, 1)]
        found = {name: [contributions(name, both) for both in batches] for name in pair}
        kinds = set[str].intersection(*(set(half) for halves in found.values() for half in halves))
        yield {
            kind: {name: (a[kind], b[kind]) for name, (a, b) in found.items()}
            for kind in (BEFORE_FUSION, AFTER_FUSION)
            if kind in kinds
        }


def _after(
    config: Config,
    workspace: Workspace,
    dataset: Dataset,
    job: Job,
    objective: str,
    both: Mapping[str, IntArray],
    factor: float,
) -> dict[str, Matrices]:
    """Every linear map's weight, adapter included, after the repeated steps and one of an objective's part × `factor`.

    Beside it what the objective's own path proposed in that last step, where the method has such paths.
    """
    fit = begin_stage(config, workspace, dataset, job, steps=WARM + 2).fit
    batches = (batch for epoch in count(1) for batch in fit.batches(epoch))
    with reproducible(fit.seed):
        fit.model.train()
        for batch in islice(batches, WARM):
            fit.step(fit.losses(batch))
        if isinstance(fit.step, SurgeryStep):
            fit.step.alone(fit.losses(both), objective, factor)
        else:
            fit.step(_scaled(fit, {objective: both[objective]}, factor))
    found = {AFTER_FUSION: effective_weights(fit.model.stack)}
    paths = own_updates(fit.step)
    return found | ({BEFORE_FUSION: paths[objective]} if objective in paths else {})


def _scaled(fit: Fit, chosen: Mapping[str, IntArray], factor: float) -> Iterator[SharedLosses]:
    for losses in fit.losses(chosen):
        shares = losses.shares if isinstance(losses, SharedLosses) else dict.fromkeys(losses, 1.0)
        yield SharedLosses({name: loss * factor for name, loss in losses.items()}, shares)
