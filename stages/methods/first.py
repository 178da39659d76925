"""Stage 0, trained once and shared by every method of a run.

A backbone with random weights (`small`) trains whole and an untouched adapter (B = 0) is saved beside it as the first
anchor; a pretrained backbone trains the adapter and the token rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models import adapter as lora
from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.parts import adamw_step, let_train, load_adapter, load_base


@dataclass(frozen=True)
class FirstStage:
    """The common start."""

    adapter: AdapterConfig
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """The model as stage 0 left it."""
        load_base(model, lineage)
        load_adapter(model, lineage[0], self.adapter)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Train every weight of a random backbone; adapter and token rows of a pretrained one."""
        if model.pretrained:
            lora.attach(model.stack, self.adapter.rank, self.adapter.alpha, self.adapter.targets, schedule.seed)
            return adamw_step(let_train(model, rows=True), schedule)
        model.requires_grad_(True)
        return adamw_step(list(model.parameters()), schedule)
