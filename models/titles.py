"""How likely a pretrained language model finds each of a few texts behind a prompt, in its own words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from transformers import DynamicCache

from models.generative import GenerativeModel
from models.recommender import IntArray
from models.words import Vocabulary

HISTORY = 10
"""Titles of the newest history items that a prompt names."""
TITLE_TOKENS = 32
"""Tokens read of a title."""


class TitleReader:
    """Scores items by how likely their titles are behind a prompt in words: what a backbone knows before any training.

    Args:
        model: in eval mode, with plain weights; a pretrained backbone.
        head: (V, d) output rows of the backbone's own vocabulary.
        vocabulary: its tokenizer.
        titles: by item number.
    """

    def __init__(self, model: GenerativeModel, head: Tensor, vocabulary: Vocabulary, titles: Sequence[str]) -> None:
        self.model, self.head, self.vocabulary, self.titles = model, head, vocabulary, titles

    def score(
        self,
        histories: Sequence[IntArray],
        candidates: IntArray,
        queries: Sequence[str] | None = None,
        **request: Any,
    ) -> npt.NDArray[np.float64]:
        """Scores of a few candidates a history.

        Args:
            histories: B arrays of item numbers, oldest first; may be empty.
            candidates: (B, K) item numbers.
            queries: B texts that were searched for; absent: none was.
            request: what else a recommender is told; nothing of it counts.

        Returns:
            (B, K) nats a token of the title; -inf for one that the backbone has no words for.
        """
        return self.behind(prompts_of(self.titles, histories, queries), candidates)

    def behind(self, prompts: Sequence[str], candidates: IntArray) -> npt.NDArray[np.float64]:
        """(B, K) as `score`, behind B prompts."""
        items = np.unique(candidates).tolist()
        texts = {item: self.vocabulary.encode(f" {self.titles[item]}")[:TITLE_TOKENS] for item in items}
        scores = np.full(candidates.shape, -np.inf)
        for line, (prompt, row) in enumerate(zip(prompts, candidates.tolist(), strict=True)):
            read = [place for place, item in enumerate(row) if texts[item]]
            if read:
                titles = [texts[row[place]] for place in read]
                scores[line, read] = title_scores(self.model, self.head, self.vocabulary.encode(prompt), titles).numpy()
        return scores


def prompts_of(titles: Sequence[str], histories: Sequence[IntArray], queries: Sequence[str] | None = None) -> list[str]:
    """What is read first: titles of the newest items of each history, and the query where one is given.

    Args:
        titles: by item number.
        histories: B arrays of item numbers, oldest first; may be empty.
        queries: B texts, empty where nothing was searched for; absent: all are.
    """
    texts = [""] * len(histories) if queries is None else queries
    named = ([titles[int(item)] for item in own[-HISTORY:]] for own in histories)
    return [_prompt(past, text) for past, text in zip(named, texts, strict=True)]


def _prompt(history: Sequence[str], query: str) -> str:
    past = f"A customer took: {'; '.join(history)}. " if history else ""
    return f'{past}The customer searched for "{query}" and took:' if query else f"{past}Next, the customer took:"


@torch.no_grad()
def title_scores(
    model: GenerativeModel, head: Tensor, prompt: Sequence[int], titles: Sequence[Sequence[int]]
) -> Tensor:
    """Mean log-probability a token of each title, read behind one reading of the prompt.

    Args:
        model: in eval mode, with a pretrained backbone.
        head: (V, d) output rows of the backbone's own vocabulary.
        prompt: token numbers of that vocabulary, after the beginning of the sequence.
        titles: K lists of token numbers, none empty.

    Returns:
        (K,) nats a token, at most 0.

    Raises:
        ValueError: an empty title, which has no likelihood.
    """
    lengths = torch.tensor([len(title) for title in titles])
    if not bool((lengths > 0).all()):
        raise ValueError(f"title {int(lengths.argmin())} is empty; give every candidate a text")
    width = int(lengths.max())
    tokens = torch.tensor([[*title, *[0] * (width - len(title))] for title in titles]).to(model.device)
    cache = DynamicCache(config=model.stack.config)
    opening = torch.tensor([[model.bos_row, *prompt]]).to(model.device)
    read = model.stack(inputs_embeds=model.own_embedding[opening], past_key_values=cache, use_cache=True)
    states = read.last_hidden_state[:, -1:].expand(len(titles), 1, -1)
    if width > 1:
        cache.batch_repeat_interleave(len(titles))
        # Padding stands on the right, where no token of a title attends to it.
        fed = model.stack(inputs_embeds=model.own_embedding[tokens[:, :-1]], past_key_values=cache, use_cache=True)
        states = torch.cat([states, fed.last_hidden_state], dim=1)  # (K, width, d)
    inside = torch.arange(width, device=model.device) < lengths.to(model.device)[:, None]
    found = -F.cross_entropy(F.linear(states[inside], head.to(states)).float(), tokens[inside], reduction="none")
    total = torch.zeros(len(titles), device=model.device).index_add_(0, inside.nonzero()[:, 0], found)
    return (total / lengths.to(model.device)).cpu()
