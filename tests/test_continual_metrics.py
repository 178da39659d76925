"""What is learnt, kept and forgotten over stages: worked out by hand, and out of a report's cells."""

from __future__ import annotations

import math

import numpy as np
import pytest

from stages import continual_metrics as continual
from stages.jobs import Job
from stages.summary import summarise
from stages.workspace import Workspace
from tests.measured import crowd, measured, pick, settings

R = np.array([[0.5, 0.2, 0.1], [0.4, 0.6, 0.3], [0.3, 0.5, 0.7]])


def test_continual_metrics_by_hand() -> None:
    assert continual.average_performance(R) == pytest.approx(0.5)
    assert continual.learning_accuracy(R) == pytest.approx(0.6)
    assert continual.next_performance(R) == pytest.approx(0.25)
    assert continual.backward_transfer(R) == pytest.approx((-0.2 - 0.1) / 2)
    assert continual.forgetting(R) == pytest.approx((0.2 + 0.1) / 2)
    assert continual.forward_transfer(R, np.array([np.nan, 0.1, 0.1])) == pytest.approx((0.1 + 0.2) / 2)
    assert continual.retained_accuracy(R) == pytest.approx((0.5 + 0.5 + 0.5) / 3)
    assert continual.harmonic(0.6, 0.3) == pytest.approx(0.4)
    assert continual.harmonic(0.0, 0.0) == 0
    assert math.isnan(continual.backward_transfer(np.array([[0.5]])))


def test_the_matrix_fills_its_gaps_with_headline_cells_on_the_same_users(space: Workspace) -> None:
    """The sample is users 0 … 19; on users 20 … 39 the headline cells hold other numbers that must not leak in."""
    cells = []
    for i in range(3):
        for j in range(3):
            job = Job("single", 0, "same_stage", i)
            sample = crowd(R[i, j], users=20)
            if i == j:
                cells.append(measured(space, job, j, sample + crowd(1.0, offset=20, users=20)))
            else:
                cells.append(measured(space, job, j, sample, matrix=True))
    report = summarise(settings(), space, cells, [])
    found = {(row["trained"], row["tested"]): row for row in report["matrix"] if row["metric"] == "hit_at_10"}
    assert {place: row["value"] for place, row in found.items()} == pytest.approx(dict(np.ndenumerate(R)))
    assert {row["users"] for row in found.values()} == {20}
    values = {row["metric"]: row["value"] for row in report["continual"]}
    assert values["bwt"] == pytest.approx(continual.backward_transfer(R))
    assert values["learning_accuracy"] == pytest.approx(0.6)
    assert values["next_perf"] == pytest.approx(0.25)
    assert values["fwt"] is None  # recent popularity was not measured
    assert pick(report["rows"], seed=0, stage=0, slice="all", metric="mrr")["value"] == pytest.approx(0.75)


def test_what_is_kept_is_counted_for_each_objective_apart(space: Workspace) -> None:
    turned = R.T
    cells = [
        measured(space, Job("single", 0, "same_stage", i), j, crowd(R[i, j]), i != j, searches=crowd(turned[i, j]))
        for i in range(3)
        for j in range(3)
    ]
    report = summarise(settings(), space, cells, [])
    assert list(dict.fromkeys(row["objective"] for row in report["continual"])) == ["recommendation", "search"]
    for objective, cells_of in (("recommendation", R), ("search", turned)):
        values = {row["metric"]: row["value"] for row in report["continual"] if row["objective"] == objective}
        assert values["bwt"] == pytest.approx(continual.backward_transfer(cells_of))
        assert values["forgetting"] == pytest.approx(continual.forgetting(cells_of))
        assert values["next_perf"] == pytest.approx(continual.next_performance(cells_of))
        found = [row for row in report["matrix"] if (row["objective"], row["metric"]) == (objective, "hit_at_10")]
        assert {(row["trained"], row["tested"]): row["value"] for row in found} == pytest.approx(
            dict(np.ndenumerate(cells_of))
        )


def test_forward_transfer_is_measured_against_recent_popularity(space: Workspace) -> None:
    cells = [
        measured(space, Job(method, 0, "next_stage", j - 1), j, crowd(share))
        for method, share in (("single", 0.5), ("recent_popularity", 0.2))
        for j in (1, 2)
    ]
    report = summarise(settings(), space, cells, [])
    assert pick(report["continual"], method="single", metric="fwt")["value"] == pytest.approx(0.3)
    assert pick(report["continual"], method="recent_popularity", metric="fwt")["value"] == 0
