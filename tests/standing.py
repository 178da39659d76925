"""A shop whose model in service stands or falls, retrained without Prefect and MLflow."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from benchmarks.growing import week, write_rows
from flows import retrain, retraining, steps
from flows.promotion import champion
from flows.recommending import recommend
from stages.workspace import Workspace

ANEW = "learning_rate = 5.0\n[evaluation]"
"""Put in place of `[evaluation]`, it has the champion trained anew, to other tensors."""


class Quietly:
    """The steps of a retraining without Prefect and MLflow."""

    take, grow, train, evaluate = retraining.take, retraining.grow, retraining.train, retraining.evaluate
    answers, decide = retraining.answers, retraining.decide
    mirror = staticmethod(lambda *_: None)


class Shop:
    """A shop's folder: its config, and the workspace that follows it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.config = folder, folder / "shop.toml"
        self.workspace = Workspace(folder / "workspace")

    def begin(self) -> Shop:
        """Have a first model at stage 1 and a promoted one at stage 2."""
        self.nightly()
        write_rows(self.folder / "events" / "week2.csv", week(2) + week(3)[:1])
        assert [line["decision"] for line in self.nightly()] == ["promoted"]
        return self

    def set(self, before: str, after: str) -> None:
        """Change the config."""
        text = self.config.read_text()
        assert before in text
        self.config.write_text(text.replace(before, after))

    def nightly(self) -> list[dict[str, Any]]:
        """Retrain; the new lines of the history."""
        plan = steps.claimed(retraining.retrain_plan(self.config, self.workspace.root))
        return retrain.work(plan, None, False, Quietly)[1]

    def listed(self) -> list[tuple[str, str, float]]:
        """What `recommend` answers."""
        return recommend(self.workspace.root, user="u03", k=5).rows

    @property
    def served(self) -> champion.Champion:
        """The model that champion.json names."""
        found = champion.in_service(self.workspace)
        assert found is not None
        return found

    @property
    def tensors(self) -> Path:
        """A file of the champion's."""
        return self.workspace.checkpoints / self.served.key / "adapter_model.safetensors"

    def damage(self) -> bytes:
        """Change one byte of it; the bytes it had."""
        before = self.tensors.read_bytes()
        self.tensors.write_bytes(before[:-1] + bytes([before[-1] ^ 1]))
        return before

    def copied(self, folder: Path) -> Shop:
        """A copy below `folder`, to be changed."""
        return Shop(shutil.copytree(self.folder, folder / "shop"))
