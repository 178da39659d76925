from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from benchmarks.generated import TINY, write_experiment
from benchmarks.growing import OPEN_GATE, load_config, opened, seconds, week, write_rows, write_shop
from flows import cli, endings, environment
from flows.environment import set_defaults
from flows.serving.guarding import Access
from stages.workspace import Workspace, write_json
from tests import nights
from tests.intake import WeeklyShop
from tests.nights import FourNights, ShopCopy
from tests.storefront import HERE, crown

if TYPE_CHECKING:
    from fastapi.testclient import TestClient

    from tests.standing import Shop

set_defaults()
os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Prefect's own folder stays out of the tests; the harness brings its own database.
os.environ.setdefault("PREFECT_HOME", tempfile.mkdtemp(prefix="driftrec-prefect-"))

STAGES = 4
METRICS = ("hit_at_10", "ndcg_at_10")
QUICK = """
[training]
first_epochs = 1
epochs = 1
[evaluation]
matrix_users = 10
bootstrap = 100
"""
STRENGTH = {
    "frozen": 0.030,
    "single": 0.046,
    "peso": 0.051,
    "popularity": 0.022,
    "recent_popularity": 0.026,
    "item_graph": 0.043,
}


@pytest.fixture(scope="session")
def prefect_server() -> Iterator[None]:
    """One temporary Prefect server and database for the whole test run."""
    from prefect.testing.utilities import prefect_test_harness

    with prefect_test_harness(server_startup_timeout=120):
        yield


@pytest.fixture
def environment_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command in this process leaves its variables, signals and umask alone; no earlier one's workspace is known."""
    monkeypatch.setattr(cli, "set_defaults", lambda root=None: None)
    environment.RUNNING_IN.clear()
    monkeypatch.setattr(endings, "own_process", lambda: None)
    monkeypatch.setenv("DRIFTREC_LOG_FORMAT", "text")


@dataclass(frozen=True)
class Trained:
    """A comparison that ran once for the whole test run; tests only read it."""

    workspace: Workspace
    config: Path
    report: Path
    state: str


@pytest.fixture(scope="session")
def trained(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> Trained:
    """The flow `compare` on a tiny generated log: two stages, two methods, one seed."""
    from flows.compare import compare

    folder = tmp_path_factory.mktemp("compared")
    config = write_tiny_experiment(folder / "source")
    state = compare(str(config), methods=["frozen", "single"], workspace=str(folder / "workspace"), return_state=True)
    return Trained(Workspace(folder / "workspace"), config, Path(state.result()), state.name)


@pytest.fixture
def shop(trained: Trained, tmp_path: Path) -> Path:
    """A copy of the trained workspace whose champion is `single`."""
    root = tmp_path / "shop"
    shutil.copytree(trained.workspace.root, root, ignore=shutil.ignore_patterns("prefect", "mlartifacts", "mlflow.db"))
    crown(root, "single")
    return root


@pytest.fixture
def client(shop: Path) -> Iterator[TestClient]:
    """The service over that workspace."""
    from fastapi.testclient import TestClient

    from flows.service import build_app
    from flows.serving.served import InService

    with TestClient(build_app(InService(shop), Access()), base_url=HERE, raise_server_exceptions=False) as found:
        yield found


def write_tiny_experiment(folder: Path) -> Path:
    """A generated log of two stages and a config whose models train in a second."""
    return write_experiment(folder, "tiny", TINY + QUICK, users=60, items=40)


@pytest.fixture(scope="session")
def two_weeks(tmp_path_factory: pytest.TempPathFactory) -> WeeklyShop:
    """A shop whose log grows week by week, cut into its first two; tests work on copies."""
    folder = tmp_path_factory.mktemp("shop") / "base"
    return *opened(folder), folder / "events"


@pytest.fixture
def weekly_shop(two_weeks: WeeklyShop, tmp_path: Path) -> WeeklyShop:
    """Such a shop of one's own."""
    folder = tmp_path / "shop"
    shutil.copytree(two_weeks[1].root.parent, folder)
    return load_config(folder / "shop.toml"), Workspace(folder / "workspace"), folder / "events"


@pytest.fixture(scope="session")
def four_nights(prefect_server: None, tmp_path_factory: pytest.TempPathFactory) -> FourNights:
    """Such a shop, retrained four times; tests only read it."""
    from flows.retrain import retrain

    folder = tmp_path_factory.mktemp("retrained")
    config, place = write_shop(folder, OPEN_GATE), folder / "workspace"

    def nightly() -> str:
        return retrain(str(config), workspace=str(place))

    said = [nightly(), nightly()]
    write_rows(folder / "events" / "week2.csv", week(2) + week(3)[:1])
    said.append(nightly())
    config.write_text(config.read_text().replace("minimum = -1", "minimum = 1"))
    write_rows(folder / "events" / "week3.csv", [*week(3), ("u00", "i01", seconds(28))])
    said.append(nightly())
    return config, Workspace(place), said


@pytest.fixture
def own_nights(four_nights: FourNights, tmp_path: Path) -> ShopCopy:
    """A copy of it, to be changed."""
    config, workspace, _ = four_nights
    shutil.copytree(config.parent, tmp_path / "shop")
    return tmp_path / "shop" / config.name, Workspace(tmp_path / "shop" / workspace.root.name)


@pytest.fixture(scope="session")
def promoted_shop(tmp_path_factory: pytest.TempPathFactory) -> Shop:
    """Such a shop with a first model at stage 1 and a promoted one at stage 2; tests work on copies."""
    from tests.standing import Shop

    folder = tmp_path_factory.mktemp("standing")
    write_shop(folder, OPEN_GATE)
    return Shop(folder).begin()


@pytest.fixture
def driftrec(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    """The command line in this process, without Prefect and MLflow: exit code, output, error output."""
    from flows import retraining

    monkeypatch.setenv("DRIFTREC_PREFECT", "off")
    monkeypatch.setattr(retraining, "mirrored", lambda *_: None)
    return partial(nights.driftrec, monkeypatch, capsys)


@pytest.fixture
def workspace(tmp_path: Path) -> Workspace:
    """An empty workspace in a temporary folder."""
    found = Workspace(tmp_path / "workspace")
    found.claim("invented")
    return found


@pytest.fixture
def space(workspace: Workspace) -> Workspace:
    """The same with three stages and a catalogue, known by their manifests alone."""
    stages = [{"index": number} for number in range(3)]
    write_json(workspace.stages / "manifest.json", {"schema": 1, "stages": stages, "digest": "s", "log_digest": "l"})
    write_json(workspace.catalogue / "manifest.json", {"schema": 1, "digest": "c", "source": "shipped"})
    return workspace


@pytest.fixture
def invented_report() -> dict[str, Any]:
    """A small report whose numbers are invented: three methods, three baselines, four stages, two seeds."""
    return invent_report()


def invent_report() -> dict[str, Any]:
    rng = np.random.default_rng(7)
    return {
        "schema": 1,
        "name": "invented",
        "rows": _rows(rng),
        "differences": _differences(),
        "matrix": _matrix(),
        "continual": [
            {"method": method, "seed": 0, "metric": metric, "value": value}
            for method in ("frozen", "single", "peso")
            for metric, value in (
                ("next_perf", STRENGTH[method]),
                ("learning_accuracy", STRENGTH[method] * 1.1),
                ("bwt", -0.012 if method == "single" else -0.004),
                ("forgetting", 0.013),
                ("fwt", None),
                ("retained_accuracy", 0.04),
                ("harmonic", 0.041),
            )
        ],
        "costs": [
            {
                "method": method,
                "seed": seed,
                "protocol": "same_stage",
                "stage": stage,
                "train_seconds": (30.0 if stage == 0 else 8.0) * (method != "frozen"),
                "trained_parameters": 0 if method == "frozen" else 412_000,
                "bytes": 20_000 if method == "frozen" else 1_650_000,
                "peak_memory_bytes": 900_000_000,
                "queries_per_second": 180.0,
                "targets": 5000,
            }
            for method in ("frozen", "single", "peso")
            for seed in (0, 1)
            for stage in range(STAGES)
        ],
        "stages": [
            {
                "index": stage,
                "start": f"2024-0{stage + 1}-01T00:00:00+00:00",
                "end": f"2024-0{stage + 2}-01T00:00:00+00:00",
                "events": 6000 if stage == 0 else 1000,
                "users": 400,
                "new_users": 400 if stage == 0 else 30,
                "returning_users": 0 if stage == 0 else 370,
                "items": 300,
                "new_items": 300 if stage == 0 else 20,
                "digest": f"{stage:064x}",
                "sha256": f"{stage:064x}",
                "path": f"stages/stage={stage:02d}/events.parquet",
            }
            for stage in range(STAGES)
        ],
        "oracle": [
            {"protocol": protocol, "stage": stage, "value": 0.93}
            for protocol in ("same_stage", "next_stage")
            for stage in range(1, STAGES)
        ],
        "invalid_rate": 0.0,
        "wall_seconds": {"training": 300.0, "testing": 120.0},
        "command": {
            "config": "../invented.toml",
            "methods": ["frozen", "single", "peso"],
            "seeds": [0, 1],
            "stages": None,
            "users": None,
            "git_sha": "d" * 40,
        },
        "settings": {"single": {"method": "kind", "strength": 0.5}},
        "config": {"name": "invented", "evaluation": {"matrix_users": 300}},
        "digests": {"log": "a" * 64, "stages": "b" * 64, "catalogue": "c" * 64},
        "versions": {"driftrec": "0.1.0", "torch": "2.13.0"},
        "machine": {"cores": 2},
        "sampled_users": None,
        "beam": 20,
        "target_rule": "all baskets of the stage, rolling history",
        "collisions": {"shared_ids": 3, "items_sharing": 7, "largest_group": 3},
        "catalogue_known_in_advance": True,
        "notes": ["invented numbers"],
    }


def _rows(rng: np.random.Generator) -> list[dict[str, Any]]:
    rows = []
    for method, base in STRENGTH.items():
        for seed in (None, 0, 1):
            if seed == 1 and "pop" in method:
                continue
            for protocol in ("same_stage", "next_stage"):
                for stage in (*range(STAGES), "mean"):
                    if protocol == "next_stage" and stage == 0:
                        continue
                    for part, share in (("all", 1.0), ("new_item", 0.2), ("new_user", 0.6), ("returning_user", 1.1)):
                        for metric in METRICS:
                            scale = share * (0.5 if metric.startswith("ndcg") else 1.0)
                            noise = 0.0 if stage == "mean" else float(rng.normal(0, 0.004))
                            value = max(0.0, scale * (base * (1.1 if protocol == "same_stage" else 1.0) + noise))
                            users = 0 if part == "new_user" and stage == 3 else int(1200 * share)
                            rows.append(
                                {
                                    "method": method,
                                    "seed": seed,
                                    "stage": stage,
                                    "protocol": protocol,
                                    "objective": "recommendation",
                                    "slice": part,
                                    "metric": metric,
                                    "value": value if users else None,
                                    "low": max(0.0, value - 0.006) if users else None,
                                    "high": value + 0.006 if users else None,
                                    "users": users,
                                }
                            )
    return rows


def _differences() -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "reference": "single",
            "stage": "mean",
            "protocol": protocol,
            "objective": "recommendation",
            "slice": "all",
            "metric": metric,
            "value": STRENGTH[method] - STRENGTH["single"],
            "low": STRENGTH[method] - STRENGTH["single"] - 0.004,
            "high": STRENGTH[method] - STRENGTH["single"] + 0.004,
            "p_holm": 0.012 if method != "peso" else 0.2,
            "users": 1200,
            "seeds": 2,
        }
        for method in STRENGTH
        if method != "single"
        for protocol in ("same_stage", "next_stage")
        for metric in METRICS
    ]


def _matrix() -> list[dict[str, Any]]:
    return [
        {
            "method": method,
            "seed": 0,
            "protocol": "same_stage",
            "metric": "hit_at_10",
            "trained": i,
            "tested": j,
            "value": STRENGTH[method] * math.exp(-0.3 * abs(i - j)),
            "users": 300,
        }
        for method in ("frozen", "single", "peso")
        for i in range(STAGES)
        for j in range(STAGES)
    ]
