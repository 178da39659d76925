"""Packed linear maps are the same function as plain ones, and stand in wherever a model only answers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from copy import deepcopy
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from models import packed
from models.backbone import small_backbone
from models.generative_recommender import GenerativeRecommender
from models.mixture import MixtureLinear, attach
from models.packed import PackedLinear
from stages.dataset import load_dataset
from stages.evaluate import recommender
from stages.jobs import Job
from stages.train import train_stage
from tests import tiny

CPU = torch.device("cpu")
here = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this torch was built without oneDNN")


@here
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 7), (24, 40), (192, 512)])
def test_a_packed_map_is_the_plain_one_for_any_number_of_rows(shape: tuple[int, int], bias: bool) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(*shape, bias=bias)
    one = PackedLinear(plain)
    with torch.inference_mode():
        for rows in ((1,), (3, 1), (5, 20), (700,)):
            x = torch.randn(*rows, shape[0])
            torch.testing.assert_close(one(x), plain(x), rtol=1e-5, atol=1e-5)


@here
def test_packing_leaves_no_plain_map_and_the_states_of_the_stack() -> None:
    stack = small_backbone(32, 2, 2, 48, seed=3).stack.eval()
    attach(stack, experts=2, rank=2, alpha=4.0, targets=["q_proj"], seed=0)
    with torch.no_grad():
        for module in stack.modules():
            if isinstance(module, MixtureLinear):
                module.lora_B.normal_()
    other = deepcopy(stack)
    packed.pack(other)
    kinds = [type(module) for module in other.modules()]
    assert kinds.count(PackedLinear) == 2 * 7
    assert nn.Linear not in kinds
    vectors = torch.randn(3, 9, 32)
    with torch.inference_mode():
        expected, found = (one(inputs_embeds=vectors).last_hidden_state for one in (stack, other))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@here
def test_threads_that_rank_beside_each_other_share_one_packed_map() -> None:
    torch.manual_seed(1)
    one = PackedLinear(nn.Linear(192, 512))
    inputs = [torch.randn(320, 192) for _ in range(16)]

    def answered(x: torch.Tensor) -> torch.Tensor:
        with torch.inference_mode():
            return one(x)

    alone = [answered(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        assert all(map(torch.equal, pool.map(answered, inputs), alone))


def test_maps_are_packed_where_it_was_measured_to_gain_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    for vendor, flags, wanted in (
        ("AuthenticAMD", {"avx2", "avx512f"}, torch.backends.mkldnn.is_available()),
        ("AuthenticAMD", {"avx2"}, False),
        ("GenuineIntel", {"avx2", "avx512f"}, False),
        (None, set(), False),
    ):
        monkeypatch.setattr("models.processor.told", lambda key, vendor=vendor: {"vendor_id": vendor}[key])
        monkeypatch.setattr("models.processor.features", lambda flags=flags: flags)
        assert packed.gains(CPU) is wanted
        assert not packed.gains(torch.device("cuda"))
    # A torch without these operators multiplies as before.
    monkeypatch.setattr("models.processor.told", lambda _: "AuthenticAMD")
    monkeypatch.setattr("models.processor.features", lambda: {"avx512f"})
    monkeypatch.setattr("models.packed._OPERATORS", ("no_such_operator",))
    assert not packed.gains(CPU)


@here
@pytest.mark.parametrize("method", ["single", "lora_moe"])
def test_a_recommender_gives_the_same_list_with_packed_maps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    board = tiny.checkerboard(tmp_path / "board")
    config = tiny.config(backbone={"precision": "float32"})
    job = Job(method, 0, "same_stage", 1)
    for stage in (0, 1):
        train_stage(config, board, replace(job, stage=stage))
    dataset = load_dataset(config, board)
    histories = [np.arange(length, dtype=np.int64) % 5 for length in (1, 4, 9)]
    found = []
    for gains in (False, True):
        monkeypatch.setattr("models.packed.gains", lambda _, gains=gains: gains)
        one = recommender(config, board, dataset, job)
        assert isinstance(one, GenerativeRecommender)
        assert any(isinstance(module, PackedLinear) for module in one.model.modules()) is gains
        found.append(one.recommend(histories, 5))
    plain, other = found
    np.testing.assert_allclose(other.scores, plain.scores, atol=1e-4)
    apart = np.abs(np.diff(plain.scores, axis=1)) > 1e-4
    assert apart.any()
    clear = np.pad(apart, ((0, 0), (1, 0)), constant_values=True) & np.pad(apart, ((0, 0), (0, 1)))
    np.testing.assert_array_equal(other.items[clear], plain.items[clear])
