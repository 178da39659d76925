"""All rows, and how one is tried."""

from __future__ import annotations

import time
import traceback
from random import Random
from typing import Any

from benchmarks.faults import (
    hostile,
    intake,
    kills,
    late,
    lives,
    power,
    retrains,
    rot,
    servers,
    storage,
    together,
    training,
)
from benchmarks.faults.harness import Bench, Row

PARTS = (kills, power, rot, storage, intake, late, hostile, servers, together, training, lives, retrains)
TABLE: tuple[Row, ...] = tuple(
    sorted(
        (row for part in PARTS for row in part.TABLE),
        key=lambda row: row.number,
    )
)


def tried(row: Row, bench: Bench, count: int, seed: int) -> dict[str, Any]:
    """Inject a row's fault `count` times; the row as faults.json holds it."""
    started = time.monotonic()
    runs = passes = 0
    problems: list[str] = []
    try:
        for problem in row.scenario(bench, count, Random(seed * 1000 + row.number)) if count else ():  # noqa: S311
            runs += 1
            passes += not problem
            problems += [problem] if problem else []
        if bench.first_inputs and bench.inputs() != bench.first_inputs:
            problems.append("the raw input was changed")
            passes = 0
    except Exception:
        runs += 1
        problems.append(traceback.format_exc(limit=-3))
    note = "; ".join([*([row.note] if row.note else []), *dict.fromkeys(problems[:3])])
    return {
        "row": row.number,
        "fault": row.fault,
        "expectation": row.expected,
        "runs": runs,
        "passes": passes,
        "seconds": round(time.monotonic() - started, 1),
        "seed": seed,
        "note": note,
    }
