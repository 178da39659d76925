"""Which test cases an update turned from right to wrong and back, from the evaluation files on disk."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from stages.analysis.intervals import Answers
from stages.cells import read_frame
from stages.errors import UserError
from stages.interactions import BoolArray
from stages.jobs import Evaluation, Job
from stages.workspace import Workspace

METRIC = "hit_at_10"
"""A test case is correct where its target stands in the top 10; a tie counts from one half on."""


@dataclass(frozen=True)
class Transitions:
    """One model against the one before it, on the same test cases.

    Attributes:
        before: cases the earlier model answered correctly.
        lost: of those, how many the later one does not.
        gained: cases only the later one answers correctly.
        cases: all.
    """

    before: int
    lost: int
    gained: int
    cases: int


def transitions(before: BoolArray, after: BoolArray) -> Transitions:
    """The table of two models' right and wrong answers to the same cases.

    Args:
        before: (N,) whether the earlier model was right.
        after: (N,) whether the later one is.

    Raises:
        ValueError: they do not have the same number of cases.
    """
    if before.shape != after.shape:
        raise ValueError(f"{len(before)} cases before and {len(after)} after; both models need the same cases")
    return Transitions(int(before.sum()), int((before & ~after).sum()), int((~before & after).sum()), len(before))


def stage_answers(workspace: Workspace, evaluations: Sequence[Evaluation], job: Job, tested: int) -> dict[str, Answers]:
    """`job`'s model beside that of the stage before, on the tests of stage `tested`.

    Args:
        workspace: holds the evaluation files.
        evaluations: those of a report.
        job: the later model.
        tested: stage whose tests both answered.

    Returns:
        Objective -> what both answered; empty where not both models were measured on the same users there.

    Raises:
        UserError: an evaluation file is missing or altered.
    """
    for matrix in (False, True):  # all users before a sample of them
        later = _cell(evaluations, job, tested, matrix)
        earlier = _cell(evaluations, Job(job.method, job.seed, job.protocol, job.stage - 1), tested, matrix)
        if earlier is None or later is None:
            continue
        frames = [read_frame(workspace, cell, [METRIC]) for cell in (earlier, later)]
        if not frames[0].select("user", "objective").equals(frames[1].select("user", "objective")):
            raise UserError(
                f"{later.path}: its test cases are not those of {earlier.path}; delete both and run `compare` again"
            )
        return {
            str(objective): _answers(*(frame.filter(pl.col("objective") == objective) for frame in frames))
            for objective in frames[0]["objective"].unique().sort()
        }
    return {}


def _cell(evaluations: Iterable[Evaluation], job: Job, tested: int, matrix: bool) -> Evaluation | None:
    return next((e for e in evaluations if (e.job, e.tested, e.matrix) == (job, tested, matrix)), None)


def _answers(earlier: pl.DataFrame, later: pl.DataFrame) -> Answers:
    before, after = (np.asarray(frame[METRIC].to_numpy() >= 0.5) for frame in (earlier, later))
    return Answers(later["user"], before, after)
