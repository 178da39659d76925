"""The one tree of settings: TOML in, frozen values out, nothing about how they are used.

Every table of a config file is one class here; an unknown key or a contradiction is refused on construction with a
message that names the key. The tree imports neither torch nor polars, so that reading a config costs nothing.
"""

from __future__ import annotations

import math
import os
import re
import tomllib
from datetime import UTC, datetime
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

from pydantic import Field, ValidationError, field_validator, model_validator

from stages.analysis_config import AnalysisConfig
from stages.errors import UserError
from stages.log_config import CatalogueConfig, LogConfig, Source
from stages.method_config import BUILT_IN, AnyMethod, GemsConfig, MethodConfig
from stages.retrain_config import RetrainConfig
from stages.search_config import SearchConfig
from stages.settings import Settings, Targets, nearest

Protocol = Literal["same_stage", "next_stage"]
PROTOCOLS: tuple[Protocol, ...] = ("same_stage", "next_stage")
CUTOFFS = (1, 5, 10, 20)
NAME = r"^[a-z0-9][a-z0-9_-]{0,63}$"
"""Names of experiments and methods: they become names of folders and files."""
RESERVED = ("first", "popularity", "recent_popularity", "item_graph", "bm25", "last_category")
"""What no method may be called: the stage 0 that all methods share, and the baselines, that of 99 + 1 included."""


class StageConfig(Settings):
    """Where the log is cut; exactly one rule holds."""

    fractions: list[float] | None = None
    """Shares of the events, in time order; default 0.6 and four times 0.1."""
    period: str | None = None
    """Calendar period such as `1w` or `1mo` (polars duration)."""
    first: str | None = None
    """With `period`: the instant at which stage 0 ends (ISO); default: after the first 60 % of the events."""
    instants: list[str] | None = None
    """Explicit boundaries, ISO, rising; stage 0 is everything before the first."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        given = [name for name in ("fractions", "period", "instants") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"stages has {' and '.join(given)}; keep one boundary rule")
        if self.first is not None and self.period is None:
            raise ValueError("stages.first goes with stages.period; remove it or add period")
        if self.fractions is not None:
            _check_fractions(self.fractions)
        if self.instants is not None:
            _check_instants(self.instants)
        return self


def _check_fractions(fractions: list[float]) -> None:
    if len(fractions) < 1 or any(not 0 < share <= 1 for share in fractions):
        raise ValueError(f"stages.fractions must each lie in (0, 1], got {fractions}")
    if not math.isclose(sum(fractions), 1.0, abs_tol=1e-6):
        raise ValueError(f"stages.fractions must sum to 1, got {sum(fractions):g}; adjust the last one")


def _check_instants(texts: list[str]) -> None:
    try:
        found = [datetime.fromisoformat(text) for text in texts]
    except ValueError:
        return  # the split says which one is no ISO date
    instants = [one.replace(tzinfo=UTC) if one.tzinfo is None else one for one in found]
    if any(late <= early for early, late in pairwise(instants)):
        raise ValueError(f"stages.instants must rise strictly, got {texts}; sort them")


class ItemConfig(Settings):
    """How an item becomes a tuple of codes."""

    vectors: Literal["auto", "tfidf", "cooccurrence", "encoder"] = "auto"
    """`auto`: tfidf where the catalogue has text, else co-occurrence within stage 0."""
    encoder: str | None = None
    """Local path or hub id of a sentence encoder, for `vectors = "encoder"`."""
    dimensions: Annotated[int, Field(ge=2)] = 64
    """Width of the item vectors (truncated SVD)."""
    quantizer: Literal["kmeans", "rqvae"] = "kmeans"
    levels: Annotated[int, Field(ge=2, le=8)] = 4
    """Codes in a semantic ID, the last, disambiguating one included."""
    codes_per_level: Annotated[int, Field(ge=2, le=65536)] = 256
    """Upper bound; a small catalogue uses fewer."""
    index: Literal["fitted", "shipped"] = "fitted"
    """`shipped`: use log.index as it is (its catalogue was known in advance: every output says so)."""

    @model_validator(mode="after")
    def _encoder_named(self) -> Self:
        if self.vectors == "encoder" and not self.encoder:
            raise ValueError('items.vectors = "encoder" needs items.encoder, a local path or hub id')
        return self


class BackboneConfig(Settings):
    """The language model under the adapter."""

    path: str | None = None
    """Local folder or hub id of a decoder LM; absent: `small`, a Llama built from the numbers below."""
    hidden: Annotated[int, Field(ge=8)] = 192
    layers: Annotated[int, Field(ge=1)] = 4
    heads: Annotated[int, Field(ge=1)] = 4
    feed_forward: Annotated[int, Field(ge=8)] = 512
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Dropout on the input embeddings of code tokens while stage 0 of `small` is trained; 0 at later stages."""
    precision: Literal["auto", "float32", "bfloat16"] = "auto"
    """`auto`: bfloat16 autocast with float32 weights where the hardware multiplies it natively, else float32."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model is trained and asked; `auto`: a CUDA device where there is one. No part of a checkpoint's key."""
    vocabulary: Literal["codes", "full"] = "codes"
    """Output softmax over the code tokens only, or over the backbone's whole vocabulary and the code tokens."""

    @model_validator(mode="after")
    def _heads_divide(self) -> Self:
        if self.hidden % (2 * self.heads):
            raise ValueError(f"backbone.hidden ({self.hidden}) must be a multiple of 2 x heads ({self.heads})")
        return self

    @model_validator(mode="after")
    def _full_has_words(self) -> Self:
        if self.vocabulary == "full" and not self.path:
            raise ValueError('backbone.vocabulary = "full" needs a pretrained backbone; set backbone.path')
        return self


class AdapterConfig(Settings):
    """LoRA (Hu et al., 2021) on every linear map of attention and MLP."""

    rank: Annotated[int, Field(ge=1)] = 8
    alpha: Annotated[float, Field(gt=0)] = 16.0
    targets: Targets = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class TrainingConfig(Settings):
    """One stage's optimisation; the same for every method compared."""

    batch_size: Annotated[int, Field(ge=1)] = 64
    """Windows an optimiser step sees."""
    micro_batch_size: Annotated[int, Field(ge=1)] | None = None
    """Windows a backward pass sees; absent: about 4,096 tokens of them on a CPU, 65,536 on a GPU."""
    history_length: Annotated[int, Field(ge=1)] = 20
    """Items of history a target sees at least, and a test query exactly (at most)."""
    layout: Literal["packed", "packed_exact", "per_prefix"] = "packed"
    """`packed`: a loss at every target of a window, the later ones seeing more than `history_length` items;
    `per_prefix`: one target an example, as in PESO's release; `packed_exact`: the same losses as that, packed where a
    target's whole history fits `history_length`."""
    targets_per_window: Annotated[int, Field(ge=1)] = 30
    first_epochs: Annotated[int, Field(ge=1)] = 12
    """Epochs at stage 0."""
    epochs: Annotated[int, Field(ge=1)] = 4
    """Epochs at later stages."""
    first_learning_rate: Annotated[float, Field(gt=0)] = 2e-3
    learning_rate: Annotated[float, Field(gt=0)] = 1e-3
    """Peak rate at later stages."""
    full_learning_rate: Annotated[float, Field(gt=0)] = 5e-4
    """Peak rate at later stages for methods that move every weight."""
    warmup: Annotated[float, Field(ge=0, lt=1)] = 0.02
    """Share of the steps with a rising rate; cosine decay to zero after it."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    clip_norm: Annotated[float, Field(gt=0)] = 1.0
    temperature: Annotated[float, Field(gt=0)] = 1.0
    """Divides the training logits only (the released PESO code uses 0.8)."""
    label_smoothing: Annotated[float, Field(ge=0, lt=1)] = 0.0
    patience: Annotated[int, Field(ge=1)] = 2
    """Epochs without a better validation loss before the stage stops; the best epoch's weights are kept."""
    token_rows: Literal["evolve", "freeze"] = "evolve"
    """Whether the code tokens' rows (input and output side) train after stage 0, for every method alike."""


class EvaluationConfig(Settings):
    """Who is tested on what."""

    protocols: tuple[Protocol, ...] = PROTOCOLS
    next_target: Literal["all", "first"] = "all"
    """Next-stage targets: all baskets of the stage with rolling history, or a returning user's first one."""
    baskets: bool = False
    """Events of a user that share a timestamp are one target, scored as a set."""
    exclude_history: bool = False
    """Never recommend what the user already has (do not use it on logs with repeats)."""
    beam: Annotated[int, Field(ge=1)] = 20
    k: Annotated[int, Field(ge=1)] = 20
    """Length of a recommendation list."""
    batch_size: Annotated[int, Field(ge=1)] = 64
    matrix_users: Annotated[int, Field(ge=0)] = 300
    """Seeded sample of test users for R[i][j]; 0 leaves the matrix out. The headline cells use every user."""
    users: Annotated[int, Field(ge=1)] | None = None
    """Seeded sample of test users for a quick look; every output then says so."""
    bootstrap: Annotated[int, Field(ge=100)] = 10_000
    negatives: Literal["off", "uniform", "popularity", "bm25_first"] = "off"
    """Rank each target among 99 drawn items besides, as some papers do; shown apart, never in a headline.
    `bm25_first`: those whose words match the query best, then uniform; uniform where nothing is searched for."""

    @field_validator("protocols")
    @classmethod
    def _protocols_distinct(cls, protocols: tuple[Protocol, ...]) -> tuple[Protocol, ...]:
        if not protocols or len(set(protocols)) != len(protocols):
            raise ValueError(f"evaluation.protocols must be distinct and at least one, got {list(protocols)}")
        return protocols

    @model_validator(mode="after")
    def _beam_covers_k(self) -> Self:
        if self.beam < self.k:
            raise ValueError(f"evaluation.beam ({self.beam}) is below evaluation.k ({self.k}); widen the beam")
        if self.k < max(CUTOFFS):
            raise ValueError(f"evaluation.k ({self.k}) must reach {max(CUTOFFS)}, the deepest cut-off reported")
        return self


class Config(Settings):
    """One experiment: a log, its stages, a model, and the methods compared on it."""

    name: Annotated[str, Field(pattern=NAME)]
    workspace: str
    """Folder for everything the run writes; relative paths start at the current directory."""
    log: LogConfig
    catalogue: CatalogueConfig = CatalogueConfig()
    stages: StageConfig = StageConfig()
    items: ItemConfig = ItemConfig()
    backbone: BackboneConfig = BackboneConfig()
    adapter: AdapterConfig = AdapterConfig()
    training: TrainingConfig = TrainingConfig()
    search: SearchConfig = SearchConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    retrain: RetrainConfig = RetrainConfig()
    analysis: AnalysisConfig = AnalysisConfig()
    methods: dict[str, AnyMethod] = Field(default_factory=dict)
    """Named settings besides the built-in ones; a built-in name may be redefined."""
    compare: tuple[str, ...] = ("frozen", "single", "peso", "cumulative_sum")
    """What `driftrec compare` runs without --methods."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0, 1, 2)

    @field_validator("seeds")
    @classmethod
    def _seeds_distinct(cls, seeds: tuple[int, ...]) -> tuple[int, ...]:
        if not seeds or len(set(seeds)) != len(seeds):
            raise ValueError(f"seeds must be distinct and at least one, got {seeds}")
        return seeds

    @field_validator("methods")
    @classmethod
    def _methods_named(cls, methods: dict[str, AnyMethod]) -> dict[str, AnyMethod]:
        for name in methods:
            if not re.fullmatch(NAME, name):
                raise ValueError(
                    f"{name!r} cannot name a method; use 1 to 64 of a-z, 0-9, _ and -, a letter or digit first"
                )
            if name in RESERVED:
                raise ValueError(f"{name!r} is taken by driftrec itself; choose another name for the method")
        return methods

    @model_validator(mode="after")
    def _tables_agree(self) -> Self:
        if self.items.index == "shipped" and not self.log.index:
            raise ValueError('items.index = "shipped" needs log.index, the file that ships it')
        rule = [name for name, value in self.stages if value is not None]
        if rule and self.log.kind != "events":
            raise ValueError(
                f'log.kind = "{self.log.kind}" brings its own stages, but [stages] has {", ".join(rule)}; remove it'
            )
        for name, method in self.methods.items():
            if self.training.token_rows == "freeze" and getattr(method, "anchor", "adapter") == "adapter+tokens":
                raise ValueError(
                    f'methods.{name}.anchor = "adapter+tokens" anchors rows that training.token_rows = "freeze" never '
                    'moves; use anchor = "adapter" or token_rows = "evolve"'
                )
        return self

    def method(self, name: str) -> MethodConfig:
        """The settings of the method called `name`.

        Raises:
            UserError: no such method; the nearest names are suggested.
        """
        known = {**BUILT_IN, **self.methods}
        if name not in known:
            raise UserError(f"unknown method {name!r}{nearest(name, known)}; known: {', '.join(sorted(known))}")
        return known[name]


def load_config(path: Path) -> Config:
    """Read and check a TOML config; relative source paths become relative to the file's folder.

    Raises:
        UserError: unreadable file, invalid TOML, or a value that breaks a rule (all of them are listed).
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such config file; see configs/ for examples") from None
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable TOML file: {error}") from None
    try:
        config = Config.model_validate(values)
    except ValidationError as error:
        raise UserError(f"{path}: {explain(error)}") from None
    return _anchor_paths(config, path.resolve().parent)


def explain(error: ValidationError) -> str:
    """Every broken rule of a refused config in words: which key, what was given, and the nearest known key."""
    return "; ".join(_explain(problem) for problem in error.errors())


def _explain(problem: Any) -> str:
    place = ".".join(str(part) for part in problem["loc"]) or "config"
    if problem["type"] == "extra_forbidden":
        return f"unknown key {place!r}{nearest(str(problem['loc'][-1]), _known_keys(problem['loc'][:-1]))}"
    message = problem["msg"].removeprefix("Value error, ")
    value = problem.get("input")
    shown = "" if isinstance(value, dict | list) or problem["type"] == "value_error" else f" (got {value!r})"
    return f"{place}: {message}{shown}"


def _known_keys(place: tuple[Any, ...]) -> list[str]:
    """Keys of the tables at `place`, which names fields, positions in lists, methods, and a method's kind."""
    tables: list[type[Settings]] = [Config]
    for part in place:
        fields = [table.model_fields[part] for table in tables if part in table.model_fields]
        below = [table for field in fields for table in _tables_in(field.annotation)]
        kinds = [table for table in tables if part in _kinds(table)]
        tables = below or kinds or tables
    return [name for table in tables for name in table.model_fields]


def _kinds(table: type[Settings]) -> tuple[Any, ...]:
    return get_args(table.model_fields["method"].annotation) if "method" in table.model_fields else ()


def _tables_in(annotation: Any) -> list[type[Settings]]:
    if isinstance(annotation, type) and issubclass(annotation, Settings):
        return [annotation]
    return [table for part in get_args(annotation) for table in _tables_in(part)]


def _anchor_paths(config: Config, folder: Path) -> Config:
    def anchored(path: str) -> str:
        expanded = Path(expand(path))
        return str(expanded if expanded.is_absolute() else folder / expanded)

    def sources(table: list[Source]) -> list[Source]:
        return [
            source.model_copy(
                update={
                    "path": anchored(source.path),
                    "join": [join.model_copy(update={"path": anchored(join.path)}) for join in source.join],
                }
            )
            for source in table
        ]

    places = {key: anchored(value) for key in ("blocks", "index", "sequences") if (value := getattr(config.log, key))}
    log = config.log.model_copy(update={**places, "sources": sources(config.log.sources)})
    catalogue = config.catalogue.model_copy(update={"sources": sources(config.catalogue.sources)})
    backbone = config.backbone.model_copy(update={"path": _model_place(config.backbone.path, folder)})
    items = config.items.model_copy(update={"encoder": _model_place(config.items.encoder, folder)})
    methods = {
        name: method.model_copy(update={"corpus": anchored(method.corpus)})
        if isinstance(method, GemsConfig) and method.corpus not in ("previous_stage", "off")
        else method
        for name, method in config.methods.items()
    }
    text = config.analysis.text and anchored(config.analysis.text)
    tables = {"log": log, "catalogue": catalogue, "backbone": backbone, "items": items, "methods": methods}
    tables |= {"analysis": config.analysis.model_copy(update={"text": text})}
    return config.model_copy(update=tables)


def _model_place(path: str | None, folder: Path) -> str | None:
    """A model's folder made absolute where it lies beside the config; anything else may be a hub id and stays."""
    if path is None:
        return None
    place = os.path.normpath(folder / expand(path))
    return place if os.path.isdir(place) else expand(path)


def expand(path: str) -> str:
    """`path` with `~` and `$NAME` expanded; `$DRIFTREC_DATA` defaults to `data` in the current directory.

    Raises:
        UserError: a variable is not set, or empty.
    """
    os_values = {"DRIFTREC_DATA": str(Path("data").resolve()), **{name: v for name, v in os.environ.items() if v}}
    expanded = os.path.expanduser(path)
    for name, value in sorted(os_values.items(), key=lambda pair: -len(pair[0])):
        expanded = expanded.replace("${" + name + "}", value).replace("$" + name, value)
    if "$" in expanded:
        raise UserError(f"{path}: an environment variable in this path is not set; export it or write the path out")
    return expanded
