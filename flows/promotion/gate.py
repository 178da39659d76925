"""Whether a challenger replaces the champion: pure logic over measured numbers, and one sentence that says why."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from stages.retrain_config import GateConfig

if TYPE_CHECKING:
    from stages.contest import Difference, Probe


@dataclass(frozen=True)
class Verdict:
    """What the gate says.

    Attributes:
        passed: the challenger may go into service.
        why: one sentence without a full stop.
    """

    passed: bool
    why: str


def verdict(differences: Mapping[str, Difference] | None, probe: Probe, gate: GateConfig) -> Verdict:
    """Judge a challenger.

    Args:
        differences: challenger minus champion in `gate.metric`, by slice, `all` among them; None where there is no
            champion to compare with.
        probe: how the challenger answered single users.
        gate: the bounds.
    """
    faults = [*_answers(probe, gate), *(() if differences is None else _quality(differences, gate))]
    if faults:
        return Verdict(False, "; ".join(faults))
    if differences is None:
        return Verdict(True, "there is no champion to compare with")
    return Verdict(True, f"{_shown(differences['all'], gate.metric)} reaches gate.minimum = {gate.minimum:g}")


def _answers(probe: Probe, gate: GateConfig) -> Iterator[str]:
    if probe.invalid_rate > 0:
        yield f"{probe.invalid_rate:.2%} of the items it returned are not in the catalogue"
    if gate.latency_ms is not None and probe.p95_ms > gate.latency_ms:
        yield f"it answers in {probe.p95_ms:.0f} ms (95th percentile), above gate.latency_ms = {gate.latency_ms:g}"


def _quality(differences: Mapping[str, Difference], gate: GateConfig) -> Iterator[str]:
    everyone = differences["all"]
    if everyone.users < gate.users or everyone.value is None or everyone.low is None:
        yield f"{everyone.users} test users are fewer than gate.users = {gate.users}"
        return
    judged = everyone.low if gate.decide_by == "interval" else everyone.value
    if not judged >= gate.minimum:  # a NaN passes nothing
        end = "the lower end of " if gate.decide_by == "interval" else ""
        yield f"{end}{_shown(everyone, gate.metric)} is below gate.minimum = {gate.minimum:g}"
    for name, part in differences.items():
        lost = name != "all" and part.users >= gate.slice_users and not (part.value or 0.0) >= -gate.worst_slice
        if lost:
            yield f"{name}: {_shown(part, gate.metric)} loses more than gate.worst_slice = {gate.worst_slice:g}"


def _shown(difference: Difference, metric: str) -> str:
    low, high = difference.low or 0.0, difference.high or 0.0
    return f"{metric} {difference.value:+.4f} [{low:+.4f}, {high:+.4f}] on {difference.users:,} users"
