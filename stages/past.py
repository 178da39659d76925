"""What a stage may look back on besides checkpoints: earlier stages' training windows, as numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import numpy as np
from torch import Tensor

from models.generative import TokenBatch
from models.words import Vocabulary
from stages.config import Config
from stages.dataset import Dataset
from stages.jobs import Job
from stages.methods.contract import Past
from stages.stage_examples import stage_examples
from stages.workspace import Workspace


def past_of(config: Config, workspace: Workspace, dataset: Dataset, job: Job, vocabulary: Vocabulary | None) -> Past:
    """The training windows of the stages before `job`'s, shuffled by the job's seed; nothing held out is in them."""

    def tokens(stage: int) -> Iterator[tuple[TokenBatch, Tensor]]:
        examples = stage_examples(config, dataset, replace(job, stage=stage), False, vocabulary)
        for chosen in examples.epoch(config.training.batch_size, np.random.default_rng([job.seed, job.stage])):
            for name, own in chosen.items():
                part = examples.parts[name]
                batch = part.batch(part.training, own)
                yield batch, part.inside(batch)

    return Past(
        tokens=[partial(tokens, stage) for stage in reversed(range(job.stage))], folder=workspace.root / "null_space"
    )
