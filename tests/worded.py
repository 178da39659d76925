"""A small pretrained backbone that reads the words of the tests' titles."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

FIRST = 10
"""Token number of the first word."""


def write_backbone(folder: Path, words: Iterable[str]) -> Path:
    """A decoder of seeded random weights with a tokenizer of whole words, `find` and these."""
    numbered = {"<unk>": 0, "find": 2, **{word: FIRST + place for place, word in enumerate(words)}}
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    torch.manual_seed(0)
    vocabulary = max(60, max(numbered.values()) + 1)
    LlamaForCausalLM(LlamaConfig(vocab_size=vocabulary, bos_token_id=1, **sizes)).save_pretrained(folder)
    core = Tokenizer(WordLevel(numbered, unk_token="<unk>"))
    core.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>").save_pretrained(folder)
    return folder
