"""Second moments Σ x xᵀ of what each linear map of a stack is fed, streamed over a corpus.

Maps that read the same tensor (q, k, v; gate, up) share one moment. Positions that are padding are left out. Moments
are summed in float32; as many as fit into a budget are gathered in one pass over the corpus, so that a large model
takes several passes and never holds all of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import TypeAlias

import torch
from torch import Tensor, nn

from models.generative import TokenBatch

Corpus: TypeAlias = Iterator[tuple[TokenBatch, Tensor]]
"""Batches, and for each a bool mask (B, T) that is False on padding."""

TokenStream: TypeAlias = Callable[[], Corpus]
"""Starts the corpus anew."""

Forward: TypeAlias = Callable[[TokenBatch], object]
"""A pass of the model over a batch; only what its linear maps are fed counts."""

BUDGET = 2**30
"""Bytes of moments gathered in one pass."""


@dataclass(frozen=True)
class InputMoment:
    """What the linear maps of one input saw.

    Attributes:
        names: the maps that read this input, in module order.
        moment: Σ x xᵀ (n, n), float32, un-centred.
        tokens: inputs summed.
    """

    names: tuple[str, ...]
    moment: Tensor
    tokens: int


def linear_maps(stack: nn.Module) -> dict[str, nn.Linear]:
    """Every linear map of a decoder stack by name; embeddings, norms and the head are none."""
    return {name: module for name, module in stack.named_modules() if isinstance(module, nn.Linear)}


@torch.no_grad()
def distinct_inputs(maps: Mapping[str, nn.Linear], run: Forward, batch: TokenBatch) -> list[tuple[str, ...]]:
    """Names of the maps, those together that are handed the same tensor in a forward pass.

    Args:
        maps: linear maps by name.
        run: a forward pass.
        batch: a small one to try it on.
    """
    held: dict[str, Tensor] = {}  # keeps the inputs alive, so that no address is used twice

    def note(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        return lambda _, inputs: held.__setitem__(name, inputs[0])

    handles = [module.register_forward_pre_hook(note(name)) for name, module in maps.items()]
    try:
        run(batch)
    finally:
        for handle in handles:
            handle.remove()
    groups: dict[tuple[int, torch.Size], list[str]] = {}
    for name in maps:
        if name in held:
            groups.setdefault((held[name].data_ptr(), held[name].shape), []).append(name)
    return [tuple(names) for names in groups.values()]


@torch.no_grad()
def input_moments(
    maps: Mapping[str, nn.Linear],
    run: Forward,
    stream: TokenStream,
    progress: Callable[[int], None] = lambda _: None,
    budget: int = BUDGET,
) -> Iterator[InputMoment]:
    """The moment of every distinct input, a few at a time.

    Args:
        maps: linear maps by name.
        run: a forward pass.
        stream: the corpus; started again for each pass.
        progress: called with the tokens seen so far in a pass.
        budget: bytes of moments held at once; one moment is always held.

    Raises:
        ValueError: the corpus is empty.
    """
    first = next(iter(stream()), None)
    if first is None:
        raise ValueError("the corpus holds no tokens")
    waiting = distinct_inputs(maps, run, _first_row(first[0]))
    while waiting:
        chosen = _fitting(waiting, maps, budget)
        yield from _one_pass(chosen, maps, run, stream, progress)
        waiting = waiting[len(chosen) :]


def _first_row(batch: TokenBatch) -> TokenBatch:
    places, visible = (None if part is None else part[:1] for part in (batch.places, batch.visible))
    return replace(batch, tokens=batch.tokens[:1], places=places, visible=visible)


def _fitting(
    groups: Sequence[tuple[str, ...]], maps: Mapping[str, nn.Linear], budget: int
) -> Sequence[tuple[str, ...]]:
    sizes = torch.tensor([4 * maps[names[0]].in_features ** 2 for names in groups]).cumsum(0)
    return groups[: max(1, int((sizes <= budget).sum()))]


def _one_pass(
    groups: Sequence[tuple[str, ...]],
    maps: Mapping[str, nn.Linear],
    run: Forward,
    stream: TokenStream,
    progress: Callable[[int], None],
) -> Iterator[InputMoment]:
    heads = [names[0] for names in groups]
    sums = {name: maps[name].weight.new_zeros(2 * (maps[name].in_features,), dtype=torch.float32) for name in heads}
    seen, mask = 0, torch.empty(0)

    def add(name: str) -> Callable[[nn.Module, tuple[Tensor, ...]], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            rows = inputs[0].float()[mask.to(inputs[0].device)]  # (N, n)
            sums[name].addmm_(rows.T, rows)

        return hook

    handles = [maps[name].register_forward_pre_hook(add(name)) for name in heads]
    try:
        for batch, inside in stream():
            mask = inside
            run(batch)
            seen += int(inside.sum())
            progress(seen)
    finally:
        for handle in handles:
            handle.remove()
    for names in groups:
        yield InputMoment(names, sums.pop(names[0]), seen)


def limited(batches: Corpus, tokens: int) -> Corpus:
    """Batches until they hold `tokens` tokens; the last one counts whole."""
    seen = 0
    for batch, inside in batches:
        yield batch, inside
        seen += int(inside.sum())
        if seen >= tokens:
            return


def packed_text(numbers: Iterator[int], length: int, batch: int) -> Corpus:
    """A stream of token numbers as batches (batch, length) without padding; a last, shorter row is dropped."""
    while rows := list(islice(numbers, batch * length)):
        whole = len(rows) // length
        if not whole:
            return
        tokens = torch.tensor(rows[: whole * length]).view(whole, length)
        nothing = torch.empty(0, dtype=torch.int64)
        yield TokenBatch(tokens, nothing, nothing), torch.ones_like(tokens, dtype=torch.bool)
