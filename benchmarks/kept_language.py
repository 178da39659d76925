"""What an update keeps of a language model's language, beside what it has learnt: both for each method of a comparison.

    python -m benchmarks.kept_language WORKSPACE METHOD METHOD… [--config C] [--seed S] [--tokens N] [--windows N]

Learnt: cross-entropy in nats a code token on the windows of the stage after the last one trained, which no model has
seen. Kept: perplexity of the text `analysis.text`, beside that of stage 0's model, which all methods start from, and of
the untuned backbone. The first method named is what the others are compared with, batch by batch; intervals are a
bootstrap over batches of windows. Measures models that are there, and trains nothing; minutes a model, hence not in
`make bench`. The table is for docs/log.md.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch

from flows.experiment import remembered_config
from flows.machine import description
from models.backbone import wants_bfloat16
from models.generative import GenerativeModel
from stages.analysis import preservation
from stages.analysis.measured import START, Scope
from stages.config import Config, load_config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.metrics import FloatArray
from stages.stage_examples import Examples, validation_batches
from stages.train import bare_model
from stages.workspace import Workspace

DRAWS = 10_000


@dataclass(frozen=True)
class Losses:
    """Of one model on the coming stage, batch by batch.

    Attributes:
        sums: (N,) cross-entropies, summed over a batch's code tokens.
        tokens: (N,) how many those are.
    """

    sums: FloatArray
    tokens: FloatArray

    @property
    def mean(self) -> float:
        """Nats a code token."""
        return float(self.sums.sum() / self.tokens.sum())

    def less(self, other: Losses) -> tuple[float, float, float]:
        """This one's mean less the other's, and its 95 % interval over batches."""
        rng = np.random.default_rng(0)
        weights = rng.multinomial(len(self.tokens), np.full(len(self.tokens), 1 / len(self.tokens)), size=DRAWS)
        drawn = (weights @ (self.sums - other.sums)) / (weights @ self.tokens)
        low, high = np.quantile(drawn, [0.025, 0.975])
        return self.mean - other.mean, float(low), float(high)


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("workspace", type=Path)
    parser.add_argument("methods", nargs="+")
    parser.add_argument("--config", type=Path, help="absent: the workspace's own copy")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tokens", type=int, default=8192, help="of the text")
    parser.add_argument("--windows", type=int, default=1000, help="of the coming stage, at most, of each objective")
    wish = parser.parse_args()
    config, workspace = remembered_config(wish.workspace)
    if wish.config is not None:
        config = load_config(wish.config)
    try:
        print_table(scope_of(config, workspace, tuple(wish.methods), wish.seed), wish.tokens, wish.windows)
    except UserError as error:
        raise SystemExit(f"kept_language: {error}") from None


def scope_of(config: Config, workspace: Workspace, methods: tuple[str, ...], seed: int) -> Scope:
    """The models after the last stage but one, the last being what they have not seen."""
    dataset = load_dataset(config, workspace)
    last = int(dataset.interactions.stages.max()) - 1
    return Scope(config, workspace, dataset, methods, seed, "next_stage", last, (), partial(print, flush=True))


def print_table(scope: Scope, tokens: int, windows: int) -> None:
    """A line a model.

    Raises:
        UserError: no text is set, the backbone reads none, or a model is not there.
    """
    text = scope.config.analysis.text
    if text is None or scope.config.backbone.path is None:
        raise UserError("analysis.text names no text, or the backbone reads none; set both")
    preservation.refuse_protected(scope.config, scope.methods)
    coming = scope.examples(scope.last + 1)
    start = scope.model(START, 0).eval()
    stream = preservation.held_out_text(start, Path(text), tokens)
    head = preservation.own_head(str(scope.config.backbone.path))
    kept = partial(preservation.text_perplexity, head=head, stream=stream)
    print(f"{', '.join(f'{key} {value}' for key, value in description().items())}; seed {scope.seed}")
    print(f"untuned backbone: perplexity {kept(bare_model(scope.config, scope.dataset, scope.seed).eval()):.1f}")
    before = kept(start)
    print(line(START, before, before, losses(scope.config, start, coming, windows), None))
    first: dict[str, Losses] | None = None
    for method in scope.methods:
        model = scope.model(method, scope.last).eval()
        found = losses(scope.config, model, coming, windows)
        print(line(method, kept(model), before, found, first), flush=True)
        first = first or found


def line(
    method: str, perplexity: float, before: float, found: dict[str, Losses], first: dict[str, Losses] | None
) -> str:
    """What one model keeps and what it has learnt, in words."""
    parts = []
    for name, one in found.items():
        beside = ""
        if first is not None:
            value, low, high = one.less(first[name])
            beside = f" ({value:+.4f} [{low:+.4f}, {high:+.4f}])"
        parts.append(f"{name} {one.mean:.4f}{beside}, {int(one.tokens.sum()):,} code tokens")
    return (
        f"{method}: perplexity {perplexity:.1f} ({perplexity - before:+.1f}); loss of the coming stage: "
        + "; ".join(parts)
    )


@torch.no_grad()
def losses(config: Config, model: GenerativeModel, coming: Examples, windows: int) -> dict[str, Losses]:
    """Of a model in eval mode on at most so many windows of each objective, spread over the stage."""
    bfloat16 = wants_bfloat16(config.backbone.precision, model.device)
    return {name: _collected(_batches(config, model, coming, name, windows, bfloat16)) for name in coming.parts}


def _batches(
    config: Config, model: GenerativeModel, coming: Examples, name: str, most: int, bfloat16: bool
) -> Iterator[tuple[float, int]]:
    part = coming.parts[name]
    size = config.training.micro_batch_size or config.training.batch_size
    every = list(validation_batches(part.training, size))
    step = max(1, -(-len(part.training) // most))
    for chosen in every[::step]:
        batch = part.batch(part.training, chosen).to(model.device)
        with torch.autocast(model.device.type, torch.bfloat16, enabled=bfloat16):
            yield float(model.loss(batch, 1.0, 0.0)), len(batch.labels)


def _collected(found: Iterator[tuple[float, int]]) -> Losses:
    sums, tokens = zip(*found, strict=True)
    return Losses(np.array(sums), np.array(tokens, dtype=np.float64))


if __name__ == "__main__":
    main()
