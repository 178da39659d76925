"""What the training benchmarks measure on: models of a known size, batches of a known shape, a prepared public log."""

from __future__ import annotations

import tempfile
from collections.abc import Iterable
from pathlib import Path

import torch

from benchmarks.measure import data_folder
from flows import steps
from models.backbone import Backbone, small_backbone
from models.generative import GenerativeModel, TokenBatch
from stages.config import BackboneConfig, Config, load_config
from stages.dataset import Dataset, load_dataset
from stages.methods.contract import Losses, Schedule, Step

ROOT = Path(__file__).resolve().parent.parent
CODES, LEVELS = 256, 4
"""Codes a level and levels of the generated batches: 1,024 code tokens, as in PESO's index."""
SCHEDULE = Schedule(steps=10_000, learning_rate=1e-3, warmup=0.02, weight_decay=0.01, clip_norm=1.0, seed=0)


def small(seed: int = 0) -> GenerativeModel:
    """The default backbone with random weights, ready to train."""
    own = BackboneConfig()
    backbone = small_backbone(own.hidden, own.layers, own.heads, own.feed_forward, seed)
    return with_codes(backbone, seed)


def with_codes(backbone: Backbone, seed: int = 0, full_vocabulary: bool = False) -> GenerativeModel:
    """A backbone with 1,024 code tokens around it, in training mode without dropout."""
    model = GenerativeModel(backbone, CODES * LEVELS, seed, full_vocabulary, dropout=0.0)
    return model.train()


def generated_batch(windows: int, context: int, targets: int, seed: int = 0) -> TokenBatch:
    """Windows of random items, `context` of history and `targets` with a loss; no padding.

    The default shape of the benchmarks, 64 windows of 4 + 6 items, is that of a Video_Games stage (64 windows of 7 to 8
    items on average, five targets each).
    """
    length = context + targets
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(CODES, (windows, length, LEVELS), generator=generator)
    tokens = (codes + CODES * torch.arange(LEVELS)).flatten(1)  # (B, M·L)
    bos = torch.full((windows, 1), CODES * LEVELS)
    whole = torch.cat([bos, tokens], dim=1)
    width = whole.shape[1] - 1
    place = torch.arange(context * LEVELS, length * LEVELS)  # the token before each target code
    positions = torch.arange(windows)[:, None] * width + place
    return TokenBatch(whole[:, :-1].contiguous(), positions.flatten(), whole[:, 1:][:, place].flatten())


def usual_batch() -> TokenBatch:
    """64 windows of 4 context and 6 target items."""
    return generated_batch(windows=64, context=4, targets=6)


def mean_loss(model: GenerativeModel, batch: TokenBatch) -> Iterable[Losses]:
    """One micro-batch, as the training loop hands it to a method's step."""
    yield {"recommendation": model.loss(batch) / len(batch.labels)}


def take(step: Step, model: GenerativeModel, batch: TokenBatch, times: int) -> None:
    """`times` optimiser steps on one batch."""
    for _ in range(times):
        step(mean_loss(model, batch))


def video_games(script: str) -> tuple[Config, Dataset]:
    """PESO's stage blocks of Amazon Video Games, prepared from DRIFTREC_DATA; skips the script without them."""
    return prepared(script, "video_games", "amazon-video-games-blocks")


def lastfm(script: str) -> tuple[Config, Dataset]:
    """Last.fm's tag searches and recommendations, prepared from DRIFTREC_DATA; skips the script without them."""
    return prepared(script, "lastfm_search", "hetrec-lastfm-2k")


def prepared(script: str, config: str, data: str) -> tuple[Config, Dataset]:
    """The log of a config of this repository, read, cut and coded; skips the script where `data` is not there."""
    data_folder(script, data)
    place = ROOT / "configs" / f"{config}.toml"
    with tempfile.TemporaryDirectory() as folder:
        plan = steps.make_plan(place, Path(folder))
        steps.read(plan)
        plan = steps.split(plan)
        steps.identify(plan)
        return load_config(place), load_dataset(plan.config, plan.workspace)
