"""Everything training and evaluation read: events, catalogue, and the digests that name them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path

from stages.config import Config
from stages.errors import UserError
from stages.file_time import at_files
from stages.interactions import Catalogue, Interactions, load_catalogue, load_interactions
from stages.search_config import Objective
from stages.workspace import Workspace, digest_of, read_json, sha256_once


@dataclass(frozen=True)
class Dataset:
    """The prepared log.

    Attributes:
        interactions: events of all stages.
        catalogue: items with their codes.
        stage_digests: content digest of each stage, in order.
    """

    interactions: Interactions
    catalogue: Catalogue
    stage_digests: tuple[str, ...]
    _digests: dict[int, str] = field(default_factory=dict, init=False, repr=False, compare=False)

    @property
    def stages(self) -> int:
        """How many stages the log was cut into."""
        return len(self.stage_digests)

    def digest(self, stage: int) -> str:
        """Names all that is known by the end of `stage`: its and earlier events, and the codes of the items in them."""
        if stage not in self._digests:
            self._digests[stage] = self._digest(stage)
        return self._digests[stage]

    def _digest(self, stage: int) -> str:
        known = self.catalogue.known(stage)
        items = hashlib.sha256("\0".join(self.catalogue.item_ids[:known]).encode())
        items.update(self.catalogue.codes[:known].tobytes())
        return digest_of([self.stage_digests[: stage + 1], items.hexdigest(), list(self.catalogue.sizes)])


@at_files()
def load_dataset(config: Config, workspace: Workspace) -> Dataset:
    """Read what `split` and `build_semantic_ids` left in the workspace.

    A file that may have changed is hashed at every call, and all are parsed again only where one is another than at the
    last call: the trainings and tests of a run share one copy.

    Raises:
        UserError: they have not run, or a file is not the one its manifest names.
    """
    stages = read_json(workspace.stages / "manifest.json")["stages"]
    items = read_json(workspace.catalogue / "manifest.json")
    named = {workspace.catalogue / "items.parquet": items["digest"]}
    named |= {workspace.stage_file(index): row.get("sha256") for index, row in enumerate(stages)}
    content = digest_of([items, stages, [_checked(path, digest) for path, digest in named.items()]])
    digests = tuple(stage["digest"] for stage in stages)
    return _parsed(workspace.root.resolve(), content, digests, config.evaluation.baskets, config.search.objectives)


def _checked(path: Path, digest: str | None) -> str:
    """SHA-256 of a file: Parquet reads a flipped bit without complaint more often than not."""
    found = sha256_once(path) if path.is_file() else None
    if found is None or (digest is not None and found != digest):
        raise UserError(f"{path}: missing, or not the file that its manifest names; run the same command again")
    return found


@lru_cache(maxsize=1)
def _parsed(
    root: Path, content: str, digests: tuple[str, ...], baskets: bool, objectives: tuple[Objective, ...] | None
) -> Dataset:
    """The files of `root`, whose bytes `content` names; nobody writes to what it returns."""
    workspace = Workspace(root)
    return Dataset(load_interactions(workspace, baskets, objectives), load_catalogue(workspace), digests)
