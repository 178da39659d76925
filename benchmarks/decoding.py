"""The shared-prefix beam beside `generate()` under `prefix_allowed_tokens_fn`, the same weights and the same items.

    python -m benchmarks.decoding              # `small`, 32 users × 10 beams and 8 × 50
    python -m benchmarks.decoding_pretrained   # the decoder LM in DRIFTREC_BACKBONE, 2 users × 10 beams, or --users 32

Histories of 20 items (81 tokens), 25,000 items of 4 codes. Both sides score over the same output tokens in float32;
that they return the same sets of items, and no other item than the catalogue's, is asserted before anything is timed.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from unittest.mock import patch

import numpy as np
import torch
from torch import Tensor

from benchmarks.measure import Pair, Row, Work, alternate, dearer, faster, flops, report, timed, using_threads
from models import beam, packed
from models.backbone import small_backbone
from models.generative import GenerativeModel
from models.trie import Trie
from tests import reference

SIZES = (175, 256, 256, 256)
ITEMS, HISTORY, LEVELS = 25_000, 20, 4
OFFSETS = np.concatenate([[0], np.cumsum(SIZES)[:-1]])
SPREAD = 20.0
"""Factor on untrained code rows: scores as far apart as a trained model's, so that an order is more than rounding."""


@dataclass(frozen=True)
class Task:
    """One set of users on both sides: the same weights, trie and prompts.

    Attributes:
        ours: runs our search; (leaves (B, K), scores (B, K)).
        theirs: runs `generate()`; (tokens (B, K, L), scores (B, K)).
        paths: (leaves, L) token numbers of each leaf.
        users: B.
    """

    ours: Callable[[], tuple[Tensor, Tensor]]
    theirs: Callable[[], tuple[Tensor, Tensor]]
    paths: np.ndarray
    users: int


def main() -> None:
    """Measure both beam widths, and the share of masking, and record the rows."""
    backbone = small_backbone(hidden=192, layers=4, heads=4, feed_forward=512, seed=0)
    model = spread_out(GenerativeModel(backbone, codes=sum(SIZES), seed=0, full_vocabulary=False, dropout=0.0))
    rows = []
    for users, width, mark in ((32, 10, 5), (8, 50, 10)):
        name = f"decoding, small, {users} users × {width} beams"
        rows += [compared(name, task(model, users, width), mark), masking_share(name, task(model, users, width))]
    report("decoding", [*rows, *(packing(model, users) for users in (1, 16))])


def spread_out(model: GenerativeModel) -> GenerativeModel:
    """The model in eval mode, its code rows scaled up."""
    with torch.no_grad():
        for rows in model.rows().values():
            rows.mul_(SPREAD)
    return model.eval()


def task(model: GenerativeModel, users: int, width: int) -> Task:
    """Histories drawn evenly from a drawn catalogue, and both searches over them."""
    rng = np.random.default_rng(0)
    codes = np.unique(rng.integers(0, SIZES, (ITEMS, LEVELS)), axis=0)  # sorted: item number = leaf number
    trie, paths = Trie.build(codes), codes + OFFSETS
    prompts = paths[rng.integers(0, len(codes), (users, HISTORY))].reshape(users, -1)
    prompts = torch.from_numpy(np.concatenate([np.full((users, 1), model.bos), prompts], axis=1))
    lengths = torch.full((users,), prompts.shape[1])
    following = reference.trie_prefixes([tuple(path) for path in paths.tolist()])
    allowed = {prefix: sorted(tokens) for prefix, tokens in following.items()}
    whole, theirs = reference.causal_lm(model), prompts.clone()
    theirs[:, 0] = model.codes + model.bos_row
    offsets = torch.from_numpy(OFFSETS)

    def search() -> tuple[Tensor, Tensor]:
        """Ours, without gradients."""
        with torch.inference_mode():
            return beam.beam_search(model, trie, offsets, prompts, lengths, width)

    return Task(search, lambda: reference.generated(whole, allowed, theirs, width, LEVELS), paths, users)


def compared(name: str, one: Task, mark: float, repetitions: int = 5, note: str = "") -> Row:
    """Assert equal answers, then time both."""
    with using_threads(1):
        (leaves, scores), (tokens, theirs) = one.ours(), one.theirs()
    items = {tuple(path): leaf for leaf, path in enumerate(one.paths.tolist())}
    generated = [{items.get(tuple(path), -1) for path in row} for row in tokens.tolist()]
    invalid = int((leaves < 0).sum()) + sum(-1 in row for row in generated)
    same = sum(set(mine) == other for mine, other in zip(leaves.tolist(), generated, strict=True))
    gap = float((scores - theirs).abs().max())
    print(f"{name}: identical item sets for {same} of {one.users} users, scores within {gap:.1g}, {invalid} invalid")
    if same != one.users or invalid:
        raise SystemExit(f"{name}: the two searches return different items; a time would mean nothing")
    pair = alternate(one.ours, one.theirs, repetitions=repetitions, warm=True)
    note = f"identical item sets for all users, largest gap of scores {gap:.1g}, no invalid item{note}"
    work = Work(flops=flops(one.ours))
    return faster(name, "generate()", pair, mark=mark, unit="users/s", amount=one.users, work=work, note=note)


def packing(model: GenerativeModel, users: int, width: int = 20) -> Row:
    """The search with packed linear maps beside the same with plain ones."""
    name = f"decoding, packed maps, small, {users} {'user' if users == 1 else 'users'} × {width} beams"
    twin = deepcopy(model)
    plain, ours = task(model, users, width), task(twin, users, width)
    packed.pack(twin.stack)
    (leaves, scores), (expected, theirs) = ours.ours(), plain.ours()
    same = int((leaves.sort().values == expected.sort().values).all(dim=1).sum())
    gap = float((scores - theirs).abs().max())
    if same != users:
        raise SystemExit(f"{name}: {same} of {users} users get the same items; a time would mean nothing")
    pair = alternate(ours.ours, plain.ours, repetitions=15, warm=True)
    used = "packed" if packed.gains(model.device) else "plain"
    note = f"identical item sets for all users, largest gap of scores {gap:.1g}; {used} maps are used on this machine"
    work = Work(flops=flops(plain.ours))
    return faster(name, "torch's own linear maps", pair, mark=1, unit="users/s", amount=users, work=work, note=note)


def masking_share(name: str, one: Task, repetitions: int = 7) -> Row:
    """Looking up children, masking and top-k as a share of the whole search.

    The limit is that of memory: the code and the logit of every child of every beam read once, the best written once.
    """
    parts, wholes, moved = [], [], must_move(one)
    choose = beam._chosen

    def watched(*arguments: object) -> object:
        """The choice, its time added up."""
        start = time.process_time()
        try:
            return choose(*arguments)
        finally:
            parts[-1] += time.process_time() - start

    with patch.object(beam, "_chosen", watched), using_threads(1):
        for _ in range(repetitions + 1):
            parts.append(0.0)
            wholes.append(timed(one.ours))
    pair = Pair(tuple(parts[1:]), tuple(wholes[1:]), "cpu", 1)
    name = f"masking and top-k, {name.removeprefix('decoding, ')}"
    note = "the limit is reading each child's code and logit once and writing the best"
    return dearer(name, "the search", pair, mark=0.05, work=Work(bytes=moved), note=note)


def must_move(one: Task) -> int:
    """Bytes that choosing reads and writes at least, over one search."""
    choose, moved = beam._chosen, []

    def counted(trie: Trie, beams: beam._Beams, logits: Tensor, *others: object) -> object:
        """The choice, its bytes added up."""
        best = choose(trie, beams, logits, *others)
        codes, _, exists = trie.children(beams.nodes)
        read = int(exists.sum()) * (codes.element_size() + logits.element_size())
        moved.append(read + best.scores.nbytes + best.nodes.nbytes + best.tokens.nbytes)
        return best

    with patch.object(beam, "_chosen", counted):
        one.ours()
    return sum(moved)


if __name__ == "__main__":
    main()
