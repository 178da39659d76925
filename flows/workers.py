"""Several processes on one run: helpers work through the plan from its far end and commit what they finish.

Every checkpoint and test result is named by what it depends on and made under a lock, so there is nothing to hand
over: the run itself goes through its plan in order and finds what a helper has committed already. A small model on a
CPU gains little from a second thread and nearly everything from a second process.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from flows import machine
from flows.plan import Lineage, Plan
from stages.config import Config
from stages.errors import UserError
from stages.workspace import Workspace

MEMORY = 2 * 2**30
"""Bytes a process with torch, a log and a small model may need."""
MOST = 8
log = logging.getLogger("flows.workers")


def fitting(config: Config, lineages: int) -> int:
    """How many processes suit a run: one a core for `small` on a CPU, as memory allows; one for anything larger.

    Args:
        config: the experiment; its backbone decides.
        lineages: nothing is gained by more processes than there are lineages.
    """
    import torch

    on_gpu = config.backbone.device != "cpu" and torch.cuda.is_available()
    if on_gpu or config.backbone.path is not None:
        return 1
    room = (machine.memory() or MEMORY) // MEMORY
    return max(1, min(machine.cores(), lineages, room, MOST))


@contextmanager
def helped(plan: Plan) -> Iterator[None]:
    """Within the block `plan.workers - 1` other processes work on the plan too; all share the cores evenly.

    A helper that fails is no fault of the run, which does the rest itself.
    """
    if plan.workers < 2:
        yield
        return
    import torch

    threads, before = _threads(plan.workers), torch.get_num_threads()
    torch.set_num_threads(threads)
    helpers = [_started(plan, number, threads) for number in range(1, plan.workers)]
    log.info("%d processes of %d thread%s each", plan.workers, threads, "" if threads == 1 else "s")
    try:
        yield
    finally:
        torch.set_num_threads(before)
        for helper in helpers:
            _ended(helper)


def _threads(workers: int) -> int:
    told = os.environ.get("OMP_NUM_THREADS", "")
    return int(told) if told.isdecimal() and int(told) else max(1, machine.cores() // workers)


def _started(plan: Plan, number: int, threads: int) -> subprocess.Popen[str]:
    place = plan.workspace.root / "runs" / f"helper-{number}.log"
    place.parent.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "flows.workers"]
    variables = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with place.open("w", encoding="utf-8") as errors:
        helper = subprocess.Popen(  # noqa: S603 (this interpreter, this module)
            command, stdin=subprocess.PIPE, stdout=errors, stderr=errors, text=True, env=variables
        )
    request = {
        "config": plan.config.model_dump(mode="json"),
        "workspace": str(plan.workspace.root.resolve()),
        "methods": plan.methods,
        "seeds": plan.seeds,
        "limit": plan.limit,
        "comparison": plan.comparison,
        "count": plan.count,
        "workers": plan.workers,
        "number": number,
    }
    try:
        _pipe(helper).write(json.dumps(request) + "\n")
        _pipe(helper).flush()
    except OSError as error:
        log.warning("helper %d did not start (%s); see %s", number, error, place)
    return helper


def _pipe(helper: subprocess.Popen[str]) -> IO[str]:
    assert helper.stdin is not None  # noqa: S101 (opened as a pipe)
    return helper.stdin


def _ended(helper: subprocess.Popen[str]) -> None:
    """Stop a helper: by now everything of the plan is committed. Its locks go with it."""
    if helper.poll() not in (None, 0):
        log.warning("a helper process ended early, with code %s; its share was done by the run itself", helper.poll())
    helper.kill()
    helper.wait()
    try:
        _pipe(helper).close()
    except OSError:
        log.debug("the helper's pipe was closed already")


def share(lineages: Sequence[Lineage], number: int, workers: int) -> list[Lineage]:
    """The order in which helper `number` of `workers` processes takes the lineages; the run itself goes first to last.

    The last helper goes backwards from the end, the others begin at equal distances and go round: each meets another's
    work as late as it can.
    """
    if number == workers - 1:
        return list(reversed(lineages))
    start = len(lineages) * number // workers
    return [*lineages[start:], *lineages[:start]]


def help_with(plan: Plan, number: int) -> None:
    """Train and test the plan's lineages in the order of `share`; what is committed already is passed over."""
    from stages.evaluate import evaluate_stage
    from stages.train import train_stage

    own = plan.config.evaluation
    for lineage in share(plan.lineages(), number, plan.workers):
        for stage in plan.trained(lineage):
            job = lineage.at(stage)
            train_stage(plan.config, plan.workspace, job)
            for tested in plan.tested(lineage, stage):
                evaluate_stage(plan.config, plan.workspace, job, tested, users=own.users)
            for tested in plan.matrix(lineage):
                evaluate_stage(plan.config, plan.workspace, job, tested, users=own.matrix_users, matrix=True)


def _requested(request: dict[str, Any]) -> tuple[Plan, int]:
    config = Config.model_validate(request["config"])
    plan = Plan(
        config,
        Workspace(Path(request["workspace"])),
        tuple(request["methods"]),
        tuple(request["seeds"]),
        request["limit"],
        request["comparison"],
        request["count"],
        workers=request["workers"],
    )
    return replace(plan, config=config.model_copy(update={"workspace": request["workspace"]})), request["number"]


def _follow_to_the_grave() -> None:
    """The run's end, however it comes, closes the pipe; a helper never outlives it."""
    # The bare descriptor: a thread inside `sys.stdin` would hold a lock that Python wants when it ends by itself.
    while os.read(0, 4096):
        pass
    os._exit(1)


def main() -> None:
    """A helper: one request on standard input, which stays open for as long as help is wanted."""
    plan, number = _requested(json.loads(sys.stdin.readline()))
    threading.Thread(target=_follow_to_the_grave, daemon=True).start()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        help_with(plan, number)
    except UserError as error:
        # The run meets the same mistake and tells the user.
        log.warning("%s", error)


if __name__ == "__main__":
    main()
