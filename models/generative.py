"""A decoder LM that reads and writes items as semantic IDs.

Token numbers here are code tokens: code c of level l is `offset[l] + c`, C of them in all, and number C is the
beginning of the sequence. Their rows, on the input and the output side, are this module's own two matrices; the
backbone's vocabulary is untouched, so a row outside the semantic-ID set can never change.

A model that searches reads three kinds of tokens more: C + 1 and C + 2 mark the item behind them as recommended or
searched (in front of the item to be predicted, the marker is the request), and C + 3 + v is row v of the backbone's own
embedding, the text of a query. None of them is ever predicted.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from torch.profiler import record_function

from models.backbone import Backbone

MARKERS = 2
"""Tokens after the beginning of the sequence: recommended, searched."""


@dataclass(frozen=True)
class TokenBatch:
    """Sequences padded on the right, and where the loss is taken.

    Attributes:
        tokens: (B, T) code-token numbers; BOS first; padding is BOS too and is never attended to.
        positions: (M,) flat indices into B·T whose next token is a target.
        labels: (M,) those next tokens.
        places: (B, T) position in its own sequence of each token, where several share a row; None: 0 … T - 1.
        visible: (B, T, T) bool, what each token sees; None: everything up to itself.
    """

    tokens: Tensor
    positions: Tensor
    labels: Tensor
    places: Tensor | None = None
    visible: Tensor | None = None

    def to(self, device: torch.device) -> TokenBatch:
        """The same batch on `device`."""
        parts = {field.name: getattr(self, field.name) for field in fields(self)}
        return TokenBatch(**{name: part.to(device) for name, part in parts.items() if part is not None})


class GenerativeModel(nn.Module):
    """Backbone, code rows and restricted output head.

    Args:
        backbone: the decoder stack.
        codes: C, number of code tokens over all levels.
        seed: of the new rows.
        full_vocabulary: softmax over the backbone's own vocabulary as well as the codes.
        dropout: on the input embeddings while training.
        searching: it reads markers and the text of queries.

    Raises:
        ValueError: `full_vocabulary` with a backbone that has no vocabulary of its own.
    """

    def __init__(
        self,
        backbone: Backbone,
        codes: int,
        seed: int,
        full_vocabulary: bool,
        dropout: float,
        searching: bool = False,
    ) -> None:
        super().__init__()
        if full_vocabulary and backbone.head is None:
            raise ValueError('backbone.vocabulary = "full" needs a pretrained backbone; `small` knows codes only')
        self.stack = backbone.stack
        self.bos_row = backbone.bos
        self.pretrained = backbone.pretrained
        self.codes = codes
        self.dropout = dropout
        self._newest = torch.empty(0, 0, dtype=torch.int64)
        embedding = self.own_embedding.detach()
        generator = torch.Generator().manual_seed(seed)
        spread = 0.02 if not backbone.pretrained else float(embedding.std())
        middle = embedding.mean(dim=0) if backbone.pretrained else torch.zeros(embedding.shape[1])
        noise = torch.empty(2, codes, embedding.shape[1]).normal_(0, spread, generator=generator)
        self.input_rows = nn.Parameter(middle + noise[0])  # (C, d)
        self.output_rows = nn.Parameter(middle + noise[1])  # (C, d)
        markers = torch.empty(MARKERS, embedding.shape[1]).normal_(0, spread, generator=generator)
        self.marker_rows = nn.Parameter(middle + markers) if searching else None  # (2, d)
        self.register_buffer("other_rows", backbone.head if full_vocabulary else None, persistent=False)

    @property
    def bos(self) -> int:
        """The number of the beginning-of-sequence token."""
        return self.codes

    @property
    def device(self) -> torch.device:
        """Where its weights are."""
        return self.input_rows.device

    @property
    def own_embedding(self) -> Tensor:
        """The backbone's own input rows (V, d); read are the beginning of a sequence and the text of queries."""
        return cast(nn.Embedding, self.stack.get_input_embeddings()).weight

    def rows(self) -> dict[str, nn.Parameter]:
        """The code tokens' rows on both sides and the markers' where it has them, by name."""
        rows = {"input_rows": self.input_rows, "output_rows": self.output_rows}
        return rows if self.marker_rows is None else {**rows, "marker_rows": self.marker_rows}

    def embed(self, tokens: Tensor) -> Tensor:
        """(B, T) token numbers -> (B, T, d)."""
        with record_function("driftrec/embedding"):
            return F.dropout(self._rows_of(tokens), self.dropout, self.training)

    def _rows_of(self, tokens: Tensor) -> Tensor:
        first = self.own_embedding[self.bos_row : self.bos_row + 1]
        own = [self.input_rows, first] if self.marker_rows is None else [self.input_rows, first, self.marker_rows]
        table = torch.cat(own)
        text = tokens - len(table)
        if self.marker_rows is None or not (text >= 0).any():
            return F.embedding(tokens, table)
        vectors = F.embedding(tokens.clamp(max=len(table) - 1), table)
        words = F.embedding(text.clamp(min=0), self.own_embedding)
        return torch.where((text >= 0)[..., None], words, vectors)

    def hidden(self, tokens: Tensor, mask: Tensor | None = None, places: Tensor | None = None) -> Tensor:
        """Causal hidden states (B, T, d); right padding needs no mask, since nothing attends forward.

        Args:
            tokens: (B, T) numbers.
            mask: (B or 1, 1, T, T), in place of the causal mask: added to the attention scores, or true where seen.
            places: (B, T) position of each token, where several sequences share a row.
        """
        self._newest = tokens
        with record_function("driftrec/embedding"):
            vectors = self.embed(tokens)
        out = self.stack(inputs_embeds=vectors, position_ids=places, attention_mask=mask, use_cache=False)
        return out.last_hidden_state

    def inside(self) -> Tensor:
        """`inside` of what `hidden` read last, or is reading."""
        return inside(self._newest, self.bos)

    def logits(self, hidden: Tensor) -> Tensor:
        """(..., d) -> (..., C), or (..., C + V) with the full vocabulary."""
        rows = self.output_rows
        other = self.get_buffer("other_rows") if self._buffers["other_rows"] is not None else None
        return F.linear(hidden, rows if other is None else torch.cat([rows, other]))

    def loss(self, batch: TokenBatch, temperature: float = 1.0, smoothing: float = 0.0) -> Tensor:
        """Summed cross-entropy (nats) over the M targets of a batch; logits are formed at targets only."""
        mask = None if batch.visible is None else batch.visible[:, None]
        states = self.hidden(batch.tokens, mask, batch.places).flatten(0, 1)[batch.positions]  # (M, d)
        with record_function("driftrec/head"):
            logits = self.logits(states).float()
            logits = logits if temperature == 1 else logits / temperature  # dividing by 1 costs two passes over them
            return F.cross_entropy(logits, batch.labels, reduction="sum", label_smoothing=smoothing)


def inside(tokens: Tensor, bos: int) -> Tensor:
    """(B, T) bool, False on padding; the token that opens a sequence also pads it."""
    found = tokens != bos
    found[:, 0] = True
    return found


def band_mask(length: int, levels: int, items: int) -> Tensor:
    """(1, 1, T, T) causal mask under which a target's tokens see its `items` preceding items and no others.

    Added to attention scores: 0 where seen, float32's lowest value elsewhere. Token 0 begins the sequence and counts as
    the item before the first. In a stack of n layers what reaches a target still comes from n·`items` items, since the
    items it sees have seen others: the band bounds each look, not the horizon.

    Args:
        length: T, tokens of a sequence.
        levels: L, codes of an item.
        items: history items in the band, at least 1.

    Raises:
        ValueError: `items` is below 1.
    """
    if items < 1:
        raise ValueError(f"a band of {items} items shows a target nothing; give at least 1")
    place = torch.arange(length)
    target = place // levels  # (T,) the item whose code the query at this token predicts, or is about to finish
    item = (place - 1).div(levels, rounding_mode="floor")  # (T,) the item a key belongs to; the beginning is item -1
    seen = (place <= place[:, None]) & (item >= target[:, None] - items)
    return torch.zeros(length, length).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]
