"""Settings of the methods, and the names they go by without a config."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.settings import Settings


class MethodConfig(Settings):
    """What every method's settings are; subclasses say which by their `method` field."""


class FrozenConfig(MethodConfig):
    """Stage 0's model, never updated."""

    method: Literal["frozen"] = "frozen"


class SingleConfig(MethodConfig):
    """One LoRA that goes on training at every stage."""

    method: Literal["single"] = "single"


class PesoConfig(MethodConfig):
    """PESO (Yoo et al., 2025): `single` with a proximal term toward the previous stage's adapter."""

    method: Literal["peso"] = "peso"
    strength: Annotated[float, Field(ge=0, allow_inf_nan=False)] = 2.0
    """lambda of eq. 12."""
    penalty: Literal["softmax_kl", "squared_l2"] = "softmax_kl"
    reduction: Literal["sum", "mean"] = "sum"
    """`sum` over matrices (paper) or that sum divided by the wrapped modules (released code)."""
    scale: Literal["none", "size"] = "none"
    """`size` multiplies each matrix's term by its number of entries."""
    anchor: Literal["adapter", "adapter+tokens"] = "adapter"


class CumulativeConfig(MethodConfig):
    """Past adapters frozen and summed under a fresh one."""

    method: Literal["cumulative_sum", "cumulative_normalised"]
    latest: bool = False
    """Only the previous stage's adapter in the sum."""
    inherit: bool = False
    """Start at the previous adapter instead of a fresh one."""

    @model_validator(mode="after")
    def _inherit_double_counts(self) -> Self:
        if self.method == "cumulative_sum" and self.inherit:
            raise ValueError(
                "cumulative_sum with inherit would count the last adapter twice; use cumulative_normalised"
            )
        return self


class FullRetrainConfig(MethodConfig):
    """A fresh adapter on all data so far, at every stage."""

    method: Literal["full_retrain"] = "full_retrain"


class FullFinetuneConfig(MethodConfig):
    """Every weight goes on training at every stage."""

    method: Literal["full_finetune"] = "full_finetune"


AnyMethod = Annotated[
    FrozenConfig | SingleConfig | PesoConfig | CumulativeConfig | FullRetrainConfig | FullFinetuneConfig,
    Field(discriminator="method"),
]

BUILT_IN: dict[str, MethodConfig] = {
    "frozen": FrozenConfig(),
    "single": SingleConfig(),
    "peso": PesoConfig(),
    "peso_paper": PesoConfig(strength=2.0, reduction="sum", scale="none"),
    "peso_released": PesoConfig(strength=2.0, reduction="mean", scale="none"),
    "peso_working": PesoConfig(strength=0.1, reduction="sum", scale="size"),
    "cumulative_sum": CumulativeConfig(method="cumulative_sum"),
    "cumulative_normalised": CumulativeConfig(method="cumulative_normalised"),
    "cumulative_normalised_latest": CumulativeConfig(method="cumulative_normalised", latest=True),
    "cumulative_normalised_inherit": CumulativeConfig(method="cumulative_normalised", inherit=True),
    "cumulative_normalised_latest_inherit": CumulativeConfig(method="cumulative_normalised", latest=True, inherit=True),
    "full_retrain": FullRetrainConfig(),
    "full_finetune": FullFinetuneConfig(),
}
