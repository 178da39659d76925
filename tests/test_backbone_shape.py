"""What a backbone's linear maps are, known from its settings: before any weight is read."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from models.backbone import pretrained_backbone, small_backbone
from models.input_moments import linear_maps
from stages.backbone_shape import BackboneShape, shape_of
from stages.config import BackboneConfig
from stages.method_config import GemsConfig, LoraMoeConfig, OsfConfig
from stages.methods.gems_stack import make_stacks

TARGETS = ("q_proj", "down_proj")


def shapes(stack: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    return {name: tuple(module.weight.shape) for name, module in linear_maps(stack).items()}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained backbone whose keys are narrower than its queries, and whose weights nobody has to read."""
    path = tmp_path_factory.mktemp("llama")
    numbers = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    LlamaForCausalLM(LlamaConfig(vocab_size=64, num_key_value_heads=1, **numbers)).save_pretrained(path)
    return path


def test_small_s_maps_are_known_without_building_it() -> None:
    settings = BackboneConfig(hidden=24, layers=3, heads=2, feed_forward=40)
    found = shape_of(settings)
    assert found is not None
    stack = small_backbone(24, 3, 2, 40, seed=0).stack
    assert found.maps == shapes(stack)
    assert list(found.maps) == list(linear_maps(stack))
    assert found.width == 24


def test_a_pretrained_backbone_s_maps_are_known_from_its_settings_alone(folder: Path) -> None:
    found = shape_of(BackboneConfig(path=str(folder)))
    assert found is not None
    assert found.maps == shapes(pretrained_backbone(str(folder)).stack)
    assert found.maps["layers.0.self_attn.k_proj"] == (8, 32)
    assert found.width == 32


@pytest.mark.parametrize("spoilt", ["nowhere/no-such-model", "empty", "remote"])
def test_a_backbone_that_cannot_be_looked_at_yet_is_left_to_its_loading(spoilt: str, tmp_path: Path) -> None:
    place = tmp_path / spoilt
    if spoilt == "empty":
        place.mkdir()
    if spoilt == "remote":
        place.mkdir()
        (place / "config.json").write_text('{"model_type": "x", "auto_map": {"AutoConfig": "x.X"}}')
    path = spoilt if spoilt.startswith("nowhere") else str(place)
    assert shape_of(BackboneConfig(path=path)) is None


@pytest.mark.parametrize("subspaces", ["three", "one"])
def test_the_largest_rank_that_is_offered_is_the_largest_that_is_taken(subspaces: str) -> None:
    stack = small_backbone(24, 1, 2, 40, seed=0).stack
    shape = BackboneShape(24, {name: (size[0], size[1]) for name, size in shapes(stack).items()})
    refused = GemsConfig(rank=4096, subspaces=subspaces)  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="give at most") as caught:
        refused.check_shape(shape, TARGETS)
    largest = int(str(caught.value).partition("give at most ")[2].split(",")[0])
    for rank, fits in ((largest, True), (largest + 1, False)):
        settings = refused.model_copy(update={"rank": rank})
        if fits:
            settings.check_shape(shape, TARGETS)
            make_stacks(linear_maps(stack), settings, rank, {})
            continue
        with pytest.raises(ValueError, match=f"rank = {rank} needs"):
            settings.check_shape(shape, TARGETS)
        with pytest.raises(ValueError, match=f"rank {rank} needs"):
            make_stacks(linear_maps(stack), settings, rank, {})
    refused.model_copy(update={"allow_large_state": True}).check_shape(shape, TARGETS)


def test_what_fits_is_taken() -> None:
    shape = shape_of(BackboneConfig(hidden=16, layers=1, heads=2, feed_forward=32))
    assert shape is not None
    for settings in (
        OsfConfig(preserved=1 / 16),
        LoraMoeConfig(rank=16),
        GemsConfig(),
        GemsConfig(k_rule="fixed", k_value=15),
        GemsConfig(k_rule="fixed", k_value=99, null_space="off"),
    ):
        settings.check_shape(shape, TARGETS)
