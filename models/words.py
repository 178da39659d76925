"""A query as rows of the backbone's own vocabulary: words and bytes for `small`, its tokenizer for any other backbone.

A query is data. Neither vocabulary holds an item code or a marker (they have token numbers of their own, see
`models.generative`), and the control tokens of a tokenizer are read as the characters they are written with.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Protocol

from transformers import AutoTokenizer

BYTES = 256
SPACE = 0x20
_PIECES = re.compile(r"\w+|[^\w\s]")


class Vocabulary(Protocol):
    """Text to rows of the stack's embedding."""

    def encode(self, text: str) -> list[int]:
        """Rows of `text`, in order; never those of a control token."""
        ...


def pieces(text: str) -> list[str]:
    """Case-folded words and single signs of a text, in order."""
    return _PIECES.findall(text.casefold())


class WordVocabulary:
    """`small`'s vocabulary: a row for each known word, and one for each byte to spell the others with.

    Args:
        words: known words, case-folded.
        first: row of byte 0; the words' rows follow the bytes'.
    """

    def __init__(self, words: Sequence[str], first: int) -> None:
        self.first = first
        self.rows = {word: first + BYTES + place for place, word in enumerate(words)}

    @classmethod
    def fit(cls, texts: Iterable[str], size: int, first: int) -> WordVocabulary:
        """The `size` commonest words of `texts` that occur at least twice, ties in alphabetical order.

        A word that occurs once stays spelt, so that the bytes' rows learn something, too.
        """
        counts = Counter(piece for text in texts for piece in pieces(text))
        common = sorted((word for word, count in counts.items() if count > 1), key=lambda word: (-counts[word], word))
        return cls(common[:size], first)

    def __len__(self) -> int:
        """Rows in all."""
        return BYTES + len(self.rows)

    def encode(self, text: str) -> list[int]:
        """A row a known word; UTF-8 bytes for any other, with a space between two spelt neighbours."""
        found: list[int] = []
        spelt = False
        for piece in pieces(text):
            row = self.rows.get(piece)
            if row is not None:
                found.append(row)
            else:
                letters = piece.encode("utf-8", errors="replace")
                found.extend(self.first + byte for byte in ([SPACE, *letters] if spelt else letters))
            spelt = row is None
        return found


class BackboneVocabulary:
    """The tokenizer that belongs to a pretrained backbone.

    Args:
        path: local folder or hub id.

    Raises:
        ValueError: there is none.
    """

    def __init__(self, path: str) -> None:
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise ValueError(
                f"backbone.path = {path!r} has no tokenizer, which searches need: {reason}; "
                'add its files, or set search.objectives = ["recommendation"]'
            ) from None
        # A word that the tokenizer does not have is still a word, unless its token controls something besides.
        core = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "model", None)
        unknown = getattr(core, "unk_token", None)
        also = {self.tokenizer.bos_token, self.tokenizer.eos_token, self.tokenizer.pad_token}
        kept = set() if unknown is None or unknown in also else {self.tokenizer.convert_tokens_to_ids(unknown)}
        self.control = frozenset(self.tokenizer.all_special_ids) - kept

    def encode(self, text: str) -> list[int]:
        """The tokenizer's rows of the text; what looks like a control token is split into its characters' tokens."""
        rows = self.tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True)
        return [row for row in rows if row not in self.control]
