from __future__ import annotations

import errno
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from flows import cli, endings, environment
from flows.experiment import exclusive
from stages.errors import UserError
from stages.workspace import read_json, write_json

if TYPE_CHECKING:
    from conftest import Trained


@pytest.fixture(autouse=True)
def _leave_the_environment_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "set_defaults", lambda root=None: None)
    environment.RUNNING_IN.clear()
    monkeypatch.setattr(endings, "own_process", lambda: None)
    monkeypatch.setenv("DRIFTREC_LOG_FORMAT", "text")


def driftrec(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *words: object
) -> tuple[int, str, str]:
    """Run the command line in this process: exit code, output, error output."""
    monkeypatch.setattr(sys, "argv", ["driftrec", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        cli.main()
    captured = capsys.readouterr()
    code = end.value.code
    return code if isinstance(code, int) else 0, captured.out, captured.err


def test_help_answers_within_a_second_and_imports_nothing_heavy() -> None:
    heavy = ("torch", "polars", "prefect", "mlflow", "numpy", "pydantic", "matplotlib", "sklearn")
    script = f"import flows.cli, sys; sys.exit(sum(name in sys.modules for name in {heavy}))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run([sys.executable, "-m", "flows.cli", "--help"], capture_output=True, text=True, check=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    # Processor time: what the command costs, whatever else the machine is doing.
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1.0
    commands = ("demo", "ingest", "split", "train", "compare", "recommend", "report", "analyse", "resume", "doctor")
    for command in (*commands, "retrain", "rollback", "history", "serve-flows", "serve", "search", "ui"):
        assert re.search(rf"\b{command}\b", done.stdout)


def test_a_user_s_mistake_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    code, out, err = driftrec(monkeypatch, capsys, "compare", "--config", tmp_path / "none.toml")
    assert (code, out) == (2, "")
    assert err == f"driftrec: {tmp_path / 'none.toml'}: no such config file; see configs/ for examples\n"


def test_mistakes_are_told_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    for words, message in (
        (["--methods", "sinlge"], "did you mean 'single'"),
        (["--seeds", "0,x"], "--seeds 0,x: give whole numbers"),
    ):
        place = tmp_path / "untouched"
        code, _, err = driftrec(
            monkeypatch, capsys, "compare", "--config", trained.config, "--workspace", place, *words
        )
        assert code == 2
        assert message in err
        assert not place.exists()


@pytest.mark.parametrize(
    ("raised", "code", "words"),
    [
        (UserError("two\nlines"), 2, "driftrec: two lines\n"),
        (KeyboardInterrupt(), 130, "driftrec resume"),
        (OSError(errno.ENOSPC, "No space left on device", "/w/x"), 1, "/w/x: no space left"),
        (OSError(errno.EROFS, "Read-only file system", "/w/x"), 1, "read-only"),
        (RuntimeError("write failed: No space left on device (os error 28)"), 1, "no space left; free some"),
        (RuntimeError("(sqlite3.OperationalError) database or disk is full"), 1, "no space left; free some"),
        (OSError("disk is full"), 1, "no space left; free some"),
        (ValueError("boom"), 1, "ValueError: boom"),
    ],
)
def test_every_end_has_its_exit_code_and_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    raised: BaseException,
    code: int,
    words: str,
) -> None:
    def fail(*_: object) -> None:
        raise raised

    monkeypatch.setattr("flows.doctor.examine", fail)
    found, _, err = driftrec(monkeypatch, capsys, "doctor", "--workspace", tmp_path)
    assert found == code
    assert words in err
    assert err.count("\n") == 1


def test_a_defect_leaves_its_traceback_in_the_workspace(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def fail(*_: object) -> None:
        raise ZeroDivisionError("inside")

    monkeypatch.setattr("flows.doctor.examine", fail)
    for number in (1, 2):
        _, _, err = driftrec(monkeypatch, capsys, "doctor", "--workspace", tmp_path)
        assert str(tmp_path / f"crash-{number}.log") in err
    assert "Traceback" in (tmp_path / "crash-1.log").read_text()


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


def test_a_missing_source_is_one_line_without_a_traceback(tmp_path: Path) -> None:
    config = tmp_path / "x.toml"
    config.write_text('name = "x"\nworkspace = "unused"\n[[log.sources]]\npath = "missing.csv"\n')
    command = [sys.executable, "-m", "flows.cli", "compare", "-c", str(config), "-w", str(tmp_path / "w")]
    own = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=own)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if not re.match(r"\d\d:\d\d:\d\d ", line)]
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("driftrec: ")
    assert "missing.csv" in lines[0]


def test_a_workspace_in_use_keeps_its_config(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained
) -> None:
    root = trained.workspace.root
    before = (root / "config.json").read_bytes()
    other = trained.config.with_name("other.toml")
    other.write_text(trained.config.read_text().replace("bootstrap = 100", "bootstrap = 101"))
    with exclusive(trained.workspace):
        for command in ("compare", "train", "ingest", "split"):
            code, _, err = driftrec(monkeypatch, capsys, command, "-c", other, "-w", root)
            assert code == 2
            assert "in use by process" in err
    assert (root / "config.json").read_bytes() == before


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


def test_log_lines_may_be_json(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained, tmp_path: Path
) -> None:
    words = ("--log-format", "json", "ingest", "-c", trained.config, "-w", tmp_path / "w")
    _, _, err = driftrec(monkeypatch, capsys, *words)
    assert all(json.loads(line)["logger"].startswith("flows") for line in err.splitlines())
    assert err.count("\n") >= 3
    assert driftrec(monkeypatch, capsys, "--log-format", "xml", "doctor")[0] == 2


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
