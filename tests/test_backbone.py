"""A pretrained backbone from a local folder goes the same way as `small`; its own vocabulary is never touched."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

from models.backbone import compute_device, pretrained_backbone, small_backbone, wants_bfloat16
from models.generative import GenerativeModel, TokenBatch
from stages.checkpoint import ADAPTER, BACKBONE, ROWS
from stages.commit import checkpoint_folder
from stages.config import Config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import evaluate_stage
from stages.jobs import Job
from stages.train import restore_model, train_stage
from stages.workspace import Workspace, read_json
from tests import tiny

METHODS = ("frozen", "single", "peso", "cumulative_sum", "full_retrain", "full_finetune", "gems")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("backbone") / "tiny-llama"
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=50, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, bos_token_id=1
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def settings(folder: Path, **backbone: object) -> Config:
    return tiny.config(
        backbone={"path": str(folder), **backbone}, training={"first_epochs": 2, "epochs": 2, "batch_size": 16}
    )


@pytest.mark.parametrize("method", METHODS)
def test_every_method_trains_and_recommends_on_a_pretrained_backbone(
    method: str, pretrained: Path, tmp_path: Path
) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=3)
    config = settings(pretrained)
    job = Job(method, 0, "same_stage", 2)
    train_stage(config, workspace, job)
    first = checkpoint_folder(config, workspace, load_dataset(config, workspace), Job("first", 0, "same_stage", 0))
    assert {path.name for path in first.glob("*.safetensors")} == {ADAPTER, ROWS}  # never a copy of the backbone
    last = checkpoint_folder(config, workspace, load_dataset(config, workspace), job)
    assert (last / BACKBONE).exists() is (method in ("full_finetune", "gems"))
    assert evaluate_stage(config, workspace, job, tested=2).queries == 24


def test_loading_a_backbone_draws_no_bar(pretrained: Path) -> None:
    code = (
        "import sys; from flows.environment import set_defaults; set_defaults(); "
        "from models.backbone import pretrained_backbone; pretrained_backbone(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(pretrained)], capture_output=True, text=True, check=True)
    assert done.stdout + done.stderr == ""


def test_rows_outside_the_semantic_ids_never_change(pretrained: Path, tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path, stages=2)
    config = settings(pretrained)
    before = pretrained_backbone(str(pretrained))
    for method in ("single", "full_finetune"):
        job = Job(method, 0, "same_stage", 1)
        train_stage(config, workspace, job)
        model = restore_model(config, workspace, load_dataset(config, workspace), job)
        own = before.stack.get_input_embeddings().weight
        assert torch.equal(model.own_embedding, own)  # pyright: ignore[reportArgumentType]


def test_other_weights_under_the_same_path_are_another_commit(pretrained: Path, tmp_path: Path) -> None:
    workspace = tiny.checkerboard(tmp_path / "board", stages=1)
    folder = shutil.copytree(pretrained, tmp_path / "copy")
    config = settings(folder)
    dataset = load_dataset(config, workspace)
    before = checkpoint_folder(config, workspace, dataset, Job("first", 0, "same_stage", 0))
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert checkpoint_folder(config, workspace, dataset, Job("first", 0, "same_stage", 0)) != before


def test_the_full_vocabulary_takes_its_share_of_the_probability(pretrained: Path) -> None:
    backbone = pretrained_backbone(str(pretrained))
    batch = TokenBatch(torch.tensor([[6, 0, 3]]), torch.tensor([0, 1, 2]), torch.tensor([0, 3, 5]))
    losses = {}
    for full in (False, True):
        model = GenerativeModel(backbone, codes=6, seed=0, full_vocabulary=full, dropout=0.0).eval()
        losses[full] = float(model.loss(batch).detach())
        assert model.logits(torch.zeros(1, 32)).shape == (1, 6 + 50 * full)
    assert losses[True] > losses[False]


def test_small_has_no_vocabulary_to_widen_to() -> None:
    with pytest.raises(ValueError, match=r'backbone\.vocabulary = "full" needs a pretrained backbone'):
        tiny.config(backbone={"vocabulary": "full"})


def test_a_folder_without_safetensors_and_an_encoder_decoder_are_refused(tmp_path: Path, board: Workspace) -> None:
    with pytest.raises(UserError, match=r"backbone\.path = .* cannot be loaded"):
        train_stage(settings(tmp_path / "nowhere"), board, Job("single", 0, "same_stage", 0))
    config = T5Config(vocab_size=20, d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, decoder_start_token_id=0)
    T5ForConditionalGeneration(config).save_pretrained(tmp_path / "t5")
    with pytest.raises(UserError, match=r"backbone\.path"):
        train_stage(settings(tmp_path / "t5"), board, Job("single", 0, "same_stage", 0))


def test_pickled_weights_are_never_read(pretrained: Path, tmp_path: Path, board: Workspace) -> None:
    folder = tmp_path / "pickled"
    folder.mkdir()
    (folder / "config.json").write_bytes((pretrained / "config.json").read_bytes())
    marker = tmp_path / "ran"
    (folder / "pytorch_model.bin").write_bytes(b"cos\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(UserError, match="a pickle, which can run code, and is never read"):
        train_stage(settings(folder), board, Job("single", 0, "same_stage", 0))
    assert not marker.exists()


@pytest.fixture
def board(tmp_path: Path) -> Workspace:
    return tiny.checkerboard(tmp_path / "board", stages=1)


def test_small_is_the_same_for_the_same_seed_and_leaves_the_global_generator_alone() -> None:
    torch.manual_seed(3)
    before = torch.random.get_rng_state()
    one, two, other = (small_backbone(16, 1, 2, 32, seed).stack.state_dict() for seed in (5, 5, 6))
    assert torch.equal(before, torch.random.get_rng_state())
    name = "layers.0.mlp.up_proj.weight"
    assert torch.equal(one[name], two[name])
    assert not torch.equal(one[name], other[name])


def test_precision_is_as_told(monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert wants_bfloat16("bfloat16", cpu)
    assert not wants_bfloat16("float32", cpu)
    for flags, wanted in (({"avx2"}, False), ({"amx_bf16"}, True), ({"avx512_bf16"}, True)):
        monkeypatch.setattr("models.processor.features", lambda flags=flags: flags)
        assert wants_bfloat16("auto", cpu) is wanted


def test_bfloat16_trains_float32_weights(board: Workspace) -> None:
    """Autocast narrows the products alone: any processor can run it, if slowly."""
    job, states = Job("first", 0, "same_stage", 0), []
    for precision in ("float32", "bfloat16"):
        config = tiny.config(backbone={"precision": precision}, training={"first_epochs": 4})
        train_stage(config, board, job)
        folder = checkpoint_folder(config, board, load_dataset(config, board), job)
        kept = {tensor.dtype for file in folder.glob("*.safetensors") for tensor in load_file(file).values()}
        assert kept == {torch.float32}
        states.append(read_json(folder / "state.json"))
    wide, narrow = states
    assert [state["precision"] for state in states] == ["float32", "bfloat16"]
    assert narrow["training"][-1]["ce"] < narrow["training"][0]["ce"]
    assert narrow["training"][0]["ce"] != wide["training"][0]["ce"]
    assert narrow["training"][0]["ce"] == pytest.approx(wide["training"][0]["ce"], rel=1e-2)


def test_the_device_is_as_told_and_a_missing_one_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert compute_device("auto") == compute_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="no CUDA device"):
        compute_device("cuda")
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert compute_device("auto") == compute_device("cuda") == torch.device("cuda")
    assert compute_device("cpu") == torch.device("cpu")


@pytest.mark.slow
def test_a_real_language_model_goes_through_two_stages(tmp_path: Path) -> None:
    """SmolLM2-135M, converted by `python -m models.convert`; its folder is named by DRIFTREC_BACKBONE."""
    folder = os.environ.get("DRIFTREC_BACKBONE")
    if not folder:
        pytest.skip("DRIFTREC_BACKBONE is not set; convert a model with `python -m models.convert` and name its folder")
    workspace = tiny.checkerboard(tmp_path, stages=2, users=16, length=6)
    config = tiny.config(
        backbone={"path": folder}, training={"first_epochs": 6, "epochs": 2, "first_learning_rate": 2e-3}
    )
    done = train_stage(config, workspace, Job("peso", 0, "same_stage", 1))
    assert done.trained_parameters > 0
    result = evaluate_stage(config, workspace, Job("peso", 0, "same_stage", 1), tested=1)
    assert result.queries == 16
