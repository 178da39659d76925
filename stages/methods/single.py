"""`single`: one LoRA that goes on from stage to stage, (B_t, A_t) ← (B_{t-1}, A_{t-1})."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.parts import adamw_step, let_train, load_adapter, load_base


@dataclass(frozen=True)
class Single:
    """W_0 + s·B_t·A_t, started where the previous stage ended."""

    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Stage 0's backbone under the newest adapter and rows."""
        load_base(model, lineage)
        load_adapter(model, lineage[-1], self.adapter)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Adapter and rows go on from the previous stage."""
        self.restore(model, lineage)
        return adamw_step(let_train(model, self.evolve_rows), schedule)
