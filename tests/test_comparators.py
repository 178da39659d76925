"""LoRA-MoE and PEFT's OSF: what mixes, what balances, what is preserved."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from models import mixture, orthogonal
from models.effective import effective_weights
from models.mixture import MixtureLinear
from regularizers.balance import localized_balance
from stages.analysis.conflict import applied_updates, batch_pairs
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.jobs import Job
from stages.method_config import LoraMoeConfig, OsfConfig
from stages.methods.contract import Schedule, SharedLosses
from stages.methods.lora_moe import mean_balance, moe_step
from stages.search_examples import query_vocabulary
from stages.stage_examples import stage_examples
from stages.stored import stored
from stages.train import begin_stage, put_together, restore_model, train_stage, training_log
from tests import searching, tiny

QUICK = {"training": {"first_epochs": 2, "epochs": 2}}
JOB = Job("lora_moe", 0, "same_stage", 1)


def small(generator: torch.Generator, experts: int = 2) -> MixtureLinear:
    one = MixtureLinear(nn.Linear(3, 4, bias=False), experts, 2, alpha=4.0, generator=generator)
    with torch.no_grad():
        one.lora_B.normal_(generator=generator)
    return one


def test_a_mixture_is_the_sum_of_its_experts_weighted_by_the_router() -> None:
    one = small(torch.Generator().manual_seed(0))
    inputs = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(1))
    expected = one.base_layer(inputs)
    weights = (inputs @ one.router.T).softmax(dim=-1)
    for expert in range(2):
        expected = expected + 2.0 * weights[..., expert, None] * (inputs @ one.lora_A[expert].T @ one.lora_B[expert].T)
    torch.testing.assert_close(one(inputs), expected)
    with torch.no_grad():
        one.router.zero_()
    even = inputs @ (one.base_layer.weight + one.get_delta_weight()).T
    torch.testing.assert_close(one(inputs), even)


def everywhere(rows: int, tokens: int) -> Callable[[], Tensor]:
    return lambda: torch.ones(rows, tokens, dtype=torch.bool)


def test_a_fresh_mixture_changes_nothing_and_notes_its_routing_only_when_asked() -> None:
    one = MixtureLinear(nn.Linear(3, 4), 2, 2, alpha=4.0, generator=torch.Generator().manual_seed(0))
    inputs = torch.ones(2, 5, 3)
    torch.testing.assert_close(one(inputs), one.base_layer(inputs))
    assert one.routed == []
    one.inside = everywhere(2, 5)
    with torch.no_grad():
        one(inputs)
    assert one.routed == []
    one(inputs)
    (mass,) = one.routed
    torch.testing.assert_close(mass.sum(dim=1), torch.ones(2))


@pytest.mark.parametrize("even", [True, False])
def test_routing_is_balanced_whatever_the_lengths_and_the_padding(even: bool) -> None:
    one = small(torch.Generator().manual_seed(3))
    if even:
        with torch.no_grad():
            one.router.zero_()
    settings = LoraMoeConfig(experts=2, skew=0.0)
    inputs = torch.randn(2, 30, 3, generator=torch.Generator().manual_seed(1))
    inputs[1] = inputs[1, 0]

    def balance(searched: Tensor, own: int) -> float:
        for rows, tokens in ((inputs[:1], 30), (searched, own)):
            one.inside = lambda rows=rows, tokens=tokens: torch.arange(rows.shape[1])[None] < tokens
            one(rows)
        return float(mean_balance([one], ["recommendation", "search"], settings).detach())

    found = balance(inputs[1:, :8], 8)
    assert found == pytest.approx(0.0, abs=1e-6) if even else found > 0.01
    assert balance(inputs[1:], 30) == pytest.approx(found)  # the same token more often
    padded = inputs[1:].clone()
    padded[:, 8:] = 9.0
    assert balance(padded, 8) == pytest.approx(found)


def test_a_model_knows_which_tokens_of_the_batch_it_reads_are_padding(tmp_path: Path) -> None:
    config, workspace = tiny.config(**QUICK), searching.ring(tmp_path, stages=2)
    train_stage(config, workspace, replace(JOB, stage=0))
    fit = begin_stage(config, workspace, load_dataset(config, workspace), JOB).fit
    fit.model.train()
    mixtures = [one for one in fit.model.modules() if isinstance(one, MixtureLinear)]
    for chosen in fit.batches(1):
        for losses in fit.losses(chosen):
            for one in mixtures:
                assert len(one.routed) == len(losses)
                for mass in one.routed:
                    torch.testing.assert_close(mass.sum(dim=1), torch.ones(len(mass)))
                one.routed.clear()
    part = fit.examples.parts["search"]
    batch = part.batch(part.training, np.arange(len(part.training)))
    fit.model.loss(batch)
    assert not bool(part.inside(batch).all())
    assert torch.equal(fit.model.inside(), part.inside(batch))


def test_localized_balance_by_hand() -> None:
    even = torch.ones(2, 2)
    assert float(localized_balance(even, [0, 1], [0, 1], 0.0, "repaired")) == 0.0
    mass = torch.tensor([[3.0, 1.0], [1.0, 3.0]])  # each expert takes three parts of its own kind
    assert float(localized_balance(mass, [0, 1], [0, 1], 0.0, "repaired")) == pytest.approx(1 / 4)
    assert float(localized_balance(mass, [0, 1], [0, 1], 0.5, "repaired")) == pytest.approx(0.0)  # 3/1.5 = 1/0.5
    assert float(localized_balance(mass, [1, 0], [0, 1], 0.5, "as_printed")) == pytest.approx(0.0)  # 3·0.5 = 1·1.5
    assert float(localized_balance(mass, [0, 1], [0, 1], 0.5, "as_printed")) == pytest.approx((2.0 / 2.5) ** 2)
    for wrong, message in (((0.0, "other"), "balance is 'other'"), ((1.0, "repaired"), "skew is 1")):
        with pytest.raises(ValueError, match=message):
            localized_balance(mass, [0, 1], [0, 1], *wrong)
    with pytest.raises(ValueError, match=r"mass is \(2, 2\) for 3 experts"):
        localized_balance(mass, [0, 1, 0], [0, 1], 0.0, "repaired")


def routed_share(weight: float, how: str, objectives: tuple[str, ...] = ("recommendation", "search")) -> float:
    """Share of the searches' routing that the expert meant for searches gets after training on the balance alone."""
    generator = torch.Generator().manual_seed(3)
    one = small(generator)
    one.inside = everywhere(1, 4)
    inputs = {"recommendation": torch.tensor([1.0, 0.0, 0.0]), "search": torch.tensor([0.0, 1.0, 0.0])}
    settings = LoraMoeConfig(experts=2, balance_weight=weight, skew=0.5, balance=how)  # pyright: ignore[reportArgumentType]
    schedule = Schedule(steps=60, learning_rate=0.2, warmup=0, weight_decay=0, clip_norm=1e9, seed=0)
    step = moe_step([one.router], [one], settings, schedule)

    def losses() -> SharedLosses:
        found: dict[str, Tensor] = {name: 0 * one(inputs[name].expand(1, 4, 3)).sum() for name in objectives}
        return SharedLosses(found, dict.fromkeys(found, 1 / len(found)))

    logs: dict[str, float] = {}
    for _ in range(60):
        logs = step([losses()])
    assert logs["ce"] == 0.0  # the balance is trained on and logged, but no part of the loss that is compared
    return float((inputs["search"] @ one.router.T).softmax(dim=-1)[1].detach())


def test_repaired_balance_gives_an_expert_its_own_kind_and_the_printed_one_the_other() -> None:
    assert routed_share(1.0, "repaired") == pytest.approx(0.75, abs=0.02)
    assert routed_share(1.0, "as_printed") == pytest.approx(0.25, abs=0.02)


def test_one_objective_alone_is_balanced_over_all_experts_its_own_first() -> None:
    share = routed_share(1.0, "repaired", ("search",))
    assert share / (1 - share) == pytest.approx(1.5 / 0.5, rel=0.1)  # (1 + δ) to (1 − δ)


def test_a_mixture_goes_on_where_the_stage_before_ended(tmp_path: Path) -> None:
    config, workspace = tiny.config(**QUICK), searching.ring(tmp_path)
    train_stage(config, workspace, replace(JOB, stage=2))
    dataset = load_dataset(config, workspace)
    before = restore_model(config, workspace, dataset, JOB)
    start = begin_stage(config, workspace, dataset, replace(JOB, stage=2)).fit.model
    for (name, a), (other, b) in zip(before.stack.named_parameters(), start.stack.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    moved = [p for name, p in before.stack.named_parameters() if name.endswith("lora_B")]
    assert moved
    assert all(bool(p.any()) for p in moved)
    rows = training_log(config, workspace, dataset, JOB)["training"]
    assert all(row["balance"] >= 0 for row in rows)
    assert {"ce/search", "ce/recommendation"} <= rows[0].keys()


def test_osf_keeps_the_top_singular_triples_of_the_weights_a_stage_starts_from() -> None:
    stack = nn.Sequential()
    stack.add_module("q_proj", nn.Linear(6, 10, bias=False))
    start = stack.q_proj.weight.detach().clone()  # pyright: ignore[reportAttributeAccessIssue, reportCallIssue]
    layers = orthogonal.attach(stack, ["q_proj"], 0.5)
    inputs = torch.randn(20, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(stack(inputs), inputs @ start.T, atol=1e-5, rtol=0)
    torch.testing.assert_close(orthogonal.merged(layers)["q_proj.weight"], start)
    optimizer = torch.optim.SGD(orthogonal.parameters(layers), lr=0.05)
    for _ in range(20):
        optimizer.zero_grad()
        (stack(inputs) - 1).square().mean().backward()
        optimizer.step()
    moved = orthogonal.merged(layers)["q_proj.weight"] - start
    left, _, right = torch.linalg.svd(start, full_matrices=False)
    assert float(moved.norm()) > 0.01
    # SGD keeps what PEFT's hooks project: nothing moves between preserved directions.
    assert float((left[:, :3].T @ moved @ right[:3].T).norm()) <= 1e-4 * float(moved.norm())
    torch.testing.assert_close(effective_weights(stack)["q_proj"], start + moved)


def test_osf_tests_exactly_what_it_stored_and_says_what_it_kept(tmp_path: Path) -> None:
    config, workspace = tiny.config(**QUICK), searching.ring(tmp_path, stages=2)
    job = replace(JOB, method="osf")
    train_stage(config, workspace, job)
    dataset = load_dataset(config, workspace)
    log = training_log(config, workspace, dataset, job)
    assert set(log["osf"]["preserved"].values()) == {16}
    first, second = (restore_model(config, workspace, dataset, job) for _ in range(2))
    for (name, a), (_, b) in zip(first.stack.named_parameters(), second.stack.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    start = restore_model(config, workspace, dataset, replace(job, stage=0))
    moved = {
        name
        for name, w in effective_weights(first.stack).items()
        if not torch.equal(w, effective_weights(start.stack)[name])
    }
    assert moved == set(effective_weights(start.stack))


@pytest.mark.parametrize("method", ["osf", "lora_moe"])
def test_what_each_objective_adds_to_a_comparators_step_is_measured(method: str, tmp_path: Path) -> None:
    config, workspace = tiny.config(**QUICK), searching.ring(tmp_path, stages=2)
    job = replace(JOB, method=method)
    train_stage(config, workspace, job)
    dataset = load_dataset(config, workspace)
    examples = stage_examples(config, dataset, job, False, query_vocabulary(config, dataset))
    pairs = batch_pairs(examples, 1, 4, seed=0)
    (found,) = next(applied_updates(config, workspace, dataset, job, pairs)).values()  # no path of each objective's own
    assert set(found) == {"recommendation", "search"}
    assert any(bool(move.any()) for move in found["search"][0].values())


def test_settings_that_leave_nothing_are_told(tmp_path: Path) -> None:
    workspace = searching.ring(tmp_path, stages=2)
    methods = {
        "all": OsfConfig(preserved=0.01),
        "wide": LoraMoeConfig(rank=40),
        "nowhere": LoraMoeConfig(targets=("x",)),
    }
    config = tiny.config(**QUICK).model_copy(update={"methods": methods})
    for name, message in (
        ("all", "keeps 0 of the 32"),
        ("wide", "rank 40 exceeds"),
        ("nowhere", "match no linear map"),
    ):
        with pytest.raises(UserError, match=f"^method {name}, stage 1: .*{message}") as caught:
            train_stage(config, workspace, replace(JOB, method=name))
        assert "adapter" not in str(caught.value)


def test_a_mixture_that_does_not_fit_leaves_stage_0_alone_and_is_told_later_as_a_mistake(tmp_path: Path) -> None:
    workspace = searching.ring(tmp_path, stages=2)
    train_stage(tiny.config(**QUICK), workspace, JOB)
    dataset = load_dataset(tiny.config(**QUICK), workspace)
    moe = tiny.config(**QUICK).model_copy(update={"methods": {"lora_moe": LoraMoeConfig(rank=40)}})
    frozen = restore_model(moe, workspace, dataset, Job("frozen", 0, "same_stage", 0))
    start = restore_model(moe, workspace, dataset, replace(JOB, stage=0))
    for (name, a), (other, b) in zip(start.named_parameters(), frozen.named_parameters(), strict=True):
        assert name == other
        assert torch.equal(a, b), name
    found = stored(tiny.config(**QUICK), workspace, dataset, JOB)
    with pytest.raises(UserError, match=r"method lora_moe, stage 1: .*rank 40 exceeds .*give at most 32"):
        put_together(replace(found, config=moe), dataset, JOB)


def test_a_mixtures_tensors_are_named_after_their_maps() -> None:
    stack = nn.Sequential()
    stack.add_module("up_proj", nn.Linear(6, 10))
    found = mixture.attach(stack, 2, 2, 4.0, ["up_proj"], seed=0)
    assert set(mixture.matrices(found)) == {"up_proj.lora_A", "up_proj.lora_B", "up_proj.router"}
    assert set(effective_weights(stack)) == {"up_proj"}
