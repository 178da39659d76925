"""Claim: a step that trains a LoRA takes at most 1.2 times the step that trains every weight of `small`.

Ours folds the adapter into the weight once a pass (`models.adapter`). The second line puts the same adapter on through
PEFT's own modules, which compute it apart from the weight at every token.
"""

from __future__ import annotations

from peft import LoraConfig, inject_adapter_in_model

from benchmarks.measure import Work, alternate, dearer, faster, flops, report
from benchmarks.subjects import SCHEDULE, small, take, usual_batch
from models import adapter as lora
from models.generative import GenerativeModel
from stages.config import AdapterConfig
from stages.methods.contract import Step
from stages.methods.parts import adamw_step, let_train

NAME = "lora_step"
STEPS = 3
"""Steps a timing, so that one lasts near a second."""


def main() -> None:
    """Measure the three ways of training on the same batch and record the rows."""
    batch = usual_batch()
    (model, step), (whole, whole_step), (wrapped, wrapped_step) = folded(), every_weight(), through_peft()
    beside = alternate(lambda: take(step, model, batch, STEPS), lambda: take(whole_step, whole, batch, STEPS))
    peft = alternate(lambda: take(step, model, batch, STEPS), lambda: take(wrapped_step, wrapped, batch, STEPS))
    work = Work(flops=flops(lambda: take(step, model, batch, STEPS)))
    tokens = STEPS * batch.tokens.numel()
    note = f"`small`, 64 windows of 10 items, {moving(model):,} trained weights against {{:,}}"
    rows = [
        dearer(
            "LoRA step",
            "the same step with all weights trained",
            beside,
            mark=1.2,
            work=work,
            calls=STEPS,
            note=note.format(moving(whole)),
        ),
        faster(
            "LoRA step, folded",
            "the same adapter through PEFT's modules",
            peft,
            mark=None,
            unit="tokens/s",
            amount=tokens,
            work=work,
            note=note.format(moving(wrapped)),
        ),
    ]
    report(NAME, rows)


def folded() -> tuple[GenerativeModel, Step]:
    """The adapter as this repository trains it, with the code tokens' rows."""
    model, own = small(), AdapterConfig()
    lora.attach(model.stack, own.rank, own.alpha, own.targets, seed=0)
    return model, adamw_step(let_train(model, rows=True), SCHEDULE)


def every_weight() -> tuple[GenerativeModel, Step]:
    """No adapter; the whole stack and the rows train."""
    model = small()
    return model, adamw_step(list(model.parameters()), SCHEDULE)


def through_peft() -> tuple[GenerativeModel, Step]:
    """The same adapter and rows, the adapter as PEFT's `LoraLayer`s."""
    model, own = small(), AdapterConfig()
    settings = LoraConfig(r=own.rank, lora_alpha=int(own.alpha), target_modules=list(own.targets), lora_dropout=0.0)
    inject_adapter_in_model(settings, model.stack)  # freezes nothing it did not add
    chosen = [value for name, value in model.stack.named_parameters() if ".lora_" in name]
    model.stack.requires_grad_(False)
    for value in chosen:
        value.requires_grad_(True)
    return model, adamw_step([*chosen, *model.rows().values()], SCHEDULE)


def moving(model: GenerativeModel) -> int:
    """Weights that train."""
    return sum(value.numel() for value in model.parameters() if value.requires_grad)


if __name__ == "__main__":
    main()
