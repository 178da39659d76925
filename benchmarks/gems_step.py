"""Claim: GEMS's optimiser step costs at most 1.3 × AdamW's on all weights, and refreshing bases under 5 % of it.

The same `small` model and batch (two objectives of 32 windows each) under both steps.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch

from benchmarks.measure import Row, alternate, dearer, median, report
from benchmarks.subjects import SCHEDULE, generated_batch, small
from models.generative import GenerativeModel, TokenBatch
from models.input_moments import input_moments, linear_maps
from regularizers.null_space import Protection, protect
from stages.method_config import GemsConfig
from stages.methods.contract import SharedLosses
from stages.methods.gems_step import GemsStep, split_parameters
from stages.methods.parts import adamw_step, let_backbone_train

NAME = "gems_step"
PAIRS = 20
"""More than elsewhere: a refresh comes a matrix at a time, and its share is a mean over steps."""


def main() -> None:
    """Measure both steps and record the rows."""
    own = {name: generated_batch(32, context=4, targets=6, seed=seed) for seed, name in enumerate(("search", "rec"))}
    batches = {"search": own["search"], "recommendation": own["rec"]}
    plain, held = small(), small()
    adamw = adamw_step(let_backbone_train(plain, rows=True), SCHEDULE)
    gems = gems_of(held, batches["search"])
    first = gems(losses(held, batches))["refresh_seconds"]
    refreshing: list[float] = []
    pair = alternate(
        lambda: refreshing.append(gems(losses(held, batches))["refresh_seconds"]),
        lambda: adamw(losses(plain, batches)),
        repetitions=PAIRS,
    )
    state = gems.report()["gems"]
    note = f"`small`, two objectives of 32 windows; state {state['state_bytes'] / 1e6:.1f} MB"
    step = dearer("GEMS step", "AdamW on all weights", pair, mark=1.3, note=note)
    counted = refreshing[1:]  # the first call does not count, as in `alternate`
    share = sum(counted) / sum(pair.ours)
    report(
        NAME,
        [
            step,
            Row(
                name="GEMS refresh",
                rival="a whole step",
                ratio=share,
                mark=0.05,
                better="lower",
                unit="ms",
                ours=1e3 * sum(counted) / len(counted),
                theirs=1e3 * median(pair.ours),
                note=f"mean over {len(counted)} steps, staggered over {GemsConfig().refresh_every}; "
                f"all bases at a stage's start take {first:.2f} s",
                how=step.how,
            ),
        ],
    )


def gems_of(model: GenerativeModel, corpus: TokenBatch) -> GemsStep:
    """GEMS on every linear map of `model`, protecting what `corpus` feeds them."""
    found = protected(model, corpus)
    let_backbone_train(model, rows=True)
    maps, others = split_parameters(model, model.stack)
    rank = min(64, model.own_embedding.shape[1] // 4)
    return GemsStep(maps, others, GemsConfig(gate_warmup=1), rank, found, SCHEDULE)


def losses(model: GenerativeModel, batches: Mapping[str, TokenBatch]) -> Iterator[SharedLosses]:
    """One micro-batch of both objectives, weighed by their targets."""
    total = sum(len(batch.labels) for batch in batches.values())
    found = {name: model.loss(batch) / total for name, batch in batches.items()}
    yield SharedLosses(found, {name: len(batch.labels) / total for name, batch in batches.items()})


def protected(model: GenerativeModel, batch: TokenBatch) -> dict[str, Protection]:
    """What each linear map must keep of its inputs on `batch`."""
    found: dict[str, Protection] = {}
    whole = torch.ones_like(batch.tokens, dtype=torch.bool)
    for one in input_moments(
        linear_maps(model.stack), lambda one: model.hidden(one.tokens), lambda: iter([(batch, whole)])
    ):
        found |= dict.fromkeys(one.names, protect(one.moment, one.tokens, "energy", 0.95))
    return found


if __name__ == "__main__":
    main()
