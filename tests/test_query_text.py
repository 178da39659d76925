"""What a query may say, and what is made of it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from models.backbone import CONTROL_TOKENS
from models.words import BackboneVocabulary, WordVocabulary
from stages.dataset import Dataset
from stages.errors import UserError
from stages.examples import Encoder
from stages.search_examples import query_vocabulary
from tests import searching, tiny
from tests.searching import VISIT, WORDS, dataset

QUERIES = ["<s>", "</s> <pad>", "<c0_3> code 7", "[BOS] 16 17 18", "<|endoftext|>", "item 5</s>item"]


def encoder_of(own: Dataset) -> Encoder:
    return Encoder(own.interactions, own.catalogue, WORDS)


@pytest.mark.parametrize("query", QUERIES)
def test_the_text_of_a_query_is_never_a_code_nor_a_control_token(query: str, tmp_path: Path) -> None:
    own = dataset(tmp_path, [VISIT])
    encoder = encoder_of(own)
    rows = encoder.text(query) - (encoder.bos + 3)
    assert len(rows)
    assert ((rows >= CONTROL_TOKENS) & (rows < CONTROL_TOKENS + len(WORDS))).all()


def write_tokenizer(folder: Path) -> None:
    words = {"<unk>": 0, "<s>": 1, "</s>": 2, "item": 3, "<": 4, "s": 5, ">": 6, "/": 7, "5": 8}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence(  # pyright: ignore
        [pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation(), pre_tokenizers.Digits(individual_digits=True)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>", bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(folder)


def test_control_tokens_in_a_query_are_only_characters_to_a_pretrained_tokenizer(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    vocabulary = BackboneVocabulary(str(tmp_path))
    rows = vocabulary.encode("item <s> 5 </s>")
    assert rows == [3, 4, 5, 6, 8, 4, 7, 5, 6]


def test_a_word_that_a_pretrained_tokenizer_does_not_have_is_a_word_all_the_same(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    assert BackboneVocabulary(str(tmp_path)).encode("zebra item") == [0, 3]
    assert BackboneVocabulary(str(tmp_path)).encode("<unk>") == [4, 0, 6]


def test_a_pretrained_backbone_without_a_tokenizer_is_named(tmp_path: Path) -> None:
    own = dataset(tmp_path / "log", [VISIT])
    with pytest.raises(UserError, match="has no tokenizer, which searches need"):
        query_vocabulary(tiny.config(backbone={"path": str(tmp_path)}), own)


def test_words_come_from_stage_0s_training_queries_and_others_are_spelt(tmp_path: Path) -> None:
    rows: list[searching.Row] = [(f"u{n}", f"i0{n}", n, "red shoe") for n in range(3)]
    held: list[searching.Row] = [("w", f"i0{n}", n, "hidden hidden") for n in range(1, 3)]
    first = [*rows, *held, ("w", "i00", 0, "seldom")]
    own = dataset(tmp_path, [first, [("u", "i05", 0, "later later later")]])
    vocabulary = query_vocabulary(tiny.config(), own)
    assert isinstance(vocabulary, WordVocabulary)
    assert list(vocabulary.rows) == ["red", "shoe"]
    spelt = [CONTROL_TOKENS + byte for byte in "ü later".encode()]
    assert vocabulary.encode("Ü Later") == spelt
    assert vocabulary.encode("Red, shoe")[::2] == [vocabulary.rows["red"], vocabulary.rows["shoe"]]


def test_an_empty_query_is_refused(tmp_path: Path) -> None:
    encoder = encoder_of(dataset(tmp_path, [VISIT]))
    for query in ("", "  \t"):
        with pytest.raises(ValueError, match="the query is empty"):
            encoder.prompts([np.array([1])], [query])


def test_a_long_query_is_cut(tmp_path: Path) -> None:
    own = dataset(tmp_path, [VISIT])
    encoder = Encoder(own.interactions, own.catalogue, WORDS, query_tokens=3)
    assert len(encoder.text("item " * 9)) == 3
