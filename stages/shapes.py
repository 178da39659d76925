"""JSON that was read, as the value it should be: a file of another shape is named with what is wrong in it."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from pydantic import TypeAdapter, ValidationError

from stages.errors import UserError

T = TypeVar("T")


@cache
def _reader(kind: type[T]) -> TypeAdapter[T]:
    """Made once: it takes longer than what it is for, and a history holds a champion a line."""
    return TypeAdapter(kind)


def shaped(kind: type[T], value: Any, path: Path, what: str, remedy: str) -> T:
    """`value` as a `kind`, every field of the type it is declared with; fields that `kind` does not know are left out.

    Args:
        kind: a dataclass, or a type of collections.
        value: a JSON value.
        path: where it was read.
        what: what the file is not, where it is wrong.
        remedy: what to do about it.

    Raises:
        UserError: the value is of another shape.
    """
    try:
        return _reader(kind).validate_json(json.dumps(value), strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(str(part) for part in first["loc"])
        wrong = f"{place}: {first['msg']}" if place else first["msg"]
        raise UserError(f"{path}: {what} ({wrong}); {remedy}") from None
