"""The demo's log and configs, and the best score that its maker knows."""

from __future__ import annotations

import os
from pathlib import Path


def test_demo_writes_its_log_beside_its_config_and_knows_the_best_score(tmp_path: Path) -> None:
    from flows.demo import best_rows, best_scores, write_demo
    from flows.reporting.findings import HEADLINE
    from stages.config import StageConfig, load_config

    config = write_demo(tmp_path)
    loaded = load_config(config)
    assert loaded.name == "demo"
    assert [Path(source.path).exists() for source in loaded.log.sources] == [True]
    best = best_scores(tmp_path, ["next_stage", "same_stage"], ["recommendation"], [1, 2])
    assert best_scores(tmp_path, ["same_stage"], ["recommendation"], []) == {}
    assert list(best) == [("same_stage", "recommendation"), ("next_stage", "recommendation")]
    following = best["next_stage", "recommendation"]
    assert 0 < following["hit_at_1"] < following["hit_at_10"] < 1
    measured = [
        {"protocol": protocol, "objective": "recommendation", "stage": stage}
        for protocol in ("next_stage", "same_stage")
        for stage in (0, 1, 2, "mean")
    ]
    rows = best_rows(loaded, tmp_path, {"rows": measured})
    assert {(row["protocol"], row["metric"]): row["value"] for row in rows} == {
        (protocol, metric): scores[metric] for (protocol, _), scores in best.items() for metric in HEADLINE
    }
    searched = [{**row, "objective": "search"} for row in measured]
    assert best_rows(loaded, tmp_path, {"rows": [*measured, *searched]}) == []  # repeats are left out there
    assert best_rows(loaded, tmp_path / "elsewhere", {"rows": measured}) == []
    elsewhere = loaded.model_copy(update={"stages": StageConfig(instants=["2025-06-30T00:00:00Z"])})
    assert best_rows(elsewhere, tmp_path, {"rows": measured}) == []
    assert os.sep not in (tmp_path / "demo" / "demo.toml").read_text().split("[stages]")[0].split("[[log")[1]


def test_the_demo_with_searches_is_the_same_log_under_a_config_beside_it(tmp_path: Path) -> None:
    import polars as pl

    from flows.demo import WORKSPACES, best_scores, write_demo
    from stages.config import load_config
    from stages.log import read_log
    from stages.workspace import Workspace

    plain = write_demo(tmp_path)
    before = {path.name: path.read_bytes() for path in plain.parent.iterdir()}
    config = load_config(write_demo(tmp_path, searches=True))
    assert all((plain.parent / name).read_bytes() == content for name, content in before.items())
    assert Path(config.workspace) == WORKSPACES[True] != WORKSPACES[False] == Path(load_config(plain).workspace)
    assert "gems" in config.compare
    assert {"single", *config.compare} == set(config.compare)
    # The lines that turn the searches on are the only ones that differ.
    same = {"name", "workspace", "compare", "log", "search"}
    assert config.model_dump(exclude=same) == load_config(plain).model_dump(exclude=same)
    workspace = Workspace(tmp_path / "read")
    workspace.claim(config.name)
    read_log(config, workspace)
    kinds = pl.read_parquet(workspace.log)["event"].value_counts()
    assert dict(kinds.iter_rows())["search"] > 1000
    best = best_scores(tmp_path, ["next_stage"], ["recommendation", "search"], [1, 2])
    named, next_one = best["next_stage", "search"], best["next_stage", "recommendation"]
    assert next_one["hit_at_1"] + 0.1 < named["hit_at_1"] < named["hit_at_10"] <= 1
