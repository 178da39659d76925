"""Examples that branch off a history: a user's history, a query where there is one, and the item that was taken.

Targets that are near each other in a user's history share it: the history is read once, and each target is a branch
(the query's text, the request, the item's codes) that sees the history up to its own moment and nothing of the other
branches. To the model a branch is what it would be as a sequence of its own. Searches are always learnt so;
recommendations where several were taken at one moment.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.profiler import record_function

from models.backbone import CONTROL_TOKENS
from models.generative import TokenBatch
from models.words import BackboneVocabulary, Vocabulary, WordVocabulary
from stages.config import Config, TrainingConfig
from stages.dataset import Dataset
from stages.errors import UserError
from stages.examples import BUCKET, Encoder, batches
from stages.interactions import BoolArray, IntArray, Interactions, runs
from stages.queries import moment_starts, training_targets


@dataclass(frozen=True)
class Branches:
    """W histories with R targets that branch off them.

    Attributes:
        start: (W,) first row of the history.
        end: (W,) one past its last row: where the last branch leaves it.
        count: (W,) branches.
        row: (R,) target rows, window by window.
        cut: (R,) row at which the target's moment begins and its branch leaves the history.
    """

    start: IntArray
    end: IntArray
    count: IntArray
    row: IntArray
    cut: IntArray

    def __len__(self) -> int:
        return len(self.start)

    @property
    def targets(self) -> int:
        """Target items in all windows."""
        return len(self.row)

    @property
    def lengths(self) -> IntArray:
        """(W,) what a batch pads to, in items, a branch taken for one."""
        return self.end - self.start + self.count


def make_branches(interactions: Interactions, mask: BoolArray, training: TrainingConfig) -> Branches:
    """Group the targets of a user that lie within `targets_per_window` rows of each other.

    Every target sees at least `history_length` items, where the user has them; with `layout = "per_prefix"` it stands
    alone and sees exactly those, as it does with `packed_exact`, where only targets of one past share a window.

    Args:
        interactions: N events.
        mask: (N,) which events are targets, of one kind.
        training: gives `layout`, `history_length` and `targets_per_window`.
    """
    row = np.flatnonzero(mask)
    user, cut = interactions.users[row], moment_starts(interactions)[row]
    if training.layout == "per_prefix":
        first = np.arange(len(row))
    else:
        size = training.targets_per_window
        past = cut - interactions.offsets[user]
        exact = np.where(past <= training.history_length, 0, past)
        reach = exact if training.layout == "packed_exact" else past // size
        opens = np.ones(len(row), dtype=bool)
        opens[1:] = (user[1:] != user[:-1]) | (reach[1:] != reach[:-1])
        group = np.flatnonzero(opens)
        place = np.arange(len(row)) - np.repeat(group, np.diff(np.append(group, len(row))))
        first = np.flatnonzero(opens | (place % size == 0))
    count = np.diff(np.append(first, len(row)))
    start = np.maximum(interactions.offsets[user[first]], cut[first] - training.history_length)
    return Branches(start=start, end=cut[first + count - 1], count=count, row=row, cut=cut)


def branch_batch(encoder: Encoder, windows: Branches, chosen: IntArray) -> TokenBatch:
    """Tokens, places, sight and targets of the chosen windows; a target item is a target at each of its codes."""
    begins = np.cumsum(windows.count) - windows.count
    start, end, count = windows.start[chosen], windows.end[chosen], windows.count[chosen]
    target = runs(begins[chosen], count)
    owner = np.repeat(np.arange(len(chosen)), count)
    row, codes = windows.row[target], encoder.tokens[encoder.items[windows.row[target]]]
    prefix = 1 + (windows.cut[target] - start[owner]) * encoder.stride  # tokens of the history a branch sees
    flat, sizes = _branches(encoder, row, codes)
    history = 1 + (end - start) * encoder.stride
    before = np.cumsum(sizes) - sizes
    column = history[owner] + before - before[np.cumsum(count) - count][owner]
    stream = encoder.stream(start, end)[0]
    width = int((history + np.bincount(owner, weights=sizes, minlength=len(chosen)).astype(np.int64)).max())
    tokens = np.full((len(chosen), width), encoder.bos)
    tokens[:, : stream.shape[1]] = stream
    line, place = np.repeat(owner, sizes), runs(column, sizes)
    tokens[line, place] = flat
    asked = (column + sizes - encoder.levels)[:, None] + np.arange(encoder.levels)  # the request, then each code
    plain = bool((count == 1).all())
    with record_function("driftrec/masking"):
        seen = None if plain else _visible(tokens.shape, line, place, history, np.repeat(prefix, sizes), sizes)
    return TokenBatch(
        tokens=torch.from_numpy(tokens),
        positions=torch.from_numpy((owner[:, None] * width + asked).ravel()),
        labels=torch.from_numpy(codes.ravel()),
        places=None if plain else _places(tokens.shape, line, place, runs(prefix, sizes)),
        visible=seen,
    )


_NOTHING = np.empty(0, dtype=np.int64)


def _branches(encoder: Encoder, row: IntArray, codes: np.ndarray) -> tuple[IntArray, IntArray]:
    """Each target's query, request and codes but the last, one branch after the other, and their lengths."""
    searched = encoder.interactions.searched[row]
    queries = iter(encoder.interactions.queries(row[searched]))
    texts = [encoder.text(next(queries)) if one else _NOTHING for one in searched.tolist()]
    words = np.array([len(text) for text in texts], dtype=np.int64)
    sizes = words + encoder.levels
    ends = np.cumsum(sizes)
    flat = np.empty(int(sizes.sum()), dtype=np.int64)
    flat[runs(ends - sizes, words)] = np.concatenate([*texts, _NOTHING])
    asked = np.concatenate([encoder.marker(searched)[:, None], codes[:, :-1]], axis=1)
    flat[(ends - encoder.levels)[:, None] + np.arange(encoder.levels)] = asked
    return flat, sizes


def _places(shape: tuple[int, ...], line: IntArray, place: IntArray, position: IntArray) -> Tensor:
    """(B, T) a branch goes on counting where it leaves the history."""
    places = np.tile(np.arange(shape[1]), (shape[0], 1))
    places[line, place] = position
    return torch.from_numpy(places)


def _visible(
    shape: tuple[int, ...], line: IntArray, place: IntArray, history: IntArray, prefix: IntArray, sizes: IntArray
) -> Tensor:
    """(B, T, T) bool: the history sees what came before, a branch the history before it and itself so far."""
    column = np.arange(shape[1])
    limit = np.where(column < history[:, None], column + 1, 1)  # padding sees the beginning, so that nothing is empty
    limit[line, place] = prefix
    branch = np.where(column < history[:, None], 0, -1)
    branch[line, place] = np.repeat(np.arange(1, len(sizes) + 1), sizes)
    own, before = torch.from_numpy(branch), torch.from_numpy(limit)
    seen = (own[:, None] == 0) & (torch.arange(shape[1]) < before[..., None])
    same = (own[..., None] == own[:, None]) & (own[..., None] > 0)
    return seen | same.tril()


def query_vocabulary(config: Config, dataset: Dataset) -> Vocabulary | None:
    """What reads the queries of a log, or None where searches are not used.

    `small` knows the words of stage 0's queries outside each visit's last two moments, which are held out for
    validation and test; whatever it does not know, later words above all, is spelt in bytes.

    Raises:
        UserError: a pretrained backbone without a tokenizer.
    """
    events = dataset.interactions
    if events.query is None:
        return None
    if config.backbone.path is not None:
        try:
            return BackboneVocabulary(config.backbone.path)
        except ValueError as error:
            raise UserError(str(error)) from None
    known = training_targets(events, [0], "same_stage", 0) & events.searched
    texts = (events.texts[number] for number in events.query[known].tolist())
    return WordVocabulary.fit(texts, config.search.words, CONTROL_TOKENS)


def mixed_batches(
    lengths: Mapping[str, IntArray], size: int, order: np.random.Generator
) -> Iterator[dict[str, IntArray]]:
    """Window numbers of every objective a batch at a time: each batch holds all objectives, in their natural shares.

    Args:
        lengths: objective -> (W,) what its windows are padded to; one without windows takes no part.
        size: windows a batch, of all objectives together.
        order: of the shuffling.

    Yields:
        objective -> window numbers. An objective with fewer windows than there are batches is left out of some.
    """
    there = {name: own for name, own in lengths.items() if len(own)}
    if len(there) < 2:
        yield from ({name: part} for name, own in there.items() for part in batches(own, size, order))
        return
    count = -(-sum(map(len, there.values())) // size)
    parts = {name: _parts(own, count, order) for name, own in there.items()}
    for number in range(count):
        batch = {name: own[number] for name, own in parts.items() if len(own[number])}
        if batch:
            yield batch


def _parts(lengths: IntArray, count: int, order: np.random.Generator) -> list[IntArray]:
    """All window numbers in `count` parts as equal as can be, shuffled, alike in length within `BUCKET` parts."""
    shuffled = order.permutation(len(lengths))
    edges = np.arange(count + 1) * len(lengths) // count
    parts: list[IntArray] = []
    for low in range(0, count, BUCKET):
        high = min(low + BUCKET, count)
        bucket = shuffled[edges[low] : edges[high]]
        by_length = bucket[np.argsort(lengths[bucket], kind="stable")]
        split = np.split(by_length, edges[low + 1 : high] - edges[low])
        parts += [split[number] for number in order.permutation(len(split))]
    return parts
