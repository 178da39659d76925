"""What one more stage costs a retraining in a process that has lived long: counted, as seconds depend on the rest."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import polars as pl
import pytest

from benchmarks.growing import opened
from benchmarks.soak import lived
from flows.plain import run_plainly
from flows.promotion import history
from stages import append, checkpoint, interactions, items, lineage, stage_files
from stages import dataset as datasets
from stages import workspace as places
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.split import load_stages
from stages.workspace import Workspace

ROUNDS, POOLS = 9, 2
"""Rounds, and those at their beginning in which libraries are loaded and the first model is put into service."""


@dataclass(frozen=True)
class Lived:
    """A shop's workspace after some rounds.

    Attributes:
        workspace: it.
        work: by round, how often it did what takes time.
        promoted: by round, whether its challenger went into service, which takes more.
    """

    workspace: Workspace
    work: list[Counter[str]]
    promoted: list[bool]


@pytest.fixture(scope="module")
def life(tmp_path_factory: pytest.TempPathFactory) -> Lived:
    folder, count = tmp_path_factory.mktemp("life"), Counter[str]()
    rounds: list[Counter[str]] = []

    def run(name: str, arguments: dict[str, Any]) -> str:
        count.clear()
        said = run_plainly(name, arguments)
        rounds.append(Counter(count))
        return said

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(places, "SETTLED", -(10**18))  # what was read counts as read, however fast the rounds are

        def count_calls(name: str, *modules: Any, of: Callable[..., int] = lambda *_: 1) -> None:
            plain = getattr(modules[0], name)

            def counted(*arguments: Any, **named: Any) -> Any:
                count[name] += of(*arguments)
                return plain(*arguments, **named)

            for module in modules:
                patched.setattr(module, name, counted)

        count_calls("_chained", history)
        count_calls("sha256_file", places, checkpoint, items)
        count_calls("stamp_of", places, lineage)
        count_calls("digest_of", places, datasets, checkpoint, history)
        count_calls("read_stages", stage_files, append, interactions, items, of=lambda _, wanted, *__: len(wanted))
        promoted = lived(folder, ROUNDS, run).promoted
    return Lived(Workspace(folder / "workspace"), rounds[1:], promoted.tolist())


@pytest.mark.parametrize(
    ("work", "most"), [("_chained", 0), ("sha256_file", 0), ("read_stages", 4), ("digest_of", 3), ("stamp_of", 120)]
)
def test_a_stage_more_adds_little_to_what_a_round_does(life: Lived, work: str, most: int) -> None:
    tried = 0
    for kind in (True, False):
        rounds = [number for number in range(POOLS, ROUNDS) if life.promoted[number] == kind]
        for early, late in pairwise(rounds):
            grown = life.work[late][work] - life.work[early][work]
            assert grown <= most * (late - early), (early, late, life.work)
            tried += life.work[late][work] > 0
    assert tried >= 3


def test_stages_read_one_by_one_give_the_items_of_all_read_at_once(life: Lived) -> None:
    place = life.workspace
    stored = pl.read_parquet(place.catalogue / "items.parquet").select("item_id", "first_stage")
    assert stored.equals(items._first_stages(place, ROUNDS + 2, None, 0))
    interactions._kinds.clear()
    assert interactions.used_objectives(place, None) == ("recommendation",)


@pytest.mark.parametrize("name", ["stages/stage=01/events.parquet", "stages/manifest.json", "catalogue/items.parquet"])
def test_a_file_altered_in_place_between_two_looks_of_one_process_is_noticed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    config, place = opened(tmp_path)
    monkeypatch.setattr(places, "SETTLED", -(10**18))
    first = load_dataset(config, place)
    with monkeypatch.context() as patched:
        patched.setattr(places, "sha256_file", None)
        assert load_dataset(config, place) is first, "nothing is hashed again"
    time.sleep(0.02)  # the file system's clock moves in steps
    damaged = place.root / name
    before, content = damaged.stat(), bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    with damaged.open("r+b") as handle:
        handle.write(content)
    os.utime(damaged, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a tool that restores times would leave it
    for _ in range(2):
        with pytest.raises(UserError, match=damaged.name):
            load_dataset(config, place)
    if name.startswith("stages"):
        with pytest.raises(UserError, match=damaged.name):
            load_stages(place)
    damaged.unlink()
    with pytest.raises(UserError, match=damaged.name):
        load_dataset(config, place)


def test_of_a_stage_that_is_not_the_one_that_was_written_nothing_is_remembered(tmp_path: Path) -> None:
    _, place = opened(tmp_path)
    interactions._kinds.clear()
    path = place.stage_file(1)
    content = path.read_bytes()
    pl.read_parquet(path).with_columns(event=pl.lit("search")).write_parquet(path)
    assert interactions.used_objectives(place, None) == ("recommendation", "search")
    path.write_bytes(content)
    assert interactions.used_objectives(place, None) == ("recommendation",)
