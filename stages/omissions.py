"""What a reader must know of how a report's numbers came about, counted: rows left out, users skipped, inputs kept."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import polars as pl

from regularizers.gate import LEARNED
from stages.config import Config, Protocol
from stages.interactions import Interactions, load_interactions, used_objectives
from stages.jobs import Checkpoint
from stages.queries import asked_moments, repeated_targets, same_stage_tests
from stages.workspace import Workspace, read_json

COUNTS = ("rows", "filtered", "rejected", "duplicates", "accepted", "units")
"""Fields of a stages.log.LogReport that a report repeats."""

LOSS, LESSON = "ce/", "hypergradient/"
"""Prefixes in a training log: an objective's loss, and what a gate learnt about it."""

ALONE = {
    "gems": "trained the shared subspace only",
    "pcgrad": "had no two gradients to reconcile and trained as `single` does",
    "ortho_lora": "had no two gradients to reconcile and trained as `single` does",
    "lora_moe": "sent the one objective through all experts, balanced to give those meant for the other a share of "
    "(1 - skew) / (1 + skew)",
}
"""What a method made for two objectives does with one, by its kind."""


def log_counts(workspace: Workspace) -> dict[str, Any]:
    """What became of the rows of the log: the fields COUNTS of `logs/manifest.json`; empty where there is no log."""
    manifest = _log_manifest(workspace)
    return {name: manifest[name] for name in COUNTS if name in manifest}


def omission_notes(
    config: Config,
    workspace: Workspace,
    tested: Mapping[Protocol, Collection[int]],
    checkpoints: Sequence[Checkpoint],
) -> list[str]:
    """Sentences for the report, one a kind of omission that occurs; what a workspace does not hold is not mentioned.

    Args:
        config: the experiment.
        workspace: holds log, stages, catalogue and checkpoints.
        tested: stages by the protocol that was to test them.
        checkpoints: everything trained.
    """
    states, events = _states(workspace, checkpoints), _events(config, workspace, tested)
    return [
        *_rows_note(_log_manifest(workspace)),
        *_search_note(config, workspace),
        *_repeats_notes(config, events, tested),
        *_skipped_note(events, sorted(tested.get("same_stage", ()))),
        *_unseen_note(states),
        *_alone_notes(states),
        *_waiting_note(states),
        *_protected_notes(states),
        *_unprotected_note(states),
    ]


def _log_manifest(workspace: Workspace) -> dict[str, Any]:
    path = workspace.log.with_name("manifest.json")
    return read_json(path) if path.exists() else {}


def _rows_note(manifest: Mapping[str, Any]) -> list[str]:
    if not all(name in manifest for name in COUNTS):
        return []
    units = ", ".join(sorted({unit for unit in manifest["units"].values() if unit is not None}))
    notes = [
        f"Log: {manifest['rows']:,} rows read, {manifest['filtered']:,} filtered by `where`, "
        f"{_rejected(manifest['rejected'], 'log')}, {manifest['duplicates']:,} duplicates dropped, "
        f"{manifest['accepted']:,} events kept; {f'times read as {units}' if units else 'no clock'}."
    ]
    if refused := manifest.get("catalogue_rejected"):
        notes.append(f"Item table: {_rejected(refused, 'catalogue')}.")
    return notes


def _rejected(reasons: Mapping[str, int], table: str) -> str:
    if not reasons:
        return "none rejected"
    listed = ", ".join(f"{reason} ({count:,})" for reason, count in reasons.items())
    return f"{sum(reasons.values()):,} rejected: {listed}; they are in rejects/{table}.parquet"


def _search_note(config: Config, workspace: Workspace) -> list[str]:
    """How many searches there are and how they are used."""
    if not workspace.log.exists():
        return []
    searches = pl.scan_parquet(workspace.log).select((pl.col("event") == "search").sum()).collect().item()
    wanted = config.search.objectives
    if not searches:
        return []
    if wanted is not None and "search" not in wanted:
        return [f"Searches: {searches:,} events, left out as search.objectives says."]
    repeats = "" if config.search.repeats == "ask" else "; items a user has met before are not asked for in any test"
    return [f"Searches: {searches:,} events. A history ends where its target's moment begins{repeats}."]


def _events(config: Config, workspace: Workspace, tested: Mapping[Protocol, Collection[int]]) -> Interactions | None:
    """The events where they are needed: for tests of visits, or of a log with searches."""
    if not (workspace.catalogue / "items.parquet").exists() or not workspace.stage_file(0).exists():
        return None
    wanted = config.search.objectives
    if not tested.get("same_stage") and "search" not in used_objectives(workspace, wanted):
        return None
    return load_interactions(workspace, config.evaluation.baskets, wanted)


def _repeats_notes(
    config: Config, events: Interactions | None, tested: Mapping[Protocol, Collection[int]]
) -> list[str]:
    """How many targets `search.repeats` left out, and where it left none; it says nothing to a log without searches."""
    if events is None or events.query is None or config.search.repeats == "ask":
        return []
    some, none = [], []
    for protocol, stages in tested.items():
        moments = [asked_moments(events, protocol, stage, config.evaluation.next_target) for stage in sorted(stages)]
        counts = [repeated_targets(events, own) for own in moments]
        for objective in events.objectives:
            repeats, targets = (sum(one[objective][place] for one in counts) for place in (0, 1))
            named = protocol.replace("_", "-"), objective
            if repeats and repeats == targets:
                none.append(
                    f"Nothing is left to test of {' '.join(named)}: all {targets:,} targets are items their users had "
                    'before; set search.repeats = "ask".'
                )
            elif repeats:
                some.append(f"{repeats:,} of {targets:,} targets ({', '.join(named)})")
    return [f"Left out of the tests as items their users had before: {', '.join(some)}."] * bool(some) + none


def _skipped_note(events: Interactions | None, tested: Sequence[int]) -> list[str]:
    if events is None:
        return []
    skipped = {stage: same_stage_tests(events, stage).skipped for stage in tested}
    if not any(skipped.values()):
        return []
    return [f"Same-stage tests skip users with fewer than three baskets in the stage: {_by_stage(skipped, 'users')}."]


def _states(workspace: Workspace, checkpoints: Iterable[Checkpoint]) -> list[dict[str, Any]]:
    """Each checkpoint's `state.json`, once: a frozen model's later jobs name stage 0's."""
    paths = dict.fromkeys(workspace.checkpoints / checkpoint.key / "state.json" for checkpoint in checkpoints)
    return [read_json(path) for path in paths if path.exists()]


def _unseen_note(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """The largest count of any checkpoint of a stage: methods and seeds meet the same rows, so a sum would repeat."""
    unseen: dict[int, int] = {}
    for state in states:
        stage = state.get("job", {}).get("stage", 0)
        if stage and "unseen_code_rows" in state:
            unseen[stage] = max(state["unseen_code_rows"], unseen.get(stage, 0))
    if not any(unseen.values()):
        return []
    return [f"Code tokens trained on that no event of an earlier stage holds: {_by_stage(unseen, 'tokens')}."]


def _alone_notes(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """Methods made for two objectives where a stage held one, a sentence for each thing they then do."""
    alone: dict[str, list[Mapping[str, Any]]] = {}
    for state in states:
        kind = (state.get("inputs", {}).get("method") or {}).get("method", "gems" if "gems" in state else None)
        if kind in ALONE and len(_objectives(state)) == 1:
            alone.setdefault(ALONE[kind], []).append(state)
    notes = []
    for does, own in alone.items():
        objectives = sorted({name for state in own for name in _objectives(state)})
        stages = sorted({state["job"]["stage"] for state in own})
        notes.append(
            f"One objective alone, {' or '.join(objectives)}, at stage {', '.join(map(str, stages))}: there "
            f"{_methods(own)} {does}."
        )
    return notes


def _waiting_note(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where GEMS's learning gate was never asked: each stage's steps are counted anew, and they may end first."""
    waited = [
        state
        for state in states
        if _has_learning_gate(state.get("inputs", {}).get("method") or {})
        and len(_objectives(state)) == 2
        and state.get("training")
        and not any(
            name.startswith(LESSON) for row in (*state["training"], state.get("every_step", {})) for name in row
        )
    ]
    if not waited:
        return []
    # The rows of a long stage are thinned: their number is not that of its steps.
    ends = [state["training"][-1]["step"] for state in waited]
    steps = max(ends + [len(own) for state in waited for own in state.get("every_step", {}).values()])
    return [
        f"The learning gate of {_methods(waited)} never left its warm-up in a stage of at most {steps:,} steps: both "
        "weights stayed 1/2. Give gate_warmup fewer steps than a stage has."
    ]


def _has_learning_gate(method: Mapping[str, Any]) -> bool:
    """Whether a method weighs paths of two objectives by what it learns; one subspace has nothing to weigh."""
    return method.get("gate") in LEARNED and method.get("subspaces") != "one"


def _objectives(state: Mapping[str, Any]) -> set[str]:
    """What a stage trained on: said by GEMS, for others read off the losses they logged."""
    if "gems" in state:
        return set(state["gems"]["objectives"])
    logged = {name for row in state.get("training", ()) for name in row if name.startswith(LOSS)}
    return {name.removeprefix(LOSS) for name in logged}


def _protected_notes(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """Whose inputs GEMS left alone, and how much of them."""
    by_corpus: dict[str, list[Mapping[str, Any]]] = {}
    for state in states:
        if state.get("gems", {}).get("protected") and state["inputs"]["method"]["null_space"] == "orthogonal":
            by_corpus.setdefault(state["inputs"]["method"]["corpus"], []).append(state)
    notes = []
    for corpus, own in by_corpus.items():
        kept = sorted((one["k_over_n"], one["k"]) for state in own for one in state["gems"]["protected"].values())
        named = own[0]["gems"].get("corpus", corpus)  # in `inputs` a text goes by its digest
        source = "the stage before" if corpus == "previous_stage" else f"the text {Path(named).name}"
        span = " to ".join(f"{k:,} of {k / share:,.0f} ({share:.1%})" for share, k in (kept[0], kept[-1]))
        notes.append(
            f"Null space: {_methods(own)} kept what the inputs of {source} give, {span} of the directions that a map "
            "reads; k of every map is in its checkpoint's state.json."
        )
    return notes


def _unprotected_note(states: Iterable[Mapping[str, Any]]) -> list[str]:
    """Where GEMS was to leave inputs alone and the stages before held too few tokens to say which."""
    own = [
        state
        for state in states
        if "gems" in state
        and (state["inputs"]["method"] or {}).get("null_space", "off") != "off"
        and not state["gems"]["protected"]
        and state["job"]["stage"] > 0
    ]
    if not own:
        return []
    stages = ", ".join(map(str, sorted({state["job"]["stage"] for state in own})))
    return [
        f"Null space: {_methods(own)} protected nothing at stage {stages}: the stages before hold fewer tokens than an "
        "input has dimensions."
    ]


def _methods(states: Iterable[Mapping[str, Any]]) -> str:
    return ", ".join(dict.fromkeys(state["job"]["method"] for state in states))


def _by_stage(counts: Mapping[int, int], what: str) -> str:
    return ", ".join(f"{counts[stage]:,} {what} at stage {stage}" for stage in sorted(counts))
