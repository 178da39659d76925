from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.error import URLError
from urllib.request import Request, urlopen

import numpy as np
import pandas
import polars as pl
import pytest

from flows.recommending import recommend
from stages.config import load_config
from stages.dataset import load_dataset
from stages.errors import UserError
from stages.workspace import Workspace

if TYPE_CHECKING:
    from conftest import Trained

# MLflow warns of its own type hints, and of the missing ones that would spoil our signature.
pytestmark = pytest.mark.filterwarnings("ignore:.*type hint:UserWarning")


@pytest.fixture(scope="module")
def model(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    from flows.pyfunc import export_model

    return export_model(trained.workspace.root, tmp_path_factory.mktemp("exported") / "model")


def people(root: Path) -> tuple[list[str], list[str]]:
    """Two users and three items of the log."""
    users = pl.read_parquet(Workspace(root).stage_file(0))["user_id"].unique(maintain_order=True)
    return users[:2].to_list(), pl.read_parquet(Workspace(root).catalogue / "items.parquet")["item_id"][:3].to_list()


def test_the_exported_model_predicts_what_the_command_recommends(model: Path, trained: Trained) -> None:
    import mlflow.pyfunc

    root = trained.workspace.root
    (first, second), items = people(root)
    loaded = mlflow.pyfunc.load_model(str(model))
    asked = pandas.DataFrame({"user": [first, None, second, "nobody"], "history": [None, items, None, None]})
    found = loaded.predict(asked, params={"k": 5})
    plain = [recommend(root, user=first, k=5), recommend(root, history=items, k=5), recommend(root, user=second, k=5)]
    for answer, listing in zip(found.to_dict("records")[:3], plain, strict=True):
        assert list(zip(answer["item_ids"], answer["titles"], strict=True)) == [row[:2] for row in listing.rows]
        assert answer["scores"] == pytest.approx([row[2] for row in listing.rows], abs=1e-5)
        assert answer["method"] == listing.job.method
    assert found["method"][3] == "recent_popularity"
    assert len(loaded.predict(pandas.DataFrame({"user": [first]}))["item_ids"][0]) == 10
    with pytest.raises(UserError, match="from 1 to 20"):
        loaded.predict(pandas.DataFrame({"user": [first]}), params={"k": 21})
    with pytest.raises(UserError, match="neither user nor history"):
        loaded.predict(pandas.DataFrame({"user": [first, None]}))


def test_the_exported_model_holds_no_pickle_and_names_what_it_needs(model: Path, trained: Trained) -> None:
    # Another test may have loaded the model: Python then keeps its byte code beside the sources.
    names = {path.suffix for path in model.rglob("*") if path.is_file() and path.parent.name != "__pycache__"}
    assert names <= {"", ".py", ".txt", ".yaml", ".json", ".parquet", ".safetensors", ".css", ".js", ".html", ".toml"}
    needed = (model / "requirements.txt").read_text().splitlines()
    assert all("==" in line for line in needed)
    assert not any(line.startswith("driftrec") for line in needed)
    assert str(trained.workspace.root) not in (model / "MLmodel").read_text()


def test_the_exported_log_is_one_file_which_is_checked_when_it_is_read(
    model: Path, trained: Trained, tmp_path: Path
) -> None:
    part = Workspace(tmp_path / "part")
    shutil.copytree(model / "artifacts" / "workspace", part.root)
    assert sorted(path.name for path in part.stages.iterdir()) == ["events.parquet", "manifest.json"]
    config = load_config(trained.config)
    own, whole = (load_dataset(config, place) for place in (part, trained.workspace))
    assert own.stage_digests == whole.stage_digests
    for name in ("offsets", "items", "stages", "baskets"):
        assert np.array_equal(getattr(own.interactions, name), getattr(whole.interactions, name))
    (part.stages / "events.parquet").write_bytes((part.stages / "events.parquet").read_bytes() + b"?")
    with pytest.raises(UserError, match="not the file that its manifest names"):
        load_dataset(config, part)


def test_an_existing_folder_is_never_written_over(model: Path, trained: Trained) -> None:
    from flows.pyfunc import export_model

    with pytest.raises(UserError, match="exists already"):
        export_model(trained.workspace.root, model)


def test_exporting_leaves_nothing_of_it_in_the_process(trained: Trained, tmp_path: Path) -> None:
    from flows.pyfunc import RUN_BY_MLFLOW, export_model
    from stages import workspace

    before = set(sys.modules)
    export_model(trained.workspace.root, tmp_path / "model")
    assert not [name for name in set(sys.modules) - before if name.startswith(RUN_BY_MLFLOW)]
    known = [path for table in workspace._remembered for path in table]
    assert not [path for path in known if path.is_relative_to(tmp_path)]


@pytest.mark.slow
def test_mlflow_serves_the_exported_model(model: Path, trained: Trained) -> None:
    user = people(trained.workspace.root)[0][0]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    # From another folder and without the sources on the path: what the model needs lies in it.
    command = [sys.executable, "-m", "mlflow", "models", "serve", "-m", str(model), "-p", str(port)]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    # With --env-manager local MLflow starts the uvicorn that it finds on the path.
    environment["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{environment['PATH']}"
    words = ["--env-manager", "local", "--host", "127.0.0.1", "--workers", "1"]
    with subprocess.Popen([*command, *words], cwd=model.parent, env=environment) as process:
        try:
            answer = asked(f"http://127.0.0.1:{port}/invocations", {"dataframe_records": [{"user": user}]})
        finally:
            process.terminate()
    assert answer["predictions"][0]["item_ids"] == [row[0] for row in recommend(trained.workspace.root, user=user).rows]


def asked(address: str, body: Any) -> Any:
    limit = time.monotonic() + 240
    request = Request(address, json.dumps(body).encode(), {"content-type": "application/json"})
    while True:
        try:
            with urlopen(request) as answer:
                return json.load(answer)
        except URLError:
            assert time.monotonic() < limit, "the server never answered"
            time.sleep(1)
