"""What the service reads and answers, as JSON. Limits stand here, so that OpenAPI states them."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

LONGEST_ID = 256
"""Characters of a user or item id."""
LONGEST_QUERY = 256
"""Characters of a search query."""
LONGEST_HISTORY = 1000
"""Item ids of a history; models read the newest `history_length` of them."""

Id = Annotated[str, Field(min_length=1, max_length=LONGEST_ID)]
Count = Annotated[int, Field(ge=1, strict=True, description="length of the list, at most the model's limit")]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid")


class RecommendRequest(_Strict):
    """For whom: a user of the log, or anybody with a history of item ids, oldest first."""

    user: Id | None = None
    history: Annotated[list[Id], Field(max_length=LONGEST_HISTORY)] | None = None
    k: Count = 10

    @model_validator(mode="after")
    def _one_person(self) -> Self:
        if (self.user is None) == (self.history is None):
            raise ValueError("give either user or history")
        return self


class SearchRequest(_Strict):
    """What is looked for, and optionally by whom."""

    query: Annotated[str, Field(min_length=1, max_length=LONGEST_QUERY)]
    user: Id | None = None
    history: Annotated[list[Id], Field(max_length=LONGEST_HISTORY)] | None = None
    k: Count = 10

    @model_validator(mode="after")
    def _at_most_one_person(self) -> Self:
        if self.user is not None and self.history is not None:
            raise ValueError("give user or history, not both")
        if not self.query.strip():
            raise ValueError("query is blank; give at least one word")
        return self


class Model(BaseModel):
    """The model in service."""

    method: str
    seed: int
    protocol: str
    stage: int


class Item(BaseModel):
    """An item of the catalogue."""

    item_id: str
    title: str


class Why(Item):
    """The history item nearest to a recommended one, looked up afterwards: it is no part of the model's score."""

    kind: Literal["again", "taken_together", "similar"]
    shared_levels: int
    """Levels of the semantic ID that agree."""
    levels: int


class Ranked(Item):
    """An item of a list. `score` falls along it: a log-probability, or a baseline's count."""

    rank: int
    score: float
    why: Why | None


class RecommendReply(BaseModel):
    """A list for a person."""

    model: Model
    method: str
    """Who ranked: the model's method, or the fallback."""
    fallback: bool
    reason: str | None
    """Why the fallback answered."""
    history: list[Item]
    """The items that the list rests on, oldest first; the newest ones where there are many."""
    history_length: int
    unknown_items: list[str]
    items: list[Ranked]


class SearchReply(BaseModel):
    """A list for a query."""

    model: Model
    method: str
    """Who ranked: the model in service if it was trained on searches, after the history; else `title_words`, which
    compares the words of the titles and does not look at the history."""
    reason: str | None
    """What of the request could not be used."""
    history: list[Item]
    history_length: int
    unknown_items: list[str]
    items: list[Ranked]


class ItemReply(Item):
    """What is known of an item."""

    first_stage: int
    codes: list[int]
    known: bool
    """Whether the model in service can recommend it."""
    taken_together: list[Item]


class ModelReply(Model):
    """The model in service, and what can be asked of it."""

    limit: int
    """The largest k."""
    history_length: int
    """Items of a history that the model reads."""
    items: int
    users: int
    search: str
    """Who answers a search."""
    examples: list[str]
    """Users to try it with."""


class State(BaseModel):
    """Whether the service lives, and what it last stumbled over."""

    ok: bool
    fault: str | None = None


class Error(BaseModel):
    """What was wrong, in one sentence."""

    error: str
