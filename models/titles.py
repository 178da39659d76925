"""How likely a pretrained language model finds each of a few texts behind a prompt, in its own words."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor
from transformers import DynamicCache

from models.generative import GenerativeModel


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
