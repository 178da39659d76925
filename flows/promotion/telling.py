"""Models and decisions in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flows.promotion.champion import Champion, named
from flows.promotion.history import Entry
from stages.jobs import Job


def name(job: Job) -> str:
    """A model in words."""
    return f"{job.method} after stage {job.stage}"


def told_apart(models: Sequence[Champion]) -> list[str]:
    """Models in words; those of one name with the beginning of their checkpoint's digest."""
    keys: dict[str, set[str]] = {}
    for model in models:
        keys.setdefault(name(model.job), set()).add(model.key)
    return [f"{word} ({m.short})" if len(keys[word := name(m.job)]) > 1 else word for m in models]


def rows(lines: Sequence[Entry]) -> list[dict[str, Any]]:
    """The history as a table, newest last."""
    words = iter(told_apart(named(lines)))
    return [
        {
            "at": line["at"],
            "decision": line["decision"],
            "stage": line["stage"],
            "champion": next(words) if line["champion"] else "none",
            "why": line["why"],
        }
        for line in lines
    ]
