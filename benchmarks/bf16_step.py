"""Claim, where the processor multiplies bfloat16 itself (AMX): autocast steps are at least twice as fast as float32.

Elsewhere `precision = "auto"` chooses float32, and the row says why nothing was claimed.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from benchmarks.measure import Row, Work, alternate, faster, flops, pretrained_folder, report
from benchmarks.subjects import SCHEDULE, generated_batch, mean_loss, with_codes
from models import adapter as lora
from models import processor
from models.backbone import pretrained_backbone, wants_bfloat16
from stages.config import AdapterConfig
from stages.methods.contract import Losses
from stages.methods.parts import adamw_step, let_train

NAME = "bf16_step"
CLAIM, RIVAL = "bf16", "the same step in float32"


def main() -> None:
    """Measure where it applies, else record that it does not."""
    if wants_bfloat16("auto", torch.device("cpu")):
        report(NAME, [row(pretrained_folder(NAME))])
        return
    known = " ".join(sorted(name for name in processor.features() if name.startswith(("avx", "amx")))) or "none named"
    reason = f"not applicable: this processor has neither AMX nor AVX-512 BF16 ({known}); float32 is chosen by itself"
    report(NAME, [Row(CLAIM, RIVAL, mark=2.0, note=reason)])


def row(folder: str) -> Row:
    """A LoRA step under autocast beside the same step in float32."""
    model, own = with_codes(pretrained_backbone(folder)), AdapterConfig()
    lora.attach(model.stack, own.rank, own.alpha, own.targets, seed=0)
    step = adamw_step(let_train(model, rows=True), SCHEDULE)
    batch = generated_batch(windows=16, context=6, targets=10)  # AMX pays from about 64 rows

    def halved() -> Iterator[Losses]:
        """The batch's loss under autocast."""
        with torch.autocast("cpu", torch.bfloat16):
            losses = next(iter(mean_loss(model, batch)))
        yield losses

    pair = alternate(lambda: step(halved()), lambda: step(mean_loss(model, batch)), repetitions=5)
    amx = "amx_bf16" in processor.features()
    return faster(
        CLAIM,
        RIVAL,
        pair,
        mark=2.0 if amx else None,
        unit="tokens/s",
        amount=batch.tokens.numel(),
        work=Work(flops=flops(lambda: step(mean_loss(model, batch))), number="bfloat16"),
        note="AMX" if amx else "AVX-512 BF16, no claim without AMX",
    )


if __name__ == "__main__":
    main()
