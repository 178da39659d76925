"""What every script of this folder measures with: alternating repetitions, the machine's limits, one row a claim.

    pair = alternate(ours, rival)
    report("decoding", [faster("decoding", "generate()", pair, mark=5, unit="users/s", amount=32)])

A script names itself as `make bench` does; its rows replace its earlier ones in results.json, whole or not at all.
"""

from __future__ import annotations

import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import cache
from pathlib import Path
from typing import Any, Literal, NoReturn

import torch
from torch.utils.flop_counter import FlopCounterMode

from flows.machine import description
from models import packed
from stages.workspace import read_json, write_json

RESULTS = Path(__file__).resolve().parent / "results.json"
REPETITIONS = 7
Clock = Literal["cpu", "wall"]
Number = Literal["float32", "bfloat16"]
Call = Callable[[], object]
OPERATIONS = (
    {torch.ops.mkldnn._linear_pointwise: lambda x, weight, *_, **__: 2 * math.prod(x) * weight[0]}
    if torch.backends.mkldnn.is_available()
    else {}
)
"""Those that torch's own counter does not know, by the shapes of their arguments."""


@dataclass(frozen=True)
class Pair:
    """Seconds of the same number of alternating calls.

    Attributes:
        ours: (n,) seconds a call.
        rival: (n,) seconds a call, measured right before or after.
        clock: `cpu`: this process's processor time, which other programs disturb little; `wall`: elapsed.
        threads: torch's, for both.
    """

    ours: tuple[float, ...]
    rival: tuple[float, ...]
    clock: Clock
    threads: int


@dataclass(frozen=True)
class Work:
    """What one call of ours cannot avoid.

    Attributes:
        flops: arithmetic, of the matmuls and attentions.
        bytes: memory traffic: everything read once and everything written once.
        number: what the matmuls multiply.
    """

    flops: float = 0.0
    bytes: float = 0.0
    number: Number = "float32"


@dataclass(frozen=True)
class Row:
    """One line of results.json; `ratio` is None where nothing was claimed, and `note` says why.

    Attributes:
        name: the claim.
        rival: what it stands beside.
        ratio: the median over alternating pairs, > 1 meaning faster with `better = "higher"`, dearer with `"lower"`.
        low: smallest of the pairs' ratios.
        high: largest.
        mark: what `ratio` should reach, or stay under.
        better: which way is good.
        unit: of `ours` and `theirs`.
        ours: our absolute figure, median.
        theirs: the rival's.
        limit: share of what this machine's matmul and memory stream allow, in [0, 1]; None where that would mean
            nothing, as for a size, a count or a whole command.
        limits: those, in words.
        how: repetitions, clock, threads.
        note: anything a reader must know.
        machine: in words.
        measured: date.
        script: whose row it is.
    """

    name: str
    rival: str
    ratio: float | None = None
    low: float | None = None
    high: float | None = None
    mark: float | None = None
    better: Literal["higher", "lower"] = "higher"
    unit: str = ""
    ours: float | None = None
    theirs: float | None = None
    limit: float | None = None
    limits: str = ""
    how: str = ""
    note: str = ""
    machine: str = ""
    measured: str = ""
    script: str = ""

    @property
    def met(self) -> bool | None:
        """Whether the median ratio keeps to the mark; None without a claim."""
        if self.ratio is None or self.mark is None:
            return None
        return self.ratio >= self.mark if self.better == "higher" else self.ratio <= self.mark


def alternate(
    ours: Call,
    rival: Call,
    *,
    repetitions: int = REPETITIONS,
    clock: Clock = "cpu",
    threads: int = 1,
    warm: bool = False,
) -> Pair:
    """Time both in turn, each going first every other time, after one call of each that does not count.

    Args:
        ours: the thing claimed for.
        rival: what it stands beside; does the same job.
        repetitions: pairs, at least 5.
        clock: `cpu` unless a rival works in another process or the claim is about using several cores.
        threads: torch's while measuring.
        warm: both have been called already; the calls that do not count are left out.
    """
    sides: list[tuple[Call, list[float]]] = [(ours, []), (rival, [])]
    with using_threads(threads):
        for call, _ in () if warm else sides:
            call()
        for number in range(max(5, repetitions)):
            for call, seconds in sides if number % 2 else reversed(sides):
                seconds.append(timed(call, clock))
    return Pair(tuple(sides[0][1]), tuple(sides[1][1]), clock, threads)


def timed(call: Call, clock: Clock = "cpu") -> float:
    """Seconds of one call."""
    now = time.process_time if clock == "cpu" else time.perf_counter
    start = now()
    call()
    return now() - start


@contextmanager
def using_threads(count: int) -> Iterator[None]:
    """torch with `count` threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def faster(
    name: str,
    rival: str,
    pair: Pair,
    *,
    mark: float | None,
    unit: str,
    amount: float = 1.0,
    rival_amount: float | None = None,
    work: Work | None = None,
    note: str = "",
) -> Row:
    """A claim about a rate: ours over the rival's, `mark` a lower bound.

    Args:
        name: the claim.
        rival: what it stands beside.
        pair: seconds.
        mark: None to report without a claim.
        unit: of the rates, such as `targets/s`.
        amount: how many of those one call of ours does.
        rival_amount: the same for the rival; absent: as many.
        work: of one call of ours, for the share of the limit.
        note: anything a reader must know.
    """
    other = amount if rival_amount is None else rival_amount
    rates = [amount / second for second in pair.ours], [other / second for second in pair.rival]
    ratios = [mine / theirs for mine, theirs in zip(*rates, strict=True)]
    row = _row(name, rival, ratios, mark, pair, work)
    return replace(row, unit=unit, ours=median(rates[0]), theirs=median(rates[1]), better="higher", note=note)


def dearer(
    name: str, rival: str, pair: Pair, *, mark: float | None, work: Work | None = None, note: str = "", calls: int = 1
) -> Row:
    """A claim about a cost: our seconds over the rival's, `mark` an upper bound; figures in ms a call.

    Args:
        name: the claim.
        rival: what it stands beside.
        pair: seconds.
        mark: None to report without a claim.
        work: of everything `pair.ours` timed at once.
        note: anything a reader must know.
        calls: how many steps each timing holds.
    """
    ratios = [mine / theirs for mine, theirs in zip(pair.ours, pair.rival, strict=True)]
    row = _row(name, rival, ratios, mark, pair, work)
    figures = (1e3 * median(seconds) / calls for seconds in (pair.ours, pair.rival))
    return replace(row, unit="ms", ours=next(figures), theirs=next(figures), better="lower", note=note)


def _row(name: str, rival: str, ratios: Sequence[float], mark: float | None, pair: Pair, work: Work | None) -> Row:
    threads = f"{pair.threads} thread{'s' * (pair.threads > 1)}"
    return Row(
        name=name,
        rival=rival,
        ratio=median(ratios),
        low=min(ratios),
        high=max(ratios),
        mark=mark,
        limit=None if work is None else share_of_limit(work, median(pair.ours), pair.threads, pair.clock),
        limits="" if work is None else limits_in_words(work, pair.threads, pair.clock),
        how=f"{len(ratios)} alternating pairs, {pair.clock} time, {threads}",
    )


def median(values: Sequence[float]) -> float:
    """The middle one."""
    return float(statistics.median(values))


def flops(call: Call) -> float:
    """Floating-point operations of the matmuls and attentions in one call, forward and backward."""
    with FlopCounterMode(display=False, custom_mapping=OPERATIONS) as counter:
        call()
    return float(counter.get_total_flops())


@cache
def matmul(threads: int, clock: Clock = "cpu", number: Number = "float32") -> float:
    """This machine's FLOP/s in a product of two square matrices, 2 or 4 MiB each: the best of about a second.

    Processor time of several threads adds up, so with `cpu` it is per core in use; so is `stream`.
    """
    size, kind = 1024, {"float32": torch.float32, "bfloat16": torch.bfloat16}[number]
    left, right, product = (torch.rand(size, size).to(kind) for _ in range(3))
    ways: list[Call] = [lambda: torch.mm(left, right, out=product)]
    if number == "float32" and packed.gains(left.device):
        way = packed.PackedLinear(torch.nn.Linear(size, size, bias=False))
        ways.append(torch.inference_mode()(lambda: way(left)))
    with using_threads(threads):
        return 2 * size**3 / min(_best(way, clock) for way in ways)


@cache
def stream(threads: int, clock: Clock = "cpu") -> float:
    """This machine's bytes/s, read and written, in a copy far beyond any cache: the best of about a second."""
    entries = 2**25  # 128 MiB
    source, target = torch.rand(entries), torch.zeros(entries)
    with using_threads(threads):
        return 2 * 4 * entries / _best(lambda: target.copy_(source), clock)


def _best(call: Call, clock: Clock) -> float:
    call()
    until = time.perf_counter() + 1.0
    best = timed(call, clock)
    while time.perf_counter() < until:
        best = min(best, timed(call, clock))
    return best


def share_of_limit(work: Work, seconds: float, threads: int, clock: Clock = "cpu") -> float:
    """The least time `work` can take here, by arithmetic or by memory traffic, over the time it took."""
    arithmetic = work.flops / matmul(threads, clock, work.number) if work.flops else 0.0
    traffic = work.bytes / stream(threads, clock) if work.bytes else 0.0
    return max(arithmetic, traffic) / seconds


def limits_in_words(work: Work, threads: int, clock: Clock = "cpu") -> str:
    """The limits that `work` is held to, for print."""
    words = []
    if work.flops:
        words.append(f"{work.number} matmul {matmul(threads, clock, work.number) / 1e9:.0f} GFLOP/s")
    if work.bytes:
        words.append(f"memory stream {stream(threads, clock) / 1e9:.1f} GB/s")
    return ", ".join(words)


def limited(row: Row, work: Work, seconds: float, threads: int = 1, clock: Clock = "cpu") -> Row:
    """The row with the share of the limit that `work` in `seconds` comes to."""
    share = share_of_limit(work, seconds, threads, clock)
    return replace(row, limit=share, limits=limits_in_words(work, threads, clock))


def machine() -> str:
    """Processor, cores, instruction sets, memory and torch in one line."""
    own = description()
    memory = f"{own['memory_bytes'] / 2**30:.0f} GiB, " if own["memory_bytes"] else ""
    sets = " ".join(own["features"]) or "no vector sets named"
    return f"{own['processor']}, {own['cores']} cores, {sets}, {memory}{own['system']}, torch {torch.__version__}"


def report(script: str, rows: Sequence[Row], results: Path = RESULTS) -> None:
    """Print the rows and put them into results.json in place of `script`'s earlier ones."""
    stamp = {"machine": machine(), "measured": datetime.now(UTC).date().isoformat(), "script": script}
    stamped = [replace(row, **stamp) for row in rows]
    for row in stamped:
        print(in_words(row))
    kept = [row for row in stored(results) if row["script"] != script]
    write_json(results, {"schema": 1, "rows": kept + [asdict(row) | {"met": row.met} for row in stamped]})


def stored(results: Path = RESULTS) -> list[dict[str, Any]]:
    """The rows of results.json; none where it does not exist yet."""
    return read_json(results)["rows"] if results.exists() else []


def in_words(row: Row) -> str:
    """The claim in one line, and below it the absolute figures, the share of the limit and how it was measured."""
    if row.ratio is None:
        return f"{row.name}: not measured: {row.note}"
    verdict = "no mark"
    if row.mark is not None:
        verdict = f"mark {'≥' if row.better == 'higher' else '≤'} {row.mark:g} {'met' if row.met else 'MISSED'}"
    spread = "" if row.low is None or row.high is None else f" [{row.low:.3g}, {row.high:.3g}]"
    lines = [f"{row.name}: {row.ratio:.3g} × {row.rival}{spread}, {verdict}"]
    if row.ours is not None and row.theirs is not None:
        lines.append(f"ours {row.ours:,.4g} {row.unit}, beside it {row.theirs:,.4g} {row.unit}")
    if row.limit is not None:
        lines.append(f"{percent(row.limit)} of this machine's limit ({row.limits})")
    return "\n    ".join([*lines, *(part for part in (row.note, row.how, row.machine) if part)])


def percent(share: float) -> str:
    """A share in words, with two digits where it is small."""
    return f"{share:.0%}" if share >= 0.095 else f"{100 * share:.2g}%"


def skip(script: str, reason: str) -> NoReturn:
    """End the script well, leaving its rows of an earlier run as they are."""
    print(f"{script}: skipped: {reason}")
    sys.exit(0)


def data_folder(script: str, name: str) -> Path:
    """The public log `name` below DRIFTREC_DATA; skips where there is none (docs/data.md says where to get it)."""
    root = os.environ.get("DRIFTREC_DATA")
    if not root:
        skip(script, f"DRIFTREC_DATA is not set; it names the folder that holds {name} (docs/data.md)")
    if not (Path(root) / name).is_dir():
        skip(script, f"{Path(root) / name} does not exist; docs/data.md says where to get it")
    return Path(root) / name


def pretrained_folder(script: str) -> str:
    """The local decoder LM that DRIFTREC_BACKBONE names; skips where there is none."""
    path = os.environ.get("DRIFTREC_BACKBONE")
    if not path:
        skip(script, "DRIFTREC_BACKBONE is not set; it names a local folder with a decoder LM such as SmolLM2-135M")
    if not (Path(path) / "config.json").is_file():
        skip(script, f"DRIFTREC_BACKBONE: {path} holds no config.json")
    return path
