"""A trained model as it lies on disk: as the settings give it, or by its checkpoint's name whatever they say by now.

A checkpoint notes what its key is the digest of (`stages.commit`): the settings it was trained under. So a model that
is named can be put together after the settings, the log's stages or this program's version moved on.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from stages.checkpoint import tensors_digest
from stages.commit import folders_of, lineage_jobs, links, weights_digest
from stages.config import Config, explain
from stages.dataset import Dataset
from stages.errors import UserError
from stages.jobs import Job, Pin
from stages.lineage import Parents, fault_in_files, fault_in_lineage, left_out
from stages.workspace import Workspace, digest_of, read_json

REMEDY = "run `driftrec retrain`, or the command that trained it, to train it again"


@dataclass(frozen=True)
class Stored:
    """A model's verified checkpoints, and how to put it together.

    Attributes:
        config: the experiment's, but with the settings that the model was trained under.
        method: who trained the last checkpoint; `first` where the model is stage 0's.
        key: of the last checkpoint, in full.
        folders: its checkpoints, stage 0 first; in an exported model some of them are not there.
        tensors: digest of the tensors of all of them.
        coded: how many items had codes when it was trained: it answers with no others; None: with all its stage knows.
    """

    config: Config
    method: str
    key: str
    folders: list[Path]
    tensors: str
    coded: int | None = None


def stored(config: Config, workspace: Workspace, dataset: Dataset, job: Job, pin: Pin | None = None) -> Stored:
    """`job`'s model: the one that `config` gives, or the one that `pin` names.

    Raises:
        UserError: a checkpoint is missing or damaged, or cannot be used with this log, catalogue, backbone or version.
    """
    if pin is not None:
        return _named(config, workspace, dataset, job, pin)
    chain = links(config, dataset, job)
    folders, parents = folders_of(config, workspace, job, chain), Parents()
    elsewhere = left_out(workspace.checkpoints)
    for folder, link in zip(folders, chain, strict=True):
        if folder.name in elsewhere:
            parents.note(folder.name, elsewhere[folder.name])
            continue
        if fault := fault_in_lineage(folder, link, parents):
            raise UserError(f"{folder}: {fault}; {REMEDY}")
        parents.add(folder)
    own = lineage_jobs(config, job)[-1].method
    return Stored(config, own, chain[-1].key, folders, digest_of(list(parents.tensors.values())))


def tensors_of(folder: Path) -> str:
    """Digest of the tensors of a committed checkpoint and of those it was trained from, as `Stored` has it.

    Raises:
        UserError: the checkpoint cannot be read.
    """
    before = _noted(folder, "parents", read_json(folder / "state.json"))
    return digest_of([*before.values(), tensors_digest(folder)])


def _named(config: Config, workspace: Workspace, dataset: Dataset, job: Job, pin: Pin) -> Stored:
    folder = workspace.checkpoint(pin.key)
    if fault := fault_in_files(folder):
        raise UserError(f"{folder}: {fault}; {REMEDY}")
    state = read_json(folder / "state.json")
    inputs, parents = (_noted(folder, field, state) for field in ("inputs", "parents"))
    key = digest_of(inputs)
    if not folder.name.endswith(f"-{key[:16]}"):
        raise UserError(f"{folder}: not the checkpoint that its name promises; {REMEDY}")
    elsewhere = left_out(workspace.checkpoints)
    for name, digest in parents.items():
        before = workspace.checkpoint(name)
        if fault := _fault_before(before, digest, elsewhere.get(name)):
            raise UserError(f"{before}: {fault}; {REMEDY}")
    tensors = digest_of([*parents.values(), tensors_digest(folder)])
    if pin.tensors not in (None, tensors):
        raise UserError(f"{folder}: its tensors are not those that went into service; {REMEDY}")
    folders = [*(workspace.checkpoint(name) for name in parents), folder]
    coded = _coded(dataset, folder, state)
    own = _as_trained(config, dataset, job, folder, state)
    # A model that a later stage leaves as it is, as `frozen` is, knows that stage's items all the same.
    same = state["job"]["stage"] == job.stage
    return Stored(own, str(state["job"]["method"]), key, folders, tensors, coded if same else None)


def _coded(dataset: Dataset, folder: Path, state: dict[str, Any]) -> int | None:
    """How many items had codes when a checkpoint was trained; None where an earlier version did not note it.

    Raises:
        UserError: they have other codes now, so that the model would read and name other items than it means.
    """
    if "codes" not in state:
        return None
    noted = _noted(folder, "codes", state)
    if dataset.catalogue.digest_of_codes(noted["items"]) != noted["digest"]:
        raise UserError(f"{folder}: trained on other item codes than the catalogue has now; {REMEDY}")
    return noted["items"]


def _fault_before(folder: Path, wanted: str, elsewhere: str | None) -> str | None:
    """Why an earlier checkpoint is not the one that a later was trained from; one left out of an export is noted."""
    if elsewhere is None and (fault := fault_in_files(folder)):
        return fault
    found = tensors_digest(folder) if elsewhere is None else elsewhere
    return None if found == wanted else "its tensors are not those that later stages were trained from"


def _noted(folder: Path, field: str, state: Any) -> dict[str, Any]:
    found = state.get(field) if isinstance(state, dict) else None
    if not isinstance(found, dict):
        raise UserError(f"{folder}: written by an earlier version, which did not note its {field}; {REMEDY}")
    return found


def _as_trained(config: Config, dataset: Dataset, job: Job, folder: Path, state: dict[str, Any]) -> Config:
    """`config` with the settings that a checkpoint was trained under; where and of what it is asked stays as it is."""
    made = state["inputs"]
    if ("search" in made) != (dataset.interactions.query is not None):
        how = "with" if "search" in made else "without"
        raise UserError(f"{folder}: trained {how} searches, which search.objectives now says otherwise; set it back")
    place = _backbone_place(config, folder, state)
    values = config.model_dump()
    values["backbone"] = {**made["backbone"], "path": place, "device": config.backbone.device}
    values["adapter"] = made["adapter"]
    values["training"] |= made["training"]
    kept = {name: values["search"][name] for name in ("objectives", "repeats")}
    values["search"] = {**made.get("search", values["search"]), **kept}
    if made["method"] is not None:
        values["methods"][job.method] = made["method"]
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{folder}: trained by a version with other settings: {explain(error)}; {REMEDY}") from None


def _backbone_place(config: Config, folder: Path, state: dict[str, Any]) -> str | None:
    """Where the backbone is that the checkpoint was trained on: where the settings say, or where it was then."""
    wanted = state["inputs"]["weights"]
    if wanted is None:
        return None
    places = [path for path in (config.backbone.path, state.get("backbone_path")) if path is not None]
    found = next((path for path in places if weights_digest(path) == wanted), None)
    if found is None:
        raise UserError(
            f"{folder}: trained on another backbone than backbone.path = {config.backbone.path!r} names; give the "
            "folder of that one, with its files as they were"
        )
    return found
