"""Everything training and evaluation read: events, catalogue, and the digests that name them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from stages.config import Config
from stages.errors import UserError
from stages.interactions import Catalogue, Interactions, load_catalogue, load_interactions
from stages.workspace import Workspace, digest_of, read_json, sha256_file


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

    @property
    def stages(self) -> int:
        """How many stages the log was cut into."""
        return len(self.stage_digests)

    def digest(self, stage: int) -> str:
        """Names all that is known by the end of `stage`: its and earlier events, and the codes of the items in them."""
        known = self.catalogue.known(stage)
        items = hashlib.sha256("\0".join(self.catalogue.item_ids[:known]).encode())
        items.update(self.catalogue.codes[:known].tobytes())
        return digest_of([self.stage_digests[: stage + 1], items.hexdigest(), list(self.catalogue.sizes)])


def load_dataset(config: Config, workspace: Workspace) -> Dataset:
    """Read what `split` and `build_semantic_ids` left in the workspace.

    Raises:
        UserError: they have not run, or a file is not the one its manifest names.
    """
    manifest = read_json(workspace.stages / "manifest.json")
    _check_files(workspace, manifest)
    return Dataset(
        interactions=load_interactions(workspace, config.evaluation.baskets, config.search.objectives),
        catalogue=load_catalogue(workspace),
        stage_digests=tuple(stage["digest"] for stage in manifest["stages"]),
    )


def _check_files(workspace: Workspace, stages: dict[str, Any]) -> None:
    """Parquet reads a flipped bit without complaint more often than not, so every file is hashed first."""
    items = read_json(workspace.catalogue / "manifest.json")
    expected = {workspace.catalogue / "items.parquet": items["digest"]}
    expected |= {workspace.stage_file(index): row.get("sha256") for index, row in enumerate(stages["stages"])}
    for path, digest in expected.items():
        if digest is not None and (not path.is_file() or sha256_file(path) != digest):
            raise UserError(f"{path}: missing, or not the file that its manifest names; run the same command again")
