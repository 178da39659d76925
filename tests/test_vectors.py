from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from models.vectors import CooccurrenceVectors, EncoderVectors, TextVectors, embed, unit_rows, window_counts
from tests import reference

TEXTS = ["red mug", "red cup", "blue mug", "wool scarf", "wool hat", "knitted wool hat"]


def test_texts_with_shared_words_are_nearer_than_texts_without():
    vectors = TextVectors.fit(TEXTS, 4, seed=0).transform(TEXTS)
    assert vectors.shape == (6, 4)
    assert vectors[4] @ vectors[5] > vectors[4] @ vectors[0] + 0.5
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(1.0, abs=1e-6)


def test_dimensions_are_capped_by_texts_and_words():
    assert TextVectors.fit(TEXTS, 64, seed=0).transform(["red"]).shape == (1, 6)
    assert TextVectors.fit(["one two"], 64, seed=0).transform(["two"]).tolist() == [[1.0]]


def test_later_texts_change_no_earlier_vector_and_unknown_words_count_nothing():
    fitted = TextVectors.fit(TEXTS, 4, seed=0)
    later = fitted.transform([*TEXTS, "red teapot", "granite", "", "!!!"])
    assert np.array_equal(later[:6], fitted.transform(TEXTS))
    assert np.array_equal(later[6], fitted.transform(["red"])[0])
    assert not later[7:].any()
    assert fitted.transform([]).shape == (0, 4)


def test_control_strings_in_a_text_are_words_like_others():
    texts = ["<a_12> ### Response: mug", "red mug", "</s> [SEP] cup"]
    assert {"a_12", "response", "sep"} <= set(TextVectors.fit(texts, 2, seed=0).terms)


def test_text_vectors_survive_their_arrays_bit_for_bit():
    fitted = TextVectors.fit(TEXTS, 3, seed=0)
    again = TextVectors.from_arrays(fitted.arrays(), fitted.terms)
    assert np.array_equal(again.transform(TEXTS), fitted.transform(TEXTS))
    assert np.array_equal(TextVectors.fit(TEXTS, 3, seed=0).components, fitted.components)


def test_texts_without_a_word_are_refused():
    with pytest.raises(ValueError, match="none of 2 texts holds a word"):
        TextVectors.fit(["", "!!!"], 4, seed=0)


@given(
    st.lists(st.tuples(st.integers(0, 2), st.integers(0, 5)), max_size=25),
    st.integers(1, 4),
)
def test_window_counts_agree_with_counting_pair_by_pair(events, window):
    events = sorted(events, key=lambda event: event[0])
    users, items = (np.array([event[side] for event in events], dtype=np.int64) for side in (0, 1))
    expected = reference.pair_counts(users.tolist(), items.tolist(), window)
    counts = window_counts(users, items, range(2, 6), 3, window).toarray()
    assert counts.shape == (4, 3)
    assert all(counts[i - 2, j] == expected.get((i, j), 0) for i in range(2, 6) for j in range(3))


def two_shelves() -> tuple[np.ndarray, np.ndarray]:
    """Users 0-19 take items 0-3, users 20-39 items 4-7; item 8 is in no event."""
    random = np.random.default_rng(0)
    users = np.repeat(np.arange(40), 6)
    return users, np.where(users < 20, 0, 4) + random.integers(0, 4, size=len(users))


def test_items_kept_company_by_the_same_items_are_near_and_others_are_not():
    users, items = two_shelves()
    vectors = CooccurrenceVectors.fit(users, items, 9, 4, seed=0).vectors
    assert vectors.shape == (9, 4)
    within, across = vectors[0] @ vectors[1], vectors[0] @ vectors[5]
    assert within > across + 0.5
    assert not vectors[8].any()


def test_a_later_item_lies_among_its_company_and_a_lone_one_is_zero():
    users, items = two_shelves()
    fitted = CooccurrenceVectors.fit(users, items, 9, 4, seed=0)
    later = fitted.transform(np.array([0, 0, 0, 1]), np.array([0, 9, 1, 10]), range(9, 11))
    expected = unit_rows((fitted.vectors[0] + fitted.vectors[1])[None, :])[0]
    assert later[0] == pytest.approx(expected, abs=1e-6)
    assert not later[1].any()


def test_no_company_at_all_gives_zero_vectors():
    vectors = CooccurrenceVectors.fit(np.arange(3), np.arange(3), 3, 64, seed=0).vectors
    assert vectors.shape == (3, 3)
    assert not vectors.any()
    empty = np.empty(0, dtype=np.int64)
    assert not CooccurrenceVectors.fit(empty, empty, 2, 64, seed=0).vectors.any()


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A random BERT of a few thousand weights, saved as a folder."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder = str(tmp_path_factory.mktemp("encoder"))
    words = ["[PAD]", "[UNK]", "[SEP]", "red", "blue", "mug", "cup", "[", "]", "SEP"]
    tokenizer = Tokenizer(WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()  # pyright: ignore[reportAttributeAccessIssue]
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="[PAD]",
        unk_token="[UNK]",
        sep_token="[SEP]",
        model_max_length=16,
    ).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=10, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=16,
    )  # fmt: skip
    BertModel(config).save_pretrained(folder)
    return folder


def test_padding_does_not_reach_the_mean_of_an_encoder(encoder):
    texts = ["red mug", "blue cup red mug blue", "cup"]
    together = embed(texts, encoder)
    alone = np.concatenate([embed([text], encoder) for text in texts])
    assert together == pytest.approx(alone, abs=1e-5)
    assert not np.allclose(together[0], together[2], atol=1e-2)


def test_encoder_vectors_are_unit_rows_of_the_asked_width_and_empty_texts_are_zero(encoder):
    fitted = EncoderVectors.fit(["red mug", "blue cup", "cup", ""], encoder, 3, seed=0)
    rows = fitted.transform(["red mug", "", "blue"])
    assert rows.shape == (3, 3)
    assert np.linalg.norm(rows, axis=1) == pytest.approx([1.0, 0.0, 1.0], abs=1e-6)
    again = EncoderVectors.from_arrays(fitted.arrays(), encoder)
    assert np.array_equal(again.transform(["cup"]), fitted.transform(["cup"]))


def test_a_separator_written_in_a_text_is_plain_characters(encoder):
    written, spelled = embed(["red [SEP] mug", "red [ SEP ] mug"], encoder)
    assert written == pytest.approx(spelled, abs=1e-6)


def test_an_encoder_with_pickled_weights_is_refused(encoder, tmp_path: Path):
    import shutil

    folder = tmp_path / "pickled"
    shutil.copytree(encoder, folder)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        embed(["red"], str(folder))
