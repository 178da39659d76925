"""The commands on a trained workspace: what each prints, writes and leaves as it was."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows import cli
from stages.workspace import read_json, write_json
from tests.commanding import driftrec

if TYPE_CHECKING:
    from conftest import Trained

pytestmark = pytest.mark.usefixtures("environment_left_alone")


def test_recommend_lists_titles_and_scores_for_a_user_and_for_a_history(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained
) -> None:
    import polars as pl

    items = pl.read_parquet(trained.workspace.catalogue / "items.parquet")
    user = pl.read_parquet(trained.workspace.stage_file(0))["user_id"][0]
    code, out, _ = driftrec(
        monkeypatch, capsys, "recommend", "-w", trained.workspace.root, "-u", user, "-k", 4, "-m", "single"
    )
    assert code == 0
    assert "single, seed 0, after stage 1" in out
    listed = [item for item in items["item_id"] if re.search(rf"\b{item}\b", out)]
    assert len(listed) == 4
    assert all(items.filter(pl.col("item_id") == item)["title"][0] in out for item in listed)
    history = ",".join(items["item_id"][:2])
    for method in ("frozen", "item_graph"):
        code, out, _ = driftrec(
            monkeypatch, capsys, "recommend", "-w", trained.workspace.root, "--history", history, "-m", method
        )
        assert code == 0
        assert method in out


def test_unknown_users_items_methods_and_folders_are_answered_with_what_to_do(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    root = trained.workspace.root
    for words, message in (
        (["-w", root, "-u", "nobody at all"], "--history"),
        (["-w", root], "give --user"),
        (["-w", root, "--history", "i0001,i000x"], "'i000x'"),
        (["-w", root, "-u", "u", "--history", "i0001"], "--user u and --history exclude each other; give one"),
        (["-w", root, "-u", "u", "-m", "sinlge"], "did you mean 'single'"),
        (["-w", root, "-u", "u", "-m", "single", "--seed", "7"], "seed 7 is not trained"),
        (["-w", root, "-u", "u", "-k", "0"], "-k 0"),
        (["-w", tmp_path, "-u", "u"], "no driftrec workspace"),
    ):
        code, out, err = driftrec(monkeypatch, capsys, "recommend", *words)
        assert (code, out) == (2, "")
        assert message in err


def test_the_whole_history_reaches_the_model(monkeypatch: pytest.MonkeyPatch, trained: Trained) -> None:
    import numpy as np
    import polars as pl

    from flows.recommending import recommend
    from models.recommender import Recommendations

    seen: list[int] = []

    class Recorder:
        def recommend(self, histories: list[np.ndarray], k: int) -> Recommendations:
            seen.extend(len(history) for history in histories)
            nothing = np.full((1, k), -1)
            return Recommendations(nothing, nothing.astype(np.float32), nothing)

    monkeypatch.setattr("stages.evaluate.as_recommender", lambda *_: Recorder())
    items = pl.read_parquet(trained.workspace.catalogue / "items.parquet")["item_id"]
    # An item of long ago is not recommended again either, though the model reads only the last few.
    recommend(trained.workspace.root, history=list(items) * 2)
    assert seen == [2 * len(items)]


def test_ingest_and_split_print_counts_the_drift_table_and_the_picture(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    place = tmp_path / "w"
    code, out, err = driftrec(monkeypatch, capsys, "ingest", "-c", trained.config, "-w", place)
    assert code == 0
    assert (place / "logs" / "log.parquet").exists()
    assert re.search(r"log: \d+ events of 60 users", err)
    code, out, _ = driftrec(monkeypatch, capsys, "split", "-c", trained.config, "-w", place)
    assert code == 0
    for stage in read_json(place / "stages" / "manifest.json")["stages"]:
        assert f"{stage['events']:,}" in out
    picture = out.rsplit("picture: ", 1)[1].strip()
    assert Path(picture).read_bytes().startswith(b"\x89PNG")
    assert not (place / "prefect").exists()


def test_report_draws_the_page_anew_from_its_numbers(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.workspace.root, copy)
    page = copy / trained.report.relative_to(trained.workspace.root) / "report.html"
    page.unlink()
    code, out, _ = driftrec(monkeypatch, capsys, "report", "-w", copy)
    assert code == 0
    assert page.read_bytes() == (trained.report / "report.html").read_bytes()
    assert str(page) in out
    code, _, err = driftrec(monkeypatch, capsys, "report", "-w", copy, "--name", "../../etc")
    assert code == 2
    assert "no report" in err


def test_a_report_that_mlflow_does_not_hold_says_so(
    capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    copy = tmp_path / "w" / "runs" / "reports" / "a"
    copy.mkdir(parents=True)
    shutil.copyfile(trained.report / "report.json", copy / "report.json")
    cli._show(copy)
    out = capsys.readouterr().out
    assert f"not recorded in MLflow; `driftrec report --workspace {tmp_path / 'w'}` does it later" in out


def test_gc_lists_before_it_removes(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(trained.workspace.root, copy)
    superseded = copy / "runs" / "evaluations" / "of-another-report.parquet"
    superseded.write_bytes(b"x" * 2**20)
    code, out, _ = driftrec(monkeypatch, capsys, "gc", "-w", copy, "--dry-run")
    assert code == 0
    assert "of-another-report.parquet" in out
    assert "1 to remove, 1.0 MiB" in out
    assert superseded.exists()
    code, out, _ = driftrec(monkeypatch, capsys, "gc", "-w", copy)
    assert (code, superseded.exists()) == (0, False)
    assert "1 removed, 1.0 MiB" in out
    assert driftrec(monkeypatch, capsys, "report", "-w", copy)[0] == 0


def test_resume_repeats_the_last_command_and_marks_the_killed_run_as_crashed(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained
) -> None:
    from prefect.client.orchestration import get_client
    from prefect.states import Running

    from flows.compare import compare

    # What a kill leaves behind: a run that Prefect believes to be running, noted as the workspace's last.
    with get_client(sync_client=True) as client:
        killed = client.create_flow_run(compare, state=Running())
    stored = trained.workspace.root / "last_command.json"
    write_json(stored, {**read_json(stored), "flow_run": str(killed.id)}, seal=True)
    code, out, err = driftrec(monkeypatch, capsys, "resume", "-w", trained.workspace.root)
    assert code == 0, err
    assert str(trained.report) in out
    with get_client(sync_client=True) as client:
        state = client.read_flow_run(killed.id).state
    assert state is not None
    assert state.is_crashed()
