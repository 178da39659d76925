"""Settings of `driftrec analyse`; no training, key or test depends on them."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from stages.settings import Settings


class AnalysisConfig(Settings):
    """How closely trained models are looked at."""

    text: str | None = None
    """Held-out general text for perplexity and drift (a pretrained backbone only); absent: earlier stages."""
    text_tokens: Annotated[int, Field(ge=256)] = 20_000
    """Tokens of it that are read."""
    pairs: Annotated[int, Field(ge=1)] = 6
    """Pairs of batches of each objective from which conflict of gradients is measured, each of training.batch_size
    windows, or of fewer where there are not so many: four backward passes a pair and method."""
    update_pairs: Annotated[int, Field(ge=1)] = 3
    """The first so many of them are also used for conflict of updates: 32 optimiser steps a pair and method."""
    windows: Annotated[int, Field(ge=1)] = 1000
    """Windows of the stage to come, at most, of each objective, on which models are told apart by their loss."""
    titles: Annotated[int, Field(ge=0)] = 50
    """Test cases of each objective that a pretrained backbone answers in words, before training and after; 0: none."""
