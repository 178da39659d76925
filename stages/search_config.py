"""Settings of search: which objectives a run has, how a query is read, and how the two share a batch."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, field_validator

from stages.settings import Settings

Objective = Literal["recommendation", "search"]
OBJECTIVES: tuple[Objective, ...] = ("recommendation", "search")


class SearchConfig(Settings):
    """Only read where search events are used; without them no number, key or file depends on this table."""

    objectives: tuple[Objective, ...] | None = None
    """Events that are used, the others are as if they were not in the log; absent: all that the log has."""
    mix: Literal["natural", "equal"] = "natural"
    """`natural`: every target of a batch weighs the same; `equal`: each objective has half the weight of the batch."""
    rec_history: Literal["both", "recommendation"] = "both"
    """What a recommendation is predicted from: items of both kinds of events, or of recommendation events only."""
    own_moment: Literal["apart", "read"] = "apart"
    """What a recommendation is learnt from: only what came before its moment, as it is tested, or also what the log has
    before it of its own moment (one month, say)."""
    query_tokens: Annotated[int, Field(ge=1, le=512)] = 32
    """Tokens read of a query; the rest is cut off."""
    words: Annotated[int, Field(ge=0, le=1_000_000)] = 8192
    """Words of stage 0's queries that get a token of their own with `small`, the commonest first; others are spelt."""
    repeats: Literal["leave_out", "ask"] = "leave_out"
    """Whether a test asks for an item that the user has met before, by either kind of event."""

    def trained_with(self) -> dict[str, Any]:
        """What training depends on, by name; a choice that came later is named where it is not the former way."""
        return self.model_dump(exclude={"repeats"} | ({"own_moment"} if self.own_moment == "read" else set()))

    @field_validator("objectives")
    @classmethod
    def _objectives_distinct(cls, objectives: tuple[Objective, ...] | None) -> tuple[Objective, ...] | None:
        if objectives is not None and (not objectives or len(set(objectives)) != len(objectives)):
            raise ValueError(f"search.objectives must be distinct and at least one, got {list(objectives)}")
        return objectives
