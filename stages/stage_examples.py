"""What one stage trains and validates on, objective by objective."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from torch import Tensor

from models.generative import TokenBatch, inside
from models.words import Vocabulary
from stages.config import Config
from stages.dataset import Dataset
from stages.examples import Encoder, Windows, batches, make_windows
from stages.interactions import BoolArray, IntArray, Interactions
from stages.jobs import Job
from stages.queries import moment_starts, next_stage_validation, same_stage_validation, training_targets
from stages.search_examples import Branches, branch_batch, make_branches, mixed_batches


@dataclass(frozen=True)
class Part:
    """One objective's examples."""

    encoder: Encoder
    training: Windows | Branches
    validation: Windows | Branches

    def batch(self, windows: Windows | Branches, chosen: IntArray) -> TokenBatch:
        """Tokens and targets of the chosen windows."""
        if isinstance(windows, Branches):
            return branch_batch(self.encoder, windows, chosen)
        return self.encoder.batch(windows, chosen)

    def inside(self, batch: TokenBatch) -> Tensor:
        """(B, T) bool, False on padding."""
        return inside(batch.tokens, self.encoder.bos)


@dataclass(frozen=True)
class Examples:
    """What one stage trains and validates on.

    Attributes:
        parts: objective -> its examples, the objectives of the log.
        levels: codes of an item.
        unseen_rows: code tokens among the targets that no earlier stage's events contain.
    """

    parts: Mapping[str, Part]
    levels: int
    unseen_rows: int

    @property
    def windows(self) -> int:
        """Windows to train on."""
        return sum(len(part.training) for part in self.parts.values())

    @property
    def targets(self) -> dict[str, int]:
        """Training targets by objective."""
        return {name: part.training.targets for name, part in self.parts.items()}

    @property
    def validation_targets(self) -> dict[str, int]:
        """Validation targets by objective."""
        return {name: part.validation.targets for name, part in self.parts.items()}

    def epoch(self, size: int, order: np.random.Generator) -> Iterator[dict[str, IntArray]]:
        """Batches of `size` windows as objective -> window numbers; see `stages.search_examples.mixed_batches`."""
        return mixed_batches({name: part.training.lengths for name, part in self.parts.items()}, size, order)

    def shares(self, chosen: Mapping[str, IntArray], equal: bool) -> dict[str, float]:
        """What one code of each objective weighs in the mean loss of a batch.

        Args:
            chosen: objective -> window numbers of the batch.
            equal: the objectives of the batch weigh the same, not their targets.
        """
        codes = {name: int(self.parts[name].training.count[own].sum()) * self.levels for name, own in chosen.items()}
        if equal:
            return {name: 1 / (len(codes) * count) for name, count in codes.items()}
        return dict.fromkeys(codes, 1 / sum(codes.values()))

    def micro_batches(
        self, chosen: Mapping[str, IntArray], size: int | None, tokens: int
    ) -> Iterator[dict[str, IntArray]]:
        """A batch in pieces that are each one backward pass, every piece with its share of every objective.

        Args:
            chosen: objective -> window numbers of the batch, alike in length.
            size: windows a piece; None: as many pieces as make about `tokens` tokens each.
            tokens: padding included, a query's words left out.
        """
        total = sum(map(len, chosen.values()))
        count = -(-self.padded(chosen) // tokens) if size is None else -(-total // size)
        if len(chosen) == 1 and size is not None:
            for name, own in chosen.items():
                yield from ({name: part} for part in np.split(own, range(size, len(own), size)))
            return
        pieces = {name: np.array_split(own, count) for name, own in chosen.items()}
        for number in range(count):
            piece = {name: parts[number] for name, parts in pieces.items() if len(parts[number])}
            if piece:
                yield piece

    def padded(self, chosen: Mapping[str, IntArray]) -> int:
        """Tokens of a batch in one piece, padding included, a query's words left out."""
        parts = ((self.parts[name], own) for name, own in chosen.items())
        return sum(int(part.training.lengths[own].max()) * len(own) * part.encoder.stride for part, own in parts)

    def weights(self, chosen: Mapping[str, IntArray], shares: Mapping[str, float]) -> dict[str, float]:
        """What each objective weighs in a piece of a batch; over the pieces of a batch they sum to 1.

        Args:
            chosen: objective -> window numbers of the piece.
            shares: of the whole batch, as `shares` gives them.
        """
        return {
            name: int(self.parts[name].training.count[own].sum()) * self.levels * shares[name]
            for name, own in chosen.items()
        }


def validation_batches(windows: Windows | Branches, size: int) -> Iterator[IntArray]:
    """Window numbers for a pass that only measures, alike in length."""
    return batches(windows.lengths, size, None)


def stage_examples(
    config: Config, dataset: Dataset, job: Job, everything: bool, vocabulary: Vocabulary | None
) -> Examples:
    """The examples of `job`'s last stage.

    Args:
        config: the experiment.
        dataset: the prepared log.
        job: stage, protocol and seed decide what is held out.
        everything: train on all stages so far, not on the last alone.
        vocabulary: reads the queries; None where nobody searches.
    """
    events = dataset.interactions
    stages = list(range(job.stage + 1)) if everything else [job.stage]
    targets = training_targets(events, stages, job.protocol, job.seed)
    validation = _validation_targets(dataset, job)
    encoder = Encoder(events, dataset.catalogue, vocabulary, config.search.query_tokens)
    old = np.unique(encoder.tokens[events.items[events.stages < job.stage]])
    new = np.setdiff1d(np.unique(encoder.tokens[events.items[targets]]), old)
    parts = {}
    if "recommendation" in events.objectives:
        parts["recommendation"] = _recommendations(config, dataset, encoder, targets, validation)
    if "search" in events.objectives:
        windows = (make_branches(events, mask & events.searched, config.training) for mask in (targets, validation))
        parts["search"] = Part(encoder, *windows)
    return Examples(parts, encoder.levels, len(new))


def _recommendations(
    config: Config, dataset: Dataset, encoder: Encoder, targets: BoolArray, validation: BoolArray
) -> Part:
    events, kept = dataset.interactions, ~dataset.interactions.searched
    if events.query is not None and config.search.rec_history == "recommendation":
        events, targets, validation = events.recommendations, targets[kept], validation[kept]
        encoder = Encoder(events, dataset.catalogue)
    else:
        targets, validation = targets & kept, validation & kept
    apart = events.query is not None and config.search.own_moment == "apart"
    cut = make_branches if apart and not _alone(events, targets | validation) else make_windows
    return Part(encoder, *(cut(events, mask, config.training) for mask in (targets, validation)))


def _alone(events: Interactions, targets: BoolArray) -> bool:
    """Whether nothing of a target's own moment stands before it: then to read the log's order is to read the past."""
    rows = np.flatnonzero(targets)
    return bool((moment_starts(events)[rows] == rows).all())


def _validation_targets(dataset: Dataset, job: Job) -> BoolArray:
    """(N,) mask of the events that validate `job`'s last stage."""
    events = dataset.interactions
    if job.protocol == "same_stage":
        queries = same_stage_validation(events, job.stage)
    else:
        queries = next_stage_validation(events, job.stage, job.seed)
    edges = np.zeros(len(events.items) + 1, dtype=np.int64)
    np.add.at(edges, queries.cut, 1)
    np.add.at(edges, queries.end, -1)
    return np.cumsum(edges)[:-1] > 0
