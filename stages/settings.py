"""What every table of settings is: frozen, and strict about its keys."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Annotated

from pydantic import AfterValidator, BaseModel, ConfigDict


class Settings(BaseModel):
    """A frozen table that refuses keys it does not know, and numbers that are not finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, use_attribute_docstrings=True, allow_inf_nan=False)


def _some(targets: tuple[str, ...]) -> tuple[str, ...]:
    if not targets:
        raise ValueError('name at least one kind of linear map, such as "gate_proj"; got none')
    return targets


Targets = Annotated[tuple[str, ...], AfterValidator(_some)]
"""Last names of the linear maps that a method works on."""


def nearest(word: str, known: Iterable[str]) -> str:
    """`"; did you mean 'x'?"` for the closest of `known`, or an empty string."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""
