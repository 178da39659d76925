"""What a model has learnt: its loss on the stage to come, which none has seen, beside another's on the same windows.

A ranking of few test users says little where models are near each other, or far from good; the loss of thousands of
targets tells them apart. Beside what a model kept it says at which quality it kept it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

from stages.fit import Fit
from stages.metrics import FloatArray
from stages.stage_examples import validation_batches

SEED = 0
"""Of the draws: an analysis that is made again gives the same intervals."""


@dataclass(frozen=True)
class Losses:
    """Cross-entropies of one model, batch by batch.

    Attributes:
        sums: (N,) nats, summed over a batch's code tokens.
        tokens: (N,) how many those are.
    """

    sums: FloatArray
    tokens: FloatArray

    @property
    def mean(self) -> float:
        """Nats a code token."""
        return float(self.sums.sum() / self.tokens.sum())

    def less(self, other: Losses, draws: int) -> tuple[float, float, float]:
        """This mean less the other's on the same batches, and the ends of its 95 % interval, resampling batches."""
        count = len(self.tokens)
        weights = np.random.default_rng(SEED).multinomial(count, np.full(count, 1 / count), size=draws)
        drawn = (weights @ (self.sums - other.sums)) / (weights @ self.tokens)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return self.mean - other.mean, float(low), float(high)


@torch.no_grad()
def losses(fit: Fit, most: int) -> dict[str, Losses]:
    """Of `fit`'s model on its training windows, by objective; nothing of an objective without any.

    Args:
        fit: the model, and the windows of a stage that it was not trained on.
        most: windows of each objective, at most; of more, every n-th batch by length.
    """
    fit.model.eval()
    found = {}
    for name, part in fit.examples.parts.items():
        if len(part.training):
            sums, tokens = zip(*_batches(fit, name, most), strict=True)
            found[name] = Losses(np.array(sums), np.array(tokens, dtype=np.float64))
    return found


def _batches(fit: Fit, name: str, most: int) -> Iterator[tuple[float, int]]:
    windows = fit.examples.parts[name].training
    size = fit.settings.micro_batch_size or fit.settings.batch_size
    for chosen in list(validation_batches(windows, size))[:: -(-len(windows) // most)]:
        yield fit.plain_loss(name, windows, chosen)
