"""Evaluations written down in a test, as a report sums them up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from stages.config import Config
from stages.jobs import Evaluation, Job
from stages.metrics import query_metrics
from stages.workspace import Workspace, sha256_file

Query = tuple[str, int, bool, bool]
"""One query of a user: (user, rank, new item, new user)."""


def settings(**evaluation: Any) -> Config:
    return Config.model_validate(
        {
            "name": "small",
            "workspace": "unused",
            "log": {"kind": "blocks", "blocks": "unused"},
            "evaluation": {"bootstrap": 500, **evaluation},
        }
    )


def measured(
    space: Workspace,
    job: Job,
    tested: int,
    queries: Sequence[Query],
    matrix: bool = False,
    searches: Sequence[Query] = (),
) -> Evaluation:
    users, ranks, new_items, new_users = zip(*queries, *searches, strict=True)
    queries = [*queries, *searches]
    alone = np.ones(len(queries), dtype=np.int64)
    frame = pl.DataFrame(
        {
            "user": users,
            "new_item": new_items,
            "new_user": new_users,
            "reachable": [rank > 0 for rank in ranks],
            "objective": ["recommendation"] * (len(queries) - len(searches)) + ["search"] * len(searches),
            **query_metrics(np.arange(len(queries)), np.array(ranks), alone, alone),
        }
    )
    path = space.evaluations / f"{job.protocol}-{job.method}-{job.seed}-{job.stage}-{tested}-{matrix}.parquet"
    path.parent.mkdir(parents=True, exist_ok=True)
    frame.write_parquet(path)
    name = str(path.relative_to(space.root))
    return Evaluation(job, tested, name, sha256_file(path), 2.0, len(queries), sampled=False, matrix=matrix)


def crowd(share: float, offset: int = 0, users: int = 40) -> list[Query]:
    """`share` of the users find their target in place 1, the others not at all."""
    return [(f"u{n + offset}", int(n < share * users), n % 4 == 0, n % 2 == 0) for n in range(users)]


def pick(rows: list[dict[str, Any]], **wanted: Any) -> dict[str, Any]:
    found = [row for row in rows if all(row[key] == value for key, value in wanted.items())]
    assert len(found) == 1, found
    return found[0]
