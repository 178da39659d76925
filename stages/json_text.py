"""JSON as people read it: indented by two, as `json.dumps(value, indent=2)` gives it, in a fraction of its time."""

from __future__ import annotations

import json
from typing import Any


def indented(value: Any, line: str = "\n") -> str:
    """`value` as indented JSON; NaN is refused.

    The library indents item by item in Python; what holds no other lists or objects, as the hundreds of rows of a
    manifest do, is here left to its quick encoder.

    Args:
        value: a JSON value.
        line: what begins a line at this depth.

    Raises:
        ValueError: NaN or infinity.
        TypeError: not a JSON value.
    """
    if not isinstance(value, dict | list | tuple) or not value:
        return _text(value)
    parts, deeper = value.values() if isinstance(value, dict) else value, line + "  "
    if not any(isinstance(part, dict | list | tuple) for part in parts):
        inside = _text(value, f",{deeper}")[1:-1]
    elif isinstance(value, dict):
        inside = f",{deeper}".join(f"{_key(key)}: {indented(part, deeper)}" for key, part in value.items())
    else:
        inside = f",{deeper}".join(indented(part, deeper) for part in value)
    ends = "{}" if isinstance(value, dict) else "[]"
    return f"{ends[0]}{deeper}{inside}{line}{ends[1]}"


def _key(key: Any) -> str:
    """As the library writes it, which makes text of numbers."""
    return _text(key) if isinstance(key, str) else _text({key: 0}).removeprefix("{").removesuffix(": 0}")


def _text(value: Any, between: str = ", ") -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(between, ": "))
