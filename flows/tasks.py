"""The steps as Prefect tasks: the only place that decorates them.

Prefect's own result cache stays off. Every step looks for its committed, digest-checked files itself, so a retried or
repeated task is a look-up; a cached Prefect result would not notice that the file behind it is gone or damaged.
"""

from __future__ import annotations

from typing import Any

from prefect import task
from prefect.cache_policies import NO_CACHE

from flows import retraining, steps
from stages.errors import UserError


def _worth_a_retry(_task: Any, _run: Any, state: Any) -> bool:
    """A user's mistake does not mend itself."""
    return not isinstance(state.result(raise_on_failure=False), UserError)


read = task(name="read log", cache_policy=NO_CACHE)(steps.read)
split = task(name="split stages", cache_policy=NO_CACHE)(steps.split)
identify = task(name="semantic IDs", cache_policy=NO_CACHE)(steps.identify)
train = task(
    name="train",
    task_run_name="train {job.method} seed {job.seed} {job.protocol} {job.stage}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=_worth_a_retry,
)(steps.train)
evaluate = task(
    name="evaluate",
    task_run_name="evaluate {job.method} seed {job.seed} {job.protocol} {job.stage} on {tested}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=_worth_a_retry,
)(steps.evaluate)
evaluate_row = task(
    name="matrix row",
    task_run_name="matrix row {job.method} seed {job.seed} {job.stage}",
    cache_policy=NO_CACHE,
    retries=1,
    retry_condition_fn=_worth_a_retry,
)(steps.evaluate_row)
summarise = task(name="summarise", cache_policy=NO_CACHE)(steps.summarise)
record = task(name="record in MLflow", cache_policy=NO_CACHE)(steps.record)

take = task(name="new rows", cache_policy=NO_CACHE)(retraining.take)
grow = task(name="semantic IDs of new items", cache_policy=NO_CACHE)(retraining.grow)
answers = task(name="probe challenger", cache_policy=NO_CACHE)(retraining.answers)
decide = task(name="decide", task_run_name="decide on stage {match.stage}", cache_policy=NO_CACHE)(retraining.decide)
mirror = task(name="record decision in MLflow", cache_policy=NO_CACHE)(retraining.mirror)
