"""An experiment on the generated log, written where a test or benchmark wants it."""

from __future__ import annotations

from pathlib import Path

LOG = """
workspace = "unused"
seeds = [0]
[[log.sources]]
path = "events.csv"
time_unit = "s"
where = "event = 'recommendation'"
[[catalogue.sources]]
path = "catalogue.csv"
[stages]
instants = ["{boundary}"]
"""
TINY = """
[items]
dimensions = 8
codes_per_level = 16
[backbone]
hidden = 16
layers = 1
heads = 2
feed_forward = 32
precision = "float32"
"""
"""Tables with which a model trains in a second."""


def write_experiment(folder: Path, name: str, tables: str, users: int, items: int) -> Path:
    """Write a log of two stages (seed 0), its catalogue and `name`.toml; returns the config's path.

    Args:
        folder: where they go.
        name: of the experiment.
        tables: the config from [items] on.
        users: of the log.
        items: of the catalogue.
    """
    from stages.synthetic import boundaries, write_demo_log

    write_demo_log(folder, seed=0, users=users, items=items, stages=2)
    path = folder / f"{name}.toml"
    path.write_text(f'name = "{name}"' + LOG.format(boundary=boundaries(2)[0].isoformat()) + tables, encoding="utf-8")
    return path
