"""Claim: logits over the code tokens at the targets alone make a LoRA step on a pretrained backbone 1.3 times as fast.

The rival forms logits over the backbone's whole vocabulary and the code tokens, at every position, and leaves the
positions that are no target out of the loss, as `AutoModelForCausalLM` does with labels of -100. It trains those rows,
as PESO's release does (`modules_to_save`); the second line spares it that. The restricted softmax is another objective,
the one that constrained decoding uses: this compares cost, not quality.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from benchmarks.measure import Row, Work, alternate, faster, flops, pretrained_folder, report
from benchmarks.subjects import SCHEDULE, generated_batch, mean_loss, with_codes
from models import adapter as lora
from models.backbone import pretrained_backbone
from models.generative import GenerativeModel, TokenBatch
from stages.config import AdapterConfig
from stages.methods.parts import adamw_step, let_train

NAME = "output_head"


def main() -> None:
    """Measure whole optimiser steps beside both rivals and record the rows."""
    folder = pretrained_folder(NAME)
    backbone = pretrained_backbone(folder)
    head = cast(Tensor, backbone.head)  # a pretrained one always has a head
    rows = [row(with_codes(backbone), head, trained) for trained in (True, False)]
    report(NAME, rows)


def row(model: GenerativeModel, head: Tensor, trained: bool) -> Row:
    """A LoRA step with the restricted head beside one with the whole vocabulary's rows, trained or not."""
    own = AdapterConfig()
    lora.detach(model.stack)
    lora.attach(model.stack, own.rank, own.alpha, own.targets, seed=0)
    moving = let_train(model, rows=True)
    words = nn.Parameter(head.clone(), requires_grad=trained)
    step = adamw_step(moving, SCHEDULE)
    rival_step = adamw_step([*moving, words] if trained else moving, SCHEDULE)
    batch = generated_batch(windows=6, context=4, targets=6)
    pair = alternate(
        lambda: step(mean_loss(model, batch)),
        lambda: rival_step([{"recommendation": everywhere(model, words, batch)}]),
        repetitions=5,
    )
    count = batch.tokens.numel()
    return faster(
        "output head" if trained else "output head, words frozen",
        f"the whole vocabulary{', trained,' * trained} at all positions",
        pair,
        mark=1.3 if trained else None,
        unit="tokens/s",
        amount=count,
        work=Work(flops=flops(lambda: step(mean_loss(model, batch)))),
        note=f"LoRA step, {parameters(model) / 1e6:.0f} M weights, {len(head):,} words and {model.codes:,} codes, "
        f"{len(batch.labels)} targets of {count} tokens",
    )


def everywhere(model: GenerativeModel, words: Tensor, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy over the targets, from logits over everything, everywhere."""
    states = model.hidden(batch.tokens)
    logits = torch.cat([model.logits(states), torch.nn.functional.linear(states, words)], dim=-1)
    labels = torch.full((batch.tokens.numel(),), -100)
    labels[batch.positions] = batch.labels
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels)


def parameters(model: GenerativeModel) -> int:
    """Weights in all."""
    return sum(value.numel() for value in model.parameters())


if __name__ == "__main__":
    main()
