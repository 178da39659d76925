"""One file a method; this table is the only place that knows them all."""

from __future__ import annotations

from stages.config import AdapterConfig
from stages.method_config import (
    CumulativeConfig,
    FrozenConfig,
    FullFinetuneConfig,
    FullRetrainConfig,
    GemsConfig,
    LoraMoeConfig,
    MethodConfig,
    OsfConfig,
    PesoConfig,
    SingleConfig,
    SurgeryConfig,
)
from stages.methods.contract import Method
from stages.methods.cumulative import Cumulative
from stages.methods.frozen import Frozen
from stages.methods.full_finetune import FullFinetune
from stages.methods.full_retrain import FullRetrain
from stages.methods.gems import Gems
from stages.methods.lora_moe import LoraMoe
from stages.methods.osf import Osf
from stages.methods.peso import Peso
from stages.methods.single import Single
from stages.methods.surgery import Surgery


def build_method(settings: MethodConfig, adapter: AdapterConfig, evolve_rows: bool) -> Method:
    """The method that `settings` describe.

    Args:
        settings: of one method.
        adapter: shape of the LoRA, alike for all methods compared.
        evolve_rows: whether the code tokens' rows train after stage 0.

    Raises:
        ValueError: settings of a class this table does not hold.
    """
    match settings:
        case FrozenConfig():
            return Frozen(adapter)
        case SingleConfig():
            return Single(adapter, evolve_rows)
        case PesoConfig():
            return Peso(settings, adapter, evolve_rows)
        case CumulativeConfig():
            return Cumulative(settings, adapter, evolve_rows)
        case FullRetrainConfig():
            return FullRetrain(adapter, evolve_rows)
        case FullFinetuneConfig():
            return FullFinetune(adapter, evolve_rows)
        case GemsConfig():
            return Gems(settings, adapter, evolve_rows)
        case SurgeryConfig():
            return Surgery(settings, adapter, evolve_rows)
        case OsfConfig():
            return Osf(settings, adapter, evolve_rows)
        case LoraMoeConfig():
            return LoraMoe(settings, adapter, evolve_rows)
        case _:
            raise ValueError(f"no method for settings of class {type(settings).__name__}; add it to this table")
