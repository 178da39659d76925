"""Decisions are lines of the history first; MLflow and Prefect are given each of them, whatever came between."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from flows import mirror, retrain, retraining, stores, tracking
from flows.promotion import champion, copies, history
from stages.workspace import Workspace


class Killed(BaseException):
    """As sudden as a signal."""


def test_a_mirror_lacks_what_it_was_not_given(workspace: Workspace, monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in range(3):
        champion.keep(workspace, {"stage": stage}, None)
    assert [line["stage"] for line in copies.lacking(workspace, "mlflow")] == [0, 1, 2]
    assert [line["stage"] for line in copies.lacking(workspace, "prefect", known=2)] == [2]
    copies.note(workspace, "mlflow", 3)
    assert not copies.lacking(workspace, "mlflow")
    assert len(copies.lacking(workspace, "prefect")) == 3
    champion.keep(workspace, {"stage": 3}, None)
    assert [line["stage"] for line in copies.lacking(workspace, "mlflow")] == [3]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert len(copies.lacking(workspace, "mlflow")) == 4
    monkeypatch.undo()
    history.history_file(workspace).unlink()
    champion.keep(workspace, {"stage": 0}, None)
    copies.note(workspace, "prefect", 1)
    assert [line["stage"] for line in copies.lacking(workspace, "mlflow")] == [0], "it counted lines that are gone"


def test_a_decision_whose_recording_a_kill_prevented_is_recorded_by_the_next_run(workspace: Workspace) -> None:
    champion.keep(workspace, {"stage": 1}, None)
    given: list[Any] = []

    class Doing:
        take = grow = staticmethod(lambda *_: None)

        @staticmethod
        def mirror(_: Any, line: history.Entry) -> None:
            given.append(line["stage"])
            copies.note(workspace, "mlflow", copies.count(workspace))

    class Plan:
        pass

    plan: Any = Plan()
    plan.workspace = workspace
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(retraining, "outdated", lambda _: None)
        patched.setattr(retraining, "next_match", lambda _: None)
        for _ in range(2):
            retrain.work(plan, None, False, Doing)
    assert given == [1]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"given": {"mlflow": "2"}}'])
def test_a_count_that_rotted_is_counted_anew(
    workspace: Workspace, caplog: pytest.LogCaptureFixture, content: str
) -> None:
    for stage in range(3):
        champion.keep(workspace, {"stage": stage}, None)
    path = workspace.root / "runs" / copies.FILE
    copies.note(workspace, "mlflow", 2)
    whole = path.read_bytes()
    path.write_text(content)
    assert len(copies.lacking(workspace, "mlflow")) == 3
    assert len(copies.lacking(workspace, "prefect", known=2)) == 1
    assert "copies.json: not a" in caplog.text
    copies.note(workspace, "mlflow", 2)
    assert path.read_bytes() == whole
    assert [line["stage"] for line in copies.lacking(workspace, "mlflow")] == [2]


def test_a_decision_recorded_by_half_is_completed_and_not_repeated(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = {"stage": 1, "why": "it is no better", "challenger": None, "probe": {"p95_ms": 2.5}}
    champion.keep(workspace, line, None)

    def die(*_: Any, **__: Any) -> None:
        raise Killed

    with monkeypatch.context() as patched:
        patched.setattr(tracking.MlflowClient, "log_batch", die)
        stores.make(workspace)
        with pytest.raises(Killed):
            mirror._decided(workspace, "invented")
    client = tracking.MlflowClient(workspace.mlflow_uri)
    (half,) = decisions(client)
    assert (half.info.status, dict(half.data.metrics)) == ("RUNNING", {})
    for _ in range(2):
        retraining.mirrored(workspace, "invented", line)
    (whole,) = decisions(client)
    assert whole.info.run_id == half.info.run_id
    assert (whole.info.status, dict(whole.data.metrics)) == ("FINISHED", {"probe/p95_ms": 2.5})
    assert not copies.lacking(workspace, "mlflow")


def decisions(client: tracking.MlflowClient) -> list[Any]:
    found = client.get_experiment_by_name("invented")
    assert found is not None
    return list(client.search_runs([found.experiment_id], "tags.role = 'decision'"))


def test_a_database_whose_making_was_killed_is_made_by_the_next_run(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    final, made = workspace.root / "mlflow.db", list[Path]()

    class Store:
        def __init__(self, address: str) -> None:
            self.path = Path(address.removeprefix("sqlite:///"))

        def search_experiments(self, **_: Any) -> None:
            self.path.write_text("half")
            made.append(self.path)
            if len(made) == 1:
                raise Killed
            self.path.write_text("whole")

    monkeypatch.setattr(tracking, "MlflowClient", Store)
    with pytest.raises(Killed):
        stores.make(workspace)
    assert not final.exists()
    for _ in range(2):
        stores.make(workspace)
    assert (final.read_text(), len(made)) == ("whole", 2)
    assert not any(path.exists() for path in made)


def test_of_two_that_make_the_database_the_first_one_s_stands(
    workspace: Workspace, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Store:
        def __init__(self, address: str) -> None:
            self.path = Path(address.removeprefix("sqlite:///"))

        def search_experiments(self, **_: Any) -> None:
            self.path.write_text("second")
            (workspace.root / "mlflow.db").write_text("first")

    monkeypatch.setattr(tracking, "MlflowClient", Store)
    stores.make(workspace)
    assert (workspace.root / "mlflow.db").read_text() == "first"
    assert not list(workspace.root.glob(".tmp-*"))
