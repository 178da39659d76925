"""Claim: PESO's proximal term costs at most 3 % of a step.

The same LoRA step with and without the term, on `small`; the published setting (each adapter matrix's own softmax) and
the widest one, which holds the code tokens' rows as well.
"""

from __future__ import annotations

from benchmarks.lora_step import folded
from benchmarks.measure import Row, alternate, dearer, report
from benchmarks.subjects import SCHEDULE, take, usual_batch
from models import adapter as lora
from models.generative import GenerativeModel
from stages.method_config import PesoConfig
from stages.methods.contract import Step
from stages.methods.parts import adamw_step, let_train
from stages.methods.peso import proximal_penalty

NAME = "proximal_step"
STEPS = 4
"""Steps a timing."""


def main() -> None:
    """Measure both settings and record the rows."""
    report(NAME, [row("adapter", mark=1.03), row("adapter+tokens", mark=None)])


def row(anchor: str, mark: float | None) -> Row:
    """The step with the term beside the step without, on equal models and batches."""
    batch = usual_batch()
    model, step = held(anchor)
    plain, plain_step = folded()
    # The difference is small: more pairs than elsewhere.
    pair = alternate(
        lambda: take(step, model, batch, STEPS), lambda: take(plain_step, plain, batch, STEPS), repetitions=15
    )
    name = "PESO's term" if anchor == "adapter" else f"PESO's term, anchor = {anchor}"
    return dearer(name, "the same step without it", pair, mark=mark, calls=STEPS, note="`small`, 64 windows of 10 items")


def held(anchor: str) -> tuple[GenerativeModel, Step]:
    """The folded adapter under PESO's step, as `stages.methods.peso` builds it."""
    model, _ = folded()
    settings = PesoConfig.model_validate({"anchor": anchor})
    matrices = dict(lora.matrices(model.stack)) | (model.rows() if anchor == "adapter+tokens" else {})
    modules = len(lora.adapter_of(model.stack))
    penalty = proximal_penalty(matrices, settings, modules)
    return model, adamw_step(let_train(model, rows=True), SCHEDULE, penalty)


if __name__ == "__main__":
    main()
