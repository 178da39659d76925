"""Row 14: rows older than a committed stage, as `train` meets them, and under each of `retrain`'s four policies."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import polars as pl

from benchmarks.faults.harness import Bench, Child, Row, refused, sound, tree
from benchmarks.growing import seconds, week, write_rows, write_shop
from stages.waiting import load_waiting
from stages.workspace import Workspace, read_json, sha256_file

WORDS = ["train", "-m", "single", "--workers", "1"]
POLICIES = ("", "next_stage", "reject", "rebuild")
"""Values of `retrain.late`; the first is the default."""


def late(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Every policy of `retrain`, and (with whole commands) `train`, which takes no new rows at all."""
    opened = bench.place()
    write_shop(opened)
    if look(bench, opened).end():
        raise RuntimeError("the first look failed")
    for _ in range(count):
        for policy in POLICIES:
            yield taken(bench, opened, policy, rng)
        if bench.commands:
            yield trained(bench, rng)


def look(bench: Bench, shop: Path) -> Child:
    """What `retrain` does before it trains."""
    return bench.launch(work="tick", toml=str(shop / "shop.toml"), root=str(shop / "workspace"))


def taken(bench: Bench, opened: Path, policy: str, rng: Random) -> str:
    """A shop of two stages meets a week of new rows and some late ones of both stages, twice."""
    shop = bench.place()
    shutil.copytree(opened, shop)
    write_shop(shop, f'late = "{policy}"\n' if policy else "")
    place = Workspace(shop / "workspace")
    before = committed(place)
    rows = [(f"late{number}", "i05", seconds(day)) for number, day in enumerate(days(rng))]
    write_rows(shop / "events" / "more.csv", [*week(2), *rows, ("u00", "i01", seconds(21.5))])
    for number in range(2):
        child = look(bench, shop)
        if child.end():
            return f"{policy}: the look failed: {child.said[-300:]}"
        if number == 0 and f" {len(rows)} late" not in child.said:
            return f"{policy}: not counted: {child.said[-300:]}"
        if problem := misplaced(place, policy, {row[0] for row in rows}, before):
            return f"{policy or 'default'}, look {number + 1}: {problem}"
    shutil.rmtree(shop)
    return ""


def days(rng: Random) -> list[float]:
    """Days of late rows: at least one before the end of each of the two stages."""
    return [rng.uniform(0, 6.9), rng.uniform(7, 9.9), *(rng.uniform(0, 9.9) for _ in range(rng.randrange(3)))]


def committed(place: Workspace) -> list[tuple[str, str]]:
    """Content and bytes of the first two stages."""
    rows = read_json(place.stages / "manifest.json")["stages"][:2]
    return [(row["digest"], sha256_file(place.stage_file(row["index"]))) for row in rows]


def misplaced(place: Workspace, policy: str, wanted: set[str], before: list[tuple[str, str]]) -> str:
    """What is wrong with where the late rows are; all of them are to be in one place, and in no other."""
    waiting, tables = load_waiting(place), dict[str, Any]()
    tables |= {"held": waiting.held, "refused": waiting.refused, "open": waiting.open}
    tables |= {f"stage {index}": pl.read_parquet(place.stage_file(index)) for index in range(stages(place))}
    found = {name: set(table["user_id"]) & wanted for name, table in tables.items()}
    homes = {"": ["held"], "next_stage": ["stage 2"], "reject": ["refused"], "rebuild": ["stage 0", "stage 1"]}[policy]
    here = [name for name, users in found.items() if users]
    if here != homes or sum(len(users) for users in found.values()) != len(wanted):
        return f"late rows are in {here}, not in {homes}"
    same = [old == new for old, new in zip(before, committed(place), strict=True)]
    if any(same) if policy == "rebuild" else not all(same):
        return f"committed stages unchanged: {same}"
    return sound(place.root)


def stages(place: Workspace) -> int:
    """How many are committed."""
    return len(read_json(place.stages / "manifest.json")["stages"])


def trained(bench: Bench, rng: Random) -> str:
    """Rows older than a committed stage, added to the log of a trained workspace."""
    root = bench.place()
    shutil.copytree(bench.reported.root, root)
    source = bench.place()
    shutil.copytree(bench.source, source)
    log = source / "events.csv"
    lines = log.read_text().splitlines()
    old = rng.choice([line for line in lines[1:100] if "recommendation" in line]).split(",")
    log.write_text("\n".join([*lines, ",".join(["late", *old[1:]])]) + "\n")
    before = tree(root / "runs" / "checkpoints"), tree(root / "stages")
    words = [*WORDS, "--config", str(source / "tiny.toml"), "--workspace", str(root)]
    problem = refused(bench.launch(command=words), "rows changed since this workspace was made")
    after = tree(root / "runs" / "checkpoints"), tree(root / "stages")
    return problem or ("" if before == after else "committed stages were changed") or sound(root)


TABLE = (
    Row(
        14,
        "late rows in a committed workspace",
        "retrain: held and counted, or as retrain.late says; train: refused; committed stages unchanged but by rebuild",
        late,
        1,
        5,
    ),
)
