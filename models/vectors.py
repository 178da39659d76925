"""Items as vectors: from their text, from the company they keep, or from a sentence encoder.

Whatever is fitted is fitted on stage 0's items alone and frozen; items of later stages only pass through `transform`.
All rows have unit length; an item of which nothing is known is the zero vector.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt
from scipy.sparse import csr_matrix
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.utils.extmath import randomized_svd
from threadpoolctl import threadpool_limits

FloatArray: TypeAlias = npt.NDArray[np.floating]
IntArray: TypeAlias = npt.NDArray[np.int64]
Arrays: TypeAlias = dict[str, npt.NDArray[np.generic]]

WINDOW = 10
_WORD = r"(?u)\b\w+\b"  # one-letter words too: sizes and model numbers tell items apart
_MOST_TERMS = 50_000
_CONTEXT_SMOOTHING = 0.75  # Levy, Goldberg & Dagan (2015), section 3.2
_MOST_TOKENS = 256
_EPSILON = 1e-9


@dataclass(frozen=True)
class TextVectors:
    """TF-IDF projected on its leading singular vectors (latent semantic analysis, Deerwester et al., 1990).

    Attributes:
        terms: (T,) the words, in column order.
        idf: (T,) inverse document frequencies.
        components: (T, d) right singular vectors.
    """

    terms: tuple[str, ...]
    idf: FloatArray
    components: FloatArray

    @classmethod
    def fit(cls, texts: Sequence[str], dimensions: int, seed: int) -> Self:
        """Fit on stage 0's texts; d = min(dimensions, texts, words).

        Raises:
            ValueError: no text holds a word.
        """
        counter = _counter()
        if not any(map(counter.build_analyzer(), texts)):
            raise ValueError(f"none of {len(texts)} texts holds a word; use vectors = 'cooccurrence'")
        weights = counter.fit_transform(texts)
        width = min(dimensions, *weights.shape)
        terms = tuple(str(term) for term in counter.get_feature_names_out())
        return cls(terms, np.asarray(counter.idf_), _svd(weights, width, seed)[2].T)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], terms: Sequence[str]) -> Self:
        """Rebuild from `arrays()` and the terms."""
        return cls(tuple(terms), arrays["idf"], arrays["components"])

    def transform(self, texts: Sequence[str]) -> FloatArray:
        """Unit rows (n, d), float32; a text without any known word is zero."""
        if not texts:
            return np.zeros((0, self.components.shape[1]), dtype=np.float32)
        counter = _counter({term: column for column, term in enumerate(self.terms)})
        counter.idf_ = self.idf
        return unit_rows(csr_matrix(counter.transform(texts)) @ self.components)

    def arrays(self) -> Arrays:
        """All but the terms."""
        return {"idf": self.idf, "components": self.components}


@dataclass(frozen=True)
class CooccurrenceVectors:
    """Positive pointwise mutual information of items in users' windows, factorised (Levy & Goldberg, 2014).

    Attributes:
        vectors: (n, d) unit rows of stage 0's items, which are item numbers 0 … n - 1.
    """

    vectors: FloatArray

    @classmethod
    def fit(cls, users: IntArray, items: IntArray, count: int, dimensions: int, seed: int) -> Self:
        """Fit on stage 0's training events.

        Args:
            users: (N,) user of each event; equal users stand together, oldest event first.
            items: (N,) item numbers below `count`.
            count: stage 0's items, those without a training event included (they get the zero vector).
            dimensions: at most this many columns.
            seed: of the randomised factorisation.
        """
        counts = window_counts(users, items, range(count), count)
        left, values, _ = _svd(_positive_pmi(counts), min(dimensions, count), seed)
        return cls(unit_rows(left * np.sqrt(values)))

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]]) -> Self:
        """Rebuild from `arrays()`."""
        return cls(arrays["vectors"])

    def transform(self, users: IntArray, items: IntArray, numbers: range) -> FloatArray:
        """Unit rows of later items: the mean of the stage-0 items in their windows, weighted by how often.

        Args:
            users: as in `fit`, for all training events up to the end of the items' first stage.
            items: (N,) item numbers.
            numbers: the later items.
        """
        return unit_rows(window_counts(users, items, numbers, len(self.vectors)) @ self.vectors)

    def arrays(self) -> Arrays:
        """The vectors."""
        return {"vectors": self.vectors}


@dataclass(frozen=True)
class EncoderVectors:
    """A sentence encoder's masked mean of last hidden states, projected on stage 0's leading singular vectors.

    Attributes:
        path: local folder or hub id of the encoder.
        components: (hidden, d) right singular vectors.
    """

    path: str
    components: FloatArray

    @classmethod
    def fit(cls, texts: Sequence[str], path: str, dimensions: int, seed: int) -> Self:
        """Embed stage 0's texts and fit the projection; d = min(dimensions, texts, hidden)."""
        rows = embed(texts, path)
        return cls(path, _svd(rows, min(dimensions, *rows.shape), seed)[2].T)

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[Any]], path: str) -> Self:
        """Rebuild from `arrays()` and the encoder's path."""
        return cls(path, arrays["components"])

    def transform(self, texts: Sequence[str]) -> FloatArray:
        """Unit rows (n, d), float32; an empty text is zero."""
        return unit_rows(embed(texts, self.path) @ self.components)

    def arrays(self) -> Arrays:
        """The projection."""
        return {"components": self.components}


def unit_rows(rows: Any) -> FloatArray:
    """Rows scaled to length 1, float32; a row of (nearly) zero length becomes exactly zero."""
    dense = np.asarray(rows, dtype=np.float64)
    norms = np.sqrt((dense * dense).sum(axis=1, keepdims=True))
    return np.divide(dense, norms, out=np.zeros_like(dense), where=norms > _EPSILON).astype(np.float32)


def window_counts(users: IntArray, items: IntArray, rows: range, columns: int, window: int = WINDOW) -> csr_matrix:
    """How often items `rows` stand within `window` events of items 0 … columns - 1 in one user's history.

    Returns:
        (len(rows), columns) counts; an item is no company for itself.
    """
    total = csr_matrix((len(rows), columns), dtype=np.float64)
    for offset in range(1, min(window, len(items) - 1) + 1):
        older, newer = items[:-offset], items[offset:]
        together = (users[:-offset] == users[offset:]) & (older != newer)
        for item, other in ((older, newer), (newer, older)):
            kept = together & (item >= rows.start) & (item < rows.stop) & (other < columns)
            places = (item[kept] - rows.start, other[kept])
            total = total + csr_matrix((np.ones(len(places[0])), places), shape=total.shape)
    return total


def _positive_pmi(counts: csr_matrix) -> csr_matrix:
    """max(0, log(P(i, j) / (P(i) P(j)))), the context distribution flattened so that rare items don't dominate."""
    pairs = counts.tocoo()
    popularity = np.asarray(counts.sum(axis=1)).reshape(-1)
    context = popularity**_CONTEXT_SMOOTHING
    expected = popularity[pairs.row] * context[pairs.col]
    information = np.log(pairs.data * context.sum() / expected)
    return csr_matrix((np.maximum(information, 0.0), (pairs.row, pairs.col)), shape=counts.shape)


def _svd(matrix: Any, width: int, seed: int) -> tuple[FloatArray, FloatArray, FloatArray]:
    # One thread: BLAS sums in another order when it splits the work.
    with threadpool_limits(limits=1):
        return randomized_svd(matrix, n_components=width, random_state=seed)


def _counter(vocabulary: Mapping[str, int] | None = None) -> TfidfVectorizer:
    counter = TfidfVectorizer(sublinear_tf=True, max_features=_MOST_TERMS, vocabulary=vocabulary)
    return counter.set_params(token_pattern=_WORD)


def embed(texts: Sequence[str], path: str, batch_size: int = 64) -> FloatArray:
    """Masked mean of the encoder's last hidden states, (n, hidden) float64; an empty text is zero.

    Args:
        texts: what to embed; control strings in them are read as plain characters.
        path: local folder or hub id of a transformers encoder with safetensors weights.
        batch_size: texts a forward pass sees.
    """
    import torch

    tokenizer, model = _encoder(path)
    rows = np.zeros((len(texts), model.config.hidden_size))
    filled = [place for place, text in enumerate(texts) if text.strip()]
    for start in range(0, len(filled), batch_size):
        chosen = filled[start : start + batch_size]
        batch = tokenizer(
            [texts[place] for place in chosen],
            padding=True,
            split_special_tokens=True,  # text is data: "[SEP]" in a title is no separator
            truncation=True,
            max_length=min(tokenizer.model_max_length, _MOST_TOKENS),
            return_tensors="pt",
        )
        with torch.inference_mode():
            states = model(**batch).last_hidden_state  # (B, T, H)
        mask = batch["attention_mask"].unsqueeze(-1).to(states.dtype)  # (B, T, 1)
        rows[chosen] = ((states * mask).sum(dim=1) / mask.sum(dim=1)).double().numpy()
    return rows


@functools.lru_cache(maxsize=1)
def _encoder(path: str) -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    model = AutoModel.from_pretrained(path, trust_remote_code=False, use_safetensors=True)
    return tokenizer, model.eval()
