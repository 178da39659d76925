"""What flows pass between tasks: small frozen values that name files, never the files' contents."""

from __future__ import annotations

from dataclasses import dataclass

from stages.config import Protocol

SEARCH_BASELINES = ("bm25",)
"""They answer searches only."""
BASELINES = ("popularity", "recent_popularity", "item_graph", *SEARCH_BASELINES)


@dataclass(frozen=True)
class Job:
    """One method, seed and training protocol up to and including `stage`."""

    method: str
    seed: int
    protocol: Protocol
    stage: int


@dataclass(frozen=True)
class Pin:
    """The very checkpoint that is meant, whatever the settings give by now.

    Attributes:
        key: its folder's name below `runs/checkpoints`.
        tensors: digest of the tensors of its whole lineage (`stages.stored`); None where nobody noted it.
    """

    key: str
    tensors: str | None = None


@dataclass(frozen=True)
class Checkpoint:
    """A committed stage.

    Attributes:
        job: what was trained.
        key: commit key, the folder's name below `runs/checkpoints`.
        digest: SHA-256 of the checkpoint's manifest.
        seconds: wall time of the training, as first measured.
        trained_parameters: number of weights that moved.
        bytes: size of the folder.
        peak_memory: resident bytes of the process at most while it trained; None where the system does not say.
        targets: training targets of the stage.
        reused: it was there already.
    """

    job: Job
    key: str
    digest: str
    seconds: float
    trained_parameters: int
    bytes: int
    peak_memory: int | None
    targets: int
    reused: bool


@dataclass(frozen=True)
class Evaluation:
    """Per-query metrics of one model on one stage's tests.

    Attributes:
        job: the model (method, seed, protocol, last stage trained).
        tested: stage the test targets lie in.
        path: Parquet file, relative to the workspace.
        digest: SHA-256 of that file.
        seconds: wall time, as first measured.
        queries: number of rows.
        sampled: a seeded sample of users was tested, not all.
        matrix: belongs to R[i][j], not to the headline cells.
    """

    job: Job
    tested: int
    path: str
    digest: str
    seconds: float
    queries: int
    sampled: bool
    matrix: bool = False
