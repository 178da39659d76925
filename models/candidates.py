"""Exact scores of a few candidates a user: every candidate's codes are fed at once behind one reading of the prompt.

An ID has a fixed number of codes, so that no ID opens another one and no token needs to end it.
"""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import DynamicCache

from models.generative import GenerativeModel


def score_codes(model: GenerativeModel, prompts: Tensor, lengths: Tensor, codes: Tensor) -> Tensor:
    """Log-probability of each candidate, summed over its codes: the beam's score, without a beam.

    Args:
        model: in eval mode.
        prompts: (B, P) token numbers, padded on the right.
        lengths: (B,) valid tokens of each prompt, at least 1.
        codes: (B, K, L) token numbers of the candidates.

    Returns:
        (B, K).
    """
    cache = DynamicCache(config=model.stack.config)
    read = model.stack(inputs_embeds=model.embed(prompts), past_key_values=cache, use_cache=True).last_hidden_state
    last = read[torch.arange(len(prompts), device=prompts.device), lengths - 1]  # (B, d)
    states = last[:, None, None].expand(-1, codes.shape[1], 1, -1)
    if codes.shape[2] > 1:
        fed = _behind(model, cache, lengths, prompts.shape[1], codes[..., :-1])
        states = torch.cat([states, fed], dim=2)
    log_p = model.logits(states).float().log_softmax(dim=-1)  # (B, K, L, C)
    return log_p.gather(3, codes[..., None]).sum(dim=(2, 3))


def _behind(model: GenerativeModel, cache: DynamicCache, lengths: Tensor, width: int, codes: Tensor) -> Tensor:
    """Hidden states (B, K, L - 1, d) after each code but the last; a candidate sees the prompt and itself so far."""
    rows, candidates, steps = codes.shape
    device = codes.device
    prompt = torch.arange(width, device=device) < lengths[:, None]  # (B, P)
    place = torch.arange(candidates * steps, device=device)
    own = (place[:, None] // steps == place // steps) & (place <= place[:, None])
    seen = torch.cat([prompt[:, None].expand(-1, len(place), -1), own.expand(rows, -1, -1)], dim=2)
    states = model.stack(
        inputs_embeds=model.embed(codes.flatten(1)),
        attention_mask=seen[:, None],
        position_ids=lengths[:, None] + place % steps,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    return states.unflatten(1, (candidates, steps))
