"""Settings of the methods, and the names they go by without a config."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from stages.backbone_shape import BackboneShape
from stages.settings import Settings, Targets


class MethodConfig(Settings):
    """What every method's settings are; subclasses say which by their `method` field."""

    def check(self, pretrained: bool) -> None:
        """Refuse at once what only a later stage would meet.

        Args:
            pretrained: whether the backbone was trained on text.

        Raises:
            ValueError: the settings need a file or a backbone that is not there.
        """

    def check_shape(self, shape: BackboneShape, targets: Sequence[str]) -> None:
        """Refuse at once what does not fit the backbone's linear maps.

        Args:
            shape: of the backbone.
            targets: maps that an adapter sits on.

        Raises:
            ValueError: it begins with the key.
        """


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


class GemsConfig(MethodConfig):
    """GEMS (Zhao et al., 2026): every linear map moves inside gradient subspaces, off the inputs to be preserved."""

    method: Literal["gems"] = "gems"
    rank: Annotated[int, Field(ge=1)] | None = None
    """r of the shared subspace; each objective's has r // 2. Absent: 64, at most a quarter of the model's width."""
    subspaces: Literal["three", "one"] = "three"
    """`one`: a shared subspace of rank 2r, the same state in bytes (an ablation)."""
    side: Literal["short", "left", "right"] = "short"
    scale: Annotated[float, Field(gt=0, allow_inf_nan=False)] = 4.0
    """a: multiplies the update; with the rate it is one number, so tune this one. 4 was the best of 1, 2, 4 and 8 for
    `small` on Last.fm, by validation; 16 learnt on SmolLM2-135M what joint LoRA did (docs/log.md)."""
    shared_grad: Literal["sum", "pooled", "normalised"] = "sum"
    refresh: Literal["power", "rsvd", "svd"] = "power"
    refresh_every: Annotated[int, Field(ge=1)] = 200
    """T, optimiser steps between two refreshes of a basis."""
    stagger: bool = True
    """Spread the refreshes of the maps over the T steps."""
    basis_from: Literal["gradient", "gradient_in_null"] = "gradient_in_null"
    on_refresh: Literal["rotate", "keep", "reset"] = "rotate"
    separate: bool = False
    """Take the shared span out of the specific bases."""
    fuse_norm: Literal["none", "shared"] = "none"
    """`shared`: the fused update is as long as its shared part."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    gate: Literal["constant", "released", "rule", "frozen_mlp", "hypergradient", "lookahead"] = "hypergradient"
    """`lookahead` asks another training batch about every step before it is final: one more forward and backward."""
    gate_temperature: Annotated[float, Field(gt=0)] = 1.0
    gate_hidden: Annotated[int, Field(ge=1)] = 16
    gate_learning_rate: Annotated[float, Field(gt=0)] = 1e-4
    gate_warmup: Annotated[int, Field(ge=0)] | None = None
    """Steps with alpha = 1/2 before the gate learns; absent: `refresh_every`."""
    null_space: Literal["orthogonal", "off", "paper_literal"] = "orthogonal"
    corpus: str = "previous_stage"
    """Whose inputs are protected: `previous_stage`, `off`, or the path of a text file (a pretrained backbone only)."""
    corpus_tokens: Annotated[int, Field(ge=1)] = 200_000
    """Tokens of the corpus that are read."""
    k_rule: Literal["energy", "relative", "absolute", "fixed"] = "energy"
    k_value: Annotated[float, Field(gt=0)] = 0.95
    """A share for `energy` and `relative`, a mean square for `absolute`, a whole number of directions for `fixed`."""
    weight_decay: Literal["none", "to_start_projected", "to_zero"] = "none"
    """Of the linear maps, with training.weight_decay as its strength."""
    carry_state: bool = False
    """Take bases, moments and gate over from the previous stage."""
    allow_large_state: bool = False
    """Allow bases and moments that hold more than Adam's moments of the same weights would."""

    @model_validator(mode="after")
    def _choices_agree(self) -> Self:
        if self.weight_decay == "to_zero" and self.null_space != "off":
            raise ValueError(
                'weight_decay = "to_zero" pulls the weights out of the null space at every step; '
                'use "none" or "to_start_projected", or null_space = "off"'
            )
        if self.gate in ("hypergradient", "lookahead") and self.fuse_norm != "none":
            raise ValueError(
                f'gate = "{self.gate}" learns from an update that is the sum of its parts; use gate = "constant" or '
                '"rule" with fuse_norm = "shared", or fuse_norm = "none"'
            )
        if self.corpus == "off" and self.null_space != "off":
            raise ValueError(
                f'null_space = "{self.null_space}" needs a corpus; name a text file or "previous_stage", '
                'or set null_space = "off"'
            )
        return self

    @model_validator(mode="after")
    def _rule_takes_value(self) -> Self:
        if self.null_space == "off" or self.k_rule == "absolute":
            return self
        given = f'k_value = {self.k_value:g}, but k_rule = "{self.k_rule}" takes'
        if self.k_rule == "fixed" and not self.k_value.is_integer():
            raise ValueError(f'{given} a whole number of directions; set k_value = 8, say, or use k_rule = "energy"')
        if self.k_rule != "fixed" and self.k_value >= 1:
            usual = 0.95 if self.k_rule == "energy" else 0.01
            raise ValueError(f"{given} a share above 0 and below 1; set k_value = {usual}, say")
        return self

    def check(self, pretrained: bool) -> None:
        """Refuse a text that is not there, or that the backbone cannot read."""
        if self.null_space == "off" or self.corpus == "previous_stage":
            return
        if not pretrained:
            raise ValueError(
                f"corpus = {self.corpus!r} is text, but the `small` backbone reads no words and holds no general "
                'knowledge; use corpus = "previous_stage"'
            )
        if not Path(self.corpus).is_file():
            raise ValueError(f'corpus = {self.corpus!r} is no file; name a text file, "previous_stage" or "off"')

    def rank_at(self, width: int) -> int:
        """r of the shared subspace in a model of this width."""
        return self.rank or min(64, max(1, width // 4))

    def check_shape(self, shape: BackboneShape, targets: Sequence[str]) -> None:
        """Refuse a state larger than Adam's, and a fixed k that leaves an input nothing to train."""
        if not shape.maps:
            raise ValueError('method = "gems" finds no linear map in the backbone; use full_finetune')
        name = min(shape.maps, key=lambda one: shape.maps[one][1])
        least = shape.maps[name][1]
        if self.null_space != "off" and self.k_rule == "fixed" and self.k_value >= least:
            raise ValueError(
                f'k_value = {self.k_value:g} with k_rule = "fixed" leaves none of the {least} input directions of '
                f"{name} to train; give at most {least - 1}"
            )
        if not self.allow_large_state:
            self._check_state(self.rank_at(shape.width), list(shape.maps.values()))

    def _check_state(self, rank: int, shapes: list[tuple[int, int]]) -> None:
        from regularizers.subspace import too_large  # torch, which reading a config does without

        if (state := too_large(shapes, rank, self.side, self.subspaces)) is None:
            return
        highest = min(rank - 1, 2 * max(map(min, shapes)))  # above it every subspace is capped
        fitting = (r for r in range(highest, 0, -1) if too_large(shapes, r, self.side, self.subspaces) is None)
        largest = next(fitting, None)
        remedy = "" if largest is None else f"give at most {largest}, or "
        given = f"rank = {rank}{'' if self.rank else ', the default,'}"
        raise ValueError(
            f"{given} needs {4 * state[0]:,} bytes of bases and moments, more than Adam's {4 * state[1]:,} on the same "
            f"weights; {remedy}set allow_large_state = true"
        )


class SurgeryConfig(MethodConfig):
    """`single` whose search and recommendation gradients are reconciled: PCGrad, or Ortho-LoRA matrix by matrix."""

    method: Literal["pcgrad", "ortho_lora"]


class OsfConfig(MethodConfig):
    """PEFT's OSF: the top singular triples of each weight a stage starts from stay, the others train."""

    method: Literal["osf"] = "osf"
    preserved: Annotated[float, Field(gt=0, lt=1)] = 0.5
    """Share of the singular triples that stay, the largest ones."""

    def check_shape(self, shape: BackboneShape, targets: Sequence[str]) -> None:
        """Refuse a share that is less than one triple of a map."""
        found = shape.named(targets)
        name = min(found, key=lambda one: min(found[one]))
        size = min(found[name])
        if int(size * self.preserved) < 1:
            raise ValueError(
                f"preserved = {self.preserved:g} keeps 0 of the {size} singular directions of {name}; "
                f"give at least {1 / size:g}"
            )


class LoraMoeConfig(MethodConfig):
    """LoRA-MoE (Dou et al., 2023): LoRA experts under a router, with localized balance between the objectives."""

    method: Literal["lora_moe"] = "lora_moe"
    experts: Annotated[int, Field(ge=2)] = 4
    """Every second one is meant for searches, the others for recommendations."""
    rank: Annotated[int, Field(ge=1)] = 4
    """Of each expert."""
    alpha: Annotated[float, Field(gt=0)] = 8.0
    """An expert's product is multiplied by alpha / rank."""
    targets: Targets = ("gate_proj", "up_proj", "down_proj")
    balance: Literal["repaired", "as_printed"] = "repaired"
    """As printed, the term takes samples away from the experts of their own kind."""
    balance_weight: Annotated[float, Field(ge=0)] = 0.1
    skew: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """δ: how much more of its own objective an expert gets; 0 balances all alike."""

    def check_shape(self, shape: BackboneShape, targets: Sequence[str]) -> None:
        """Refuse maps that are not there, and experts wider than one."""
        shape.check_low_rank(self.rank, self.targets)


AnyMethod = Annotated[
    FrozenConfig
    | SingleConfig
    | PesoConfig
    | CumulativeConfig
    | FullRetrainConfig
    | FullFinetuneConfig
    | GemsConfig
    | SurgeryConfig
    | OsfConfig
    | LoraMoeConfig,
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
    "gems": GemsConfig(),
    "gems_scale_1": GemsConfig(scale=1.0),
    "gems_one_subspace": GemsConfig(subspaces="one"),
    "gems_no_null_space": GemsConfig(null_space="off"),
    "gems_paper_literal": GemsConfig(null_space="paper_literal"),
    "gems_energy_90": GemsConfig(k_value=0.9),
    "gems_energy_99": GemsConfig(k_value=0.99),
    "gems_constant_gate": GemsConfig(gate="constant"),
    "gems_rule_gate": GemsConfig(gate="rule"),
    "gems_released_gate": GemsConfig(gate="released"),
    "gems_frozen_gate": GemsConfig(gate="frozen_mlp"),
    "gems_lookahead_gate": GemsConfig(gate="lookahead"),
    "gems_keep": GemsConfig(on_refresh="keep"),
    "gems_reset": GemsConfig(on_refresh="reset"),
    "gems_refresh_50": GemsConfig(refresh_every=50, gate_warmup=200),
    "gems_refresh_1000": GemsConfig(refresh_every=1000, gate_warmup=200),
    "gems_refresh_rsvd": GemsConfig(refresh="rsvd"),
    "gems_refresh_svd": GemsConfig(refresh="svd"),
    "gems_pooled": GemsConfig(shared_grad="pooled"),
    "gems_normalised": GemsConfig(shared_grad="normalised"),
    "gems_separate": GemsConfig(separate=True),
    "gems_carry": GemsConfig(carry_state=True),
    "pcgrad": SurgeryConfig(method="pcgrad"),
    "ortho_lora": SurgeryConfig(method="ortho_lora"),
    "osf": OsfConfig(),
    "lora_moe": LoraMoeConfig(),
    "galore": GemsConfig(
        subspaces="one",
        scale=1.0,
        shared_grad="pooled",  # the loss that the other methods minimise
        null_space="off",
        on_refresh="keep",
        refresh="svd",
        stagger=False,
    ),
}
