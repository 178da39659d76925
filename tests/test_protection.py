"""GEMS in the loop: what it protects, where that is kept, and what a stage hands to the next."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.nn import Parameter, ParameterDict

from models.generative import GenerativeModel, TokenBatch
from models.input_moments import linear_maps
from regularizers.null_space import Protection
from stages.checkpoint import KEPT, read_tensors
from stages.config import Config
from stages.dataset import load_dataset
from stages.deltas import in_words, put, smallest
from stages.errors import UserError
from stages.jobs import Job
from stages.method_config import GemsConfig
from stages.methods.contract import Past
from stages.methods.gems_step import GemsStep
from stages.methods.protection import _warn, protections
from stages.past import past_of
from stages.search_examples import query_vocabulary
from stages.train import begin_stage, restore_model, train_stage, training_log
from stages.workspace import Workspace, read_json, write_json
from tests import searching, tiny
from tests.tiny import at_start, folder

QUICK = {"training": {"first_epochs": 2, "epochs": 2}}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return tiny.protecting(tmp_path_factory.mktemp("board"))


def job(stage: int, method: str = "gems") -> Job:
    return Job(method, 0, "same_stage", stage)


def at_end(config: Config, workspace: Workspace, own: Job) -> dict[str, Tensor]:
    """The stack's weights as the stage left them."""
    model = restore_model(config, workspace, load_dataset(config, workspace), own)
    return {name: value.detach() for name, value in model.stack.named_parameters()}


def test_a_stage_protects_the_inputs_of_the_stage_before_and_keeps_them_out_of_its_update(board: Workspace) -> None:
    config = tiny.config(**QUICK)
    model, past = at_start(config, board, job(2))
    before = {name: module.weight.detach().clone() for name, module in linear_maps(model.stack).items()}
    kept = protections(model, GemsConfig(), past)
    assert kept.keys() == before.keys()
    trained = at_end(config, board, job(2))
    for name, start in before.items():
        moved = trained[f"{name}.weight"] - start
        assert float(moved.norm()) > 1e-3
        assert float((moved @ kept[name].basis).norm()) <= 1e-4 * float(moved.norm()), name


def test_the_state_says_ranks_bytes_and_what_is_protected(board: Workspace) -> None:
    config = tiny.config(**QUICK)
    log = training_log(config, board, load_dataset(config, board), job(2))
    said = log["gems"]
    assert said["rank"] == 8
    assert said["single_objective"]
    assert said["objectives"] == ["recommendation"]
    stored = read_tensors(folder(config, board, job(2))).backbone
    assert said["checkpoint"]["as_delta"] == 14  # one basis all stage long
    assert said["checkpoint"]["whole"] == len(stored) - 2 * 14
    assert said["checkpoint"]["numbers"] < 0.8 * 2 * (4 * 32 * 32 + 3 * 64 * 32)
    one = said["protected"]["layers.0.self_attn.q_proj"]
    assert one["energy"] >= 0.95
    assert one["k_over_n"] == one["k"] / 32
    assert {"captured_norm/recommendation", "removed_share", "refresh_seconds", "state_bytes", "rate"} <= log[
        "training"
    ][0].keys()


def test_the_previous_stage_is_its_training_windows_without_padding(board: Workspace) -> None:
    config = tiny.config(**QUICK)
    past = past_of(config, board, load_dataset(config, board), job(2), None)
    batches = list(past.tokens[0]())
    assert sum(int(inside.sum()) for _, inside in batches) == 24 * (1 + 7 * 3 - 1)  # 7 of 9 items train
    again = list(past.tokens[0]())
    assert all(torch.equal(a.tokens, b.tokens) for (a, _), (b, _) in zip(batches, again, strict=True))


def test_what_is_protected_is_computed_once_and_verified_when_read(board: Workspace, tmp_path: Path) -> None:
    config = tiny.config(**QUICK)
    model, past = at_start(config, board, job(1))
    passes = itertools.count()

    def counted() -> object:
        next(passes)
        return past.tokens[0]()

    own = Past(tokens=[counted], folder=tmp_path)  # type: ignore[arg-type]
    first = protections(model, GemsConfig(), own)
    used = next(passes)
    second = protections(model, GemsConfig(), own)
    assert next(passes) == used + 3  # only to see that it is large enough, and to name it
    assert all(torch.equal(first[name].basis, second[name].basis) for name in first)
    assert first["layers.0.self_attn.q_proj"].basis is first["layers.0.self_attn.v_proj"].basis
    assert len(list(tmp_path.glob("*.safetensors"))) == 1
    protections(model, GemsConfig(k_value=0.9), own)
    with torch.no_grad():
        model.input_rows.add_(1e-3)
    protections(model, GemsConfig(), own)
    assert len(list(tmp_path.glob("*.safetensors"))) == 3
    next(tmp_path.glob("*.json")).unlink()  # a kill between the two files
    protections(model, GemsConfig(k_value=0.9), own)
    protections(model, GemsConfig(), own)
    for table in tmp_path.glob("*.json"):
        write_json(table, read_json(table) | {"key": "another"})
    with pytest.raises(UserError, match="not what its name says"):
        protections(model, GemsConfig(), own)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (GemsConfig(corpus="words.txt"), "`small` backbone reads no words"),
        (
            GemsConfig(corpus_tokens=1, k_rule="fixed", k_value=200),
            "inputs of layers.0.self_attn.q_proj: k_value is 200",
        ),
        (GemsConfig(k_value=0.9999999), "down_proj: nothing left to train: energy 1 protects all 64"),
    ],
)
def test_a_corpus_that_does_not_fit_is_refused(board: Workspace, settings: GemsConfig, message: str) -> None:
    model, past = at_start(tiny.config(**QUICK), board, job(1))
    with pytest.raises(ValueError, match=message):
        protections(model, settings, past)


def test_a_small_stage_is_helped_by_those_before_it_and_without_any_nothing_is_protected(
    board: Workspace, tmp_path: Path
) -> None:
    model, past = at_start(tiny.config(**QUICK), board, job(1))
    (whole,) = past.tokens

    def few() -> Iterator[tuple[TokenBatch, Tensor]]:
        return ((replace(b, tokens=b.tokens[:1]), m[:1]) for b, m in itertools.islice(whole(), 1))

    def both() -> Iterator[tuple[TokenBatch, Tensor]]:
        return itertools.chain(few(), whole())

    alone = protections(model, GemsConfig(), Past([whole], tmp_path))
    helped = protections(model, GemsConfig(), Past([few, lambda: iter(()), whole], tmp_path))
    joined = protections(model, GemsConfig(), Past([both], tmp_path))
    large = protections(model, GemsConfig(), Past([whole, few], tmp_path))
    for name, own in joined.items():
        assert torch.equal(helped[name].basis, own.basis)
        assert torch.equal(large[name].basis, alone[name].basis)  # a stage that is large enough is read alone
    assert any(not torch.equal(own.basis, alone[name].basis) for name, own in joined.items())
    with pytest.warns(UserWarning, match="hold fewer tokens than the 64 dimensions of an input; this stage protects"):
        assert protections(model, GemsConfig(), Past([few, few], tmp_path)) == {}
    with pytest.raises(ValueError, match="GEMS protects inputs from stage 1 on"):
        protections(model, GemsConfig(), None)


def test_nearly_everything_protected_is_warned_of(board: Workspace) -> None:
    model, past = at_start(tiny.config(**QUICK), board, job(1))
    with pytest.warns(UserWarning, match="protects 97% of the inputs of layers"):
        protections(model, GemsConfig(k_rule="fixed", k_value=31), past)


def test_carried_state_goes_on_where_the_stage_before_stopped(board: Workspace) -> None:
    config = tiny.config(**QUICK)
    train_stage(config, board, job(2, "gems_carry"))
    assert (folder(config, board, job(1, "gems_carry")) / KEPT).exists()
    assert not (folder(config, board, job(1)) / KEPT).exists()
    steps = {stage: read_steps(folder(config, board, job(stage, "gems_carry")) / KEPT) for stage in (1, 2)}
    assert steps[1] == 4  # two epochs of 24 windows in batches of 16
    assert steps[2] == 8
    stored = load_file(folder(config, board, job(1, "gems_carry")) / KEPT)
    beginning = begin_stage(config, board, load_dataset(config, board), job(2, "gems_carry")).fit.step
    assert isinstance(beginning, GemsStep)
    for name, value in beginning.tensors().items():
        if name.startswith("stack"):
            assert torch.equal(value, stored[name]), name
    assert any(float(value.norm()) > 0 for name, value in stored.items() if name.endswith("first"))
    assert all(all(due) for due in beginning._due())  # the first step turns every basis


def read_steps(file: Path) -> int:
    return int(load_file(file)["stack0.steps"][0])


def test_protected_outputs_drift_less_at_equal_weight_change_and_the_loss_still_falls(tmp_path: Path) -> None:
    """Acceptance test 13 on a stage whose users walk the ring the other way round, on seen and on unseen windows."""
    workspace, unseen = (walks(tmp_path / name, seed) for name, seed in (("seen", 0), ("unseen", 1)))
    training = {"first_epochs": 12, "epochs": 14, "patience": 14, "token_rows": "freeze", "full_learning_rate": 4e-4}
    config = tiny.config(training=training)
    own = {
        "held": GemsConfig(k_value=0.99, weight_decay="none"),
        "free": GemsConfig(null_space="off"),
    }
    config = config.model_copy(update={"methods": own})
    drift: dict[str, list[float]] = {}
    for method in own:
        train_stage(config, workspace, job(1, method))
        start, past = at_start(config, workspace, job(1, method))
        other = without(windows(past), past_of(config, unseen, load_dataset(config, unseen), job(1, method), None))
        assert len(windows(other)) > 50
        trained = at_end(config, workspace, job(1, method))
        drift[method] = [output_change(start, one, trained) for one in (past, other)]
        log = training_log(config, workspace, load_dataset(config, workspace), job(1, method))
        assert len(log["training"]) >= 100
        assert log["best_epoch"] == 14  # the weights are those of all steps
        losses = [row["validation_loss"] for row in log["epochs"]]
        assert losses[-1] < losses[0] - 0.05
    for held, free in zip(drift["held"], drift["free"], strict=True):
        assert held <= 0.3 * free, drift


def walks(root: Path, seed: int) -> Workspace:
    """The checkerboard, but users of stage 0 sometimes take two steps at once; another seed: others like them."""
    workspace = tiny.checkerboard(root, stages=2, users=128)
    generator = torch.Generator().manual_seed(seed)
    steps = 1 + (torch.rand(128, 9, generator=generator) < 0.3).long()
    places = torch.arange(128)[:, None] + steps.cumsum(dim=1)
    rows = [(f"s0u{u:03d}", f"i{item % tiny.ITEMS:02d}") for u, own in enumerate(places.tolist()) for item in own]
    tiny.write_stage(workspace, 0, rows)
    return workspace


def windows(past: Past) -> set[tuple[int, ...]]:
    """Distinct rows of tokens."""
    return {tuple(row) for batch, _ in past.tokens[0]() for row in batch.tokens.tolist()}


def without(seen: set[tuple[int, ...]], past: Past) -> Past:
    """The rows that are not among `seen`."""

    def tokens() -> Iterator[tuple[TokenBatch, Tensor]]:
        for batch, inside in past.tokens[0]():
            fresh = torch.tensor([tuple(row) not in seen for row in batch.tokens.tolist()])
            yield replace(batch, tokens=batch.tokens[fresh]), inside[fresh]

    return replace(past, tokens=[tokens])


def output_change(model: GenerativeModel, past: Past, trained: dict[str, Tensor]) -> float:
    """Mean over maps of ‖ΔW X‖ / (‖ΔW‖ ‖X‖) on the previous stage's inputs."""
    inputs: dict[str, list[Tensor]] = {}
    maps = linear_maps(model.stack)
    handles = [
        module.register_forward_pre_hook(lambda _, own, name=name: inputs.setdefault(name, []).append(own[0]))
        for name, module in maps.items()
    ]
    with torch.no_grad():
        for batch, inside in past.tokens[0]():
            model.eval().hidden(batch.tokens)
            for held in inputs.values():
                held[-1] = held[-1][inside]
    for handle in handles:
        handle.remove()
    changes = []
    for name, module in maps.items():
        rows, moved = torch.cat(inputs[name]), trained[f"{name}.weight"] - module.weight.detach()
        changes.append(float((rows @ moved.T).norm() / (moved.norm() * rows.norm())))
    return sum(changes) / len(changes)


@pytest.fixture(scope="module")
def ring(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return searching.ring(tmp_path_factory.mktemp("ring"))


@pytest.mark.parametrize("method", ["gems", "gems_one_subspace", "pcgrad", "ortho_lora"])
def test_search_and_recommendation_train_apart_in_one_model(method: str, ring: Workspace) -> None:
    own = {"quick": GemsConfig(gate_warmup=2, refresh_every=5)}
    config = tiny.config(training={"first_epochs": 4, "epochs": 5, "patience": 5}).model_copy(update={"methods": own})
    name = "quick" if method == "gems" else method
    train_stage(config, ring, job(2, name))
    log = training_log(config, ring, load_dataset(config, ring), job(2, name))
    first, last = log["training"][0], log["training"][-1]
    assert {"ce/search", "ce/recommendation"} <= last.keys()
    assert log["epochs"][-1]["validation_loss"] < log["epochs"][0]["validation_loss"]
    if method == "gems":
        assert log["gems"]["objectives"] == ["search", "recommendation"]
        assert not log["gems"]["single_objective"]
        assert (first["alpha/search"], first["alpha/recommendation"]) == (0.5, 0.5)
        assert {"hypergradient/search", "alpha_entropy", "overlap/shared_search", "cosine_in_shared"} <= last.keys()
        assert last["update_over_shared"] > 1.02
    elif method == "gems_one_subspace":
        assert last["update_over_shared"] == pytest.approx(1)
    else:
        assert 0 <= last["conflicts"] <= 1


def test_queries_of_the_stage_before_are_protected_too(ring: Workspace) -> None:
    config = tiny.config(**QUICK)
    dataset = load_dataset(config, ring)
    past = past_of(config, ring, dataset, job(2), query_vocabulary(config, dataset))
    words = sum(int((batch.tokens > 12).sum()) for batch, _ in past.tokens[0]())  # 9 codes, the opening, two markers
    assert words > 100
    assert any(batch.visible is not None for batch, _ in past.tokens[0]())
    train_stage(config, ring, job(0))
    model, past = at_start(config, ring, job(1))
    assert protections(model, GemsConfig(), past).keys() == linear_maps(model.stack).keys()


def test_a_limit_below_what_an_input_needs_is_told_apart_from_too_small_a_log(board: Workspace) -> None:
    model, past = at_start(tiny.config(**QUICK), board, job(1))
    one = TokenBatch(torch.zeros(1, 12, dtype=torch.int64), torch.empty(0), torch.empty(0))
    short = replace(past, tokens=[lambda: iter(20 * [(one, torch.ones(1, 12, dtype=torch.bool))])])
    with pytest.raises(ValueError, match=r"corpus_tokens = 20 is below the 64 dimensions of an input"):
        protections(model, GemsConfig(corpus_tokens=20), short)


def test_one_loud_direction_that_satisfies_the_rule_is_worth_a_warning() -> None:
    loud = Protection(torch.eye(200, 1), 0.997)
    with pytest.warns(UserWarning, match=r"protects 1 of the 200 input directions of one, which hold 99.7%"):
        _warn(loud, "one", GemsConfig())
    with pytest.warns(UserWarning, match="protects 95% of the inputs of one; little is left to train"):
        _warn(Protection(torch.eye(200, 190), 0.99), "one", GemsConfig())


def test_a_move_is_stored_whole_or_as_factors_whichever_is_smaller() -> None:
    generator = torch.Generator().manual_seed(0)
    before = {name: torch.randn(20, 12, generator=generator) for name in ("thin", "full", "still")}
    thin = torch.randn(20, 3, generator=generator) @ torch.randn(3, 12, generator=generator) / 100
    after = {"thin": before["thin"] + thin, "full": torch.randn(20, 12, generator=generator), "still": before["still"]}
    after |= {"norm": torch.ones(4), "turned": (before["thin"] + thin).T}
    before |= {"turned": before["thin"].T}
    stored = smallest(before, after)
    assert {name: tuple(value.shape) for name, value in stored.items()} == {
        "thin.left": (20, 3),
        "thin.right": (3, 12),
        "full": (20, 12),
        "still.left": (20, 1),
        "still.right": (1, 12),
        "norm": (4,),
        "turned.left": (12, 3),
        "turned.right": (3, 20),
    }
    module = ParameterDict({name: Parameter(before.get(name, torch.zeros(4)).clone()) for name in after})
    put(module, stored)
    for name, value in after.items():
        torch.testing.assert_close(module[name].detach(), value, rtol=0, atol=1e-6)
    assert in_words(stored) == {"whole": 2, "as_delta": 3, "numbers": 240 + 4 + 96 + 96 + 32}
