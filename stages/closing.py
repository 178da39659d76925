"""When the open stage closes: a rule over event times alone, so that a late, early or repeated run decides alike."""

from __future__ import annotations

from datetime import datetime

import polars as pl

from stages.errors import UserError
from stages.retrain_config import CloseConfig
from stages.split import TICK, later_boundary

KEY = "retrain.close"


def closings(times: pl.Series, rule: CloseConfig, close_now: bool = False) -> list[datetime]:
    """Ends (exclusive) of the stages that open events already fill, rising; no stage is empty.

    By events, a stage ends one microsecond after its n-th event, by period at the calendar boundary after its first
    one; either is closed once an event at or after that end is there, which no later file with earlier rows can undo.

    Args:
        times: (n,) rising event times of the open stage; rows from before its start count as its start.
        rule: period or number of events.
        close_now: whatever the rule leaves open ends one microsecond after the last event.

    Raises:
        UserError: the period is none.
    """
    edges: list[datetime] = []
    first = 0
    while first < len(times):
        edge = _end(times, first, rule)
        if edge is None or times[-1] < edge:
            break
        edges.append(edge)
        first = int(times.search_sorted(edge))
    if close_now and first < len(times):
        edges.append(times[-1] + TICK)
    return edges


def _end(times: pl.Series, first: int, rule: CloseConfig) -> datetime | None:
    """End of the stage whose first event stands at place `first`; None where too few events are there."""
    if rule.period is not None:
        return boundary_after(times[first], rule.period)
    last = first + (rule.events or 1) - 1
    return times[last] + TICK if last < len(times) else None


def boundary_after(time: datetime, period: str) -> datetime:
    """The calendar boundary of `period` after `time`.

    Raises:
        UserError: the period is none.
    """
    try:
        return later_boundary(pl.Series([time]).dt.truncate(period)[0], period, KEY + ".period")
    except (pl.exceptions.PolarsError, OverflowError, ValueError) as error:  # the latter two of years beyond 9999
        reason = str(error).splitlines()[0]
        raise UserError(f"{KEY}.period = {period!r} is no period such as 1d, 1w, 1mo: {reason}") from None
