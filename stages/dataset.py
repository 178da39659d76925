"""Everything training and evaluation read: events, catalogue, and the digests that name them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from stages.config import Config
from stages.errors import UserError
from stages.file_time import at_files
from stages.interactions import Catalogue, Interactions, load_catalogue, load_interactions
from stages.search_config import Objective
from stages.stage_files import stage_files
from stages.workspace import (
    Stamp,
    Workspace,
    digest_of,
    is_settled,
    read_json,
    read_json_once,
    sha256_once,
    stamp_if_there,
)


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

    def note_of_codes(self, stage: int) -> dict[str, Any]:
        """What a checkpoint of `stage` notes of the codes: how many items had some by then, and a digest of those."""
        count = int(self.catalogue.coded[: self.catalogue.known(stage)].max(initial=-1)) + 1
        return {"items": count, "digest": self.catalogue.digest_of_codes(count)}

    def _digest(self, stage: int) -> str:
        known = self.catalogue.known(stage)
        items = hashlib.sha256("\0".join(self.catalogue.item_ids[:known]).encode())
        items.update(self.catalogue.codes[:known].tobytes())
        return digest_of([self.stage_digests[: stage + 1], items.hexdigest(), list(self.catalogue.sizes)])


@at_files()
def load_dataset(config: Config, workspace: Workspace, answering: bool = False) -> Dataset:
    """Read what `split` and `build_semantic_ids` left in the workspace.

    Files are hashed again where their stamps may hide a change, and all are parsed again only where one is another than
    at the last call: the trainings and tests of a run share one copy.

    Args:
        config: the experiment.
        workspace: where.
        answering: for a model that is there already; events of a stage whose items are still to be coded are left out.

    Raises:
        UserError: they have not run, a file is not the one its manifest names, or, unless `answering`, a stage was
            closed and its items have no codes yet.
    """
    dataset = _loaded(config, workspace)
    uncoded = dataset.interactions.uncoded
    if uncoded and not answering:
        raise UserError(
            f"{workspace.catalogue}: {uncoded:,} events are of items without a code, since a stage was closed and its "
            "items are still to be coded; run the command again that closed it"
        )
    return dataset


def _loaded(config: Config, workspace: Workspace) -> Dataset:
    wish = (workspace.root.resolve(), config.evaluation.baskets, config.search.objectives)
    last = _last[0] if _last and _last[0].wish == wish else None
    # The manifests say which files there are: where all of the last call are as they were then, so is the whole.
    if last is not None and last.stamps is not None and _stamps(last.files) == last.stamps:
        return last.dataset
    stages, catalogue = workspace.stages / "manifest.json", workspace.catalogue / "manifest.json"
    # Looked at before anything is read, so that a write meanwhile shows at the next call.
    manifests = _stamps((stages, catalogue))
    manifest = read_json_once(stages)
    rows, named = manifest["stages"], stage_files(workspace, manifest)
    files = (*named, workspace.catalogue / "items.parquet")
    stamps = manifests + _stamps(files)
    items = read_json(catalogue)
    named[workspace.catalogue / "items.parquet"] = items["digest"]
    content = digest_of([items, rows, [_checked(path, digest) for path, digest in named.items()]])
    if last is not None and last.content == content:
        dataset = last.dataset
    else:
        _last.clear()  # one copy at a time
        events = load_interactions(workspace, config.evaluation.baskets, config.search.objectives)
        dataset = Dataset(events, load_catalogue(workspace), tuple(row["digest"] for row in rows))
    settled = is_settled(*(stamp for stamp in stamps if stamp is not None))
    _last[:] = [_Parsed(wish, (stages, catalogue, *files), stamps if settled else None, content, dataset)]
    return dataset


@dataclass(frozen=True)
class _Parsed:
    """The last call.

    Attributes:
        wish: whose files it read, and how.
        files: those: both manifests, and what they name.
        stamps: of those files; None where a later write need not show in them.
        content: names their bytes.
        dataset: what it gave; nobody writes to it.
    """

    wish: tuple[Path, bool, tuple[Objective, ...] | None]
    files: tuple[Path, ...]
    stamps: tuple[Stamp | None, ...] | None
    content: str
    dataset: Dataset


_last: list[_Parsed] = []
"""At most one."""


def _stamps(paths: Sequence[Path]) -> tuple[Stamp | None, ...]:
    """Of each file; a missing one, which has none, is told of when it is read."""
    return tuple(map(stamp_if_there, paths))


def _checked(path: Path, digest: str | None) -> str:
    """SHA-256 of a file: Parquet reads a flipped bit without complaint more often than not."""
    found = sha256_once(path) if path.is_file() else None
    if found is None or (digest is not None and found != digest):
        raise UserError(f"{path}: missing, or not the file that its manifest names; run the same command again")
    return found
