"""GEMS's state: as large as predicted, stored without pickle, refused where it does not fit."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load, save
from torch import nn

from stages.method_config import GemsConfig
from stages.methods.contract import SharedLosses
from tests.test_gems import PLAIN, SHAPES, Toy, guarded, schedule, step_of


def test_state_is_as_large_as_predicted() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy)
    logs = step(toy.batch())
    ranks = [[min(rank, *shape) for rank in (4, 2, 2)] for shape in SHAPES.values()]
    floats = sum(sum(own) * (min(shape) + 2 * max(shape)) for own, shape in zip(ranks, SHAPES.values(), strict=True))
    assert logs["state_bytes"] == step.state_bytes() == 4 * floats
    assert step.capped == ["rank 4 exceeds 1 matrices of 3 x 16: 1 of their 3 subspaces are capped at 3"]


@pytest.mark.parametrize("null_space", ["off", "orthogonal"])
def test_a_step_stored_as_safetensors_goes_on_bit_for_bit(null_space: Any) -> None:
    settings = GemsConfig(rank=4, null_space=null_space, gate_warmup=2, refresh_every=4, allow_large_state=True)
    toy = Toy(SHAPES)
    toy.register_parameter("norm", nn.Parameter(torch.ones(3)))
    kept = guarded(toy) if null_space != "off" else {}

    def batch(own: Toy) -> list[SharedLosses]:
        (micro,) = own.batch()
        micro["search"] = micro["search"] + own.get_parameter("norm").square().sum()
        return [micro]

    step = step_of(toy, settings, protections=kept)
    for _ in range(5):
        step(batch(toy))
    twin = copy.deepcopy(toy)
    resumed = step_of(twin, settings, protections=kept)
    resumed.load(load(save(step.tensors())), step.objectives)
    for _ in range(5):
        logs, again = step(batch(toy)), resumed(batch(twin))
        logs.pop("refresh_seconds"), again.pop("refresh_seconds")
        assert logs == again
    for name, value in toy.weights().items():
        assert torch.equal(twin.weights()[name], value), name
    smaller = step_of(copy.deepcopy(toy), settings.model_copy(update={"rank": 3}), protections=kept)
    with pytest.raises(ValueError, match="keep rank and side, or set carry_state = false"):
        smaller.load(step.tensors(), step.objectives)


def test_bases_of_the_other_side_of_a_square_matrix_are_refused() -> None:
    one, other = ({"square": (8, 8)} for _ in range(2))
    step = step_of(Toy(one), PLAIN.model_copy(update={"side": "left"}))
    turned = step_of(Toy(other), PLAIN.model_copy(update={"side": "right"}))
    with pytest.raises(ValueError, match=r"stored bases of maps.square lie on its left side, here on the right"):
        turned.load(step.tensors(), step.objectives)


def test_bytes_predicted_and_held_are_told_when_an_objective_is_met(caplog: pytest.LogCaptureFixture) -> None:
    toy = Toy(SHAPES)
    step = step_of(toy)
    with caplog.at_level("INFO", logger="stages.gems"):
        step([{"search": toy.loss("search")}])
        alone = step.state_bytes()
        step(toy.batch())
        step(toy.batch())
    assert len(caplog.messages) == 2
    assert f"{alone:,} bytes of bases and moments" in caplog.messages[0]
    assert f"(predicted {step.state_bytes():,}) for search and recommendation; " in caplog.messages[1]
    assert alone < step.state_bytes() == step.report()["gems"]["predicted_bytes"]


def test_a_state_larger_than_adams_is_refused_unless_allowed() -> None:
    toy = Toy(SHAPES)
    with pytest.raises(ValueError, match=r"rank 12 needs [\d,]+ bytes of bases and moments, more than Adam's"):
        step_of(toy, GemsConfig(rank=12, null_space="off"))
    with pytest.raises(ValueError, match="float64; small steps round away"):
        step_of(Toy(SHAPES, torch.float64))
    with pytest.raises(ValueError, match="no linear maps for GEMS"):
        step_of(nn.LayerNorm(3))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_decay": "to_zero"}, "pulls the weights out of the null space"),
        ({"fuse_norm": "shared"}, 'gate = "hypergradient" learns from an update that is the sum of its parts'),
        ({"fuse_norm": "shared", "gate": "lookahead"}, "use gate = .constant. or .rule."),
        ({"corpus": "off"}, "needs a corpus; name a text file"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"gate": "moe"}, "Input should be 'constant', 'released'"),
        ({"refresh": "qr"}, "Input should be 'power', 'rsvd' or 'svd'"),
        ({"anchor": "x"}, "Extra inputs are not permitted"),
    ],
)
def test_settings_that_contradict_themselves_are_refused(values: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        GemsConfig(**values)


def test_a_decay_to_zero_is_allowed_without_a_null_space() -> None:
    toy = Toy(SHAPES)
    step = step_of(toy, PLAIN.model_copy(update={"weight_decay": "to_zero"}), schedule=schedule(decay=0.5))
    twin = copy.deepcopy(toy)
    step_of(twin)(twin.batch())
    step(toy.batch())
    assert float(toy.weights()["maps.tall.weight"].norm()) < float(twin.weights()["maps.tall.weight"].norm())
