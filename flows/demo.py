"""The demo's generated log: written beside its config, and held against the best score anyone could reach."""

from __future__ import annotations

import shutil
from pathlib import Path

from stages.config import load_config
from stages.workspace import replacing

SEED = 0
FOLDER = "demo"


def write_demo(workspace: Path, seed: int = SEED) -> Path:
    """Write the demo's log, catalogue, truth and config to `workspace/demo`.

    Returns:
        The config's path; `driftrec compare --config` takes it too.
    """
    from stages.synthetic import write_demo_log

    folder = workspace / FOLDER
    write_demo_log(folder, seed)
    config = folder / "demo.toml"
    with replacing(config) as temporary:
        shutil.copyfile(Path(__file__).with_name("demo.toml"), temporary)
    load_config(config)
    return config


def best_scores(workspace: Path, protocols: list[str], stages: list[int]) -> dict[str, dict[str, float]]:
    """What a model that knew the true distribution would score: protocol -> metric -> mean over `stages`.

    Empty without stages: the table's means leave stage 0 out.
    """
    import polars as pl

    from stages.synthetic import best_possible

    if not stages:
        return {}
    truth = pl.read_parquet(workspace / FOLDER / "truth.parquet")
    found = {}
    for protocol in protocols:
        by_stage = [best_possible(truth, protocol, stage) for stage in stages]  # pyright: ignore[reportArgumentType]
        found[protocol] = {name: sum(scores[name] for scores in by_stage) / len(by_stage) for name in by_stage[0]}
    return found
