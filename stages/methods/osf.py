"""`osf`: PEFT's Orthogonal Subspace Fine-tuning, stage after stage; a comparator of GEMS for keeping knowledge.

Each stage decomposes the weights it starts from anew, keeps their top singular triples, and trains the rest. A
checkpoint holds the whole weights that come of it, so that a later stage starts from exactly the model that was tested.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from torch import Tensor

from models import orthogonal
from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.method_config import OsfConfig
from stages.methods.contract import Losses, Reads, Schedule, Step
from stages.methods.full_finetune import FullFinetune
from stages.methods.parts import adamw_step, let_rows_train

if TYPE_CHECKING:
    from peft.tuners.osf.layer import Linear as OsfLinear


@dataclass(frozen=True)
class Osf:
    """W_t = U_high S_high V_high (of W_{t-1}) + U_low S_low V_low, the latter trained."""

    settings: OsfConfig
    adapter: AdapterConfig
    evolve_rows: bool
    data: Literal["none", "stage", "all"] = "stage"
    every_weight: bool = True
    reads: Reads = "ends"

    def restore(self, model: GenerativeModel, lineage: Sequence[Path]) -> None:
        """Stage 0's model with its adapter folded in, or the newest whole weights."""
        FullFinetune(self.adapter, self.evolve_rows).restore(model, lineage)

    def begin(self, model: GenerativeModel, lineage: Sequence[Path], schedule: Schedule) -> Step:
        """The previous stage's weights, decomposed."""
        self.restore(model, lineage)
        layers = orthogonal.attach(model.stack, self.adapter.targets, self.settings.preserved)
        chosen = [*orthogonal.parameters(layers), *let_rows_train(model, self.evolve_rows)]
        return OsfStep(adamw_step(chosen, schedule), layers)


@dataclass(frozen=True)
class OsfStep:
    """AdamW's step, and how its parts become weights again."""

    step: Step
    layers: Mapping[str, OsfLinear]

    def __call__(self, micro_batches: Iterable[Losses]) -> dict[str, float]:
        """One step of AdamW; PEFT's hooks project the gradients as they arrive."""
        return self.step(micro_batches)

    def report(self) -> dict[str, Any]:
        """How many singular directions of each map are preserved, for `state.json`."""
        ranks = {name: int(layer.effective_rank[orthogonal.NAME]) for name, layer in self.layers.items()}
        return {"osf": {"preserved": ranks}}

    def stored(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Whole weights, in place of the parts that trained."""
        return orthogonal.merged(self.layers)

    def kept(self) -> dict[str, Tensor]:
        """Nothing: the next stage decomposes anew."""
        return {}
