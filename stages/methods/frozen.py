"""`frozen`: stage 0's model, served for ever; the floor every update has to beat."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.first import FirstStage


@dataclass(frozen=True)
class Frozen:
    """W_0 + s·B_0·A_0 at every stage."""

    adapter: AdapterConfig
    data: Literal["none", "stage", "all"] = "none"
    every_weight: bool = False
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Stage 0's model."""
        FirstStage(self.adapter).restore(model, lineage)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Never called by the loop, since the method asks for no data.

        Raises:
            ValueError: always.
        """
        raise ValueError("frozen trains nothing; its data is 'none'")
