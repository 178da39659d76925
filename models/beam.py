"""Beam search over a trie of the catalogue: one prefill a user, all beams on one shared prefix.

At each level the K beams of a user are fed as K tokens of one row; a mask lets each see the prompt and its own
ancestors, whose keys and values stay in the cache where they were written, so nothing is ever copied or reordered.
Scores are sums of log-probabilities over all output tokens, not renormalised inside the trie (the convention of
`generate()`); only paths of the trie are ever scored, so no invalid ID can be returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from models.generative import GenerativeModel
from models.trie import Trie


@dataclass
class _Beams:
    """State at one depth: scores, trie nodes, and the cache columns of each beam's own tokens."""

    scores: Tensor  # (B, K), -inf for an empty place
    nodes: Tensor  # (B, K)
    tokens: Tensor  # (B, K)
    ancestors: Tensor  # (B, K, depth)


def beam_search(
    model: GenerativeModel,
    trie: Trie,
    offsets: Tensor,
    prompts: Tensor,
    lengths: Tensor,
    width: int,
    forbidden: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The `width` best complete paths of the trie for each prompt.

    Args:
        model: in eval mode.
        trie: allowed paths, L levels.
        offsets: (L,) token number of code 0 of each level.
        prompts: (B, P) token numbers, padded on the right.
        lengths: (B,) valid tokens of each prompt, at least 1.
        width: K.
        forbidden: (B, F) leaves not to return, -1 for padding; None for none.

    Returns:
        Leaves (B, K), -1 where fewer exist, and their log-probabilities (B, K), falling, ties by leaf number.
    """
    cache = DynamicCache(config=model.stack.config)
    states = model.stack(inputs_embeds=model.embed(prompts), past_key_values=cache, use_cache=True).last_hidden_state
    rows = torch.arange(len(prompts), device=prompts.device)
    beams = _first_beams(model, trie, states[rows, lengths - 1], width)
    banned = None if forbidden is None else torch.where(forbidden < 0, forbidden, forbidden + trie.level_first[-2])
    visible = torch.arange(prompts.shape[1], device=prompts.device) < lengths[:, None]  # (B, P)
    for depth in range(1, trie.levels):
        states = _advance(model, cache, beams, visible, lengths + depth - 1, offsets[depth - 1])
        last = depth == trie.levels - 1
        beams = _expand(model, trie, beams, states, int(offsets[depth]), width, banned if last else None)
    leaves, scores = _ordered(beams)
    return torch.where(leaves < 0, leaves, leaves - trie.level_first[-2]), scores


def _first_beams(model: GenerativeModel, trie: Trie, state: Tensor, width: int) -> _Beams:
    root = torch.zeros(len(state), 1, dtype=torch.long, device=state.device)
    empty = torch.empty(len(state), 1, 0, dtype=torch.long, device=state.device)
    start = _Beams(torch.zeros(len(state), 1, device=state.device), root, root, empty)
    return _expand(model, trie, start, state[:, None], 0, width, None)


def _advance(
    model: GenerativeModel, cache: DynamicCache, beams: _Beams, visible: Tensor, positions: Tensor, offset: Tensor
) -> Tensor:
    """Feed each beam's last code; returns hidden states (B, K, d) and extends `beams.ancestors` by their columns."""
    count, width = beams.tokens.shape
    seen = int(cache.get_seq_length())
    columns = torch.arange(seen, seen + width, device=visible.device).expand(count, width)
    beams.ancestors = torch.cat([beams.ancestors, columns[..., None]], dim=2)
    allowed = torch.zeros(count, width, seen + width, dtype=torch.bool, device=visible.device)
    allowed[:, :, : visible.shape[1]] = visible[:, None]
    allowed.scatter_(2, beams.ancestors, True)
    vectors = model.embed(beams.tokens + offset)
    mask = torch.zeros(allowed.shape, dtype=vectors.dtype, device=vectors.device)
    mask.masked_fill_(~allowed, torch.finfo(vectors.dtype).min)
    return model.stack(
        inputs_embeds=vectors,
        attention_mask=mask[:, None],
        position_ids=positions[:, None].expand(count, width),
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state


def _expand(
    model: GenerativeModel,
    trie: Trie,
    beams: _Beams,
    states: Tensor,
    offset: int,
    width: int,
    forbidden: Tensor | None,
) -> _Beams:
    log_p = model.logits(states).float().log_softmax(dim=-1)  # (B, K, C)
    codes, children, exists = trie.children(beams.nodes)  # each (B, K, children)
    scores = beams.scores[..., None] + log_p.gather(2, codes + offset)
    scores = scores.masked_fill(~exists, -torch.inf)
    if forbidden is not None:
        scores = scores.masked_fill(_is_forbidden(children, forbidden), -torch.inf)
    flat = scores.flatten(1)  # (B, K·children)
    best, place = flat.topk(min(width, flat.shape[1]), dim=1)
    parent = place // codes.shape[2]
    return _Beams(
        scores=best,
        nodes=children.flatten(1).gather(1, place),
        tokens=codes.flatten(1).gather(1, place),
        ancestors=beams.ancestors.gather(1, parent[..., None].expand(-1, -1, beams.ancestors.shape[2])),
    )


def _is_forbidden(children: Tensor, forbidden: Tensor) -> Tensor:
    """(B, K, C) bool; row and leaf are packed into one key so that one `isin` serves the batch."""
    span = 2 + max(int(children.max()), int(forbidden.max()) if forbidden.numel() else 0)
    rows = torch.arange(len(children), device=children.device) * span
    keys = children + rows[:, None, None]
    return torch.isin(keys, (forbidden + rows[:, None])[forbidden >= 0])


def _ordered(beams: _Beams) -> tuple[Tensor, Tensor]:
    nodes = beams.nodes.masked_fill(beams.scores == -torch.inf, -1)
    by_leaf = nodes.argsort(dim=1, stable=True)
    scores, nodes = beams.scores.gather(1, by_leaf), nodes.gather(1, by_leaf)
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    return nodes.gather(1, by_score), scores.gather(1, by_score)
