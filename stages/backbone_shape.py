"""The linear maps of a backbone, known from its settings alone, so that what can never fit is told before training."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from stages.errors import UserError

if TYPE_CHECKING:
    from torch import nn

    from stages.config import BackboneConfig, Config


@dataclass(frozen=True)
class BackboneShape:
    """A decoder stack without its weights.

    Attributes:
        width: d, of its hidden states.
        maps: (d_out, d_in) of every linear map by name, in module order.
    """

    width: int
    maps: Mapping[str, tuple[int, int]]

    def named(self, targets: Sequence[str]) -> dict[str, tuple[int, int]]:
        """The maps whose last name is in `targets`.

        Raises:
            ValueError: there is none.
        """
        found = {name: shape for name, shape in self.maps.items() if _last(name) in targets}
        if not found:
            known = ", ".join(sorted(set(map(_last, self.maps)))) or "none at all"
            raise ValueError(f"targets = {list(targets)} match no linear map of the backbone; it has: {known}")
        return found

    def check_low_rank(self, rank: int, targets: Sequence[str]) -> None:
        """Refuse factors of more columns than a map of `targets` has rows or columns.

        Raises:
            ValueError: it begins with the key.
        """
        found = self.named(targets)
        name = min(found, key=lambda one: min(found[one]))
        d_out, d_in = found[name]
        if rank > min(d_out, d_in):
            raise ValueError(
                f"rank = {rank} exceeds {name}, which is {d_out} x {d_in}; give at most {min(d_out, d_in)}"
            )


def check_methods(config: Config, names: Sequence[str], path: Path) -> None:
    """Refuse settings that a later stage could not work with, before any is trained.

    Args:
        config: the experiment.
        names: of the methods asked for.
        path: of the config file, for the message.

    Raises:
        UserError: an unknown method, a text that is not there, or what does not fit the backbone.
    """
    shape, targets = shape_of(config.backbone), config.adapter.targets
    if shape is not None:
        try:
            shape.check_low_rank(config.adapter.rank, targets)
        except ValueError as error:
            raise UserError(f"{path}: adapter.{error}") from None
    for name in names:
        settings = config.method(name)
        try:
            settings.check(pretrained=config.backbone.path is not None)
        except ValueError as error:
            raise UserError(f"{path}: methods.{name}: {error}") from None
        try:
            if shape is not None:
                settings.check_shape(shape, targets)
        except ValueError as error:
            raise UserError(f"{path}: methods.{name}.{error}") from None


def shape_of(settings: BackboneConfig) -> BackboneShape | None:
    """The shape of the backbone in the settings; no weight is read, and nothing fetched.

    Returns:
        None where its folder is not on this machine yet, or is one that loading will refuse.
    """
    if settings.path is None:
        return _small(settings.hidden, settings.layers, settings.feed_forward)
    from models.backbone import skeleton  # seconds of imports that `small` does without

    stack = skeleton(settings.path)
    if stack is None:
        return None
    from models.input_moments import linear_maps

    maps = {name: (module.out_features, module.in_features) for name, module in linear_maps(stack).items()}
    return BackboneShape(cast("nn.Embedding", stack.get_input_embeddings()).embedding_dim, maps)


def _small(d: int, layers: int, f: int) -> BackboneShape:
    attention = {f"self_attn.{name}_proj": (d, d) for name in "qkvo"}
    layer = attention | {"mlp.gate_proj": (f, d), "mlp.up_proj": (f, d), "mlp.down_proj": (d, f)}
    return BackboneShape(d, {f"layers.{i}.{name}": shape for i in range(layers) for name, shape in layer.items()})


def _last(name: str) -> str:
    return name.rpartition(".")[2]
