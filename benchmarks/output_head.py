"""Claim: logits over the code tokens at the targets alone make a LoRA step on a pretrained backbone 1.3 times as fast.

The rival forms logits over the backbone's whole vocabulary and the code tokens, at every position, and leaves the
positions that are no target out of the loss, as `AutoModelForCausalLM` does with labels of -100. Its vocabulary rows
are frozen, so it is spared their gradient. The restricted softmax is another objective, the one that constrained
decoding uses: this compares cost, not quality.
"""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.measure import Work, alternate, faster, flops, pretrained_folder, report
from benchmarks.subjects import SCHEDULE, generated_batch, mean_loss, with_codes
from models import adapter as lora
from models.backbone import pretrained_backbone
from models.generative import GenerativeModel, TokenBatch
from stages.config import AdapterConfig
from stages.methods.parts import adamw_step, let_train

NAME = "output_head"


def main() -> None:
    """Measure whole optimiser steps of both and record the row."""
    folder = pretrained_folder(NAME)
    backbone = pretrained_backbone(folder)
    assert backbone.head is not None
    model, head = with_codes(backbone), backbone.head
    own = AdapterConfig()
    lora.attach(model.stack, own.rank, own.alpha, own.targets, seed=0)
    step = adamw_step(let_train(model, rows=True), SCHEDULE)
    batch = generated_batch(windows=4, context=4, targets=6)

    def ours() -> None:
        step(mean_loss(model, batch))

    def rival() -> None:
        step([{"recommendation": everywhere(model, head, batch)}])

    pair = alternate(ours, rival, repetitions=5)
    vocabulary, count = f"{len(head):,} words and {model.codes:,} codes", batch.tokens.numel()
    row = faster(
        "output head",
        "logits over the whole vocabulary at all positions",
        pair,
        mark=1.3,
        unit="tokens/s",
        amount=count,
        work=Work(flops=flops(ours)),
        note=f"LoRA step, {parameters(model) / 1e6:.0f} M weights, {vocabulary}, {len(batch.labels)} targets of {count}",
    )
    report(NAME, [row])


def everywhere(model: GenerativeModel, head: Tensor, batch: TokenBatch) -> Tensor:
    """Mean cross-entropy over the targets, from logits over everything, everywhere."""
    states = model.hidden(batch.tokens)
    logits = torch.cat([model.logits(states), torch.nn.functional.linear(states, head)], dim=-1)
    labels = torch.full((batch.tokens.numel(),), -100)
    labels[batch.positions] = batch.labels
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), labels)


def parameters(model: GenerativeModel) -> int:
    """Weights in all."""
    return sum(value.numel() for value in model.parameters())


if __name__ == "__main__":
    main()
