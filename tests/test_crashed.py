"""What Prefect believes of a run that is alive does not end its work."""

from __future__ import annotations

from pathlib import Path
from typing import Any
from uuid import UUID

import pytest

import stages.train
from benchmarks.growing import OPEN_GATE, listing, write_shop
from flows import crashed, running
from flows.promotion import copies
from flows.promotion.history import read_history
from stages.workspace import Workspace


def state_of(run: str) -> str:
    from prefect.client.orchestration import get_client

    with get_client(sync_client=True) as client:
        found = client.read_flow_run(UUID(run)).state
    assert found is not None
    return found.type.value


@pytest.mark.slow
def test_a_run_that_prefect_was_told_has_crashed_ends_its_work_and_the_next_finds_nothing_to_do(
    prefect_server: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from prefect.runtime import flow_run

    place, told = Workspace(tmp_path / "workspace"), list[str]()
    arguments = {"config": str(write_shop(tmp_path, OPEN_GATE)), "workspace": str(place.root)}
    train = stages.train.train_stage

    def told_crashed(*given: Any, **more: Any) -> Any:
        if not told:
            told.append(str(flow_run.id))
            assert crashed.mark_crashed(told[0])
            assert state_of(told[0]) == "CRASHED"
        return train(*given, **more)

    monkeypatch.setattr(stages.train, "train_stage", told_crashed)
    assert "goes into service" in running.run("retrain", arguments)
    assert state_of(told[0]) == "COMPLETED"
    (line,) = read_history(place)[0]
    assert line["decision"] == "first"
    assert copies.lacking(place, "mlflow") == copies.lacking(place, "prefect") == []
    kept = ("stages", "open", "catalogue", "history", "champion.json", "runs")
    before = {name: digest for name, digest in listing(place.root).items() if name.startswith(kept)}
    assert "nothing to decide" in running.run("retrain", arguments)
    after = listing(place.root)
    assert {name: after.get(name) for name in before} == before
    assert len(told) == 1
