"""Measurements on the trained models of a finished comparison, put together as the content of analysis.json."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from models.effective import effective_weights
from models.generative import GenerativeModel
from models.words import BackboneVocabulary
from stages.analysis import conflict, learnt, preservation, titles
from stages.analysis.intervals import Answers, column_means, crossed_interval, share_intervals
from stages.analysis.state_memory import footprints
from stages.analysis.transitions import stage_answers, transitions
from stages.commit import FIRST, method_of
from stages.config import Config, Protocol
from stages.dataset import Dataset
from stages.errors import UserError
from stages.fit import Fit
from stages.jobs import Evaluation, Job
from stages.method_config import GemsConfig, LoraMoeConfig
from stages.search_examples import query_vocabulary
from stages.stage_examples import Examples, stage_examples
from stages.train import bare_model, restore_model, training_log
from stages.workspace import Workspace

ENDS = ("less", "low", "high")
"""A difference from the first method, and the ends of its interval."""
START = "stage 0"
"""Stands for the model all methods started from: one set of weights for all."""
Row = dict[str, Any]
PARTS = {
    "conflict": ("conflict", "above_floor"),
    "transitions": ("transitions", "shares"),
    "titles": ("titles",),
    "preservation": ("preservation", "learnt"),
    "memory": ("memory",),
}
"""What can be measured, and the keys of its results; what was kept says little without what was learnt."""
NOTHING_KEPT: Row = {"corpus": "", "text": False, "untuned": None, "perplexity": [], "drift": []}


@dataclass(frozen=True)
class Scope:
    """What is looked at.

    Attributes:
        config: the experiment.
        workspace: holds the models and the evaluation files.
        dataset: the prepared log.
        methods: trained ones.
        seed: of their training.
        protocol: whose models they are.
        last: the last stage looked at.
        evaluations: everything measured so far.
        say: called with a sentence before each long part.
    """

    config: Config
    workspace: Workspace
    dataset: Dataset
    methods: tuple[str, ...]
    seed: int
    protocol: Protocol
    last: int
    evaluations: tuple[Evaluation, ...]
    say: Callable[[str], None]

    def job(self, method: str, stage: int) -> Job:
        """The model of a method after a stage."""
        return Job(FIRST, self.seed, self.protocol, 0) if method == START else self.plain(method, stage)

    def plain(self, method: str, stage: int) -> Job:
        """The job of that name, trained or not."""
        return Job(method, self.seed, self.protocol, stage)

    def examples(self, stage: int) -> Examples:
        """What every method trained on at `stage`; a method that trains on all stages sees more."""
        vocabulary = query_vocabulary(self.config, self.dataset)
        return stage_examples(self.config, self.dataset, self.plain(FIRST, stage), False, vocabulary)

    def model(self, method: str, stage: int) -> GenerativeModel:
        """A trained model with plain weights."""
        return restore_model(self.config, self.workspace, self.dataset, self.job(method, stage))

    def fit(self, model: GenerativeModel, examples: Examples) -> Fit:
        """The loss of `model` on examples as the training loop takes it; it never steps."""
        return Fit(self.config, model, lambda _: {}, examples, self.seed)


def measured(scope: Scope, parts: Collection[str] = PARTS) -> Row:
    """Conflict, transitions, preservation and memory, and what could not be measured and why.

    Args:
        scope: the models.
        parts: of `PARTS`; the others stay empty.

    Raises:
        UserError: a model or file is missing or damaged, or a text cannot be read or is one that a method protected.
    """
    preservation.refuse_protected(scope.config, scope.methods)
    notes: list[str] = []
    conflicts, above = conflict_rows(scope, notes) if "conflict" in parts else ([], [])
    turns, shares = transition_rows(scope, notes) if "transitions" in parts else ([], [])
    return {
        "conflict": conflicts,
        "above_floor": above,
        "transitions": turns,
        "shares": shares,
        "titles": title_rows(scope, notes) if "titles" in parts else [],
        "preservation": preservation_rows(scope, notes) if "preservation" in parts else dict(NOTHING_KEPT),
        "learnt": learnt_rows(scope, notes) if "preservation" in parts else [],
        "memory": memory_rows(scope) if "memory" in parts else [],
        "notes": notes,
    }


def conflict_rows(scope: Scope, notes: list[str]) -> tuple[list[Row], list[Row]]:
    """ρ of every linear map on the last stage's windows, by method and kind; a note where there is none to measure.

    Beside it what lies above the noise floor, over all maps, with its interval.
    """
    objectives = scope.dataset.interactions.objectives
    if len(objectives) < 2:
        notes.append(
            f"Conflict is between search and recommendation; this log has {''.join(objectives)} events only, so there "
            "is none to measure."
        )
        return [], []
    examples = scope.examples(scope.last)
    size = scope.config.training.batch_size
    pairs = conflict.batch_pairs(examples, scope.config.analysis.pairs, size, scope.seed)
    if not pairs:
        notes.append(
            f"Stage {scope.last} has fewer than two training windows of one objective: no conflict was measured."
        )
    rows: list[Row] = []
    above: list[Row] = []

    def take(kind: str, found: Sequence[conflict.Coefficients]) -> None:
        rows.extend(_labelled(method, kind, found))
        above.append({"method": method, "kind": kind, **_above_floor(found, scope.config.evaluation.bootstrap)})

    for method in [START, *scope.methods] if pairs else ():
        scope.say(f"gradients at the weights of {method}")
        fit = scope.fit(scope.model(method, scope.last), examples)
        take("gradient", conflict.coefficients(conflict.raw_gradients(fit, pairs)))
        if method != START and scope.last and method_of(scope.config, method).data == "stage":
            scope.say(f"updates of {method}")
            job = scope.plain(method, scope.last)
            some = pairs[: scope.config.analysis.update_pairs]
            steps = conflict.applied_updates(scope.config, scope.workspace, scope.dataset, job, some)
            for kind, found in conflict.coefficients_by_kind(steps).items():
                take(kind, found)
            if isinstance(scope.config.method(method), LoraMoeConfig):
                notes.append(
                    f"Updates of {method} are those of its experts' mean: which expert counts how much depends on the "
                    "token, and no one matrix says it."
                )
    return rows, above


def _labelled(method: str, kind: str, found: Sequence[conflict.Coefficients]) -> list[Row]:
    return [
        {
            "method": method,
            "kind": kind,
            "pair": one.pair,
            **dict(zip(("layer", "map"), place_of(one.name), strict=True)),
            "rho": one.mean,
            "below_zero": one.below_zero,
            "pairs": len(one.known),
        }
        for one in found
    ]


def _above_floor(found: Sequence[conflict.Coefficients], draws: int) -> Row:
    """Mean over maps of ρ less its noise floor, and its interval over pairs and maps."""
    tables = conflict.tables_of(found)
    values = conflict.above_floor([column_means(table) for table in tables])
    known = values[np.isfinite(values)]
    ends = crossed_interval(tables, conflict.above_floor, draws)
    return {
        "value": float(known.mean()) if len(known) else None,
        **dict(zip(("low", "high"), ends or (None, None), strict=True)),
        "pairs": len(tables[0]),
    }


def place_of(name: str) -> tuple[int, str]:
    """Layer number and weight type of a linear map: `layers.3.self_attn.q_proj` -> (3, "q_proj")."""
    words = name.split(".")
    return next((int(word) for word in words if word.isdecimal()), 0), words[-1]


def transition_rows(scope: Scope, notes: list[str]) -> tuple[list[Row], list[Row]]:
    """Each stage's model against the one before it, on the tests of its own and earlier stages.

    Beside it the intervals of what is shown of them: sums over the earlier stages' tests or the stage's own, after one
    stage or (`trained` None) after all.
    """
    rows = []
    pools: dict[tuple[str, str, bool, int | None], list[Answers]] = {}
    for method in scope.methods:
        for stage in range(1, scope.last + 1):
            for tested in range(stage + 1):
                answers = stage_answers(scope.workspace, scope.evaluations, scope.plain(method, stage), tested)
                for objective, one in answers.items():
                    place = {"method": method, "objective": objective, "trained": stage, "tested": tested}
                    rows.append({**place, **asdict(transitions(one.before, one.after))})
                    for trained in (stage, None):
                        pools.setdefault((method, objective, tested < stage, trained), []).append(one)
    if not rows:
        notes.append(
            "No stage's tests were answered by two models in a row, so no transitions were counted; `driftrec compare` "
            "with evaluation.matrix_users above 0 measures them."
        )
    found = share_intervals(pools, scope.config.evaluation.bootstrap)
    names = ("method", "objective", "earlier", "trained")
    shares = [{**dict(zip(names, pool, strict=True)), "intervals": own} for pool, own in found.items()]
    return rows, shares


def title_rows(scope: Scope, notes: list[str]) -> list[Row]:
    """The last stage's models against the untuned backbone, on test cases put in words."""
    own = scope.config
    if own.backbone.path is None or own.analysis.titles == 0:
        if own.backbone.path is None:
            notes.append("`small` reads no titles: right before, wrong after is counted between stages only.")
        return []
    scope.say("titles as the untuned backbone ranks them")
    vocabulary, head = BackboneVocabulary(own.backbone.path), preservation.own_head(own.backbone.path)
    untuned = bare_model(own, scope.dataset, scope.seed).eval()
    last = scope.plain(FIRST, scope.last)
    answers = partial(titles.title_ranks, head=head, vocabulary=vocabulary, dataset=scope.dataset)
    rows: list[Row] = []
    pools: dict[int, list[Answers]] = {}
    for objective in scope.dataset.interactions.objectives:
        try:
            cases = titles.title_cases(own, scope.dataset, last, objective, own.analysis.titles)
        except UserError as error:
            notes.append(f"Titles were not scored: {error}")
            break
        before = answers(untuned, cases=cases)
        for method in scope.methods:
            scope.say(f"titles as {method} ranks them, {objective}")
            after = answers(scope.model(method, scope.last), cases=cases)
            for cutoff in titles.CUTOFFS:
                place = {"method": method, "objective": objective, "stage": scope.last, "cutoff": cutoff}
                pools[len(rows)] = [Answers(cases.users, before <= cutoff, after <= cutoff)]
                rows.append({**place, **asdict(transitions(before <= cutoff, after <= cutoff))})
    found = share_intervals(pools, own.evaluation.bootstrap)
    return [{**row, "intervals": found[number]} for number, row in enumerate(rows)]


def learnt_rows(scope: Scope, notes: list[str]) -> list[Row]:
    """Loss of every model on the stage after the last one looked at, by objective, and that of stage 0's model.

    From the second method on also `less`, its difference from the first method's, and the ends of its interval.
    """
    if scope.last == scope.dataset.interactions.stages.max():
        notes.append("No stage comes after the last one, so there is none on which to see what was learnt.")
        return []
    coming = scope.examples(scope.last + 1)
    rows: list[Row] = []
    first: dict[str, learnt.Losses] | None = None
    for method in [START, *scope.methods]:
        scope.say(f"loss of {method} on the stage to come")
        found = learnt.losses(scope.fit(scope.model(method, scope.last), coming), scope.config.analysis.windows)
        for objective, one in found.items():
            beside: Row = {}
            if first is not None:
                beside = dict(zip(ENDS, one.less(first[objective], scope.config.evaluation.bootstrap), strict=True))
            place = {"method": method, "objective": objective, "stage": scope.last + 1, "tokens": int(one.tokens.sum())}
            rows.append({**place, "value": one.mean, **beside})
        first = found if first is None and method != START else first
    return rows


def preservation_rows(scope: Scope, notes: list[str]) -> Row:
    """Perplexity after each stage beside that before it, and every linear map's drift from stage 0.

    On a text also that of the untuned backbone: stage 0 has moved it already.
    """
    own = scope.config.analysis
    base = scope.model(START, 0)
    if own.text is not None:
        stream = preservation.held_out_text(base, Path(own.text), own.text_tokens)
        corpus = f"{Path(own.text).name}, at most {own.text_tokens:,} tokens"
        head = preservation.own_head(str(scope.config.backbone.path))
        measure = partial(_on_text, scope, head, stream)
    else:
        stream = preservation.held_out_items(scope.fit(base, scope.examples(0)))
        corpus = "the log's own validation windows"
        notes.append(
            "No held-out text is set (analysis.text): perplexity is that of a code on the validation windows of the "
            "stage before, drift is on those of stage 0."
        )
        measure = partial(_on_items, scope)
    scope.say("inputs of stage 0's model")
    start, moments = effective_weights(base.stack), preservation.moments_of(base, stream, own.text is not None)
    found: Row = {"corpus": corpus, "text": own.text is not None, "untuned": None, "perplexity": [], "drift": []}
    if own.text is not None:
        scope.say("what the untuned backbone makes of the text")
        found["untuned"], _ = measure(bare_model(scope.config, scope.dataset, scope.seed).eval(), 0)

    def after(method: str, stage: int) -> tuple[float | None, float | None, dict[str, float]]:
        """Perplexity now and that which the next stage starts with, and every map's drift."""
        scope.say(f"what {method} kept after stage {stage}")
        model = scope.model(method, stage)
        moved = preservation.drifts(start, model, moments)
        return *measure(model, stage), moved | preservation.mixture_drifts(base, model, stream, own.text is not None)

    common = after(START, 0)  # every method's
    for method in scope.methods:
        earlier: float | None = None
        for stage in range(scope.last + 1):
            now, earlier_next, own_drifts = after(method, stage) if stage else common
            if now is not None:
                row = {"method": method, "stage": stage, "before": earlier, "value": now}
                found["perplexity"].append(row)
            if own.text is None or stage == 0:
                earlier = earlier_next
            kept = protected(scope, method, stage)
            for name, value in own_drifts.items():
                layer, kind = place_of(name)
                place = {"method": method, "stage": stage, "layer": layer, "map": kind, **kept.get(name, {})}
                found["drift"].append({**place, "value": None if math.isnan(value) else value})
    return found


def protected(scope: Scope, method: str, stage: int) -> dict[str, Row]:
    """`k` and `k_over_n` of every linear map whose inputs GEMS protected at a stage; empty elsewhere."""
    if not stage or not isinstance(scope.config.method(method), GemsConfig):
        return {}
    log = training_log(scope.config, scope.workspace, scope.dataset, scope.plain(method, stage))
    found = log.get("gems", {}).get("protected", {})
    return {name: {key: one[key] for key in ("k", "k_over_n")} for name, one in found.items()}


def _on_text(
    scope: Scope, head: Any, stream: Any, model: GenerativeModel, stage: int
) -> tuple[float | None, float | None]:
    """Perplexity on the text, and what later stages are held against: stage 0's."""
    value = preservation.text_perplexity(model, head, stream)
    return value, value


def _on_items(scope: Scope, model: GenerativeModel, stage: int) -> tuple[float | None, float | None]:
    """Perplexity on the stage before, and on the model's own stage: the next model is held against it."""
    earlier = preservation.item_perplexity(scope.fit(model, scope.examples(stage - 1))) if stage else None
    return earlier, preservation.item_perplexity(scope.fit(model, scope.examples(stage)))


def memory_rows(scope: Scope) -> list[Row]:
    """Bytes of state and gradients of the three ways to train, on the linear maps of this backbone."""
    scope.say("memory of optimiser state and gradients")
    name, settings = gems_among(scope)
    examples = scope.examples(scope.last)
    if not examples.windows:
        return []
    fit = scope.fit(scope.model(START, 0), examples)
    batch = next(iter(fit.batches(1)))
    found = footprints(fit.model, lambda: fit.losses(batch), scope.config.adapter, settings)
    return [asdict(one) | ({"name": name} if one.name == "gems" else {}) for one in found]


def gems_among(scope: Scope) -> tuple[str, GemsConfig]:
    """Name and settings of the first method with three subspaces, else of the first with one, else GEMS's own."""
    found = [
        (name, settings) for name in scope.methods if isinstance(settings := scope.config.method(name), GemsConfig)
    ]
    found.sort(key=lambda one: one[1].subspaces != "three")
    return found[0] if found else ("gems", GemsConfig())
