"""Slow, readable twins that the fast versions are tested against."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import nn
from transformers import AutoModelForCausalLM


def trie_prefixes(codes: list[tuple[int, ...]]) -> dict[tuple[int, ...], set[int]]:
    """Every prefix of some code tuples, the empty one included, with the codes that may follow it."""
    following: dict[tuple[int, ...], set[int]] = {}
    for item in codes:
        for depth, code in enumerate(item):
            following.setdefault(item[:depth], set()).add(code)
    return following


def trie_items(codes: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Each complete tuple with the items it names, rising."""
    named: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(codes):
        named.setdefault(item, []).append(number)
    return named


def semantic_ids(prefixes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The last code is the number of earlier items with the same prefix."""
    return [(*prefix, prefixes[:row].count(prefix)) for row, prefix in enumerate(prefixes)]


def pair_counts(users: list[int], items: list[int], window: int) -> dict[tuple[int, int], int]:
    """How often two different items stand within `window` events of each other in one user's history, both ways."""
    counts: dict[tuple[int, int], int] = {}
    for i, (user, item) in enumerate(zip(users, items, strict=True)):
        for j, (other_user, other) in enumerate(zip(users, items, strict=True)):
            if user == other_user and item != other and 0 < abs(i - j) <= window:
                counts[item, other] = counts.get((item, other), 0) + 1
    return counts


def item_scores(model: Any, codes: np.ndarray, offsets: list[int], history: list[int]) -> list[float]:
    """Log-probability of every item's whole code sequence, one forward pass an item."""
    scores = []
    for item in range(len(codes)):
        tokens = [model.bos, *_tokens(codes, offsets, [*history, item])]
        with torch.no_grad():
            log_p = model.logits(model.hidden(torch.tensor([tokens[:-1]]))).log_softmax(dim=-1)[0]
        start = len(tokens) - 1 - len(offsets)
        scores.append(sum(float(log_p[start + level, tokens[start + level + 1]]) for level in range(len(offsets))))
    return scores


def slow_beam(
    model: Any, codes: np.ndarray, offsets: list[int], history: list[int], width: int
) -> list[tuple[int, ...]]:
    """The beam search in words: extend every kept prefix by every code the catalogue allows, keep the best `width`."""
    allowed = {tuple(int(c) for c in row[:depth]) for row in codes for depth in range(len(offsets) + 1)}
    kept: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for level, offset in enumerate(offsets):
        grown = []
        for score, prefix in kept:
            own = [code + offsets[depth] for depth, code in enumerate(prefix)]
            tokens = [model.bos, *_tokens(codes, offsets, history), *own]
            with torch.no_grad():
                log_p = model.logits(model.hidden(torch.tensor([tokens]))).log_softmax(dim=-1)[0, -1]
            following = sorted(path[level] for path in allowed if len(path) == level + 1 and path[:level] == prefix)
            grown += [(score + float(log_p[offset + code]), (*prefix, code)) for code in following]
        kept = sorted(grown, key=lambda pair: (-pair[0], pair[1]))[:width]
    return [prefix for _, prefix in kept]


def _tokens(codes: np.ndarray, offsets: list[int], items: list[int]) -> list[int]:
    return [int(code) + offset for item in items for code, offset in zip(codes[item], offsets, strict=True)]


def causal_lm(model: Any) -> Any:
    """An ordinary causal LM of the same weights: its vocabulary is the codes, then the backbone's own tokens.

    Its output is a softmax over what `model` scores: the codes, and the own tokens where the vocabulary is full.
    """
    stack = copy.deepcopy(model.stack)
    outputs = model.logits(torch.zeros(1, model.output_rows.shape[1])).shape[1]
    config = copy.deepcopy(stack.config)
    config.vocab_size, config.tie_word_embeddings = outputs, False
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    rows = torch.cat([model.input_rows, model.own_embedding]).detach()
    stack.set_input_embeddings(nn.Embedding.from_pretrained(rows))
    head = model.output_rows if outputs == model.codes else torch.cat([model.output_rows, model.other_rows])
    whole.model, whole.lm_head = stack, nn.Linear(rows.shape[1], outputs, bias=False, device="meta")
    whole.lm_head.weight = nn.Parameter(head.detach().clone())
    return whole.eval()


def generated(
    whole: Any, allowed: dict[tuple[int, ...], list[int]], prompts: torch.Tensor, width: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`generate()` under `prefix_allowed_tokens_fn`: tokens (B, K, L) and log-probabilities (B, K), best first.

    Args:
        whole: of `causal_lm`.
        allowed: tokens that may follow each partial path, in token numbers.
        prompts: (B, P) in the numbers of `whole`, all of one length.
        width: K.
        levels: L.
    """
    size = prompts.shape[1]
    out = whole.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=width,
        num_return_sequences=width,
        min_new_tokens=levels,
        max_new_tokens=levels,
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, tokens: allowed[tuple(tokens[size:].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )
    return out.sequences[:, size:].reshape(len(prompts), width, levels), out.sequences_scores.reshape(-1, width)
