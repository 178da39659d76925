"""Claim: PESO's proximal term costs at most 3 % of a step.

The same LoRA step with and without the term, on `small`; and, since a difference of a percent drowns in the spread of
whole steps, the term by itself as a share of the step: the published setting (each adapter matrix's own softmax) and
the widest one, which holds the code tokens' rows as well. The limit of the term alone is that of memory: weight, anchor
and gradient of every number read once, the gradient written once.
"""

from __future__ import annotations

from torch.nn import Parameter

from benchmarks.lora_step import folded
from benchmarks.measure import Work, alternate, dearer, flops, report
from benchmarks.subjects import SCHEDULE, take, usual_batch
from models import adapter as lora
from models.generative import GenerativeModel
from stages.method_config import PesoConfig
from stages.methods.contract import Step
from stages.methods.parts import Penalty, adamw_step, let_train
from stages.methods.peso import proximal_penalty

NAME = "proximal_step"
STEPS = 4
"""Steps a timing."""
NOTE = "`small`, 64 windows of 10 items"


def main() -> None:
    """Measure whole steps, then the term alone under both settings, and record the rows."""
    batch = usual_batch()
    (model, step, penalty), (plain, plain_step) = held("adapter"), folded()
    _, _, wide = held("adapter+tokens", model)
    whole = alternate(lambda: take(step, model, batch, STEPS), lambda: take(plain_step, plain, batch, STEPS))
    work = Work(flops=flops(lambda: take(step, model, batch, STEPS)))
    rows = [dearer("PESO's term", "the same step without it", whole, mark=1.03, work=work, calls=STEPS, note=NOTE)]
    for anchor, term in (("adapter", penalty), ("adapter+tokens", wide)):
        pair = alternate(lambda term=term: repeat(term, STEPS), lambda: take(plain_step, plain, batch, STEPS))
        name = f"PESO's term alone, anchor = {anchor}"
        work = Work(bytes=STEPS * 4 * 4 * sum(value.numel() for value in matrices(model, anchor).values()))
        rows.append(dearer(name, "a step without it", pair, mark=0.03, work=work, calls=STEPS, note=NOTE))
    report(NAME, rows)


def held(anchor: str, model: GenerativeModel | None = None) -> tuple[GenerativeModel, Step, Penalty]:
    """The folded adapter under PESO's step, as `stages.methods.peso` builds it."""
    model = folded()[0] if model is None else model
    settings = PesoConfig.model_validate({"anchor": anchor})
    penalty = proximal_penalty(matrices(model, anchor), settings, modules=len(lora.adapter_of(model.stack)))
    return model, adamw_step(let_train(model, rows=True), SCHEDULE, penalty), penalty


def matrices(model: GenerativeModel, anchor: str) -> dict[str, Parameter]:
    """What the term holds."""
    return dict(lora.matrices(model.stack)) | (model.rows() if anchor == "adapter+tokens" else {})


def repeat(penalty: Penalty, times: int) -> None:
    """The term's value and gradient, added to the gradients the last step left."""
    for _ in range(times):
        penalty()


if __name__ == "__main__":
    main()
