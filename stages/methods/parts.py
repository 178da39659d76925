"""What the methods are made of: stage 0's weights, the newest token rows, and the AdamW step they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.profiler import record_function

from models import adapter as lora
from models.generative import GenerativeModel
from stages.checkpoint import BACKBONE, Tensors, read_tensors
from stages.config import AdapterConfig
from stages.methods.contract import Losses, Schedule, SharedLosses, Step

Penalty = Callable[[], dict[str, float]]
"""Adds a term's gradient to `.grad` after the losses' own, and returns numbers to log."""


def load_base(model: GenerativeModel, lineage: Sequence[Path]) -> None:
    """Stage 0's backbone where stage 0 trained one, and the newest token rows of the lineage; nothing trains."""
    load_backbone(model, read_tensors(lineage[0]))
    load_rows(model, lineage)
    model.requires_grad_(False)


def load_rows(model: GenerativeModel, lineage: Sequence[Path]) -> None:
    """The newest token rows of the lineage."""
    for folder in reversed(lineage):
        rows = read_tensors(folder).rows
        if rows:
            with torch.no_grad():
                for name, value in model.rows().items():
                    value.copy_(rows[name])
            break


def load_backbone(model: GenerativeModel, tensors: Tensors) -> None:
    """Copy the stored backbone weights, if any, into the model."""
    own = dict(model.stack.named_parameters())
    with torch.no_grad():
        for name, value in tensors.backbone.items():
            own[name].copy_(value)


def load_adapter(model: GenerativeModel, folder: Path, settings: AdapterConfig) -> None:
    """Attach an adapter and fill it from a checkpoint."""
    lora.attach(model.stack, settings.rank, settings.alpha, settings.targets, seed=0)
    lora.load(model.stack, read_tensors(folder).adapter)


def trained_adapters(lineage: Sequence[Path]) -> list[Path]:
    """The checkpoints whose adapter was trained: all but a stage 0 that trained the backbone instead."""
    return [folder for folder in lineage if not (folder / BACKBONE).exists()]


def let_train(model: GenerativeModel, rows: bool) -> list[nn.Parameter]:
    """Make the attached adapter, and the token rows if `rows`, the only weights that train.

    Raises:
        ValueError: nothing would train.
    """
    chosen = [*lora.matrices(model.stack).values(), *(model.rows().values() if rows else ())]
    if not chosen:
        raise ValueError("nothing trains: no adapter is attached and token_rows = freeze")
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return chosen


def let_rows_train(model: GenerativeModel, rows: bool) -> list[nn.Parameter]:
    """The token rows, training if `rows`; other weights are left as they are."""
    for parameter in model.rows().values():
        parameter.requires_grad_(rows)
    return list(model.rows().values()) if rows else []


def let_backbone_train(model: GenerativeModel, rows: bool) -> list[nn.Parameter]:
    """Make every weight of the decoder stack train, and the token rows if `rows`; not a pretrained vocabulary."""
    model.stack.requires_grad_(True)
    model.stack.get_input_embeddings().requires_grad_(not model.pretrained)
    let_rows_train(model, rows)
    return [p for p in model.parameters() if p.requires_grad]


def adamw_step(parameters: Sequence[nn.Parameter], schedule: Schedule, penalty: Penalty | None = None) -> Step:
    """AdamW (Loshchilov & Hutter, 2019) with linear warm-up and cosine decay, over accumulated micro-batches.

    Args:
        parameters: what moves.
        schedule: rates and bounds.
        penalty: called once a step, after every micro-batch's backward and before clipping.
    """
    optimizer = torch.optim.AdamW(parameters, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
    rate = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: rate_at(step, schedule))

    def step(micro_batches: Iterable[Losses]) -> dict[str, float]:
        optimizer.zero_grad(set_to_none=True)
        logs: dict[str, float] = {}
        for losses in micro_batches:
            total: Tensor = torch.stack(list(losses.values())).sum()
            total.backward()
            for objective, loss in losses.items():
                logs[f"ce/{objective}"] = logs.get(f"ce/{objective}", 0.0) + float(loss.detach())
        logs["ce"] = sum(logs.values())
        if penalty is not None:
            with record_function("driftrec/penalty"):
                logs.update(penalty())
        with record_function("driftrec/clipping"):
            logs["gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, schedule.clip_norm))
        optimizer.step()
        rate.step()
        return logs

    return step


def objective_backward(
    micro_batches: Iterable[Losses], before: Callable[[str], object] = lambda _: None
) -> Iterator[tuple[str, float, float]]:
    """One backward an objective and micro-batch; the consumer takes what it left in `.grad` before the next.

    Args:
        micro_batches: losses by objective.
        before: told the objective whose backward is about to run.

    Yields:
        Objective, loss, and the share of the batch's targets it stands for (alike for all where the loop does not say).
    """
    for losses in micro_batches:
        shares = losses.shares if isinstance(losses, SharedLosses) else dict.fromkeys(losses, 1 / len(losses))
        for place, (objective, loss) in enumerate(losses.items()):
            before(objective)
            loss.backward(retain_graph=place + 1 < len(losses))  # two losses may share a forward pass
            yield objective, float(loss.detach()), shares[objective]


def rate_at(step: int, schedule: Schedule) -> float:
    """Share of the peak rate at optimiser step `step`, from 0."""
    warm = max(1, round(schedule.warmup * schedule.steps))
    if step < warm:
        return (step + 1) / warm
    progress = (step - warm) / max(1, schedule.steps - warm)
    return 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
