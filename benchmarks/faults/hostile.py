"""Rows 35 to 38: paths, settings, model folders and weight files that mean harm."""

from __future__ import annotations

import json
import resource
import shutil
import socket
import struct
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from benchmarks.faults.harness import Bench, Row, refused, tree, user_error
from models.backbone import pretrained_backbone
from stages.checkpoint import ROWS, Tensors, read_tensors, write_checkpoint
from stages.config import AdapterConfig, load_config

NAMES = (
    "../x",
    "/etc/x",
    "~root",
    "x;rm -rf y",
    "a b",
    "latest/../..",
    "x" * 300,
    "Case",
    "nul\x00",
    "$(touch m)",
    ".",
)


def names(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Names of experiments, methods and reports that leave the workspace; links that lead out of it.

    What lies around the workspace, and where the links lead, is the same afterwards.
    """
    for _ in range(count):
        around = bench.place()
        around.mkdir()
        (around / "precious").write_text("x")
        before = tree(around)
        for name in NAMES:
            file = bench.place()
            file.write_text(bench.config_file.read_text().replace('name = "tiny"', f"name = {json.dumps(name)}"))
            yield user_error(lambda file=file: load_config(file), "name")
            file.write_text(bench.config_file.read_text() + f'\n[methods.{json.dumps(name)}]\nmethod = "single"\n')
            yield user_error(lambda file=file: load_config(file), "method")
        shutil.copytree(bench.learned.root, around / "w w")
        inside = tree(around)
        for name in ("../../../precious", "latest", str(around / "precious")):
            child = bench.launch(command=["report", "--name", name, "--workspace", str(around / "w w")])
            yield refused(child, "no report")
        yield "" if tree(around) == inside else "files outside of the workspace changed"
        yield links(bench, around / "w w")
        shutil.rmtree(around / "w w")
        yield "" if tree(around) == before else "files beside the workspace changed"
        link = bench.place()
        link.symlink_to("/proc/nowhere")
        yield refused(bench.command(["ingest"], link), "cannot write")


LINKS = (
    "runs/quarantine/old.0",
    "runs/checkpoints/.tmp-x-4194305-00000000",
    "stages/.next",
    "runs/evaluations/.tmp-x-4194305-00000000",
)
"""Places in a workspace that a run sweeps, or `driftrec gc` empties; no process has that number."""


def links(bench: Bench, root: Path) -> str:
    """ "" if a real folder outside, to which links in a workspace lead, is as it was after a run and `driftrec gc`."""
    outside = bench.place()
    (outside / "deep").mkdir(parents=True)
    for name in ("manifest.json", "deep/model.safetensors"):
        (outside / name).write_text("precious")
    before = tree(outside)
    for name in LINKS:
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).symlink_to(outside, target_is_directory=True)
    codes = [bench.command(words, root).end() for words in (["split"], ["gc"])] + [bench.learn(root).end()]
    if tree(outside) != before:
        return "a link was followed: files outside of the workspace changed"
    if any(codes):
        return f"exit codes {codes}"
    left = [name for name in LINKS if ".tmp-" in name and (root / name).is_symlink()]
    return f"{left[0]} was not swept" if left else ""


SETTINGS = {
    "[training]\nlearning_rate = nan": "learning_rate",
    "[training]\nlearning_rate = inf": "learning_rate",
    "[training]\nlearning_rate = -1.0": "learning_rate",
    "[training]\nepochs = -3": "epochs",
    "[adapter]\nrank = 0": "rank",
    "[adapter]\nalpha = nan": "alpha",
    "[adapter]\nrnak = 8": "rnak",
    "[evaluation]\nbeam = 0": "beam",
    "[training]\nepochs = 3\nepochs = 4": "toml",
    "x: !!python/object/apply:os.system ['touch marker']": "toml",
    "a = " + "[" * 100_000: "toml",
    "# " + "x" * 10_000_000: "",
}


def settings(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Config files with objects to build, bombs, ten megabytes, doubled and unknown keys, numbers that are none."""
    for _ in range(count):
        for text, word in SETTINGS.items():
            file = bench.place()
            base = "\n".join(line for line in bench.config_file.read_text().split("[training]")[0].splitlines() if line)
            file.write_text(f"{base}\n{text}\n")
            if word:
                yield user_error(lambda file=file: load_config(file), word)
            else:
                load_config(file)
                yield ""


class NoNetworkError(Exception):
    """Somebody opened a connection."""


def quiet_socket(*_: Any, **__: Any) -> None:
    """Stands in the place of a connection and refuses it."""
    raise NoNetworkError


def folder(place: Path, **keys: Any) -> Path:
    """A model folder with a plausible config and one small safetensors file."""
    place.mkdir()
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 16, "vocab_size": 8}
    config |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    (place / "config.json").write_text(json.dumps(config | keys))
    save_file({"model.norm.weight": torch.ones(16)}, place / "model.safetensors")
    return place


def value_error(place: Path, word: str) -> str:
    """ "" if the folder is refused with a sentence that holds `word`."""
    try:
        pretrained_backbone(str(place))
    except ValueError as error:
        return "" if word in str(error) else f"{word!r} is not in: {error}"
    return f"{word}: nothing was refused"


def models(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Pickles in place of weights, and keys of config.json that make the loader run or fetch code."""
    honest = socket.socket.connect
    socket.socket.connect = quiet_socket  # type: ignore[method-assign]
    try:
        for _ in range(count):
            marker = bench.place()
            # protocol 0 of `os.system("touch marker")`, written by hand: nothing here imports pickle
            payload = f"cos\nsystem\n(S'touch {marker}'\ntR.".encode()
            for name in ("pytorch_model.bin", "model.pt", "optimizer.pt"):
                place = folder(bench.place())
                (place / "model.safetensors").unlink()
                (place / name).write_bytes(payload)
                yield value_error(place, "safetensors")
            keys = {"auto_map": {"AutoModelForCausalLM": "evil--x.Y"}, "trust_remote_code": True}
            keys |= {"_attn_implementation_internal": "evil/kernel", "quantization_config": {"quant_method": "x"}}
            for key, value in keys.items():
                yield value_error(folder(bench.place(), **{key: value}), key)
                yield value_error(folder(bench.place(), nested=[{key: value}]), key)
            yield "a marker appeared" if marker.exists() else ""
    finally:
        socket.socket.connect = honest  # type: ignore[method-assign]


def header(place: Path, text: bytes, body: bytes = b"") -> Path:
    """A model folder whose weight file has this header and body."""
    found = folder(place)
    (found / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + body)
    return found


def weights(bench: Bench, count: int, rng: Random) -> Iterator[str]:
    """Weight files with a header of 100 MB, overlapping, gapped or impossible tensors, and of another type."""
    for _ in range(count):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        yield value_error(header(bench.place(), b" " * 100_000_000), "header of")
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        yield "" if grown < 300_000 else f"memory grew by {grown} kB"
        place = folder(bench.place())
        (place / "model.safetensors").write_bytes(struct.pack("<Q", 2**62) + b"{}")
        yield value_error(place, "truncated")
        one = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
        for other in (one, one | {"data_offsets": [4, 12]}, one | {"data_offsets": [16, 24]}):
            text = json.dumps({"a": one, "b": other}).encode()
            yield value_error(header(bench.place(), text, b"\0" * 24), "overlaps")
        text = json.dumps({"a": one | {"dtype": "PICKLE"}}).encode()
        yield value_error(header(bench.place(), text, b"\0" * 8), "unknown type")
        yield value_error(header(bench.place(), b"{" * 1000), "not a table")
        checkpoint = bench.place()
        rows = {"input_rows": torch.from_numpy(np.ones((2, 2))), "output_rows": torch.ones(2, 2)}
        write_checkpoint(checkpoint, Tensors(rows=rows), AdapterConfig(), {})
        yield user_error(lambda checkpoint=checkpoint: read_tensors(checkpoint), "float64")
        shutil.rmtree(checkpoint)
        save_file({"a": torch.ones(1)}, bench.place())
        yield "" if ROWS.endswith(".safetensors") else "tensors are not safetensors"


TABLE = (
    Row(35, "names and paths that leave the workspace", "E; the tree around it unchanged", names, 1, 3),
    Row(36, "hostile, huge, doubled, unknown or impossible settings", "E naming the key", settings, 1, 3),
    Row(37, "pickles and config keys that run code", "refused; no marker; no connection", models, 1, 5),
    Row(38, "weight files: huge header, overlaps, wrong types", "E; memory bounded", weights, 1, 5),
)
