"""Indented JSON is what the library gives, byte for byte."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from stages.json_text import indented

SCALARS = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text()
KEYS = st.text() | st.integers() | st.booleans() | st.none()
VALUES = st.recursive(
    SCALARS, lambda part: st.lists(part, max_size=4) | st.dictionaries(KEYS, part, max_size=4) | st.tuples(part, part)
)


@given(VALUES)
def test_the_text_is_the_library_s_byte_for_byte(value: Any) -> None:
    assert indented(value) == json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False)


@pytest.mark.parametrize("value", [float("nan"), [1, [float("inf")]], {"a": {"b": float("-inf")}}])
def test_what_json_does_not_know_is_refused_at_any_depth(value: Any) -> None:
    with pytest.raises(ValueError, match="JSON"):
        indented(value)
    with pytest.raises(TypeError, match="not JSON serializable"):
        indented([{"a": {1, 2}}])
