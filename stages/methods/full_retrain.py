"""`full_retrain`: a fresh adapter on all data so far at every stage; the cost bound of updating."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models import adapter as lora
from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.parts import adamw_step, let_train, load_base
from stages.methods.single import Single


@dataclass(frozen=True)
class FullRetrain:
    """W_0 + s·B_t·A_t with (B_t, A_t) trained from fresh on D_0 … D_t; rows start at stage 0's."""

    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "all"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """As `single`: stage 0's backbone under the newest adapter and rows."""
        Single(self.adapter, self.evolve_rows).restore(model, lineage)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """A fresh adapter over stage 0's base; nothing of the stages between is used."""
        load_base(model, lineage[:1])
        lora.attach(model.stack, self.adapter.rank, self.adapter.alpha, self.adapter.targets, schedule.seed)
        return adamw_step(let_train(model, self.evolve_rows), schedule)
