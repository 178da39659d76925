"""Cutting a log into chronological stages: where the boundaries lie, and what each stage holds.

A stage is the half-open interval [start, end); equal timestamps never straddle a boundary, and every accepted event
is in exactly one stage.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from fractions import Fraction
from itertools import pairwise

import numpy as np
import polars as pl

from stages.clock import instant, microseconds
from stages.coded import INSTANT, NEVER, Coded
from stages.config import Config, StageConfig
from stages.errors import UserError
from stages.log_files import checked_manifest, coded_log
from stages.stage_files import counted, first_met, write_run
from stages.workspace import (
    SCHEMA,
    Workspace,
    digest_of,
    need_space,
    read_json,
    read_json_once,
    sha256_if_there,
    write_json,
)

DEFAULT_FRACTIONS = (0.6, 0.1, 0.1, 0.1, 0.1)
MOST_STAGES = 1000
TICK = timedelta(microseconds=1)


@dataclass(frozen=True)
class Stage:
    """One time slice of the log.

    Attributes:
        index: 0, 1, …
        start: ISO instant, inclusive; None for a log without a clock.
        end: ISO instant, exclusive; the last stage ends one microsecond after the last event.
        events: rows.
        users: distinct users.
        new_users: users with no event in an earlier stage.
        returning_users: the others.
        items: distinct items.
        new_items: items in no event of an earlier stage.
        digest: SHA-256 of the stage's content, hex.
        sha256: of the file, hex.
        path: of the file, relative to the workspace.
    """

    index: int
    start: str | None
    end: str | None
    events: int
    users: int
    new_users: int
    returning_users: int
    items: int
    new_items: int
    digest: str
    sha256: str
    path: str


def split_stages(config: Config, workspace: Workspace) -> list[Stage]:
    """Cut the stored log into `stages/stage=NN/events.parquet` and write `stages/manifest.json` last.

    A workspace that already holds exactly these stages of exactly this log is left as it is, and so is one that has
    grown by `stages.append`.

    Args:
        config: `config.stages` is the boundary rule (published blocks and sequences bring their own stages).
        workspace: holds the log that `read_log` stored.

    Raises:
        UserError: no log, or boundaries that lie outside it.
    """
    if is_grown(workspace):
        return load_stages(workspace)
    report = checked_manifest(workspace)
    rule = digest_of({"kind": report["kind"], **config.stages.model_dump()})
    committed = _committed(workspace, report["digest"], rule)
    if committed is not None:
        return committed
    clock = report["kind"] == "events"
    with coded_log(workspace) as log:
        starts, spans = _cut(log, config.stages if clock else None)
        need_space(workspace.root, workspace.log.stat().st_size)
        (workspace.stages / "manifest.json").unlink(missing_ok=True)
        digests = [write_run(log, workspace.stage_file(index), *run) for index, run in _runs(starts)]
        met, found = (_first_met(log, name, starts) for name in ("user", "item"))
    stages = described(starts, met, found, digests, spans)
    count = len(stages)
    _sweep(workspace, count)
    manifest = {
        "schema": SCHEMA,
        "clock": clock,
        "digest": digest_of_stages(stages),
        "log_digest": report["digest"],
        "rule": rule,
        "stages": [asdict(stage) for stage in stages],
    }
    write_json(workspace.stages / "manifest.json", manifest, seal=True)
    return stages


def digest_of_stages(stages: list[Stage]) -> str:
    """Names the cut: every stage's span and content."""
    return digest_of([[stage.start, stage.end, stage.digest] for stage in stages])


def is_grown(workspace: Workspace) -> bool:
    """Whether stages were added to those that the log was cut into; such a workspace is never cut again."""
    path = workspace.stages / "manifest.json"
    return path.is_file() and bool(read_json_once(path).get("appended"))


def load_stages(workspace: Workspace) -> list[Stage]:
    """The stages of a workspace, after checking every file against its hash.

    Raises:
        UserError: no stages yet, another version's, or a file that is missing or damaged.
    """
    path = workspace.stages / "manifest.json"
    if not path.is_file():
        raise UserError(f"{path}: no stages yet; run driftrec split first")
    manifest = read_json_once(path)
    if manifest.get("schema") != SCHEMA:
        raise UserError(
            f"{path}: schema {manifest.get('schema')}, this version reads {SCHEMA}; run driftrec split again"
        )
    for stage in damaged_stages(workspace):
        file = workspace.root / stage.path
        fault = "is not the file that was written" if file.is_file() else "is missing"
        raise UserError(f"{file}: stage {stage.index} {fault}; run driftrec split, which makes it again")
    return [Stage(**row) for row in manifest["stages"]]


def damaged_stages(workspace: Workspace) -> list[Stage]:
    """Those whose file is missing or not the one that was written."""
    rows = read_json_once(workspace.stages / "manifest.json")["stages"]
    return [Stage(**row) for row in rows if sha256_if_there(workspace.file(row["path"])) != row["sha256"]]


def boundaries(times: pl.Series, rule: StageConfig) -> list[datetime]:
    """Ends of all stages but the last, rising (two may be equal where ties leave a stage empty).

    By fractions, boundary k is the time of the event at place floor(n · (share of stages 0 … k)) in time order, counted
    from 0. By period, stage 0 ends at `first`, or at the first calendar boundary at or after 60 % of the events.

    Args:
        times: (n,) event times in any order, n >= 1.
        rule: fractions, period or instants; the default fractions without any.

    Raises:
        UserError: a boundary outside the log.
    """
    ordered = times.sort()
    if rule.instants is not None:
        return _explicit(ordered, [instant(text, "stages.instants") for text in rule.instants])
    if rule.period is not None:
        return _calendar(ordered, rule.period, rule.first)
    return [_at(ordered, share) for share in _shares(rule.fractions or DEFAULT_FRACTIONS)]


def _shares(fractions: list[float] | tuple[float, ...]) -> list[Fraction]:
    # Exact decimals: in floating point .6 + .1 + .1 falls short of .8, and the boundary with it.
    exact = [Fraction(repr(share)) for share in fractions]
    return [sum(exact[:count], Fraction(0)) for count in range(1, len(exact))]


def _at(ordered: pl.Series, share: Fraction) -> datetime:
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)]


def _explicit(ordered: pl.Series, edges: list[datetime]) -> list[datetime]:
    for edge in edges:
        _inside(ordered, edge, "stages.instants")
    return edges


def _inside(ordered: pl.Series, edge: datetime, key: str) -> None:
    first, last = ordered[0], ordered[-1]
    if not first < edge <= last:
        raise UserError(
            f"{key}: {edge.isoformat()} lies outside the log, whose events run from {first.isoformat()} "
            f"to {last.isoformat()}; choose a boundary between them"
        )


def _calendar(ordered: pl.Series, period: str, first: str | None) -> list[datetime]:
    try:
        start = instant(first, "stages.first") if first else next_boundary(_at(ordered, Fraction(6, 10)), period)
        edges = [start]
        while len(edges) < MOST_STAGES and edges[-1] <= ordered[-1]:
            edges.append(later_boundary(edges[-1], period))
    except pl.exceptions.PolarsError as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"stages.period = {period!r} is no period such as 1w, 1mo, 1d: {reason}") from None
    if len(edges) == MOST_STAGES:
        raise UserError(f"stages.period = {period!r} makes more than {MOST_STAGES:,} stages of this log; lengthen it")
    _inside(ordered, start, "stages.first" if first else f"stages.period = {period!r}")
    return [edge for edge in edges if edge <= ordered[-1]]


def next_boundary(time: datetime, period: str) -> datetime:
    """The first calendar boundary of `period` at or after `time`."""
    floor = pl.Series([time]).dt.truncate(period)[0]
    return floor if floor == time else later_boundary(floor, period)


def later_boundary(time: datetime, period: str, key: str = "stages.period") -> datetime:
    """`time` and one `period` more.

    Raises:
        UserError: the period does not move forward; `key` says which setting it is.
    """
    later = pl.Series([time]).dt.offset_by(period)[0]
    if later <= time:
        raise UserError(f"{key} = {period!r} does not move forward; write 1w, 1mo or the like")
    return later


def _cut(log: Coded, rule: StageConfig | None) -> tuple[list[int], list[tuple[str | None, str | None]]]:
    """First row of every stage, and the number of rows; and every stage's span. Stages are runs of the stored order."""
    if rule is None:
        blocks = np.maximum(log.column("block").to_numpy(), 0)
        starts = [int(start) for start in np.searchsorted(blocks, np.arange(int(blocks[-1]) + 2))]
        return starts, [(None, None)] * (len(starts) - 1)
    times = log.column("time")
    if times[0] == NEVER:
        raise UserError("the log holds events without a time; run driftrec ingest again")
    edges = boundaries(times.cast(INSTANT).set_sorted(), rule)
    places = times.search_sorted(pl.Series([microseconds(edge) for edge in edges], dtype=pl.Int64))
    stops = [times[:1].cast(INSTANT)[0], *edges, times[-1:].cast(INSTANT)[0] + TICK]
    spans = pairwise([stop.astimezone(UTC).isoformat() for stop in stops])
    return [0, *(int(place) for place in places), log.height], list(spans)


def _first_met(log: Coded, name: str, starts: list[int]) -> list[tuple[int, int]]:
    return first_met(counted(log, name, low, high) > 0 for low, high in pairwise(starts))


def _runs(starts: list[int]) -> list[tuple[int, tuple[int, int]]]:
    return list(enumerate(pairwise(starts)))


def described(
    starts: list[int],
    met: list[tuple[int, int]],
    found: list[tuple[int, int]],
    digests: list[tuple[str, str]],
    spans: Sequence[tuple[str | None, str | None]],
) -> list[Stage]:
    """The stages of a table whose rows stand stage by stage.

    Args:
        starts: first row of each stage, and the number of rows.
        met: users of each stage, and how many of them no earlier one has.
        found: the same of items.
        digests: content digest and SHA-256 of each stage's file.
        spans: [start, end) of each stage, ISO.
    """
    return [
        Stage(
            index=index,
            start=span[0],
            end=span[1],
            events=high - low,
            users=met[index][0],
            new_users=met[index][1],
            returning_users=met[index][0] - met[index][1],
            items=found[index][0],
            new_items=found[index][1],
            digest=digest,
            sha256=sha256,
            path=f"stages/stage={index:02d}/events.parquet",
        )
        for (index, (low, high)), (digest, sha256), span in zip(_runs(starts), digests, spans, strict=True)
    ]


def _committed(workspace: Workspace, log_digest: str, rule: str) -> list[Stage] | None:
    path = workspace.stages / "manifest.json"
    if not path.is_file():
        return None
    try:
        manifest = read_json(path)
        if (manifest.get("log_digest"), manifest.get("rule")) != (log_digest, rule):
            return None
        return load_stages(workspace)
    except UserError:
        return None  # damaged stages are cut afresh


def _sweep(workspace: Workspace, count: int) -> None:
    """Remove stages that an earlier split left beyond the last one."""
    kept = {workspace.stage_file(index).parent for index in range(count)}
    for folder in workspace.stages.glob("stage=*"):
        if folder not in kept:
            shutil.rmtree(folder)
