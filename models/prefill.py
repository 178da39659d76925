"""Reading prompts into the cache: each text once, and short prompts beside each other where they would be padding.

A prompt that opens a longer one of the batch (the same user asked again later) is read off that one's keys and values.
Prompts of unlike length share rows as wide as the longest, each seeing itself alone; their keys and values are then
laid out a row a prompt, as the beams expect them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import numpy as np
import torch
from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

from models.generative import GenerativeModel

SAVED = 0.15
"""Share of the rows that sharing must save: it costs a mask, and one copy of the keys and values."""
WIDEST = 512
"""Tokens of a row at most: the mask of shared rows grows with their square."""


def prefill(model: GenerativeModel, cache: DynamicCache, prompts: Tensor, lengths: Tensor) -> Tensor:
    """Fill the empty `cache` with a row a prompt; returns the hidden state (B, d) behind each prompt's last token.

    Args:
        model: in eval mode.
        cache: afterwards of P columns, those behind a prompt's own length without meaning.
        prompts: (B, P) token numbers, padded on the right.
        lengths: (B,) valid tokens, at least 1.
    """
    source = shared_prompts(prompts, lengths)
    rows, place = source.unique(return_inverse=True)
    shelves = shared_rows(lengths[rows].tolist(), prompts.shape[1])
    fewer = 1 + max(row for row, _ in shelves) <= (1 - SAVED) * len(rows)
    # A layer that forgets what slid out of its window keeps other columns than it read.
    if fewer and prompts.shape[1] <= WIDEST and all(type(layer) is DynamicLayer for layer in cache.layers):
        return _side_by_side(model, cache, prompts[rows], lengths[rows], shelves, place, lengths)
    vectors = model.embed(prompts[rows])
    states = model.stack(inputs_embeds=vectors, past_key_values=cache, use_cache=True).last_hidden_state
    if len(rows) < len(prompts):
        cache.batch_select_indices(place)
    return states[place, lengths - 1]


def shared_prompts(prompts: Tensor, lengths: Tensor) -> Tensor:
    """(B,) for each prompt one of the batch that it opens (itself, if no other), which in turn opens no longer one.

    Args:
        prompts: (B, P) token numbers, padded on the right.
        lengths: (B,) valid tokens.
    """
    valid = torch.arange(prompts.shape[1], device=prompts.device) < lengths[:, None]
    table = torch.where(valid, prompts, -1).cpu().numpy()
    # Sorted as words in a dictionary, a prompt is followed by those that it opens.
    order = np.lexsort(table.T[::-1])
    ordered = table[order]
    opens = ((ordered[:-1] == ordered[1:]) | (ordered[:-1] < 0)).all(axis=1)
    last = np.append(np.flatnonzero(~opens), len(order) - 1)  # the end of each run
    source = np.empty_like(order)
    source[order] = order[last[np.searchsorted(last, np.arange(len(order)))]]
    return torch.from_numpy(source).to(prompts.device)


def shared_rows(lengths: Sequence[int], width: int) -> list[tuple[int, int]]:
    """Row and first column of each prompt, the longest placed first, each in the first row with room for it.

    Args:
        lengths: tokens of each, at most `width`.
        width: columns of a row.
    """
    found = [(0, 0)] * len(lengths)
    filled: list[int] = []
    for prompt in sorted(range(len(lengths)), key=lambda prompt: -lengths[prompt]):
        row = next((row for row, used in enumerate(filled) if used + lengths[prompt] <= width), len(filled))
        filled += [0] * (row == len(filled))
        found[prompt] = row, filled[row]
        filled[row] += lengths[prompt]
    return found


def added(seen: Tensor, dtype: torch.dtype) -> Tensor:
    """A mask to add to attention scores: 0 where `seen`, the lowest number elsewhere; of the same shape."""
    return torch.zeros(seen.shape, dtype=dtype, device=seen.device).masked_fill_(~seen, torch.finfo(dtype).min)


def _side_by_side(
    model: GenerativeModel,
    cache: DynamicCache,
    prompts: Tensor,
    own: Tensor,
    shelves: Sequence[tuple[int, int]],
    place: Tensor,
    lengths: Tensor,
) -> Tensor:
    """`prefill` of n distinct prompts (n, P) of lengths `own` (n,) that share R rows.

    Args:
        model: as in `prefill`.
        cache: as in `prefill`.
        prompts: what is read.
        own: its valid tokens.
        shelves: row and first column of each.
        place: (B,) the prompt that each of the batch opens.
        lengths: (B,) its tokens.
    """
    width, device = prompts.shape[1], prompts.device
    row, start = torch.tensor(shelves, device=device).T
    column = torch.arange(width, device=device)
    valid = column < own[:, None]  # (n, P)
    cells = row[:, None] * width + start[:, None] + column  # (n, P) flat places in the shared rows
    count = (1 + int(row.max())) * width
    tokens = torch.full((count,), model.bos, device=device)
    places, owner = torch.zeros_like(tokens), torch.full_like(tokens, -1)
    tokens[cells[valid]] = prompts[valid]
    places[cells[valid]] = column.expand_as(cells)[valid]
    owner[cells[valid]] = torch.arange(len(own), device=device)[:, None].expand_as(cells)[valid]
    owner = owner.view(-1, width)  # (R, P)
    seen = (owner[:, :, None] == owner[:, None]) & (column <= column[:, None])
    vectors = model.embed(tokens.view(-1, width))
    states = model.stack(
        inputs_embeds=vectors,
        attention_mask=added(seen, vectors.dtype)[:, None],
        position_ids=places.view(-1, width),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    cells = cells.clamp(max=count - 1)[place]  # (B, P)
    line, column = cells // width, cells % width
    for layer in cast(list[DynamicLayer], cache.layers):
        keys, values = cast(Tensor, layer.keys), cast(Tensor, layer.values)
        layer.keys = keys[line, :, column].transpose(1, 2)  # (B, heads, P, d / heads)
        layer.values = values[line, :, column].transpose(1, 2)
    return states.flatten(0, 1)[cells.gather(1, lengths[:, None] - 1)[:, 0]]
