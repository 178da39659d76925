"""One table of all methods, run through one list of promises."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from models import adapter as lora
from models.generative import GenerativeModel
from stages.checkpoint import ADAPTER, BACKBONE, KEPT, ROWS, fault_of, read_tensors, tensors_digest
from stages.commit import lineage_jobs, method_of
from stages.config import PROTOCOLS, Config, Protocol
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import evaluate_stage
from stages.fit import MICRO_TOKENS, Fit
from stages.jobs import Job
from stages.lineage import LEFT_OUT
from stages.method_config import BUILT_IN
from stages.methods.contract import Schedule
from stages.stage_examples import stage_examples
from stages.train import bare_model, folders_read, lineage_folders, restore_model, train_stage, training_log
from stages.workspace import Workspace, write_json
from tests import tiny
from tests.tiny import folder, job

METHODS = (
    "frozen",
    "single",
    "peso_paper",
    "peso_released",
    "peso_working",
    "cumulative_sum",
    "cumulative_normalised",
    "cumulative_normalised_latest",
    "cumulative_normalised_inherit",
    "cumulative_normalised_latest_inherit",
    "full_retrain",
    "full_finetune",
    "gems",
    "gems_no_null_space",
    "gems_carry",
    "galore",
    "pcgrad",
    "ortho_lora",
    "osf",
    "lora_moe",
)
WHOLE = ("full_finetune", "gems", "gems_no_null_space", "gems_carry", "galore", "osf", "lora_moe")
"""Methods whose checkpoint holds tensors of the stack, not a LoRA."""
ADDING = ("cumulative", "gems", "galore")
"""Methods whose checkpoint may hold only what its stage added."""
QUICK = {"training": {"first_epochs": 2, "epochs": 2}}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return tiny.checkerboard(tmp_path_factory.mktemp("board"))


def model_after(config: Config, workspace: Workspace, own: Job) -> GenerativeModel:
    return restore_model(config, workspace, load_dataset(config, workspace), own)


def probe(model: GenerativeModel) -> torch.Tensor:
    tokens = torch.arange(24).reshape(2, 12) % model.codes
    with torch.no_grad():
        return model.eval().logits(model.hidden(tokens))


def test_the_table_holds_every_kind_of_method() -> None:
    kinds = {name: str(settings.model_dump()["method"]) for name, settings in BUILT_IN.items()}
    assert {kinds[name] for name in METHODS} == set(kinds.values())


@pytest.mark.parametrize("method", ["pcgrad", "ortho_lora"])
def test_gradient_surgery_of_one_objective_is_single_bit_for_bit(method: str, board: Workspace) -> None:
    config = tiny.config(**QUICK)
    for name in ("single", method):
        train_stage(config, board, job(name, 1))
    single, own = (folder(config, board, job(name, 1)) for name in ("single", method))
    for name in (ADAPTER, ROWS):
        assert (single / name).read_bytes() == (own / name).read_bytes()


@pytest.mark.parametrize("method", METHODS)
def test_the_same_seed_gives_the_same_bytes_twice(method: str, tmp_path: Path) -> None:
    digests = []
    for copy in ("a", "b"):
        workspace = tiny.checkerboard(tmp_path / copy)
        config = tiny.config(**QUICK)
        done = train_stage(config, workspace, job(method, 2))
        place = folder(config, workspace, job(method, 2))
        digests.append({p.name: p.read_bytes() for p in place.glob("*.safetensors")})
        assert done.job == job(method, 2)
    assert digests[0] == digests[1]


@pytest.mark.parametrize(
    ("method", "stage", "rate"),
    [
        ("single", 0, "first_learning_rate"),
        ("single", 1, "learning_rate"),
        ("full_finetune", 1, "full_learning_rate"),
        ("osf", 1, "full_learning_rate"),
    ],
)
def test_a_run_that_diverges_names_the_rate_it_used(method: str, stage: int, rate: str, tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=2)
    train_stage(tiny.config(**QUICK), workspace, job(method, 0))
    config = tiny.config(training={**QUICK["training"], rate: 1e30})
    with pytest.raises(UserError, match=rf"became (nan|inf) .*; lower training\.{rate}, which is 1e\+30\. Nothing was"):
        train_stage(config, workspace, job(method, stage))


@pytest.mark.parametrize("method", METHODS)
def test_a_committed_stage_is_returned_and_never_trained_again(method: str, board: Workspace) -> None:
    config = tiny.config(**QUICK)
    first = train_stage(config, board, job(method, 1))
    steps: list[object] = []
    again = train_stage(config, board, job(method, 1), steps.append)
    assert again.reused
    assert again.digest == first.digest
    assert steps == []


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_only_what_the_method_trains_is_saved_and_the_rest_is_untouched(method: str, board: Workspace) -> None:
    config = tiny.config(**QUICK)
    train_stage(config, board, job(method, 2))
    stored = {path.name for path in folder(config, board, job(method, 2)).glob("*.safetensors")}
    whole = method in WHOLE
    kept = {KEPT} if method == "gems_carry" else set()
    assert stored == ({BACKBONE, ROWS} | kept if whole else {ADAPTER, ROWS})
    if not whole:
        base = read_tensors(folder(config, board, job("first", 0))).backbone
        dataset = load_dataset(config, board)
        model = bare_model(config, dataset, 0)
        lineage = [folder(config, board, part) for part in lineage_jobs(config, job(method, 2))]
        method_of(config, method).restore(model, lineage)
        lora.detach(model.stack)
        if not method.startswith("cumulative"):  # their base holds the frozen predecessors as well
            for name, value in model.stack.named_parameters():
                assert torch.equal(value, base[name]), name


@pytest.mark.parametrize("method", METHODS)
def test_a_model_is_put_together_from_what_its_method_says_it_reads(
    method: str, board: Workspace, tmp_path: Path
) -> None:
    config, own = tiny.config(**QUICK), job(method, 2)
    train_stage(config, board, own)
    folders = lineage_folders(config, board, load_dataset(config, board), own)
    needed = folders_read(config, own, folders)
    bare = Workspace(tmp_path / "bare")
    for place in (board.stages, board.catalogue, *needed):
        shutil.copytree(place, bare.root / place.relative_to(board.root))
    others = {place.name: tensors_digest(place) for place in folders if place not in needed}
    if others:
        with pytest.raises(UserError, match="no manifest; run `driftrec retrain`, or the command that trained it"):
            model_after(config, bare, own)
    write_json(bare.checkpoints / LEFT_OUT, others)
    assert torch.equal(probe(model_after(config, bare, own)), probe(model_after(config, board, own)))
    assert len(needed) == (1 if method == "frozen" else 3 if method.startswith(ADDING) else 2)


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_training_lowers_the_validation_loss(method: str, board: Workspace) -> None:
    config = tiny.config(training={"first_epochs": 6, "epochs": 6})
    train_stage(config, board, job(method, 1))
    log = training_log(config, board, load_dataset(config, board), job(method, 1))
    losses = [row["validation_loss"] for row in log["epochs"]]
    assert min(losses[1:]) < losses[0] - 0.1


@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_a_stage_without_usable_events_carries_the_model_over(method: str, tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=3)
    tiny.write_stage(workspace, 1, [])
    config = tiny.config(**QUICK)
    done = train_stage(config, workspace, job(method, 1))
    if method == "full_retrain":  # it has the stages before
        assert done.targets > 0
        return
    assert done.targets == 0
    if method != "cumulative_normalised_inherit":
        before = probe(model_after(config, workspace, job(method, 0)))
        after = probe(model_after(config, workspace, job(method, 1)))
        torch.testing.assert_close(after, before, atol=1e-5, rtol=0)
    result = evaluate_stage(config, workspace, job(method, 1), tested=1)
    assert result.queries == 0
    assert train_stage(config, workspace, job(method, 2)).targets > 0  # and the one after it trains


@pytest.mark.parametrize("method", METHODS)
def test_stage_zero_is_one_checkpoint_for_all(method: str, board: Workspace) -> None:
    config = tiny.config(**QUICK)
    train_stage(config, board, job(method, 0))
    assert folder(config, board, job(method, 0)) == folder(config, board, job("first", 0))


def test_frozen_rows_stay_bitwise_while_evolving_rows_move(board: Workspace) -> None:
    for token_rows, moves in (("freeze", False), ("evolve", True)):
        config = tiny.config(training={**QUICK["training"], "token_rows": token_rows})
        train_stage(config, board, job("single", 2))
        before = model_after(config, board, job("single", 0))
        after = model_after(config, board, job("single", 2))
        assert torch.equal(before.input_rows, after.input_rows) is not moves
        assert torch.equal(before.own_embedding, after.own_embedding)


def test_accumulated_micro_batches_give_the_same_adapter(tmp_path: Path) -> None:
    adapters = []
    for micro in (16, 4):
        workspace = tiny.checkerboard(tmp_path / str(micro))
        config = tiny.config(training={**QUICK["training"], "micro_batch_size": micro})
        train_stage(config, workspace, job("peso_working", 1))
        adapters.append(load_file(folder(config, workspace, job("peso_working", 1)) / ADAPTER))
    for name, value in adapters[0].items():
        torch.testing.assert_close(adapters[1][name], value, atol=2e-4, rtol=0)


def test_a_batch_of_many_tokens_is_read_in_pieces_and_a_small_one_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace, config = tiny.checkerboard(tmp_path), tiny.config(**QUICK)
    examples = stage_examples(config, load_dataset(config, workspace), job("single", 1), False, None)
    chosen = {"recommendation": np.arange(16)}
    assert examples.padded(chosen) == 16 * 7 * tiny.LEVELS  # of nine items, two are held out
    sizes = [
        [len(piece["recommendation"]) for piece in examples.micro_batches(chosen, size, tokens)]
        for size, tokens in ((None, 4096), (None, 120), (6, 120))
    ]
    assert sizes == [[16], [6, 5, 5], [6, 6, 4]]
    model = bare_model(config, load_dataset(config, workspace), 0).eval()
    gradients = []
    for tokens in (4096, 120):
        monkeypatch.setitem(MICRO_TOKENS, "cpu", tokens)
        model.zero_grad()
        for losses in Fit(config, model, lambda _: {}, examples, 0).losses(chosen):
            sum(losses.values()).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.grad is not None])
    for whole, pieces in zip(*gradients, strict=True):
        torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=1e-5)


def begun(config: Config, workspace: Workspace, method: str, stage: int) -> GenerativeModel:
    dataset = load_dataset(config, workspace)
    model = bare_model(config, dataset, 0)
    lineage = [folder(config, workspace, part) for part in lineage_jobs(config, job(method, stage - 1))]
    schedule = Schedule(steps=1, learning_rate=1e-3, warmup=0, weight_decay=0, clip_norm=1, seed=5)
    method_of(config, method).begin(model, lineage, schedule)
    return model


def test_cumulative_sum_starts_a_stage_exactly_at_the_previous_model(board: Workspace) -> None:
    config = tiny.config(**QUICK)
    for method, exact in (("cumulative_sum", True), ("cumulative_normalised", False)):
        train_stage(config, board, job(method, 2))
        before = probe(model_after(config, board, job(method, 1)))
        gap = (probe(begun(config, board, method, 2)) - before).abs().max()
        assert (float(gap) <= 1e-5) is exact, method


def test_past_adapters_of_cumulative_lora_are_never_written_again(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path)
    config = tiny.config(**QUICK)
    train_stage(config, workspace, job("cumulative_sum", 1))
    place = folder(config, workspace, job("cumulative_sum", 1))
    before = {path.name: path.read_bytes() for path in place.iterdir()}
    train_stage(config, workspace, job("cumulative_sum", 2))
    assert before == {path.name: path.read_bytes() for path in place.iterdir()}


def test_a_damaged_checkpoint_is_quarantined_and_trained_to_the_same_bytes(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path)
    config = tiny.config(**QUICK)
    train_stage(config, workspace, job("single", 1))
    place = folder(config, workspace, job("single", 1))
    good = (place / ADAPTER).read_bytes()
    (place / ADAPTER).write_bytes(good[:-1] + bytes([good[-1] ^ 1]))
    assert "altered" in str(fault_of(place))
    with pytest.raises(UserError, match="altered"):
        model_after(config, workspace, job("single", 1))
    assert not train_stage(config, workspace, job("single", 1)).reused
    assert (place / ADAPTER).read_bytes() == good
    assert len(list((workspace.root / "runs" / "quarantine").glob("*.reason.txt"))) == 1


@pytest.mark.parametrize("protocol", PROTOCOLS)
@pytest.mark.parametrize("method", [m for m in METHODS if m != "frozen"])
def test_changing_the_future_changes_no_checkpoint_of_the_past(method: str, protocol: Protocol, tmp_path: Path) -> None:
    stored = []
    for place in ("as it was", "changed"):
        workspace = tiny.checkerboard(tmp_path / place)
        if place == "changed":  # other events, users who come back, and a stage digest of its own
            tiny.write_stage(workspace, 2, [(f"s{n % 2}u00{n}", f"i{(3 * n) % 16:02d}") for n in range(10)] * 3)
            tiny.write_stage_manifest(workspace, 3, tag=", changed")
        config, own = tiny.config(**QUICK), Job(method, 0, protocol, 1)
        train_stage(config, workspace, own)
        stored.append({p.name: p.read_bytes() for p in folder(config, workspace, own).glob("*.safetensors")})
    assert stored[0] == stored[1]


def test_a_stage_after_one_that_moved_nothing_still_normalises(tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path)
    tiny.write_stage(workspace, 1, [])
    config = tiny.config(**QUICK)
    assert train_stage(config, workspace, job("cumulative_normalised", 2)).targets > 0
    assert evaluate_stage(config, workspace, job("cumulative_normalised", 2), tested=2).queries > 0
