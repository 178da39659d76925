"""Rows 6, 7, 9, 10 and 17: disks that are full or closed, and checkpoints that are not what they seem."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from benchmarks.faults.harness import Bench, Child, Row, refused, sound, user_error
from stages.checkpoint import ADAPTER, ROWS, _write_manifest, fault_of
from stages.commit import links
from stages.config import Config
from stages.dataset import load_dataset
from stages.jobs import Job
from stages.train import lineage_folders, restore_model
from stages.workspace import Workspace

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
            problem = refused(child, "input/output error") or promised(root, child)
        yield problem or sound(root) or bench.resumed(root)
        shutil.rmtree(root)


def promised(root: Path, child: Child) -> str:
    """ "" if every stage that the child called trained is there and whole, and it said no more than that."""
    said = [line.split()[-1] for line in child.said.splitlines() if line.startswith("trained ")]
    names = [folder.name for folder in Workspace(root).checkpoints.glob("[!.]*") if fault_of(folder) is None]
    lost = [key for key in said if not any(name == key for name in names)]
    if lost:
        return f"said to be trained, and not there: {lost[0]}"
    return "said to be saved" if "saved" in child.said.replace("nothing was saved", "") else ""


def lineage(bench: Bench, root: Path) -> list[Path]:
    """The verified checkpoints of the trained lineage."""
    config, place = bench.config, Workspace(root)
    return lineage_folders(config, place, load_dataset(config, place), LAST)


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
    """A whole, valid checkpoint of another seed, adapter, backbone or catalogue under this one's name, and one whose
    pretrained backbone has other weights or another tokenizer since."""
    tables = {
        "seed": {},
        "adapter": {"adapter": {"rank": 3}},
        "backbone": {"backbone": {"layers": 2}},
        "data": {"items": {"codes_per_level": 8}},
    }
    for name in list(tables)[: max(1, count)]:
        config = changed(bench.config, tables[name])
        other = bench.fresh()
        if name == "data":
            from stages.items import build_semantic_ids

            shutil.rmtree(other / "catalogue" / "quantizer")
            build_semantic_ids(config, Workspace(other))
        seed = 7 if name == "seed" else 0
        yield put_under(bench, bench.config, config, other, seed, bench.learned.root, name)
    pretrained = llama(bench.place())
    own = changed(bench.config, {"backbone": {"path": str(pretrained)}})
    trained = bench.fresh()
    if code := bench.learn(trained, [("single", 0, "same_stage", 1)], config=own).end():
        yield f"the training on a pretrained backbone failed: {code}"
        return
    for part in ("tokenizer.json", "model.safetensors")[: max(1, count)]:
        yield other_base(bench, own, trained, pretrained, part)


def changed(config: Config, tables: dict[str, dict[str, Any]]) -> Config:
    """The settings with other values in some tables."""
    own = config.model_dump(mode="json")
    for table, values in tables.items():
        own[table] |= values
    return type(config).model_validate(own)


def llama(folder: Path) -> Path:
    """A pretrained backbone of 10,000 weights, with a file of its tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=50, bos_token_id=1, **shape)).save_pretrained(folder)
    (folder / "tokenizer.json").write_text("{}", encoding="utf-8")
    return folder


def other_base(bench: Bench, own: Config, trained: Path, pretrained: Path, part: str) -> str:
    """A file of the pretrained backbone is swapped: the checkpoint trained on the first is no longer this one's."""
    before = (pretrained / part).read_bytes()
    if part == "model.safetensors":
        save_file({name: value + 1 for name, value in load_file(pretrained / part).items()}, pretrained / part)
    else:
        (pretrained / part).write_text('{"version": "2"}', encoding="utf-8")
    try:
        keys = [link.key for link in links(own, load_dataset(own, Workspace(trained)), LAST)]
        if any((folder.name.endswith(keys[-1][:16])) for folder in Workspace(trained).checkpoints.iterdir()):
            return f"{part}: the checkpoint of the other counts as this one's"
        # Under this one's name it is refused by what it says of itself.
        root = bench.place()
        shutil.copytree(trained, root)
        for folder, key in zip(sorted(Workspace(root).checkpoints.iterdir()), keys, strict=True):
            folder.rename(folder.with_name(f"{folder.name.rpartition('-')[0]}-{key[:16]}"))
        return user_error(
            lambda: lineage_folders(own, Workspace(root), load_dataset(own, Workspace(root)), LAST), "weights"
        )
    finally:
        (pretrained / part).write_bytes(before)


def put_under(bench: Bench, own: Config, config: Config, other: Path, seed: int, trained: Path, name: str) -> str:
    """Train with other settings, and put what came out in the place of a checkpoint of one's own."""
    if code := bench.learn(other, [("single", seed, "same_stage", 1)], config=config).end():
        return f"the other training failed: {code}"
    source = next(iter(sorted(Workspace(other).checkpoints.glob("*first*"))))
    root = bench.place()
    shutil.copytree(trained, root)
    place = Workspace(root)
    target = lineage_folders(own, place, load_dataset(own, place), LAST)[0]
    shutil.rmtree(target)
    shutil.copytree(source, target)
    problem = user_error(lambda: lineage_folders(own, place, load_dataset(own, place), LAST), name)
    problem = problem or bench.resumed(root)
    shutil.rmtree(root)
    return problem


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
    Row(9, "file truncated, empty, missing, added", "set aside; R", cut, 2, 40),
    Row(
        10,
        "checkpoint of another seed, adapter, backbone, catalogue; base weights or tokenizer swapped",
        "named by the field; R",
        swapped,
        1,
        4,
    ),
    Row(17, "NaN or infinity in a stored tensor", "E at load", not_a_number, 2, 50),
)
