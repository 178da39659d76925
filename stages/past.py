"""What a stage may look back on besides checkpoints: the previous stage's training windows, as numbers."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from torch import Tensor

from stages.config import Config
from stages.dataset import Dataset
from stages.examples import Encoder, batches, make_windows
from stages.jobs import Job
from stages.methods.contract import Past
from stages.queries import training_targets
from stages.workspace import Workspace


def past_of(config: Config, workspace: Workspace, dataset: Dataset, job: Job) -> Past:
    """The training windows of the stage before `job`'s, shuffled by the job's seed; nothing held out is in them."""
    events = dataset.interactions
    encoder = Encoder(events, dataset.catalogue)
    mask = training_targets(events, [job.stage - 1], job.protocol, job.seed)
    windows = make_windows(events, mask, config.training)

    def tokens() -> Iterator[tuple[Tensor, Tensor]]:
        for chosen in batches(windows, config.training.batch_size, np.random.default_rng([job.seed, job.stage])):
            numbers = encoder.batch(windows, chosen).tokens
            inside = numbers != encoder.bos
            inside[:, 0] = True  # the token that opens a sequence also pads it
            yield numbers, inside

    return Past(tokens=tokens, folder=workspace.root / "null_space")
