"""Epochs over one stage's windows: seeded batches, early stopping, the best epoch's weights kept.

Knows neither checkpoints nor lineages; `stages.train` puts a model together before and commits it afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import count
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function
from torch.utils import deterministic

from models.backbone import wants_bfloat16
from models.generative import GenerativeModel, TokenBatch
from stages.config import Config, TrainingConfig
from stages.errors import UserError
from stages.examples import Windows
from stages.interactions import IntArray
from stages.jobs import Job
from stages.methods.contract import LooksAhead, Losses, SharedLosses, Step
from stages.search_examples import Branches
from stages.stage_examples import Examples, validation_batches

Progress = Callable[[Mapping[str, Any]], None]
TOKEN_ROWS = ("input_rows", "output_rows", "marker_rows")
"""Trained rows of tokens, by name."""

UNTHINNED = ("alpha/", "alpha_entropy", "hypergradient/")
"""Beginnings of the names whose numbers are kept of every step: a gate's few, about 85 bytes a step in state.json."""

MICRO_TOKENS = {"cpu": 4096, "cuda": 65536}
"""Tokens of a backward pass by device: what a processor's caches hold of `small`, and what fills a GPU."""


class Fit:
    """Epochs over one stage's windows with early stopping on validation cross-entropy.

    Args:
        config: the experiment.
        model: with its trained weights requiring gradients.
        step: the method's optimiser step.
        examples: windows to train and validate on.
        seed: of the batch order.
        rate: the setting of `training` that the step's peak rate is, for the remedy of a run that diverges.
    """

    def __init__(
        self,
        config: Config,
        model: GenerativeModel,
        step: Step,
        examples: Examples,
        seed: int,
        rate: str = "learning_rate",
    ) -> None:
        self.settings: TrainingConfig = config.training
        self.rate = rate
        self.model, self.step, self.examples, self.seed = model, step, examples, seed
        self.bfloat16 = wants_bfloat16(config.backbone.precision, model.device)
        self.equal = config.search.mix == "equal"
        if isinstance(step, LooksAhead):
            step.watch(self._other_losses(self._other_batches()))

    def run(self, epochs: int, job: Job, progress: Progress) -> dict[str, Any]:
        """Train; leaves the best epoch's weights in the model.

        Returns:
            `training`: one row of numbers an optimiser step (thinned to about 200 a stage); `epochs`: validation loss
            in nats a code token, epoch 0 being the start; `best_epoch`. Where a step has numbers of `UNTHINNED` names,
            `every_step`: name -> one number a step, rounded to six digits, None where that step had none.
        """
        log: list[dict[str, float]] = []
        losses = [self.validate()]
        best, best_weights = 0, moving(self.model)
        per_epoch = -(-self.examples.windows // self.settings.batch_size)
        every = max(1, epochs * per_epoch // 200)
        for epoch in range(1, epochs + 1):
            for numbers in self._epoch(epoch):
                number = len(log) + 1
                log.append({"step": number, **numbers})
                progress(
                    {"method": job.method, "stage": job.stage, "epoch": epoch, "step": number}
                    | {"steps": epochs * per_epoch, "loss": numbers["ce"]}
                )
            losses.append(self.validate())
            if losses[-1] is None or losses[-1] < min(loss for loss in losses[:-1] if loss is not None):
                best, best_weights = epoch, moving(self.model)
            elif epoch - best >= self.settings.patience:
                break
        _put_back(self.model, best_weights)
        rows = [{"epoch": epoch, "validation_loss": loss} for epoch, loss in enumerate(losses)]
        return {"training": log[::every], "epochs": rows, "best_epoch": best, **_columns(log)}

    def _epoch(self, epoch: int) -> Iterator[dict[str, float]]:
        self.model.train()
        for chosen in self.batches(epoch):
            numbers = self.step(self.losses(chosen))
            # A gradient that is not finite spoils the weights, which the next loss would show; there may be none.
            for name, value in (("loss", numbers["ce"]), ("gradient's norm", numbers.get("gradient_norm", 0.0))):
                if not np.isfinite(value):
                    raise UserError(
                        f"the {name} became {value} in epoch {epoch}, in the batch of "
                        f"{_first_windows(chosen)}; lower training.{self.rate}, which is "
                        f"{getattr(self.settings, self.rate):g}. Nothing was saved"
                    )
            yield numbers

    def batches(self, epoch: int) -> Iterator[dict[str, IntArray]]:
        """The batches of an epoch, from 1, in the order they are trained: objective -> window numbers."""
        order = np.random.default_rng([self.seed % 2**32, epoch])
        return self.examples.epoch(self.settings.batch_size, order)

    def _other_batches(self) -> Iterator[dict[str, IntArray]]:
        """Training batches in a seeded order of their own, without end: never validation, which chooses the epoch."""
        for epoch in count(1):
            order = np.random.default_rng([self.seed % 2**32, epoch, 1])
            yield from self.examples.epoch(self.settings.batch_size, order)

    def _other_losses(self, batches: Iterator[dict[str, IntArray]]) -> Callable[[], Iterator[Losses]]:
        return lambda: self.losses(next(batches))

    def losses(self, chosen: Mapping[str, IntArray]) -> Iterator[Losses]:
        """One batch's micro-batches as a step takes them, drawn one by one.

        Args:
            chosen: objective -> window numbers.
        """
        shares = self.examples.shares(chosen, self.equal)
        tokens = MICRO_TOKENS[self.model.device.type]
        for piece in self.examples.micro_batches(chosen, self.settings.micro_batch_size, tokens):
            losses = {
                name: self._loss(name, self.examples.parts[name].training, part, self.settings.label_smoothing)
                * shares[name]
                for name, part in piece.items()
            }
            yield SharedLosses(losses, self.examples.weights(piece, shares))

    def plain_loss(self, objective: str, windows: Windows | Branches, chosen: IntArray) -> tuple[float, int]:
        """Summed cross-entropy (nats) of a batch, without smoothing, and its code tokens."""
        batch = self.examples.parts[objective].batch(windows, chosen)
        return float(self._loss_of(batch, 0.0)), len(batch.labels)

    def _loss(self, objective: str, windows: Windows | Branches, chosen: np.ndarray, smoothing: float) -> Tensor:
        with record_function("driftrec/batches"):
            batch = self.examples.parts[objective].batch(windows, chosen)
        return self._loss_of(batch, smoothing)

    def _loss_of(self, batch: TokenBatch, smoothing: float) -> Tensor:
        with record_function("driftrec/batches"):
            batch = batch.to(self.model.device)
        with torch.autocast(self.model.device.type, torch.bfloat16, enabled=self.bfloat16):
            return self.model.loss(batch, self.settings.temperature if self.model.training else 1.0, smoothing)

    def validate(self) -> float | None:
        """Mean cross-entropy (nats a code token) on the stage's validation targets; None where there are none.

        With `search.mix = "equal"` it is the mean of the objectives' means.
        """
        self.model.eval()
        with torch.no_grad():
            found = [
                (self._validation_loss(name, part.validation), part.validation.targets * self.examples.levels)
                for name, part in self.examples.parts.items()
                if len(part.validation)
            ]
        if not found:
            return None
        if self.equal:
            return sum(total / codes for total, codes in found) / len(found)
        return sum(total for total, _ in found) / sum(codes for _, codes in found)

    def _validation_loss(self, objective: str, windows: Windows | Branches) -> float:
        parts = validation_batches(windows, 2 * self.settings.batch_size)
        return sum(float(self._loss(objective, windows, part, 0.0)) for part in parts)


def _columns(log: Sequence[Mapping[str, float]]) -> dict[str, dict[str, list[float | None]]]:
    """`every_step` of the `UNTHINNED` numbers; empty where there are none."""
    names = dict.fromkeys(name for row in log for name in row if name.startswith(UNTHINNED))
    columns = {name: [float(f"{row[name]:.6g}") if name in row else None for row in log] for name in names}
    return {"every_step": columns} if columns else {}


@contextmanager
def reproducible(seed: int) -> Iterator[None]:
    """Deterministic kernels and a seeded global generator (dropout draws from it), both put back afterwards."""
    before = torch.are_deterministic_algorithms_enabled()
    own: Any = deterministic  # a module that is more than its stubs say
    filling = own.fill_uninitialized_memory
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        torch.use_deterministic_algorithms(True)
        # Nothing here reads memory before writing it; filling every new tensor costs a pass over it.
        own.fill_uninitialized_memory = False
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
            own.fill_uninitialized_memory = filling


def _first_windows(chosen: Mapping[str, np.ndarray]) -> str:
    return " and ".join(f"{name} windows {rows[0]}, ..." for name, rows in chosen.items() if len(rows))


def moving(model: GenerativeModel) -> dict[str, Tensor]:
    """Copies of the weights that train, by name."""
    return {name: value.detach().clone() for name, value in model.named_parameters() if value.requires_grad}


def _put_back(model: GenerativeModel, values: Mapping[str, Tensor]) -> None:
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, value in values.items():
            own[name].copy_(value)


def drift(before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
    """How far a stage moved its weights: root mean square, mean, and what is left without each matrix's mean."""
    gaps = {name: (after[name] - value).flatten() for name, value in before.items()}
    rows = [gap for name, gap in gaps.items() if name in TOKEN_ROWS]
    rest = [gap for name, gap in gaps.items() if name not in TOKEN_ROWS]
    numbers = {}
    if rest:
        numbers["drift_rms"] = float(torch.cat(rest).square().mean().sqrt())
        numbers["drift_mean"] = float(torch.stack([gap.mean() for gap in rest]).mean())
        numbers["drift_centred_rms"] = float(torch.cat([gap - gap.mean() for gap in rest]).square().mean().sqrt())
    if rows:
        numbers["token_row_drift"] = float(torch.cat(rows).square().mean().sqrt())
    return numbers
