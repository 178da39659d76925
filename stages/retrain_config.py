"""Settings of retraining: when a stage closes, what happens to late rows, and what lets a challenger into service."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, Literal, Self, TypeAlias

from pydantic import Field, field_validator, model_validator

from stages.errors import UserError
from stages.settings import Settings

LatePolicy: TypeAlias = Literal["hold", "next_stage", "reject", "rebuild"]
Share: TypeAlias = Annotated[float, Field(ge=-1, le=1, allow_inf_nan=False)]


class CloseConfig(Settings):
    """When the open stage closes; exactly one rule holds, and both look at event times only, never at the clock."""

    period: str | None = None
    """Calendar period such as `1d` or `1w` (polars duration): closes at its end, once a later event is there."""
    events: Annotated[int, Field(ge=1)] | None = None
    """Closes behind this many events and those tied with the last of them, once a later event is there."""

    @model_validator(mode="after")
    def _one_rule(self) -> Self:
        if (self.period is None) == (self.events is None):
            raise ValueError('retrain.close needs one of period and events, such as { period = "1w" }')
        return self

    @model_validator(mode="after")
    def _moves(self) -> Self:
        """Tried at once: the first row that waits in the open stage may come weeks later."""
        if self.period is not None:
            from stages.closing import boundary_after

            try:
                boundary_after(datetime(2025, 1, 1, tzinfo=UTC), self.period)
            except UserError as error:
                raise ValueError(str(error)) from None
        return self


class GateConfig(Settings):
    """What a challenger must show before it replaces the champion."""

    metric: Literal[
        "hit_at_1", "hit_at_5", "hit_at_10", "hit_at_20", "ndcg_at_5", "ndcg_at_10", "ndcg_at_20", "mrr"
    ] = "hit_at_10"
    objective: Literal["recommendation", "search"] = "recommendation"
    """Which queries decide, in a log that holds searches."""
    minimum: Share = 0.0
    """Challenger minus champion must reach this; below 0 it is a margin of non-inferiority."""
    decide_by: Literal["interval", "mean"] = "interval"
    """Whether the lower end of the difference's 95 % interval must reach `minimum`, or the difference alone."""
    worst_slice: Annotated[float, Field(ge=0, le=1)] = 0.05
    """No slice (new items, new users, returning users) may lose more than this."""
    slice_users: Annotated[int, Field(ge=1)] = 30
    """Slices with fewer users are reported and not judged."""
    users: Annotated[int, Field(ge=1)] = 30
    """Fewest test users on whom anything is decided; below it the champion stays."""
    latency_ms: Annotated[float, Field(gt=0)] | None = 1000.0
    """Bound on the 95th percentile of one user's answer in milliseconds; false or 0 looks at no latency."""

    @field_validator("latency_ms", mode="before")
    @classmethod
    def _off(cls, value: object) -> object:
        """TOML has no null."""
        if value is True:
            raise ValueError("give milliseconds, or false for no bound")
        return value or None


class RetrainConfig(Settings):
    """`driftrec retrain`: new rows become stages, a challenger is trained on each, and a gate decides."""

    method: str = "peso"
    """What the challenger is trained with."""
    seed: Annotated[int, Field(ge=0)] | None = None
    """Training seed; absent: the first of `seeds`."""
    protocol: Literal["same_stage", "next_stage"] = "same_stage"
    """`same_stage`: trained on the new stage without everybody's last baskets, which test it; in service at once.
    `next_stage`: trained up to the stage before, tested on the whole new one; stricter, and a stage behind."""
    # Not tried: what tries it imports this module.
    close: CloseConfig = CloseConfig.model_construct(period="1w")
    late: LatePolicy = "hold"
    """Rows older than the last closed stage's end: `hold` keeps them aside in `held/`, `next_stage` puts them into the
    open stage, `reject` lists them in `rejects/` for good, `rebuild` puts them where they belong and trains anew."""
    future_hours: Annotated[float, Field(ge=0, le=1_000_000)] = 24.0
    """Rows later than the clock by more than this are held: one wrong date must not close a stage. A million hours are
    114 years."""
    refused_share: Annotated[float, Field(ge=0, le=1)] = 1.0
    """Most of the rows of the files it reads that a look may refuse; above it the run fails and takes nothing. 1 never
    fails: refused rows are then only counted."""
    users: Annotated[int, Field(ge=1)] | None = None
    """Seeded sample of test users, at least `gate.users`; absent: all."""
    gate: GateConfig = GateConfig()

    @model_validator(mode="after")
    def _enough_users(self) -> Self:
        if self.users is not None and self.users < self.gate.users:
            raise ValueError(
                f"retrain.users ({self.users}) is below retrain.gate.users ({self.gate.users}), so that no challenger "
                "could ever pass; raise the one or lower the other"
            )
        return self
