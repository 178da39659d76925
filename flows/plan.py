"""Which models a command trains and on which stages each is tested: decided here, once, before anything runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from stages.config import Config, Protocol
from stages.errors import UserError
from stages.jobs import BASELINES, SEARCH_BASELINES, Job
from stages.workspace import Workspace, digest_of


@dataclass(frozen=True)
class Lineage:
    """One method, seed and training protocol, through all its stages."""

    method: str
    seed: int
    protocol: Protocol

    def at(self, stage: int) -> Job:
        """The model of this lineage after `stage`."""
        return Job(self.method, self.seed, self.protocol, stage)


@dataclass(frozen=True)
class Plan:
    """A command's request, resolved against the config.

    Attributes:
        config: the settings; `evaluation.users` already holds a quick look's sample size.
        workspace: where everything goes.
        methods: names the config resolves, in the order of the tables.
        seeds: training seeds; the first one also fills R[i][j].
        limit: only the first so many stages, or all.
        comparison: baselines and R[i][j] belong to it; the last stage's next-stage model does not, nobody tests it.
        count: stages there are to work on; 0 until the log is split.
        searches: the log has searches that are used, so their baselines belong to it.
        command: what was asked for and which code answered, as the report repeats it.
        workers: processes that work on it together; no result depends on their number, only on the threads of each.
        profile: also write where the time of every stage's training goes; changes no result.
    """

    config: Config
    workspace: Workspace
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    limit: int | None = None
    comparison: bool = True
    count: int = 0
    searches: bool = False
    command: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    profile: bool = False

    def with_stages(self, available: int, searches: bool = False) -> Plan:
        """This plan for a log of `available` stages, with or without searches.

        Raises:
            UserError: fewer stages than asked for.
        """
        if self.limit is not None and not 1 <= self.limit <= available:
            raise UserError(f"--stages {self.limit}: the log has {available}; give a number from 1 to {available}")
        return replace(self, count=self.limit or available, searches=searches)

    def lineages(self) -> list[Lineage]:
        """Every trained lineage, seed by seed, so that a killed run leaves whole seeds behind."""
        return [
            Lineage(method, seed, protocol)
            for seed in self.seeds
            for method in self.methods
            for protocol in self.config.evaluation.protocols
        ]

    def baselines(self) -> Iterator[tuple[Job, int]]:
        """(model, tested stage) of every baseline cell; a baseline has no seed of its own and borrows the first."""
        for name in (name for name in BASELINES if self.searches or name not in SEARCH_BASELINES):
            for protocol in self.config.evaluation.protocols:
                lineage = Lineage(name, self.seeds[0], protocol)
                for stage in range(self.count):
                    yield from ((lineage.at(stage), tested) for tested in self.tested(lineage, stage))

    def trained(self, lineage: Lineage) -> range:
        """Stages this lineage is trained on."""
        untested = self.comparison and lineage.protocol == "next_stage"
        return range(self.count - 1 if untested else self.count)

    def tested(self, lineage: Lineage, stage: int) -> list[int]:
        """Stages whose tests the model after `stage` answers: its own, or the next one if there is one."""
        target = stage + (lineage.protocol == "next_stage")
        return [target] if target < self.count else []

    def matrix(self, lineage: Lineage) -> range:
        """Tested stages of this lineage's rows of R[i][j]; empty where the lineage has no part in it."""
        wanted = self.comparison and self.config.evaluation.matrix_users > 0
        first = lineage.seed == self.seeds[0] and lineage.protocol == "same_stage"
        return range(self.count if wanted and first else 0)

    def steps(self) -> int:
        """How many trainings, tests and rows of R[i][j] there are, for the progress bar."""
        total = sum(1 for _ in self.baselines()) if self.comparison else 0
        for lineage in self.lineages():
            stages = self.trained(lineage)
            total += len(stages) * (1 + bool(self.matrix(lineage)))
            total += sum(len(self.tested(lineage, stage)) for stage in stages)
        return total

    def key(self) -> str:
        """Names the report's folder: the same request gives the same folder, another one never overwrites it."""
        settings = self.config.model_dump(mode="json", exclude={"workspace", "compare", "seeds", "retrain", "analysis"})
        return digest_of([settings, self.methods, self.seeds, self.limit, self.comparison])[:12]
