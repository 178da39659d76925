"""Profiles: the same bytes as without one, every microsecond in one part, shares worked out by hand."""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils import deterministic

from flows import cli
from stages.checkpoint import tensors_digest
from stages.dataset import load_dataset
from stages.examples import Encoder, Windows
from stages.file_time import at_files, timed_files
from stages.jobs import Job
from stages.profiling import ASKED, REST, WATCHED, filling, profile_stage, shares
from stages.stage_examples import Examples, Part
from stages.train import train_stage
from stages.workspace import read_json
from tests import tiny
from tests.commanding import driftrec
from tests.conftest import Trained, write_tiny_experiment


def table(page: Path) -> dict[str, float]:
    """Percentages by part of the step."""
    rows = [line.split(" | ") for line in page.read_text(encoding="utf-8").splitlines() if line.startswith("| ")]
    return {cells[0].removeprefix("| "): float(cells[1].rstrip("%")) for cells in rows if cells[1].endswith("%")}


def test_a_profiled_stage_commits_the_same_bytes_and_says_where_its_time_went(tmp_path: Path) -> None:
    config = tiny.config()
    plain, watched = (tiny.checkerboard(tmp_path / name, stages=2) for name in ("plain", "watched"))
    job = Job("peso", 0, "next_stage", 1)
    told: list[int] = []
    expected = train_stage(config, plain, job)
    train_stage(config, watched, Job("peso", 0, "next_stage", 0))
    checkpoint, folder = profile_stage(config, watched, job, lambda news: told.append(news["step"]))
    assert folder is not None
    assert checkpoint.key == expected.key
    assert tensors_digest(watched.checkpoints / checkpoint.key) == tensors_digest(plain.checkpoints / expected.key)
    assert told == list(range(1, 21))
    assert folder == watched.root / "runs" / "profiles" / checkpoint.key
    assert json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    parts = table(folder / "summary.md")
    wanted = {
        "attention",
        "feed-forward",
        "head",
        "embedding",
        "adapter",
        "penalty",
        "masking",
        "clipping",
        "optimiser",
        "batches",
    }
    assert wanted <= parts.keys()
    assert sum(parts.values()) == pytest.approx(100, abs=1)
    page = (folder / "summary.md").read_text(encoding="utf-8")
    assert "peso, seed 0, next stage, stage 1" in page
    assert "- useful: " in page
    assert "- padding: " in page
    at_files = re.search(r"- I/O: ([\d.]+)% of them, ([\d.]+) s", page)
    assert at_files is not None
    assert 0 < float(at_files[1]) < 100


def test_making_the_mask_has_a_share_of_its_own_and_transformers_is_left_as_it_was(tmp_path: Path) -> None:
    from transformers.models.llama import modeling_llama

    before = modeling_llama.create_causal_mask
    workspace = tiny.checkerboard(tmp_path, stages=1)
    _, folder = profile_stage(tiny.config(), workspace, Job("single", 0, "same_stage", 0))
    assert folder is not None
    assert table(folder / "summary.md").keys() >= set(ASKED)
    events = json.loads((folder / "trace.json").read_text(encoding="utf-8"))["traceEvents"]
    assert sum(event.get("name") == "driftrec/masking" and event["ph"] == "X" for event in events) >= WATCHED
    assert modeling_llama.create_causal_mask is before


def test_time_at_files_is_that_of_the_outermost_call_and_nothing_is_kept_unasked() -> None:
    @at_files()
    def inner() -> None:
        time.sleep(0.01)

    @at_files()
    def outer() -> None:
        inner()
        inner()

    outer()
    with timed_files() as seconds:
        outer()
        time.sleep(0.05)
        inner()
    inner()
    assert len(seconds) == 2
    assert seconds[0] >= 0.02
    assert seconds[1] >= 0.01


@pytest.mark.parametrize("command", ["train", "compare"])
def test_the_commands_hand_profile_on_and_say_where_the_pages_are(
    command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], trained: Trained
) -> None:
    asked: list[dict[str, Any]] = []

    def answered(name: str, config: Path, workspace: Path | None, arguments: dict[str, Any]) -> Path:
        asked.append({"name": name, **arguments})
        return trained.report

    monkeypatch.setattr(cli, "_flow", answered)
    words = ["driftrec", command, "-c", str(trained.config), "-w", str(trained.workspace.root), "--profile"]
    monkeypatch.setattr("sys.argv", words)
    with pytest.raises(SystemExit) as end:
        cli.main()
    assert not end.value.code
    assert asked[0]["profile"]
    assert "profiles: none" in capsys.readouterr().out


def test_a_profiled_comparison_works_alone_and_writes_a_page_for_every_stage_it_trains(
    prefect_server: None, tmp_path: Path
) -> None:
    from flows.compare import compare

    config = write_tiny_experiment(tmp_path / "source")
    longer = config.read_text(encoding="utf-8").replace("epochs = 1", "epochs = 10\nbatch_size = 8\npatience = 10", 1)
    config.write_text(longer.replace("\nepochs = 1", "\nepochs = 10"), encoding="utf-8")
    place = tmp_path / "workspace"
    report = Path(compare(str(config), methods=["single"], workspace=str(place), workers=2, profile=True))
    assert read_json(report / "report.json")["command"]["methods"] == ["single"]
    pages = sorted((place / "runs" / "profiles").glob("*/summary.md"))
    committed = [folder for folder in (place / "runs" / "checkpoints").iterdir() if (folder / "manifest.json").exists()]
    assert len(pages) == len(committed) >= 2
    assert all(table(page).keys() >= set(ASKED) and "- I/O: " in page.read_text(encoding="utf-8") for page in pages)
    assert not list((place / "runs").glob("helper-*.log"))


def test_a_stage_that_is_committed_already_has_nothing_to_watch(tmp_path: Path) -> None:
    workspace, job = tiny.checkerboard(tmp_path, stages=1), Job("single", 0, "same_stage", 0)
    done = train_stage(tiny.config(), workspace, job)
    assert profile_stage(tiny.config(), workspace, job)[0].key == done.key
    assert not (workspace.root / "runs" / "profiles").exists()


def test_compare_profiles_every_stage_that_it_trains_and_says_where(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setenv("DRIFTREC_PREFECT", "off")
    config, place = write_tiny_experiment(tmp_path / "source"), tmp_path / "workspace"
    config.write_text(config.read_text().replace("first_epochs = 1\nepochs = 1", "first_epochs = 9\nepochs = 9"))
    words = ["compare", "-c", config, "-w", place, "--methods", "single,frozen", "--workers", "2", "--profile"]
    code, said, _ = driftrec(monkeypatch, capsys, *words)
    assert code == 0
    assert f"profiles: {place / 'runs' / 'profiles'}" in said
    pages = sorted(path.parent.name for path in place.glob("runs/profiles/*/summary.md"))
    assert pages == sorted(folder.name for folder in place.glob("runs/checkpoints/*"))
    assert len(pages) == 3  # stage 0 of each protocol, and `single` at stage 1 of one; `frozen` trains nothing


def event(name: str, spent: float, parent: Any = None, number: int = -1, start: float = 0.0) -> Any:
    return SimpleNamespace(
        name=name,
        self_cpu_time_total=spent,
        cpu_parent=parent,
        sequence_nr=number,
        is_async=False,
        time_range=SimpleNamespace(start=start),
    )


def test_time_goes_to_the_innermost_range_and_backward_time_to_the_range_of_its_forward() -> None:
    outer = event("driftrec/attention", 1)
    inner = event("driftrec/adapter", 2, outer)
    backward = event("autograd::engine::evaluate_function: AddmmBackward0", 8, number=7, start=2)
    stray = event("autograd::engine::evaluate_function: AccumulateGrad", 64, start=3)
    found = shares(
        [
            outer,
            inner,
            event("aten::addmm", 4, inner, number=7, start=1),
            backward,
            event("aten::mm", 16, backward, start=2),
            event("Optimizer.step#AdamW.step", 32, start=4),
            stray,
            event("ProfilerStep#3", 128),
        ]
    )
    assert found == {REST: 128, "backward, unassigned": 64, "optimiser": 32, "adapter": 2 + 4 + 8 + 16, "attention": 1}


def test_useful_and_padded_tokens_of_two_windows_by_hand(tmp_path: Path) -> None:
    """Windows of 4 and 2 items of 3 codes in one batch: 2 x 12 tokens, 5 of them padding, 1 + 2 items are targets."""
    dataset = load_dataset(tiny.config(), tiny.checkerboard(tmp_path, stages=1, users=2, length=4))
    encoder = Encoder(dataset.interactions, dataset.catalogue)
    windows = Windows(start=np.array([0, 4]), first=np.array([3, 4]), end=np.array([4, 6]))
    examples = Examples({"recommendation": Part(encoder, windows, windows)}, levels=3, unseen_rows=0)
    together = filling(examples, size=2)
    assert (together.tokens, together.useful, together.padding) == (24, 9 / 24, 5 / 24)
    assert filling(examples, size=1).padding == 0
    assert filling(examples, size=2, micro=1) == filling(examples, size=2, most=12) == filling(examples, size=1)


def test_training_does_not_fill_new_memory_and_puts_that_setting_back(tmp_path: Path) -> None:
    seen: list[bool] = []
    own: Any = deterministic
    train_stage(
        tiny.config(),
        tiny.checkerboard(tmp_path, stages=1),
        Job("single", 0, "same_stage", 0),
        lambda _: seen.append(own.fill_uninitialized_memory and torch.are_deterministic_algorithms_enabled()),
    )
    assert seen
    assert not any(seen)
    assert own.fill_uninitialized_memory
