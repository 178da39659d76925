"""Windows, batches and the packed layout's parity with one example a target."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models import adapter as lora
from models.backbone import small_backbone
from models.generative import GenerativeModel, TokenBatch, band_mask
from stages.config import TrainingConfig
from stages.dataset import load_dataset
from stages.evaluate import evaluate_stage
from stages.examples import Encoder, Windows, batches, make_windows
from stages.interactions import Catalogue, Interactions
from stages.jobs import Job
from stages.train import train_stage
from stages.workspace import read_json
from tests import tiny


def events(lengths: list[int], items: int = 12, seed: int = 0) -> Interactions:
    rng = np.random.default_rng(seed)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    total = int(offsets[-1])
    return Interactions(
        user_ids=[f"u{n}" for n in range(len(lengths))],
        offsets=offsets,
        items=rng.integers(0, items, total),
        stages=np.zeros(total, dtype=np.int64),
        baskets=np.arange(total),
    )


def catalogue(items: int = 12) -> Catalogue:
    codes = np.array([[n // 4, n % 4] for n in range(items)], dtype=np.int64)
    names = [f"i{n}" for n in range(items)]
    return Catalogue(
        names, names, np.zeros(items, dtype=np.int64), codes, (items // 4, 4), False, False, np.arange(items)
    )


@settings(deadline=None)
@given(st.lists(st.integers(1, 12), min_size=1, max_size=6), st.integers(1, 5), st.integers(1, 6), st.integers(0, 99))
def test_every_target_is_in_exactly_one_window_with_its_own_users_context(
    lengths: list[int], size: int, history: int, seed: int
) -> None:
    own = events(lengths)
    mask = np.random.default_rng(seed).random(len(own.items)) < 0.6
    windows = make_windows(own, mask, TrainingConfig(targets_per_window=size, history_length=history))
    covered = np.zeros(len(mask), dtype=int)
    for start, first, end in zip(windows.start, windows.first, windows.end, strict=True):
        covered[first:end] += 1
        assert len(set(own.users[start:end])) == 1
        assert first - start == min(history, first - own.offsets[own.users[first]])
        assert end - first <= size
    assert covered.tolist() == mask.astype(int).tolist()
    assert windows.targets == mask.sum()


def per_target_losses(model: GenerativeModel, own: Interactions, layout: str) -> dict[int, float]:
    mask = np.ones(len(own.items), dtype=bool)
    windows = make_windows(own, mask, TrainingConfig(layout=layout, history_length=20))  # pyright: ignore[reportArgumentType]
    encoder = Encoder(own, catalogue())
    losses = {}
    for line in range(len(windows)):
        batch = encoder.batch(windows, np.array([line]))
        states = model.hidden(batch.tokens).flatten(0, 1)[batch.positions]
        each = torch.nn.functional.cross_entropy(model.logits(states), batch.labels, reduction="none")
        rows = np.arange(windows.first[line], windows.end[line])
        losses.update(zip(rows.tolist(), each.reshape(len(rows), -1).sum(dim=1).tolist(), strict=True))
    return losses


def test_the_packed_layout_gives_each_target_the_loss_of_an_example_of_its_own() -> None:
    """Exact while a user's whole sequence fits the history; beyond it the packed window sees more."""
    backbone = small_backbone(hidden=16, layers=2, heads=2, feed_forward=32, seed=0)
    model = GenerativeModel(backbone, codes=7, seed=0, full_vocabulary=False, dropout=0.0).eval()
    own = events([20, 1, 7, 13])
    with torch.no_grad():
        packed, apart = (per_target_losses(model, own, layout) for layout in ("packed", "per_prefix"))
    assert packed.keys() == apart.keys()
    assert packed == pytest.approx(apart, abs=1e-5)


def test_the_exact_layout_gives_each_target_that_loss_however_long_its_history() -> None:
    """It packs what it can: fewer windows than targets, and the packed layout differs on the same sequences."""
    backbone = small_backbone(hidden=16, layers=3, heads=2, feed_forward=32, seed=0)
    model = GenerativeModel(backbone, codes=7, seed=0, full_vocabulary=False, dropout=0.0).eval()
    own = events([31, 2, 24])
    with torch.no_grad():
        exact, apart, packed = (
            per_target_losses(model, own, layout) for layout in ("packed_exact", "per_prefix", "packed")
        )
    assert exact == pytest.approx(apart, abs=1e-5)
    assert packed != pytest.approx(apart, abs=1e-3)
    windows = make_windows(own, np.ones(57, dtype=bool), TrainingConfig(layout="packed_exact", history_length=20))
    assert len(windows) == 1 + 10 + 1 + 1 + 3


def test_under_a_band_mask_a_target_apart_has_the_loss_it_has_in_the_whole_sequence() -> None:
    """Two layers of a band of 4 items look back 8; positions differ, and rotary embeddings are relative."""
    backbone = small_backbone(hidden=16, layers=2, heads=2, feed_forward=32, seed=0)
    model = GenerativeModel(backbone, codes=7, seed=0, full_vocabulary=False, dropout=0.0).eval()
    own = events([40])
    encoder, rows = Encoder(own, catalogue()), np.arange(40)

    def losses(start: np.ndarray, first: np.ndarray, end: np.ndarray, band: int | None) -> list[float]:
        found: list[float] = []
        for one in range(len(start)):
            batch = encoder.batch(Windows(start, first, end), np.array([one]))
            mask = None if band is None else band_mask(batch.tokens.shape[1], encoder.levels, band)
            states = model.hidden(batch.tokens, mask).flatten(0, 1)[batch.positions]
            each = torch.nn.functional.cross_entropy(model.logits(states), batch.labels, reduction="none")
            found += each.reshape(-1, encoder.levels).sum(dim=1).tolist()
        return found

    whole = (np.array([0]), np.array([0]), np.array([40]))
    far, near = ((np.maximum(rows - items, 0), rows, rows + 1) for items in (2 * 4 + 1, 4))
    with torch.no_grad():
        assert losses(*whole, band=4) == pytest.approx(losses(*far, band=4), abs=1e-5)
        assert losses(*whole, band=4) != pytest.approx(losses(*whole, band=None), abs=1e-3)
        # Why no band makes the packed layout equal to examples of 4 items: the second layer sees what the first saw.
        assert losses(*whole, band=4) != pytest.approx(losses(*near, band=None), abs=1e-3)
        assert losses(*whole, band=40) == pytest.approx(losses(*whole, band=None), abs=1e-5)


def test_a_band_of_one_item_of_two_codes_written_out() -> None:
    """Tokens: beginning, two codes of item 0, two of item 1, one of item 2; a row is what its token sees."""
    seen = band_mask(length=6, levels=2, items=1)[0, 0] == 0
    assert ["".join(".x"[int(cell)] for cell in row) for row in seen] == [
        "x.....",  # predicts item 0, from the beginning alone
        "xx....",
        ".xx...",  # predicts item 1, from item 0
        ".xxx..",
        "...xx.",  # predicts item 2, from item 1
        "...xxx",
    ]
    with pytest.raises(ValueError, match="a band of 0 items"):
        band_mask(6, 2, 0)


def test_padding_changes_no_loss() -> None:
    backbone = small_backbone(hidden=16, layers=2, heads=2, feed_forward=32, seed=0)
    model = GenerativeModel(backbone, codes=7, seed=0, full_vocabulary=False, dropout=0.0).eval()
    own = events([3, 9, 1])
    windows = make_windows(own, np.ones(13, dtype=bool), TrainingConfig())
    encoder = Encoder(own, catalogue())
    with torch.no_grad():
        together = float(model.loss(encoder.batch(windows, np.arange(3))))
        apart = sum(float(model.loss(encoder.batch(windows, np.array([n])))) for n in range(3))
    assert together == pytest.approx(apart, rel=1e-5)


def test_batches_hold_every_window_once_and_repeat_for_the_same_seed() -> None:
    windows = make_windows(events([5, 3, 8, 2, 9, 4]), np.ones(31, dtype=bool), TrainingConfig(targets_per_window=2))
    runs = [[part.tolist() for part in batches(windows.lengths, 4, np.random.default_rng(seed))] for seed in (1, 1, 2)]
    assert runs[0] == runs[1] != runs[2]
    for run in runs:
        assert sorted(number for part in run for number in part) == list(range(len(windows)))
    quiet = [part.tolist() for part in batches(windows.lengths, 4, None)]
    assert sorted(number for part in quiet for number in part) == list(range(len(windows)))


def test_a_prompt_is_the_beginning_of_the_sequence_and_the_codes_of_the_history() -> None:
    own = events([4])
    tokens, lengths = Encoder(own, catalogue()).prompts([np.array([], dtype=np.int64), np.array([5, 11])])
    assert lengths.tolist() == [1, 5]
    assert tokens.tolist() == [[7, 7, 7, 7, 7], [7, 1, 3 + 1, 2, 3 + 3]]


def test_the_workspace_gives_users_their_events_in_order(tmp_path: Path) -> None:
    dataset = load_dataset(tiny.config(), tiny.checkerboard(tmp_path, stages=2, users=3, length=4))
    assert dataset.stages == 2
    own = dataset.interactions
    walks = {user: own.items[own.offsets[n] : own.offsets[n + 1]].tolist() for n, user in enumerate(own.user_ids)}
    assert walks["s0u001"] == [1, 2, 3, 4]
    assert walks["s1u001"] == [1, 0, 15, 14]


def test_rows_adapter_and_batch_follow_the_model_to_its_device() -> None:
    # The meta device computes shapes only, and refuses an operation one of whose tensors was left behind elsewhere.
    meta = torch.device("meta")
    model = GenerativeModel(small_backbone(16, 1, 2, 32, 0), codes=7, seed=0, full_vocabulary=False, dropout=0.1)
    model = model.to(meta).train()
    lora.attach(model.stack, 2, 4.0, ["q_proj", "down_proj"], seed=0)
    batch = TokenBatch(torch.zeros(2, 5, dtype=torch.long), torch.tensor([0, 1]), torch.tensor([3, 4])).to(meta)
    assert model.logits(model.embed(batch.tokens)).device == model.device == meta
    assert {batch.positions.device, batch.labels.device} == {meta}
    assert {value.device for value in lora.matrices(model.stack).values()} == {meta}


@pytest.mark.skipif(
    not torch.cuda.is_available(), reason="no CUDA device: the whole path was run on the processor only"
)
def test_a_stage_trains_and_is_tested_on_a_gpu(tmp_path: Path) -> None:
    config, workspace = tiny.config(), tiny.checkerboard(tmp_path)
    job = Job("peso", 0, "next_stage", 1)
    trained = train_stage(config, workspace, job)
    assert read_json(workspace.checkpoints / trained.key / "state.json")["device"] == "cuda"
    assert evaluate_stage(config, workspace, job, 2).queries > 0
