"""How time and memory grow with items, history, beams, vocabulary, users and rows; writes docs/scaling.md.

    python -m benchmarks.scaling

Each cause is varied alone, what it costs stands in a table beside the formula it follows. Logs are read and cut in
processes of their own; what a search adds to this process's memory is its highest mark, put back before the search.
"""

from __future__ import annotations

import ctypes
import tempfile
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure

from benchmarks.measure import machine, median, timed, using_threads
from benchmarks.split_log import child, write_log
from models import beam
from models.backbone import small_backbone
from models.generative import GenerativeModel
from models.trie import Trie

ROOT = Path(__file__).resolve().parent.parent
PAGE, PICTURE = ROOT / "docs" / "scaling.md", ROOT / "docs" / "images" / "scaling.svg"
HIDDEN, LAYERS, FEED_FORWARD, LEVELS = 192, 4, 512, 4
LINE, INK, FAINT = "#0072B2", "#222222", "#D9D9D9"
ITEM_COUNTS = (1_000, 10_000, 100_000, 1_000_000, 3_000_000, 10_000_000)
HISTORIES, WIDTHS, VOCABULARIES, BATCHES = (
    (5, 10, 20, 40, 80),
    (5, 10, 20, 50, 100),
    (64, 256, 1024, 4096),
    (1, 4, 16, 64),
)
ROWS, USERS = (500_000, 1_000_000, 2_000_000, 4_000_000), (5_000, 50_000, 200_000, 500_000)
MEMORY = Path("/proc/self")


@dataclass(frozen=True)
class Curve:
    """One quantity measured at several sizes of one cause.

    Attributes:
        title: what is on the vertical axis.
        cause: what is on the horizontal one.
        unit: of the values.
        sizes: (n,) of the cause.
        values: (n,) measured.
        formula: what it follows, in the letters of the page.
    """

    title: str
    cause: str
    unit: str
    sizes: Sequence[int]
    values: Sequence[float]
    formula: str = ""


def main() -> None:
    """Measure every curve, draw them, and write the page."""
    with using_threads(1):
        curves = [*by_items(), *by_model()]
    curves += [*by_log("rows", ROWS), *by_log("users", USERS)]
    draw(curves)
    PAGE.write_text(page(curves), encoding="utf-8")
    for curve in curves:
        print(f"{curve.title} by {curve.cause}: {', '.join(f'{value:.3g}' for value in curve.values)} {curve.unit}")
    print(f"wrote {PAGE} and {PICTURE}")


def by_items() -> list[Curve]:
    """Building the trie, its memory, and what choosing costs a step."""
    build, memory, peak, choose = [], [], [], []
    for count in ITEM_COUNTS:
        codes = catalogue(count, 256)
        build.append(timed(lambda codes=codes: Trie.build(codes)))
        tracemalloc.start()
        trie = Trie.build(codes)
        peak.append(tracemalloc.get_traced_memory()[1] / count)
        tracemalloc.stop()
        memory.append(trie.bytes() / count)
        choose.append(1e3 * choosing(trie))
    return [
        Curve("trie build", "items", "s", ITEM_COUNTS, build, "L · I log I"),
        Curve("trie memory", "items", "bytes an item", ITEM_COUNTS, memory, "8 · (2n + 2 leaves + I) / I"),
        Curve("peak memory of the build", "items", "bytes an item", ITEM_COUNTS, peak, "the trie and one level's sort"),
        Curve(
            "mask and top-k, 32 × 20 beams", "items", "ms a step", ITEM_COUNTS, choose, "B · K · most children, no I"
        ),
    ]


def catalogue(count: int, codes: int) -> np.ndarray:
    """Distinct semantic IDs drawn evenly, in order."""
    drawn = np.random.default_rng(0).integers(0, codes**LEVELS, int(count * 1.01) + 8, dtype=np.int64)
    drawn = np.unique(drawn)[:count]
    return np.stack([drawn // codes**power % codes for power in range(LEVELS - 1, -1, -1)], axis=1)


def choosing(trie: Trie, users: int = 32, width: int = 20) -> float:
    """Seconds of one choice among the children of nodes at the depth whose nodes have most."""
    depth = int(np.argmax(trie.widths[1:])) + 1
    low, high = trie.level_first[depth], trie.level_first[depth + 1]
    generator = torch.Generator().manual_seed(0)
    nodes = torch.randint(low, high, (users, width), generator=generator)
    logits, scores = torch.randn(users, width, 1024, generator=generator), torch.zeros(users, width)
    beams = beam._Beams(scores, nodes, nodes, torch.empty(users, width, 0, dtype=torch.long))
    return repeated(lambda: beam._chosen(trie, beams, logits, scores, 256, width, None))


def by_model() -> list[Curve]:
    """Seconds a user of the whole search on `small`, and the memory it needs beside the model's."""
    time = "2 · N · (P + K · (L − 1))"
    state = "B · (P + K · (L − 1)) · kv + 4 · B · K · C, and the prefill's widest layer"
    causes = (
        ("history items", "history", HISTORIES, f"{time}, P = 1 + history · L"),
        ("beams", "width", WIDTHS, time),
        ("codes a level", "codes", VOCABULARIES, f"{time} + 2 · d · C · K · L"),
        ("users a batch", "users", BATCHES, f"{time}; what each call costs is shared"),
    )
    curves = []
    for cause, name, sizes, formula in causes:
        seconds, peaks = zip(*(searching(**{name: size}) for size in sizes), strict=True)
        curves.append(Curve("search", cause, "ms a user", sizes, seconds, formula))
        curves.append(Curve("peak memory of the search", cause, "MiB a batch", sizes, peaks, state))
    return curves


def searching(users: int = 16, width: int = 20, history: int = 20, codes: int = 256) -> tuple[float, float]:
    """Milliseconds a user to search for one batch of users, and the MiB that the search adds at most."""
    backbone = small_backbone(HIDDEN, LAYERS, 4, FEED_FORWARD, seed=0)
    model = GenerativeModel(backbone, codes * LEVELS, seed=0, full_vocabulary=False, dropout=0.0).eval()
    rows = catalogue(20_000, codes)
    offsets = torch.arange(LEVELS) * codes
    items = torch.from_numpy(rows[np.random.default_rng(0).integers(0, len(rows), (users, history))]) + offsets
    prompts = torch.cat([torch.full((users, 1), model.bos), items.flatten(1)], dim=1)
    lengths, trie = torch.full((users,), prompts.shape[1]), Trie.build(rows)
    with torch.inference_mode():

        def search() -> None:
            """The batch, once."""
            beam.beam_search(model, trie, offsets, prompts, lengths, width)

        seconds = repeated(search)
        return 1e3 * seconds / users, added(search) / 2**20


def added(call: Callable[[], object]) -> float:
    """Bytes that a call adds to this process at most; what earlier calls freed is given back to the system first."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
    if trim is not None:
        trim(0)
    (MEMORY / "clear_refs").write_text("5", encoding="ascii")  # VmHWM falls to VmRSS
    before = held("VmRSS")
    call()
    return held("VmHWM") - before


def held(field: str) -> float:
    """One of this process's sizes in bytes."""
    lines = (MEMORY / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return 1024.0 * next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def by_log(cause: str, sizes: Sequence[int]) -> list[Curve]:
    """Reading and cutting a log of so many rows of 20 events a user, or of a million rows by so many users."""
    seconds, peaks = [], []
    for size in sizes:
        rows, users = (size, size // 20) if cause == "rows" else (1_000_000, size)
        with tempfile.TemporaryDirectory() as folder:
            write_log(Path(folder) / "log", rows, users)
            run = child("ours", Path(folder) / "log", Path(folder))
        seconds.append(run["cpu"])
        peaks.append(run["peak"] / 2**20)
    time = "rows · log rows of a part, and the distinct ids"
    state = "a fixed part, the distinct ids, a part of a file, 8 or 16 bytes a row of at most 2^24"
    return [
        Curve("read and split", cause, "s of processor", sizes, seconds, time),
        Curve("peak memory of read and split", cause, "MiB", sizes, peaks, state),
    ]


def repeated(call: Callable[[], object]) -> float:
    """Median seconds of three calls after one that does not count."""
    call()
    return median([timed(call) for _ in range(3)])


def draw(curves: Sequence[Curve]) -> None:
    """All curves in one picture."""
    figure = Figure(figsize=(9, 12), layout="constrained")
    FigureCanvasSVG(figure)
    for axes, curve in zip(figure.subplots(6, 3).flat, curves, strict=False):
        axes.loglog(curve.sizes, curve.values, marker="o", color=LINE, markersize=3, linewidth=1)
        axes.set_title(curve.title, fontsize=8, color=INK)
        axes.set_xlabel(curve.cause, fontsize=7)
        axes.set_ylabel(curve.unit, fontsize=7)
        axes.set_ylim(min(curve.values) / 2, max(curve.values) * 2)
        axes.tick_params(labelsize=6)
        axes.grid(color=FAINT, linewidth=0.5)
    for axes in list(figure.axes)[len(curves) :]:
        axes.remove()
    PICTURE.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(PICTURE, metadata={"Date": None})


def page(curves: Sequence[Curve]) -> str:
    """The page's text with a table for every curve."""
    tables = "\n".join(table(curve) for curve in curves)
    return f"{TEXT}\nMachine: {machine()}; one thread, processor time.\n{SETTING}\n{tables}"


def table(curve: Curve) -> str:
    """One curve as a table."""
    sizes = " | ".join(f"{size:,}" for size in curve.sizes)
    values = " | ".join(f"{value:,.3g}" for value in curve.values)
    rule = "|---" * (len(curve.sizes) + 1)
    formula = f"\nGrows as {curve.formula}.\n" * bool(curve.formula)
    return f"| {curve.cause} | {sizes} |\n{rule}|\n| {curve.title}, {curve.unit} | {values} |\n{formula}"


TEXT = """# Scaling

How time and memory grow, measured to what fits a small machine, and the formulas that hold beyond it. Written by
`python -m benchmarks.scaling`.

![Measured curves](images/scaling.svg)

## Formulas

I items, L codes each, n nodes of the trie, B users a batch, K beams, P prompt tokens (1 + history · L), C output
tokens, N weights of the backbone's layers, d hidden width, kv = 2 · layers · key-value heads · head width · bytes of a
number.

| what | grows as |
|---|---|
| trie, memory | 8 · (2n + 2 leaves + I) bytes; n ≤ 1 + I · L, less where items share prefixes |
| trie, build | one sort of I numbers a level: L · I log I |
| mask and top-k, a step | B · K · (most children of a beam's node), whatever I is |
| prefill | 2 · N · P · B operations, once a user; prompts that open another one of the batch are free |
| decoding | 2 · N · K · (L − 1) · B, and 2 · d · C · K · L · B in the output head |
| key-value cache | B · (P + K · (L − 1)) · kv bytes; one prompt a user, not one a beam |
| logits | 4 · B · K · C bytes at the widest step |
| item rows of the model | 2 · C · d numbers: they grow with codes, not with items |
| item graph | 16 bytes a link, at most 60 links an item |
| events in training and tests | 32 bytes an event (item, stage, basket, user), and the user ids |
| read and split | the distinct ids, a part of a file, 8 or 16 bytes a row of at most 2^24; the rest wait on disk |

With ten million items nothing but the trie and the catalogue's table grows: the model's rows, a step of decoding and
the cache stay what they are. `generate()` would hold K prompts a user: B · K · (P + L) · kv.

## Measured
"""

SETTING = """
A search is for 16 users × 20 beams with 20 items of history and 256 codes a level on `small`, unless the table says
otherwise; its memory is what it adds to the process at most, model and trie left out. A log has 20 events a user and a
hundredth as many items as rows; by users, it has a million rows. It is read on all cores; its memory is that of the
whole process, of which Python and its libraries take the fixed part.
"""

if __name__ == "__main__":
    main()
