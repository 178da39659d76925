"""Rows 6 to 10 and 17: disks that are full, closed or rotten, and checkpoints that are not what they seem."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.harness import Bench, Row, flipped, refused, sound, user_error
from stages.checkpoint import ADAPTER, BACKBONE, ROWS, _write_manifest, fault_of
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.evaluate import _intact
from stages.jobs import Job
from stages.log import load_log
from stages.train import lineage_folders, restore_model
from stages.workspace import Workspace, read_json

NOBODY = 65534
LAST = Job("single", 0, "same_stage", 1)


def disk_full(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A small tmpfs (where root may mount one), a limit on file sizes, and ENOSPC from the n-th write on, in turn."""
    for number in range(count):
        root = bench.fresh()
        if number % 3 == 0 and os.geteuid() == 0:
            yield on_small_disk(bench, root, rng)
        elif number % 3 == 1:
            fault = {"kind": "fsize", "bytes": rng.randrange(100, 1500)}
            yield refused(bench.learn(root, faults=[fault]), "") or sound(root) or bench.resumed(root)
        else:
            fault = {"kind": "error", "errno": errno.ENOSPC, "at": rng.randrange(1, 30)}
            child = bench.learn(root, faults=[fault])
            yield refused(child, "no space left") or sound(root) or bench.resumed(root)
        shutil.rmtree(root, ignore_errors=True)


def on_small_disk(bench: Bench, root: Path, rng: Random) -> str:
    """Train on a tmpfs with a few free kilobytes, then again after it has grown."""
    small = bench.place()
    small.mkdir()
    used = sum(path.stat().st_size + 4096 for path in root.rglob("*"))
    size = used + rng.randrange(4_000, 24_000)
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(small)], check=True)  # noqa: S607
    try:
        place = small / "w"
        shutil.copytree(root, place)
        problem = refused(bench.learn(place), "free some") or sound(place)
        subprocess.run(["mount", "-o", "remount,size=64m", str(small)], check=True)  # noqa: S607
        return problem or bench.resumed(place)
    finally:
        subprocess.run(["umount", str(small)], check=True)  # noqa: S607


def closed(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A workspace without the right to write (as a user who is not root), and EIO from the n-th write on."""
    for number in range(count):
        root = bench.fresh()
        if number % 2 == 0 and os.geteuid() == 0:
            bench.folder.chmod(0o755)
            for path in (root, *root.rglob("*")):
                path.chmod(0o555 if path.is_dir() else 0o444)
            child = bench.learn(root, uid=NOBODY)
            problem = refused(child, "cannot write") or ("said trained" if "trained" in child.said else "")
            for path in (root, *root.rglob("*")):
                path.chmod(0o755 if path.is_dir() else 0o644)
        else:
            at = rng.randrange(1, 30)
            child = bench.learn(root, faults=[{"kind": "error", "errno": errno.EIO, "at": at}])
            problem = refused(child, "input/output error")
        yield problem or sound(root) or bench.resumed(root)
        shutil.rmtree(root)


def lineage(bench: Bench, root: Path) -> list[Path]:
    """The verified checkpoints of the trained lineage."""
    config, place = bench.config, Workspace(root)
    return lineage_folders(config, place, load_dataset(config, place), LAST)


def noticed(path: Path, look: Callable[[], object]) -> str:
    """ "" if `look` refuses the damaged file."""
    try:
        found = look()
    except UserError:
        return ""
    return "" if found else f"{path.name}: the damage went unnoticed"


def looks(bench: Bench, root: Path) -> dict[Path, Callable[[], object]]:
    """Each file that a run reads back, and the check it passes before it is believed."""
    config, place = bench.config, Workspace(root)
    first, folder = lineage(bench, root)
    test = next(iter(sorted(place.evaluations.glob("*single*.parquet"))))
    model = read_json(test.with_suffix(".json"))["model"]
    found: dict[Path, Callable[[], object]] = {
        folder / name: lambda: fault_of(folder) for name in (ADAPTER, ROWS, "state.json", "manifest.json")
    }
    found[first / BACKBONE] = lambda: fault_of(first)
    for path in (place.stage_file(1), place.catalogue / "items.parquet"):
        found[path] = lambda: load_dataset(config, place) is None
    found[place.log] = lambda: load_log(place) is None
    found[test] = lambda: _intact(test, test.with_suffix(".json"), model) is None
    for path in (place.stages, place.catalogue, place.log.parent):
        whole = read_json(path / "manifest.json")
        found[path / "manifest.json"] = lambda path=path, whole=whole: (
            read_json(path / "manifest.json") == whole and "the flip was in the seal's name: nothing was altered"
        )
    return found


def rotten(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """`count` single flipped bits in each kind of file; every 50th workspace is then run again."""
    root = bench.place()
    shutil.copytree(bench.learned.root, root)
    for path, look in looks(bench, root).items():
        content = path.read_bytes()
        for number in range(count):
            flipped(path, rng)
            problem = noticed(path, look)
            for aside in (root / "runs").glob("quarantine/*"):
                aside.unlink()
            if not problem and number % 50 == 49 and path.is_relative_to(root / "runs"):
                path.parent.mkdir(exist_ok=True)
                if not path.exists():
                    path.write_bytes(b"rot")
                problem = bench.resumed(root)
                shutil.rmtree(root)
                shutil.copytree(bench.learned.root, root)
            path.write_bytes(content)
            yield problem


def cut(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A file of a checkpoint truncated, emptied, missing, or one too many: set aside, and trained again."""
    for number in range(count):
        root = bench.place()
        shutil.copytree(bench.learned.root, root)
        folder = lineage(bench, root)[number % 2]
        path = rng.choice(sorted(folder.iterdir()))
        if number % 4 == 0:
            os.truncate(path, rng.randrange(path.stat().st_size))
        elif number % 4 == 1:
            path.write_bytes(b"")
        elif number % 4 == 2:
            path.unlink()
        else:
            (folder / "pytorch_model.bin").write_bytes(b"x")
        if fault_of(folder) is None:
            yield f"{path.name}: the damage went unnoticed"
            continue
        problem = bench.resumed(root)
        reasons = list((root / "runs" / "quarantine").glob("*.reason.txt"))
        yield problem or ("" if reasons else "no reason was written")
        shutil.rmtree(root)


def swapped(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """A whole, valid checkpoint of another seed, adapter, backbone or catalogue under this one's name."""
    tables = {
        "seed": {},
        "adapter": {"adapter": {"rank": 3}},
        "backbone": {"backbone": {"layers": 2}},
        "data": {"items": {"codes_per_level": 8}},
    }
    for name in list(tables)[: max(1, count)]:
        own = bench.config.model_dump(mode="json")
        for table, values in tables[name].items():
            own[table] |= values
        config = type(bench.config).model_validate(own)
        seed = 7 if name == "seed" else 0
        other = bench.fresh()
        if name == "data":
            from stages.items import build_semantic_ids

            shutil.rmtree(other / "catalogue" / "quantizer")
            build_semantic_ids(config, Workspace(other))
        if code := bench.learn(other, [("single", seed, "same_stage", 1)], config=config).end():
            yield f"the other training failed: {code}"
            continue
        source = next(iter(sorted(Workspace(other).checkpoints.glob("*first*"))))
        root = bench.place()
        shutil.copytree(bench.learned.root, root)
        target = lineage(bench, root)[0]
        shutil.rmtree(target)
        shutil.copytree(source, target)
        problem = user_error(lambda root=root: lineage(bench, root), name)
        yield problem or bench.resumed(root)
        shutil.rmtree(root)


def not_a_number(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """NaN or infinity in a stored tensor under a manifest that vouches for it."""
    for _ in range(count):
        root = bench.place()
        shutil.copytree(bench.learned.root, root)
        folder = lineage(bench, root)[1]
        name = rng.choice([ADAPTER, ROWS])
        tensors = load_file(folder / name)
        victim = tensors[rng.choice(sorted(tensors))]
        victim.view(-1)[rng.randrange(victim.numel())] = rng.choice([float("nan"), float("inf")])
        save_file(tensors, folder / name)
        (folder / "manifest.json").unlink()
        _write_manifest(folder)
        config, place = bench.config, Workspace(root)
        with torch.no_grad():
            yield user_error(
                lambda config=config, place=place: restore_model(config, place, load_dataset(config, place), LAST),
                "holds nan or infinity",
            )
        shutil.rmtree(root)


TABLE = (
    Row(6, "disk full", "E; older checkpoints whole; R once space is back", disk_full, 2, 30),
    Row(7, "workspace without write rights; EIO", "E; never reports saved", closed, 1, 20, "EIO is raised by a shim"),
    Row(8, "one bit flipped in any file read back", "all noticed; R", rotten, 2, 200, "no optimiser state is kept"),
    Row(9, "file truncated, empty, missing, added", "set aside; R", cut, 2, 40),
    Row(10, "checkpoint of another seed, adapter, backbone, catalogue", "named by the field; R", swapped, 1, 4),
    Row(17, "NaN or infinity in a stored tensor", "E at load", not_a_number, 2, 50),
)
