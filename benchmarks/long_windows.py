"""Claim: a step on a log with searches is faster in pieces of some 4,096 tokens than with its whole batch in one pass.

Windows of searches are long and branch, and a batch pads each to its longest; whole, it no longer fits the processor's
caches (`stages.fit.MICRO_TOKENS`). Last.fm's tag searches and recommendations, stage 1, three batches of 64 windows.
"""

from __future__ import annotations

from itertools import islice

from benchmarks.measure import Work, alternate, faster, flops, report
from benchmarks.subjects import lastfm
from models import adapter as lora
from stages.config import Config
from stages.dataset import Dataset
from stages.fit import MICRO_TOKENS, Fit
from stages.interactions import IntArray
from stages.jobs import Job
from stages.methods.parts import let_train
from stages.search_examples import query_vocabulary
from stages.stage_examples import stage_examples
from stages.train import bare_model

NAME = "long_windows"
BATCHES = 3
ONE_PASS = 1_000_000
"""Windows: more than any batch has."""


def main() -> None:
    """Forward and backward of the same batches, in pieces and whole."""
    config, dataset = lastfm(NAME)
    pieces, whole = (learner(config, dataset, size) for size in (None, ONE_PASS))
    batches = list(islice(pieces.batches(1), BATCHES))
    tokens = sum(pieces.examples.padded(batch) for batch in batches)
    pair = alternate(lambda: learn(pieces, batches), lambda: learn(whole, batches), repetitions=5)
    note = (
        f"Last.fm, stage 1, {BATCHES} batches of {config.training.batch_size} windows, up to {MICRO_TOKENS['cpu']:,} "
        f"tokens a piece, {'bfloat16' if pieces.bfloat16 else 'float32'}; padding counted, queries' words left out"
    )
    row = faster(
        "long windows in pieces",
        "each batch in one pass",
        pair,
        mark=None,
        unit="tokens/s",
        amount=tokens,
        work=Work(flops=flops(lambda: learn(pieces, batches)), number="bfloat16" if pieces.bfloat16 else "float32"),
        note=note,
    )
    report(NAME, [row])


def learner(config: Config, dataset: Dataset, size: int | None) -> Fit:
    """An untrained model of the config under its adapter, its losses in micro-batches of `size` windows."""
    vocabulary = query_vocabulary(config, dataset)
    examples = stage_examples(config, dataset, Job("single", 0, "next_stage", 1), False, vocabulary)
    model, own = bare_model(config, dataset, 0, vocabulary), config.adapter
    lora.attach(model.stack, own.rank, own.alpha, own.targets, seed=0)
    let_train(model, rows=True)
    training = config.training.model_copy(update={"micro_batch_size": size})
    return Fit(config.model_copy(update={"training": training}), model.train(), lambda _: {}, examples, 0)


def learn(fit: Fit, batches: list[dict[str, IntArray]]) -> None:
    """Gradients of the batches."""
    for batch in batches:
        for losses in fit.losses(batch):
            sum(losses.values()).backward()  # pyright: ignore[reportAttributeAccessIssue]


if __name__ == "__main__":
    main()
