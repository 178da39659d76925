"""Beam search over a trie of the catalogue: one prefill a user, all beams on one shared prefix.

At each level the K beams of a user are fed as K tokens of one row; a mask lets each see the prompt and its own
ancestors, whose keys and values stay in the cache where they were written, so nothing is ever reordered. Scores are
sums of log-probabilities over all output tokens, not renormalised inside the trie (the convention of `generate()`);
only paths of the trie are ever scored, so no invalid ID can be returned.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import DynamicCache

from models.generative import GenerativeModel
from models.prefill import added, prefill
from models.trie import Paths, Trie


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
    forbidden: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """The `width` best complete paths of the trie for each prompt.

    Args:
        model: in eval mode.
        trie: allowed paths, L levels.
        offsets: (L,) token number of code 0 of each level.
        prompts: (B, P) token numbers, padded on the right.
        lengths: (B,) valid tokens of each prompt, at least 1.
        width: K.
        forbidden: distinct pairs of prompt (F,) and leaf (F,) not to return; None for none. Nodes that lead nowhere
            else take no place in the beam, so that K leaves come back wherever K are left.

    Returns:
        Leaves (B, K), -1 where fewer exist, and their log-probabilities (B, K), falling, ties by leaf number.
    """
    cache = DynamicCache(config=model.stack.config)
    state = prefill(model, cache, prompts, lengths)
    banned = [None] * trie.levels if forbidden is None else trie.covered(*forbidden)
    beams = _first_beams(model, trie, state, width, banned[0])
    visible = torch.arange(prompts.shape[1], device=prompts.device) < lengths[:, None]  # (B, P)
    for depth in range(1, trie.levels):
        states = _advance(model, cache, beams, visible, lengths + depth - 1, offsets[depth - 1])
        beams = _expand(model, trie, beams, states, int(offsets[depth]), width, banned[depth])
    leaves, scores = _ordered(beams)
    return torch.where(leaves < 0, leaves, leaves - trie.level_first[-2]), scores


def _first_beams(model: GenerativeModel, trie: Trie, state: Tensor, width: int, banned: Paths | None) -> _Beams:
    root = torch.zeros(len(state), 1, dtype=torch.long, device=state.device)
    empty = torch.empty(len(state), 1, 0, dtype=torch.long, device=state.device)
    start = _Beams(torch.zeros(len(state), 1, device=state.device), root, root, empty)
    return _expand(model, trie, start, state[:, None], 0, width, banned)


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
    return model.stack(
        inputs_embeds=vectors,
        attention_mask=added(allowed, vectors.dtype)[:, None],
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
    banned: Paths | None,
) -> _Beams:
    logits = model.logits(states).float()  # (B, K, C)
    return _chosen(trie, beams, logits, beams.scores - logits.logsumexp(dim=-1), offset, width, banned)


def _chosen(
    trie: Trie, beams: _Beams, logits: Tensor, before: Tensor, offset: int, width: int, banned: Paths | None
) -> _Beams:
    """Mask and take the best: the `width` best children of all beams, those of `banned` edges left out.

    Args:
        trie: allowed paths.
        beams: at one depth.
        logits: (B, K, C) of the token after each beam.
        before: (B, K) score of each beam less the log of its softmax's sum.
        offset: token number of the level's code 0.
        width: K of the next depth.
        banned: edges not to take.
    """
    codes, children, exists = trie.children(beams.nodes)  # each (B, K, children)
    scores = (before[..., None] + logits.gather(2, codes + offset)).masked_fill_(~exists, -torch.inf)
    if banned is not None:
        path, beam = (beams.nodes[banned.rows] == banned.parents[:, None]).nonzero(as_tuple=True)
        scores[banned.rows[path], beam, banned.places[path]] = -torch.inf
    flat = scores.flatten(1)  # (B, K·children)
    best, place = flat.topk(min(width, flat.shape[1]), dim=1)
    parent = place // codes.shape[2]
    return _Beams(
        scores=best,
        nodes=children.flatten(1).gather(1, place),
        tokens=codes.flatten(1).gather(1, place),
        ancestors=beams.ancestors.gather(1, parent[..., None].expand(-1, -1, beams.ancestors.shape[2])),
    )


def _ordered(beams: _Beams) -> tuple[Tensor, Tensor]:
    nodes = beams.nodes.masked_fill(beams.scores == -torch.inf, -1)
    by_leaf = nodes.argsort(dim=1, stable=True)
    scores, nodes = beams.scores.gather(1, by_leaf), nodes.gather(1, by_leaf)
    by_score = scores.argsort(dim=1, descending=True, stable=True)
    return nodes.gather(1, by_score), scores.gather(1, by_score)
