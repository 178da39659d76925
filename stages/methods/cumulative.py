"""Cumulative LoRA: every stage gets an adapter of its own on top of its frozen predecessors.

`cumulative_sum` keeps the predecessors' true weights, so a stage starts exactly at the previous model.
`cumulative_normalised` is the published variant: each past factor is divided by its Frobenius norm, which loses its
magnitude, so a stage does not start at the previous model. Predecessors are added into the base weights when a model
is put together, so neither time nor memory grows with their number; their files are never written again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models import adapter as lora
from models.generative import GenerativeModel
from stages.checkpoint import read_tensors
from stages.config import AdapterConfig
from stages.method_config import CumulativeConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.parts import adamw_step, let_train, load_adapter, load_base, trained_adapters


@dataclass(frozen=True)
class Cumulative:
    """W_0 + s·Σ_{i<t} (B_i·A_i, normalised or not) + s·B_t·A_t; only B_t, A_t train."""

    settings: CumulativeConfig
    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = False
    reads: Reads = "all"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """The newest adapter, plain, over the sum of those before it."""
        load_base(model, lineage)
        self._add_past(model, lineage[:-1])
        load_adapter(model, lineage[-1], self.adapter)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """A fresh adapter, or with `inherit` the newest one again, over the sum of all so far."""
        load_base(model, lineage)
        self._add_past(model, lineage)
        if self.settings.inherit:
            load_adapter(model, lineage[-1], self.adapter)
        else:
            lora.attach(model.stack, self.adapter.rank, self.adapter.alpha, self.adapter.targets, schedule.seed)
        return adamw_step(let_train(model, self.evolve_rows), schedule)

    def _add_past(self, model: GenerativeModel, past: Sequence[Path]) -> None:
        chosen = [folder for folder in trained_adapters(past) if _moved(folder)]
        for folder in chosen[-1:] if self.settings.latest else chosen:
            try:
                lora.add_product(
                    model.stack,
                    read_tensors(folder).adapter,
                    self.adapter.alpha / self.adapter.rank,
                    normalise=self.settings.method == "cumulative_normalised",
                )
            except ValueError as error:
                raise ValueError(f"checkpoint {folder.name}: {error}") from None


def _moved(folder: Path) -> bool:
    """Whether the stage left its adapter anywhere but at B = 0, whose product is 0 and has no norm to divide by."""
    return any(bool(value.any()) for name, value in read_tensors(folder).adapter.items() if ".lora_B." in name)
