"""What GEMS must not change: the inputs a corpus feeds to each linear map, found once, kept by what they hang on."""

from __future__ import annotations

import hashlib
import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoTokenizer

from models.generative import GenerativeModel, TokenBatch
from models.input_moments import Forward, TokenStream, input_moments, limited, linear_maps, packed_text
from regularizers.null_space import Protection, protect
from stages.errors import UserError
from stages.method_config import GemsConfig
from stages.methods.contract import Past
from stages.workspace import digest_of, read_json, replacing, sha256_file, write_json

log = logging.getLogger("stages.protection")
TEXT_LENGTH, TEXT_BATCH = 256, 8
"""Tokens of a row of text, and rows of a batch."""
CROWDED = 0.9
"""Share of the input directions above which protecting them is worth a warning."""
SPARSE = 0.01
"""Share below which it is, too: the inputs are not centred, and one direction that all share may hold the energy."""


def protections(
    model: GenerativeModel, settings: GemsConfig, past: Past | None, progress: Callable[[int], None] | None = None
) -> dict[str, Protection]:
    """The protected inputs of every linear map, by its name; maps that read the same input share one tensor.

    Args:
        model: the one the stage starts from.
        settings: corpus, its size and the rule for k.
        past: earlier stages' windows, and the folder results are kept in.
        progress: called with the corpus tokens seen; absent: every tenth of them is logged.

    Returns:
        Empty where `null_space = "off"`, and with a warning where all earlier stages hold fewer tokens than an input
        has dimensions.

    Raises:
        ValueError: the text is missing or too small, or cannot be read by this backbone; a rule that leaves nothing.
        UserError: a stored result does not belong to its name.
    """
    if settings.null_space == "off":
        return {}
    if past is None:
        raise ValueError("GEMS protects inputs from stage 1 on; stage 0 has no model to preserve")
    text = settings.corpus != "previous_stage"
    widest = max(module.in_features for module in linear_maps(model.stack).values())
    stream = text_stream(model, settings) if text else _newest(past.tokens, settings.corpus_tokens, widest)
    if stream is None:
        if settings.corpus_tokens < widest:
            raise ValueError(
                f"corpus_tokens = {settings.corpus_tokens} is below the {widest} dimensions of an input, which so few "
                "tokens cannot span; raise it"
            )
        warnings.warn(
            f"gems: the stages before hold fewer tokens than the {widest} dimensions of an input; this stage protects "
            "none",
            stacklevel=2,
        )
        return {}
    if text and next(iter(stream()), None) is None:
        raise ValueError(f"corpus = {settings.corpus!r} has fewer than {TEXT_LENGTH} tokens; give a larger text")
    forward = reads_text(model) if text else reads_items(model)
    key = digest_of(
        {
            "weights": weights_digest(model),
            "corpus": sha256_file(Path(settings.corpus)) if text else _stream_digest(stream),
            "tokens": settings.corpus_tokens,
            "rule": [settings.k_rule, settings.k_value],
        }
    )
    file = past.folder / f"{key[:16]}.safetensors"
    if not (file.exists() and file.with_suffix(".json").exists()):  # a kill may have come between the two
        training = model.training
        model.eval()
        _store(file, key, _found(model, forward, stream, settings, progress or _logged(settings.corpus_tokens)))
        model.train(training)
    return read_protections(file, key)


def _found(
    model: GenerativeModel,
    forward: Forward,
    stream: TokenStream,
    settings: GemsConfig,
    progress: Callable[[int], None],
) -> dict[tuple[str, ...], Protection]:
    found = {}
    for one in input_moments(linear_maps(model.stack), forward, stream, progress):
        try:
            found[one.names] = protect(one.moment, one.tokens, settings.k_rule, settings.k_value)
        except ValueError as error:
            raise ValueError(f"the inputs of {one.names[0]}: {error}") from None
        _warn(found[one.names], one.names[0], settings)
    return found


def _warn(found: Protection, name: str, settings: GemsConfig) -> None:
    """Of a rule that leaves little to train, and of one that a single loud direction satisfies."""
    size, k = found.basis.shape
    rule = f"gems: {settings.k_rule} {settings.k_value:g} protects"
    if found.share > CROWDED:
        warnings.warn(f"{rule} {found.share:.0%} of the inputs of {name}; little is left to train", stacklevel=2)
    elif found.share < SPARSE:
        warnings.warn(
            f"{rule} {k} of the {size:,} input directions of {name}, which hold {found.energy:.1%} of what it reads; "
            "the others are free to change",
            stacklevel=2,
        )


def _logged(total: int) -> Callable[[int], None]:
    tenths = 0

    def progress(seen: int) -> None:
        nonlocal tenths
        if seen * 10 // total > tenths:
            tenths = seen * 10 // total
            log.info("null space: %d of at most %d corpus tokens read", seen, total)

    return progress


def _store(file: Path, key: str, found: dict[tuple[str, ...], Protection]) -> None:
    with replacing(file) as temporary:
        save_file({names[0]: one.basis.cpu() for names, one in found.items()}, temporary)
    rows = [{"maps": list(names), **one.numbers()} for names, one in found.items()]
    write_json(file.with_suffix(".json"), {"key": key, "sha256": sha256_file(file), "inputs": rows})


def read_protections(file: Path, key: str) -> dict[str, Protection]:
    """What was stored under `key`.

    Raises:
        UserError: the files were altered or belong to another model, corpus or rule.
    """
    table: dict[str, Any] = read_json(file.with_suffix(".json"))
    if table.get("key") != key or table.get("sha256") != sha256_file(file):
        raise UserError(f"{file}: not what its name says (other weights, corpus or rule, or damaged); remove it")
    bases = load_file(file)
    return {name: Protection(bases[row["maps"][0]], row["energy"]) for row in table["inputs"] for name in row["maps"]}


def weights_digest(model: nn.Module) -> str:
    """SHA-256 over every parameter's name and bytes."""
    whole = hashlib.sha256()
    for name, value in model.named_parameters():
        whole.update(name.encode())
        whole.update(value.detach().cpu().contiguous().numpy().data)
    return whole.hexdigest()


def _stream_digest(stream: TokenStream) -> str:
    whole = hashlib.sha256()
    for batch, _ in stream():
        whole.update(repr(tuple(batch.tokens.shape)).encode())
        for part in (batch.tokens, batch.places, batch.visible):
            if part is not None:
                whole.update(part.contiguous().numpy().data)
    return whole.hexdigest()


def _limited(stream: TokenStream, tokens: int) -> TokenStream:
    return lambda: limited(stream(), tokens)


def _newest(streams: Sequence[TokenStream], tokens: int, enough: int) -> TokenStream | None:
    """The newest stage's windows, with those of stages before it where they hold fewer than `enough` tokens.

    Args:
        streams: of each stage, the newest first.
        tokens: read at most.
        enough: tokens that span every input.

    Returns:
        None where all of them together are too few.
    """
    for count in range(1, len(streams) + 1):
        stream = _limited(_joined(streams[:count]), tokens)
        if sum(int(inside.sum()) for _, inside in limited(stream(), enough)) >= enough:
            if count > 1:
                log.info("null space: the stage before is small; %d stages are read", count)
            return stream
    return None


def _joined(streams: Sequence[TokenStream]) -> TokenStream:
    return lambda: chain.from_iterable(stream() for stream in streams)


def reads_items(model: GenerativeModel) -> Callable[[TokenBatch], Tensor]:
    """A pass over code tokens, giving hidden states (B, T, d)."""

    def forward(batch: TokenBatch) -> Tensor:
        here = batch.to(model.device)
        return model.hidden(here.tokens, None if here.visible is None else here.visible[:, None], here.places)

    return forward


def reads_text(model: GenerativeModel) -> Callable[[TokenBatch], Tensor]:
    """A pass over the backbone's own tokens, giving hidden states (B, T, d)."""

    def forward(batch: TokenBatch) -> Tensor:
        vectors = model.own_embedding[batch.tokens.to(model.device)]
        return model.stack(inputs_embeds=vectors, use_cache=False).last_hidden_state

    return forward


def text_stream(model: GenerativeModel, settings: GemsConfig) -> TokenStream:
    """The text file `settings.corpus` in the backbone's own tokens, a line at a time, packed without padding.

    Raises:
        ValueError: the backbone has no tokenizer, or the file is not there.
    """
    settings.check(model.pretrained)
    path = Path(settings.corpus)
    place = model.stack.name_or_path
    try:
        tokenizer = AutoTokenizer.from_pretrained(place, trust_remote_code=False)
    except (OSError, ValueError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"backbone.path = {place!r} has no tokenizer to read {path.name} with: {reason}") from None

    def numbers() -> Iterator[int]:
        with path.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                if line.strip():
                    yield from tokenizer(line, add_special_tokens=False)["input_ids"]

    return _limited(lambda: packed_text(numbers(), TEXT_LENGTH, TEXT_BATCH), settings.corpus_tokens)
