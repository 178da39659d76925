"""A pretrained backbone protects the inputs of a text."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from models.input_moments import linear_maps
from regularizers.null_space import protect
from stages.commit import commit_key
from stages.dataset import load_dataset
from stages.method_config import GemsConfig
from stages.methods.contract import Past
from stages.methods.protection import protections
from stages.train import bare_model
from stages.workspace import Workspace
from tests import tiny
from tests.tiny import at_start, job

QUICK = {"training": {"first_epochs": 2, "epochs": 2}}


@pytest.fixture(scope="module")
def board(tmp_path_factory: pytest.TempPathFactory) -> Workspace:
    return tiny.protecting(tmp_path_factory.mktemp("board"))


def test_the_key_of_a_checkpoint_names_the_text_that_was_protected(board: Workspace, tmp_path: Path) -> None:
    text = tmp_path / "words.txt"
    keys = []
    for words in ("one", "two"):
        text.write_text(words)
        config = tiny.config(**QUICK).model_copy(update={"methods": {"own": GemsConfig(corpus=str(text))}})
        keys.append(commit_key(config, load_dataset(config, board), job("own", 1)))
    assert keys[0] != keys[1]


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pretrained backbone with a tokenizer of fifty words."""
    folder = tmp_path_factory.mktemp("backbone") / "reader"
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=1, **sizes)).save_pretrained(folder)
    words = Tokenizer(WordLevel({f"w{n}": n for n in range(50)}, unk_token="w0"))
    words.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(folder)
    return folder


def test_a_pretrained_backbone_protects_the_inputs_of_a_text(reader: Path, board: Workspace, tmp_path: Path) -> None:
    text = tmp_path / "glosses.txt"
    numbers = torch.randint(0, 50, (600, 4), generator=torch.Generator().manual_seed(0))
    text.write_text("\n\n".join(" ".join(f"w{n}" for n in row) for row in numbers.tolist()))
    config = tiny.config(backbone={"path": str(reader)}, **QUICK)
    model = bare_model(config, load_dataset(config, board), 0)
    past = Past(tokens=[], folder=tmp_path / "kept")
    seen: list[int] = []
    settings = GemsConfig(corpus=str(text), corpus_tokens=2048, k_rule="fixed", k_value=8)
    kept = protections(model, settings, past, seen.append)
    assert seen == [2048]  # the ninth row of 256 is not read any more
    assert len({id(one.basis) for one in kept.values()}) == 4
    caught: list[Tensor] = []
    handle = linear_maps(model.stack)["layers.0.self_attn.q_proj"].register_forward_pre_hook(
        lambda _, own: caught.append(own[0])
    )
    with torch.no_grad():
        model.stack(input_ids=numbers.flatten()[:2048].view(8, 256))
    handle.remove()
    rows = caught[0].flatten(0, 1)
    expected = protect(rows.T @ rows, 2048, "fixed", 8).basis
    found = kept["layers.0.self_attn.k_proj"].basis
    torch.testing.assert_close(found @ found.T, expected @ expected.T, atol=1e-3, rtol=0)


def test_reading_a_corpus_is_logged_by_tenths(board: Workspace, caplog: pytest.LogCaptureFixture) -> None:
    model, past = at_start(tiny.config(**QUICK), board, job("gems", 1))
    with caplog.at_level("INFO", logger="stages.protection"):
        protections(model, GemsConfig(corpus_tokens=500, k_rule="fixed", k_value=3), past)
    assert caplog.messages == [f"null space: {n} of at most 500 corpus tokens read" for n in (168, 504)]


def test_a_missing_text_and_a_backbone_without_words_are_said(reader: Path, board: Workspace, tmp_path: Path) -> None:
    config = tiny.config(backbone={"path": str(reader)}, **QUICK)
    past = Past(tokens=[], folder=tmp_path / "kept")
    model = bare_model(config, load_dataset(config, board), 0)
    with pytest.raises(ValueError, match=r"corpus = '.*nowhere.txt' is no file; name a text file"):
        protections(model, GemsConfig(corpus=str(tmp_path / "nowhere.txt")), past)
    (tmp_path / "words.txt").write_text("w1 w2")
    with pytest.raises(ValueError, match=r"words.txt' has fewer than 256 tokens; give a larger text"):
        protections(model, GemsConfig(corpus=str(tmp_path / "words.txt")), past)
    silent = tmp_path / "silent"
    shutil.copytree(reader, silent, ignore=shutil.ignore_patterns("tokenizer*"))
    model = bare_model(tiny.config(backbone={"path": str(silent)}, **QUICK), load_dataset(config, board), 0)
    with pytest.raises(ValueError, match="has no tokenizer to read"):
        protections(model, GemsConfig(corpus=str(tmp_path / "words.txt")), past)
