"""What runs in a process of its own: a driftrec command or a training, with the fault it is to meet.

Children are forked from a server that has imported everything and computed nothing, so that a trial costs its own
work and not ten seconds of imports. Nothing here is a stand-in: a kill is SIGKILL, an error is what the system raises.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import polars as pl
import torch

from flows import cli, mirror, retraining, steps, terminal
from flows.experiment import exclusive, remember_trained
from models.generative import GenerativeModel
from stages import append, checkpoint, evaluate, jobs, summary  # noqa: F401
from stages.config import load_config
from stages.left_overs import sweep
from stages.train import train_stage
from stages.workspace import Workspace

DURABLE = ((os, "fsync"), (os, "rename"), (os, "replace"), (os, "mkdir"), (Path, "write_text"))
LIBRARIES = ((checkpoint, "save_file"), (pl.DataFrame, "write_parquet"))


def run(task: dict[str, Any]) -> None:
    """Carry out `task` and end the process with its exit code.

    Args:
        task: `command` (words after `driftrec`) or `work` (see `learn`, `answers`); `out` a path for both streams;
            `faults` (see `arm`), `env`, `uid`, `threads` (absent: 1).
    """
    handle = os.open(task["out"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    for stream in (1, 2):
        os.dup2(handle, stream)
    sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
    torch.set_num_threads(task.get("threads", 1))
    os.environ.update(task.get("env", {}))
    if task.get("uid"):
        os.setgid(task["uid"])
        os.setuid(task["uid"])
    for fault in task.get("faults", []):
        arm(fault)
    own = {"learn": learn, "answers": answers, "tick": tick}.get(task.get("work", "command"))
    if own is not None:
        cli.app = lambda: own(task)  # type: ignore[assignment]
    sys.argv = ["driftrec", *task.get("command", [])]
    code = 1
    try:
        cli.main()
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else 0
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def learn(task: dict[str, Any]) -> None:
    """Train and test lineages with the lock and the sweep of a command, but without its report."""
    place, config = Workspace(Path(task["root"])), task["config"]
    with terminal.watching(), exclusive(place) if task.get("lock", True) else nullcontext():
        sweep(place.root)
        for method, seed, protocol, last in task["jobs"]:
            for stage in range(last + 1):
                job = jobs.Job(method, seed, protocol, stage)
                done = train_stage(config, place, job, progress=partial(_pause, task.get("pause")))
                remember_trained(place, done)
                if protocol == "same_stage" and task.get("test", True):
                    evaluate.evaluate_stage(config, place, job, tested=stage)
                sys.stdout.write(f"{'found' if done.reused else 'trained'} {done.key}\n")


def tick(task: dict[str, Any]) -> None:
    """What a scheduled retraining does before it trains: take the new rows, close what is due, give items codes."""
    plan = retraining.retrain_plan(Path(task["toml"]), Path(task["root"]))
    with terminal.watching(), exclusive(plan.workspace):
        plan = steps.claimed(plan)
        sys.stdout.write(retraining.take(plan).sentence() + "\n")
        retraining.grow(plan)


def _pause(stage: int | None, news: Mapping[str, Any]) -> None:
    """Stop at the second optimiser step of `stage`, until somebody lets the process go on."""
    if (news["stage"], news["step"]) == (stage, 2):
        os.kill(os.getpid(), signal.SIGSTOP)


def answers(task: dict[str, Any]) -> None:
    """Make the workspace's tracking store."""
    from flows import tracking

    tracking.answers(Workspace(Path(task["root"])))


def arm(fault: dict[str, Any]) -> None:
    """Set up one fault.

    `kill`, `stop`, `error`: at the `at`-th durable operation (before it is carried out); `count` writes how many there
    were to `to`. `kill_record`: when MLflow is about to be written. `fsize`: no file may grow beyond `bytes`.
    `memory`: `bytes` of address space more than now. `poison`: the `at`-th training loss is multiplied by `value`, or
    its gradient becomes NaN. `slow`: every loss takes `seconds` longer. `clock`: clocks are off by `seconds`.
    """
    kind = fault["kind"]
    if kind in ("kill", "stop", "error", "count"):
        _count_operations(fault)
    elif kind == "kill_record":
        mirror.record = lambda *_: _die()  # type: ignore[assignment]
    elif kind == "fsize":
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (fault["bytes"], fault["bytes"]))
    elif kind == "memory":
        size = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (size + fault["bytes"],) * 2)
    elif kind == "poison":
        _poison(fault)
    elif kind == "clock":
        _shift_clock(fault["seconds"])
    elif kind == "slow":
        _slow(fault)
    else:
        raise ValueError(f"unknown fault {kind}")


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)


def _count_operations(fault: dict[str, Any]) -> None:
    seen = [0]

    def meet() -> None:
        """The fault, where this operation is the one it waits for."""
        seen[0] += 1
        if fault["kind"] == "count":
            Path.write_bytes(Path(fault["to"]), str(seen[0]).encode())
        elif seen[0] == fault["at"] and fault["kind"] == "kill":
            _die()
        elif seen[0] == fault["at"] and fault["kind"] == "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        elif seen[0] >= fault["at"] and fault["kind"] == "error":
            raise OSError(fault["errno"], os.strerror(fault["errno"]), fault.get("place"))

    def watched(honest: Callable[..., Any]) -> Callable[..., Any]:
        """An operation that meets the fault first."""

        def call(*arguments: Any, **named: Any) -> Any:
            """The operation itself."""
            meet()
            return honest(*arguments, **named)

        return call

    for owner, name in (*DURABLE, *LIBRARIES):
        setattr(owner, name, watched(getattr(owner, name)))


def _poison(fault: dict[str, Any]) -> None:
    honest = GenerativeModel.loss
    seen = [0]

    def loss(self: GenerativeModel, *arguments: Any) -> torch.Tensor:
        """The honest loss, but for one training step."""
        found = honest(self, *arguments)
        if self.training:
            seen[0] += 1
            if seen[0] == fault["at"]:
                if fault.get("gradient"):
                    found.register_hook(lambda gradient: gradient * float("nan"))
                    return found
                return found * fault["value"]
        return found

    GenerativeModel.loss = loss  # type: ignore[method-assign]


def _shift_clock(seconds: float) -> None:
    """Every clock a run could ask is wrong by so much."""
    honest = time.time
    time.time = lambda: honest() + seconds

    class Wrong(datetime):
        @classmethod
        def now(cls, tz: Any = None) -> datetime:
            return datetime.now(tz) + timedelta(seconds=seconds)

    append.datetime = Wrong  # type: ignore[misc]
    os.environ["TZ"] = "Pacific/Apia" if seconds > 0 else "America/New_York"
    time.tzset()


def _slow(fault: dict[str, Any]) -> None:
    """A training that takes its time, so that it can be met in the middle."""
    honest = GenerativeModel.loss

    def loss(self: GenerativeModel, *arguments: Any) -> torch.Tensor:
        """The honest loss, late."""
        time.sleep(fault["seconds"])
        return honest(self, *arguments)

    GenerativeModel.loss = loss  # type: ignore[method-assign]


if __name__ == "__main__":
    wanted = json.loads(sys.argv[1])
    run({**wanted, "config": load_config(Path(wanted["config"]))} if "config" in wanted else wanted)
