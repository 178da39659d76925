"""Rankings to replies: item numbers become ids, titles and the nearest history item."""

from __future__ import annotations

import numpy as np

from flows.serving.schema import (
    Item,
    ItemReply,
    Model,
    ModelReply,
    Ranked,
    RecommendReply,
    SearchReply,
    Why,
)
from flows.serving.searching import Past, Ranking
from flows.serving.served import FALLBACK, Served

SHOWN = 20
"""History items a reply repeats; their number is given besides."""
NEIGHBOURS = 5


def recommend_reply(served: Served, past: Past, ranking: Ranking) -> RecommendReply:
    """The list of a person, or the fallback's with the reason."""
    return RecommendReply(
        model=model_of(served),
        method=served.job.method if past.reason is None else FALLBACK,
        fallback=past.reason is not None,
        reason=None if past.reason is None else f"{past.reason}; these items were taken most in the newest stages",
        history=_shown(served, past),
        history_length=len(past.items),
        unknown_items=past.unknown,
        items=_ranked(served, past, ranking),
    )


def search_reply(served: Served, past: Past, ranking: Ranking) -> SearchReply:
    """The list of a query."""
    return SearchReply(
        model=model_of(served),
        method=served.searcher.method,
        reason=past.reason,
        history=_shown(served, past),
        history_length=len(past.items),
        unknown_items=past.unknown,
        items=_ranked(served, past, ranking),
    )


def item_reply(served: Served, number: int) -> ItemReply:
    """What is known of item `number`."""
    catalogue = served.dataset.catalogue
    return ItemReply(
        **_item(served, number).model_dump(),
        first_stage=int(catalogue.first_stage[number]),
        codes=catalogue.codes[number].tolist(),
        known=number < catalogue.known(served.job.stage),
        taken_together=[_item(served, other) for other in served.reasons.neighbours(number, NEIGHBOURS)],
    )


def model_reply(served: Served) -> ModelReply:
    """The model in service, and what can be asked of it."""
    return ModelReply(
        **model_of(served).model_dump(),
        limit=served.limit,
        history_length=served.config.training.history_length,
        items=served.dataset.catalogue.known(served.job.stage),
        users=len(served.users),
        search=served.searcher.method,
        examples=served.examples(),
    )


def model_of(served: Served) -> Model:
    """Method, seed, protocol and stage."""
    job = served.job
    return Model(method=job.method, seed=job.seed, protocol=job.protocol, stage=job.stage)


def _item(served: Served, number: int) -> Item:
    catalogue = served.dataset.catalogue
    return Item(item_id=catalogue.item_ids[number], title=catalogue.titles[number])


def _shown(served: Served, past: Past) -> list[Item]:
    return [_item(served, number) for number in past.items[-SHOWN:].tolist()]


def _ranked(served: Served, past: Past, ranking: Ranking) -> list[Ranked]:
    numbers = np.array([number for number, _ in ranking], dtype=np.int64)
    reasons = served.reasons.nearest(numbers, past.items[-served.config.training.history_length :])
    levels = served.dataset.catalogue.codes.shape[1]
    found = []
    for rank, ((number, score), reason) in enumerate(zip(ranking, reasons, strict=True), start=1):
        item, why = _item(served, number), None
        if reason is not None:
            near = _item(served, reason.item)
            why = Why(
                item_id=near.item_id, title=near.title, kind=reason.kind, shared_levels=reason.shared, levels=levels
            )
        found.append(Ranked(item_id=item.item_id, title=item.title, rank=rank, score=score, why=why))
    return found
