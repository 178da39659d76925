"""The demo's generated log: written beside its config, and held against the best score anyone could reach."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import product
from pathlib import Path
from typing import Any

from flows.reporting.findings import HEADLINE
from stages.config import PROTOCOLS, Config, load_config
from stages.search_config import OBJECTIVES
from stages.workspace import replacing

SEED = 0
FOLDER = "demo"
WORKSPACES = {False: Path("workspace/demo"), True: Path("workspace/demo_searches")}
"""Where the demo goes unless it is told, without and with the searches of the log."""
SEARCHING = {
    "name": 'name = "demo_searches"',
    "workspace": f'workspace = "{WORKSPACES[True].as_posix()}"',
    "compare": 'compare = ["frozen", "single", "pcgrad", "gems"]',
    "where": None,
}
"""What the demo with searches has instead of a line of demo.toml; None: nothing."""
ASKING = """
[search]
# As in the demo without searches: the generator's best possible scores count items that a user has met before.
repeats = "ask"
"""


def write_demo(workspace: Path, searches: bool = False, seed: int = SEED) -> Path:
    """Write the demo's log, catalogue, truth and config to `workspace/demo`.

    Args:
        workspace: the folder of the run.
        searches: also train and test the log's searches; the log is the same, the config another file beside it.
        seed: of the log.

    Returns:
        The config's path; `driftrec compare --config` takes it too.
    """
    from stages.synthetic import write_demo_log

    folder = workspace / FOLDER
    write_demo_log(folder, seed)
    text = Path(__file__).with_name("demo.toml").read_text(encoding="utf-8")
    config = folder / ("searches.toml" if searches else "demo.toml")
    with replacing(config) as temporary:
        temporary.write_text(_with_searches(text) if searches else text, encoding="utf-8")
    load_config(config)
    return config


def best_scores(
    workspace: Path, protocols: list[str], objectives: list[str], stages: list[int]
) -> dict[tuple[str, str], dict[str, float]]:
    """What a model that knew the true distribution would score: (protocol, objective) -> metric -> mean over `stages`.

    Args:
        workspace: where `write_demo` wrote.
        protocols: of the report.
        objectives: of the report; events of other kinds are taken as left out of the log.
        stages: tested ones. Empty without any: the table's means leave stage 0 out.
    """
    import polars as pl

    from stages.synthetic import best_possible

    if not stages:
        return {}
    truth = pl.read_parquet(workspace / FOLDER / "truth.parquet")
    found = {}
    for protocol, objective in product(PROTOCOLS, OBJECTIVES):
        if {protocol, objective} <= {*protocols, *objectives}:
            by_stage = [best_possible(truth, protocol, stage, objectives, objective) for stage in stages]
            means = {name: sum(scores[name] for scores in by_stage) / len(by_stage) for name in by_stage[0]}
            found[protocol, objective] = means
    return found


def best_rows(config: Config, workspace: Path, report: Mapping[str, Any]) -> list[dict[str, Any]]:
    """`best_scores` as rows of a report; none where the log is not the demo's, or is cut or asked in another way.

    Args:
        config: the experiment.
        workspace: of the run.
        report: the contents of report.json so far.
    """
    folder = (workspace / FOLDER).resolve()
    if not (folder / "truth.parquet").exists() or not (folder / "demo.toml").exists():
        return []
    objectives = sorted({row["objective"] for row in report["rows"]})
    cut_alike = config.stages == load_config(folder / "demo.toml").stages
    asked_alike = config.search.repeats == "ask" or "search" not in objectives
    foreign = any(Path(source.path).resolve().parent != folder for source in config.log.sources)
    own_rules = config.evaluation.baskets or config.evaluation.exclude_history
    if foreign or own_rules or not (config.log.sources and cut_alike and asked_alike):
        return []
    stages = sorted({row["stage"] for row in report["rows"] if isinstance(row["stage"], int) and row["stage"] > 0})
    found = best_scores(workspace, sorted({row["protocol"] for row in report["rows"]}), objectives, stages)
    return [
        {"protocol": protocol, "objective": objective, "metric": metric, "value": scores[metric]}
        for (protocol, objective), scores in found.items()
        for metric in HEADLINE
        if math.isfinite(scores[metric])
    ]


def _with_searches(text: str) -> str:
    """The text of demo.toml with the lines of `SEARCHING` in place of its own."""
    lines = (SEARCHING.get(line.partition(" = ")[0], line) for line in text.splitlines())
    return "\n".join(line for line in lines if line is not None) + "\n" + ASKING
