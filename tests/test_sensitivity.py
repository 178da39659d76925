"""Curves along one setting of GEMS, from what a workspace's reports recorded."""

from __future__ import annotations

from typing import Any

import pytest

from stages.analysis.sensitivity import drift_report, sensitivity
from stages.method_config import BUILT_IN, GemsConfig, MethodConfig


def report(values: dict[str, float], **methods: MethodConfig) -> dict[str, Any]:
    rows = [
        {"method": name, "seed": 0, "stage": "mean", "protocol": "same_stage", "objective": "search", "slice": "all"}
        | {"metric": "hit_at_10", "value": value, "low": None, "high": None}
        for name, value in values.items()
    ]
    named = {name: settings.model_dump(mode="json") for name, settings in methods.items()}
    return {"rows": rows, "settings": named, "config": {"backbone": {}}, "command": {"seeds": [0]}}


def test_a_curve_holds_what_differs_in_one_setting_alone() -> None:
    first = report(
        {"a": 0.1, "b": 0.2, "c": 0.3, "single": 0.9},
        a=GemsConfig(scale=1.0),
        b=GemsConfig(scale=2.0),
        c=GemsConfig(scale=3.0, gate_temperature=2.0),
    )
    older = report({"a": 0.7, "d": 0.4}, a=GemsConfig(scale=1.0), d=GemsConfig(scale=1.0, gate_temperature=0.5))
    found = [(row["axis"], row["x"], row["value"]) for row in sensitivity([first, older])]
    assert found == [
        ("gate_temperature", 0.5, 0.4),
        ("gate_temperature", 1.0, 0.1),
        ("scale", 1.0, 0.1),
        ("scale", 2.0, 0.2),
    ]
    drifted = [("a", 1, 0.5), ("a", 1, 0.7), ("a", 0, 9.0), ("b", 1, 0.2), ("single", 1, 3.0)]
    rows = [{"method": method, "stage": stage, "value": value} for method, stage, value in drifted]
    moved = drift_report(rows, 1, first, "same_stage", 0)
    assert [(row["axis"], row["x"], row["value"]) for row in sensitivity([moved])] == [
        ("scale", 1.0, pytest.approx(0.6)),
        ("scale", 2.0, 0.2),
    ]
    assert not sensitivity([{**one, "settings": {}} for one in (first, older)])  # what they ran is not known
    older["config"]["backbone"] = {"hidden": 7}
    assert [row["value"] for row in sensitivity([first, older])] == [0.4, 0.7, 0.1, 0.2]  # two models, two curves


def test_the_refresh_is_an_axis_of_its_own_at_an_equal_warm_up() -> None:
    names = ("gems", "gems_refresh_50", "gems_refresh_1000", "gems_refresh_svd", "gems_refresh_rsvd")
    settings = {**{name: BUILT_IN[name] for name in names}, "alone": GemsConfig(refresh_every=7)}
    own = report({name: 0.1 * place for place, name in enumerate(settings)}, **settings)
    found = [(row["axis"], row["x"], row["method"]) for row in sensitivity([own])]
    assert found == [  # the one whose gate warms up for 7 steps differs in two settings
        ("refresh", "power", "gems"),
        ("refresh", "rsvd", "gems_refresh_rsvd"),
        ("refresh", "svd", "gems_refresh_svd"),
        ("refresh_every", 50, "gems_refresh_50"),
        ("refresh_every", 200, "gems"),
        ("refresh_every", 1000, "gems_refresh_1000"),
    ]
    fixed = {f"every_{t}": GemsConfig(refresh_every=t, gate="constant") for t in (7, 70)}
    found = sensitivity([report(dict.fromkeys(fixed, 0.5), **fixed)])
    assert [(row["axis"], row["x"]) for row in found] == [("refresh_every", 7), ("refresh_every", 70)]
