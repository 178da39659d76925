"""What a model kept: perplexity on held-out material, and how far each linear map's output drifted from stage 0's."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import cast

import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn

from models.backbone import pretrained_backbone
from models.effective import effective_weights
from models.generative import GenerativeModel, TokenBatch
from models.input_moments import InputMoment, TokenStream, input_moments, linear_maps
from models.mixture import MixtureLinear
from stages.config import Config
from stages.errors import UserError
from stages.fit import Fit
from stages.method_config import GemsConfig
from stages.methods.protection import TEXT_LENGTH, reads_items, reads_text, text_stream
from stages.stage_examples import validation_batches
from stages.workspace import sha256_once


def relative_drift(start: Tensor, now: Tensor, moment: Tensor) -> float:
    """‖(W − W_0) X‖ / ‖W_0 X‖ over the inputs X whose second moment is given.

    Args:
        start: W_0 (m, n).
        now: W (m, n).
        moment: Σ x xᵀ (n, n) over the inputs.

    Returns:
        0 where nothing moved; NaN where W_0 maps every input to 0.
    """
    move, base, inputs = (now - start).double(), start.double(), moment.double()
    moved = ((move @ inputs) * move).sum().clamp_min(0)
    whole = ((base @ inputs) * base).sum()
    return float((moved / whole).sqrt()) if float(whole) > 0 else math.nan


def drifts(start: Mapping[str, Tensor], model: GenerativeModel, moments: Mapping[str, InputMoment]) -> dict[str, float]:
    """`relative_drift` of every linear map of `model` that one matrix describes; see `mixture_drifts` for the others.

    Args:
        start: W_0 by map, as `models.effective.effective_weights` gives them.
        model: a trained one.
        moments: by map, of the inputs that the model at W_0 feeds it.
    """
    now = effective_weights(model.stack)
    return {name: relative_drift(start[name], now[name], one.moment) for name, one in moments.items()}


@torch.no_grad()
def mixture_drifts(base: GenerativeModel, model: GenerativeModel, stream: TokenStream, text: bool) -> dict[str, float]:
    """`relative_drift` of the maps of `model` that mix experts token by token: no one matrix says what they do.

    Args:
        base: the model at W_0, with plain weights, which feeds each map its inputs.
        model: a trained one.
        stream: of text or of items.
        text: the stream holds the backbone's own tokens.

    Returns:
        By map; empty where `model` mixes none.
    """
    mixtures = {name: one for name, one in model.stack.named_modules() if isinstance(one, MixtureLinear)}
    if not mixtures:
        return {}
    sums = {name: torch.zeros(2, dtype=torch.float64) for name in mixtures}
    mask = torch.empty(0)

    def compare(name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def hook(_: nn.Module, inputs: tuple[Tensor, ...], before: Tensor) -> None:
            here = mask.to(before.device)
            after = mixtures[name](inputs[0])[here]
            parts = [(after - before[here]).double().square().sum(), before[here].double().square().sum()]
            sums[name] += torch.stack(parts).cpu()

        return hook

    base.eval()
    model.eval()
    read = reads_text(base) if text else reads_items(base)
    maps = linear_maps(base.stack)
    handles = [maps[name].register_forward_hook(compare(name)) for name in mixtures]
    try:
        for batch, inside in stream():
            mask = inside
            read(batch)
    finally:
        for handle in handles:
            handle.remove()
    return {name: float((one[0] / one[1]).sqrt()) if one[1] > 0 else math.nan for name, one in sums.items()}


def moments_of(model: GenerativeModel, stream: TokenStream, text: bool) -> dict[str, InputMoment]:
    """Second moments of the inputs of every linear map, by its name; maps with one input share one.

    Args:
        model: whose inputs they are.
        stream: of text or of items.
        text: the stream holds the backbone's own tokens.
    """
    model.eval()
    forward = reads_text(model) if text else reads_items(model)
    return {name: one for one in input_moments(linear_maps(model.stack), forward, stream) for name in one.names}


def held_out_items(fit: Fit) -> TokenStream:
    """A stage's validation windows as token numbers."""

    def stream() -> Iterator[tuple[TokenBatch, Tensor]]:
        for part in fit.examples.parts.values():
            for chosen in validation_batches(part.validation, fit.settings.batch_size):
                batch = part.batch(part.validation, chosen)
                yield batch, part.inside(batch)

    return stream


def held_out_text(model: GenerativeModel, path: Path, tokens: int) -> TokenStream:
    """The text at `path` in the backbone's own tokens, packed.

    Raises:
        UserError: no such file, or a backbone that reads no text.
    """
    try:
        return text_stream(model, GemsConfig(corpus=str(path), corpus_tokens=tokens))
    except ValueError as error:
        raise UserError(f"analysis.text: {error}") from None


def refuse_protected(config: Config, methods: Iterable[str]) -> None:
    """Refuse to measure what was kept on a text that was given to be kept.

    Args:
        config: names the held-out text, if any.
        methods: that are looked at.

    Raises:
        UserError: `analysis.text` has the bytes of the corpus of one of them.
    """
    text = config.analysis.text
    if text is None or not Path(text).is_file():  # a missing one is told of where it is read
        return
    for name in methods:
        own = config.method(name)
        if not isinstance(own, GemsConfig) or own.null_space == "off" or not Path(own.corpus).is_file():
            continue
        if (digest := sha256_once(Path(text))) == sha256_once(Path(own.corpus)):
            raise UserError(
                f"analysis.text and methods.{name}.corpus are the same text ({text}, SHA-256 {digest[:12]}...): what a "
                "method was told to keep is not held out; name another file in analysis.text"
            )


def own_head(path: str) -> Tensor:
    """(V, d) output rows of a pretrained backbone's own vocabulary, which the recommender leaves aside."""
    return cast(Tensor, pretrained_backbone(path).head)


@torch.no_grad()
def text_perplexity(model: GenerativeModel, head: Tensor, stream: TokenStream) -> float:
    """exp of the mean cross-entropy of the next token.

    Args:
        model: with plain weights.
        head: (V, d) of the backbone's vocabulary.
        stream: of text.

    Raises:
        UserError: the text is shorter than one row.
    """
    model.eval()
    read = reads_text(model)
    total, count = 0.0, 0
    for batch, _ in stream():
        targets = batch.tokens[:, 1:].to(model.device)
        for row, target in zip(read(batch)[:, :-1], targets, strict=True):  # a row at a time: (T, V) logits are large
            total += float(F.cross_entropy(F.linear(row, head.to(row)).float(), target, reduction="sum"))
        count += targets.numel()
    if count == 0:
        raise UserError(f"analysis.text: the file is too short to measure on; give at least {TEXT_LENGTH} tokens")
    return math.exp(total / count)


def item_perplexity(fit: Fit) -> float | None:
    """exp of the mean cross-entropy of a code over the stage's validation windows; None where there are none."""
    loss = fit.validate()
    return None if loss is None else math.exp(loss)
