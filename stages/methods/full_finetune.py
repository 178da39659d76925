"""`full_finetune`: every weight of the decoder stack goes on training at every stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models import adapter as lora
from models.generative import GenerativeModel
from stages.checkpoint import read_tensors
from stages.config import AdapterConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.first import FirstStage
from stages.methods.parts import adamw_step, let_backbone_train, load_backbone, load_base


@dataclass(frozen=True)
class FullFinetune:
    """W_t ← W_{t-1}, no adapter; a pretrained backbone's own token rows stay as they are."""

    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = True
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Stage 0's model with its adapter folded in, or the newest whole backbone."""
        if len(lineage) == 1:
            FirstStage(self.adapter).restore(model, lineage)
            lora.fold(model.stack)
            return
        load_base(model, lineage)
        load_backbone(model, read_tensors(lineage[-1]))

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Everything goes on from the previous stage."""
        self.restore(model, lineage)
        return adamw_step(let_backbone_train(model, self.evolve_rows), schedule)
