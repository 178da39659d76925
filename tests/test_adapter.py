"""The folded adapter against PEFT's own modules."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from models import adapter as lora
from stages.checkpoint import Tensors, write_checkpoint
from stages.config import AdapterConfig

TARGETS = ["q_proj", "v_proj", "down_proj"]


def tiny_llama(seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=11, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2
    )
    return LlamaForCausalLM(config).eval()


def shake(stack: nn.Module) -> None:
    with torch.no_grad():
        for value in lora.matrices(stack).values():
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(value.numel())) * 0.1)


def logits(model: LlamaForCausalLM) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(10).reshape(2, 5)).logits


def test_a_fresh_adapter_changes_nothing_and_a_trained_one_does() -> None:
    model = tiny_llama()
    before = logits(model)
    lora.attach(model.model, rank=2, alpha=4, targets=TARGETS, seed=1)
    assert torch.equal(logits(model), before)
    shake(model.model)
    assert (logits(model) - before).abs().max() > 1e-3
    lora.detach(model.model)
    assert torch.equal(logits(model), before)


def test_folding_keeps_the_function() -> None:
    model = tiny_llama()
    lora.attach(model.model, rank=2, alpha=4, targets=TARGETS, seed=1)
    shake(model.model)
    before = logits(model)
    lora.fold(model.model)
    assert lora.adapter_of(model.model) == {}
    torch.testing.assert_close(logits(model), before, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")
def test_peft_loads_the_checkpoint_and_computes_the_same(tmp_path: Path) -> None:
    from peft import PeftModel

    model = tiny_llama()
    lora.attach(model.model, rank=2, alpha=4, targets=TARGETS, seed=1)
    shake(model.model)
    settings = AdapterConfig(rank=2, alpha=4, targets=TARGETS)
    write_checkpoint(tmp_path / "done", Tensors(adapter=lora.snapshot(model.model)), settings, {})
    with_peft = PeftModel.from_pretrained(tiny_llama(), tmp_path / "done").eval()
    torch.testing.assert_close(logits(with_peft), logits(model), atol=1e-5, rtol=0)  # pyright: ignore[reportArgumentType]


def test_the_gradient_is_that_of_the_unfolded_products() -> None:
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(6, 5, bias=False))
    lora.attach(model, rank=2, alpha=3, targets=["q_proj"], seed=0)
    shake(model)
    part = lora.adapter_of(model)["q_proj"]
    x = torch.randn(7, 6, generator=torch.Generator().manual_seed(0))
    model(x).square().sum().backward()
    weight = model.get_submodule("q_proj").parametrizations["weight"].original  # pyright: ignore
    a, b = (value.detach().clone().requires_grad_() for value in (part.lora_A, part.lora_B))
    (x @ weight.T + 1.5 * (x @ a.T) @ b.T).square().sum().backward()
    torch.testing.assert_close(part.lora_A.grad, a.grad)
    torch.testing.assert_close(part.lora_B.grad, b.grad)
    assert weight.grad is None


def wide(monkeypatch: pytest.MonkeyPatch, wide: bool, bias: bool = False) -> nn.Sequential:
    """Two adapted layers in float64, with the thin way back or without."""
    monkeypatch.setattr(lora, "WIDE", 1 if wide else 2**40)
    torch.manual_seed(0)
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(6, 5, bias=bias))
    model.add_module("v_proj", nn.Linear(5, 4, bias=bias))
    lora.attach(model, rank=2, alpha=3, targets=["q_proj", "v_proj"], seed=0)
    model.double()
    shake(model)
    return model


@pytest.mark.parametrize("bias", [False, True])
def test_thin_products_give_the_gradients_of_the_folded_weight(monkeypatch: pytest.MonkeyPatch, bias: bool) -> None:
    found = []
    for thin in (True, False):
        model = wide(monkeypatch, thin, bias)
        x = torch.randn(3, 7, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(0), requires_grad=True)
        out = model(x)
        out.square().sum().backward()
        assert ("forward" in vars(model.get_submodule("q_proj"))) == thin
        gradients = [value.grad for value in lora.matrices(model).values()]
        found.append([out.detach(), x.grad, *gradients])
    assert all(gradient is not None for gradient in found[0])
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-12)


def test_the_thin_gradient_is_the_derivative(monkeypatch: pytest.MonkeyPatch) -> None:
    part = next(iter(lora.adapter_of(wide(monkeypatch, True)).values()))
    x, weight = torch.randn(4, 6, dtype=torch.float64), torch.randn(5, 6, dtype=torch.float64)

    def through(x: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        # The folded weight is a constant to autograd here; what A and B move is added by hand.
        out = lora.FoldedLinear.apply(x, (weight + 1.5 * b @ a).detach(), a, b, 1.5, None)
        assert isinstance(out, torch.Tensor)
        return out

    a, b = (value.detach().clone().requires_grad_() for value in (part.lora_A, part.lora_B))
    assert torch.autograd.gradcheck(through, (x.requires_grad_(), a, b))


def test_thin_products_leave_the_function_the_bits_and_a_trained_weight_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = wide(monkeypatch, True), wide(monkeypatch, False)
    x = torch.randn(3, 6, dtype=torch.float64)
    with torch.no_grad():
        assert torch.equal(model(x), plain(x))
    grads = []
    for _ in range(2):
        model.zero_grad()
        model(x).sum().backward()
        grads.append([value.grad for value in lora.matrices(model).values()])
    assert all(torch.equal(one, two) for one, two in zip(*grads, strict=True))  # pyright: ignore[reportArgumentType]
    original = model.get_submodule("q_proj").parametrizations["weight"].original  # pyright: ignore
    assert original.grad is None
    original.requires_grad_(True)
    model(x).sum().backward()
    assert original.grad is not None
    with torch.no_grad():
        before = model(x)
    lora.fold(model)
    assert "forward" not in vars(model.get_submodule("q_proj"))
    torch.testing.assert_close(model(x), before)


def test_thin_products_work_under_autocast_and_after_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    model = wide(monkeypatch, True).float()
    copied = copy.deepcopy(model)
    x = torch.randn(3, 7, 6)
    with torch.autocast("cpu", torch.bfloat16):
        out = copied(x)
    assert out.dtype == torch.bfloat16
    out.float().square().sum().backward()
    model(x).square().sum().backward()
    for mine, full in zip(lora.matrices(copied).values(), lora.matrices(model).values(), strict=True):
        assert mine.grad is not None
        assert mine.grad.dtype == torch.float32
        torch.testing.assert_close(mine.grad, full.grad, rtol=0.1, atol=0.05)


@given(st.integers(1, 4), st.integers(1, 4))
def test_adding_products_is_the_sum_of_the_unfolded_adapters(rank: int, count: int) -> None:
    generator = torch.Generator().manual_seed(rank * 10 + count)
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(6, 5, bias=False))
    start = model.get_parameter("q_proj.weight").detach().clone()
    past = [
        {
            "q_proj.lora_A.weight": torch.randn(rank, 6, generator=generator),
            "q_proj.lora_B.weight": torch.randn(5, rank, generator=generator),
        }
        for _ in range(count)
    ]
    for values in past:
        lora.add_product(model, values, scale=0.5, normalise=False)
    expected = start + 0.5 * sum(v["q_proj.lora_B.weight"] @ v["q_proj.lora_A.weight"] for v in past)
    torch.testing.assert_close(model.get_parameter("q_proj.weight").detach(), expected, atol=1e-5, rtol=1e-5)


def test_a_normalised_product_has_factors_of_norm_one_and_a_zero_factor_is_refused() -> None:
    model = nn.Sequential()
    model.add_module("q_proj", nn.Linear(2, 2, bias=False))
    nn.init.zeros_(model.get_parameter("q_proj.weight"))
    values = {"q_proj.lora_A.weight": torch.tensor([[3.0, 4.0]]), "q_proj.lora_B.weight": torch.tensor([[0.0], [2.0]])}
    lora.add_product(model, values, scale=2.0, normalise=True)
    torch.testing.assert_close(model.get_parameter("q_proj.weight").detach(), torch.tensor([[0.0, 0.0], [1.2, 1.6]]))
    values["q_proj.lora_B.weight"] = torch.zeros(2, 1)
    with pytest.raises(ValueError, match="q_proj: a past adapter of norm 0"):
        lora.add_product(model, values, scale=2.0, normalise=True)


def test_a_rank_above_the_matrix_and_targets_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"adapter\.rank 99 exceeds"):
        lora.attach(tiny_llama().model, rank=99, alpha=1, targets=TARGETS, seed=0)
    with pytest.raises(ValueError, match=r"adapter.targets \['c_attn'\] match no linear map"):
        lora.attach(tiny_llama().model, rank=1, alpha=1, targets=["c_attn"], seed=0)


def test_an_adapter_of_another_rank_is_refused_by_name() -> None:
    model = tiny_llama()
    lora.attach(model.model, rank=2, alpha=4, targets=TARGETS, seed=1)
    stored = lora.snapshot(model.model)
    lora.detach(model.model)
    lora.attach(model.model, rank=3, alpha=4, targets=TARGETS, seed=1)
    with pytest.raises(ValueError, match="lora_A"):
        lora.load(model.model, stored)
