"""GEMS (Zhao et al., 2026): search and recommendation in one model, each objective's gradient in its own subspace.

W_t goes on from W_{t-1} at every stage, all linear maps moving inside low-rank gradient subspaces and off the inputs a
corpus says must be preserved. docs/method.md lists where the paper could not be followed as printed.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from safetensors.torch import load_file

from models.generative import GenerativeModel
from stages.checkpoint import KEPT, read_tensors
from stages.config import AdapterConfig
from stages.deltas import put
from stages.method_config import GemsConfig
from stages.methods.contract import Reads, Schedule, Step
from stages.methods.full_finetune import FullFinetune
from stages.methods.gems_stack import split_parameters
from stages.methods.gems_step import GemsStep
from stages.methods.parts import let_backbone_train, load_rows
from stages.methods.protection import protections


@dataclass(frozen=True)
class Gems:
    """W_t ← W_{t-1} − Σ η (D_shared + α_search D_search + α_recommendation D_recommendation)(I − K Kᵀ)."""

    settings: GemsConfig
    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = True
    reads: Reads = "all"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Stage 0's model with its adapter folded in, then every stage's weights: whole, or what it added."""
        FullFinetune(self.adapter, self.evolve_rows).restore(model, lineage[:1])
        load_rows(model, lineage)
        for folder in lineage[1:]:
            put(model.stack, read_tensors(folder).backbone)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """Everything goes on from the previous stage; what its corpus needs is found first.

        Raises:
            ValueError: a rank, corpus or state that does not fit the model.
        """
        self.restore(model, lineage)
        protected = protections(model, self.settings, schedule.past)
        let_backbone_train(model, self.evolve_rows)
        maps, others = split_parameters(model, model.stack)
        rank = self.settings.rank_at(model.own_embedding.shape[1])
        step = GemsStep(maps, others, self.settings, rank, protected, schedule)
        for sentence in step.capped:
            warnings.warn(f"gems: {sentence}", stacklevel=2)
        kept = lineage[-1] / KEPT
        if self.settings.carry_state and kept.exists():
            state = json.loads((lineage[-1] / "state.json").read_text(encoding="utf-8"))
            step.load(load_file(kept), state["gems"]["subspaces"], carry=True)
        return step
