from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from regularizers.surgery import without_conflict
from stages.methods.contract import Schedule
from stages.methods.surgery import SurgeryStep

SCHEDULE = Schedule(steps=100, learning_rate=1e-2, warmup=0, weight_decay=0, clip_norm=1e9, seed=0)


def test_two_opposed_arrows_lose_what_opposes_them_by_hand() -> None:
    a, b = torch.tensor([1.0, 0.0]), torch.tensor([-1.0, 1.0])
    (left,), (right,), conflict = without_conflict([a], [b])
    # a loses its part along b: (1, 0) - (-1/2)(-1, 1) = (1/2, 1/2); b loses (-1, 0) and keeps (0, 1).
    assert conflict
    torch.testing.assert_close(left, torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(right, torch.tensor([0.0, 1.0]))
    (left,), (right,), conflict = without_conflict([a], [-b])
    assert not conflict
    assert torch.equal(left, a)
    assert torch.equal(right, -b)


def test_each_is_cleared_of_the_original_other_not_of_the_cleared_one() -> None:
    a, b = torch.tensor([2.0, 0.0]), torch.tensor([-1.0, 1.0])
    (left,), (right,), _ = without_conflict([a], [b])
    assert float(left @ b) == float(right @ a) == 0.0
    (turned,), (other,), _ = without_conflict([b], [a])
    assert torch.equal(left, other)
    assert torch.equal(right, turned)


class Pair(nn.Module):
    """Two matrices; the objectives agree strongly on the first and oppose each other on the second."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.row = (nn.Parameter(torch.zeros(2)) for _ in range(3))

    def losses(self) -> dict[str, Tensor]:
        search = 5 * self.a[0] + self.b[0] + self.row.sum()
        recommendation = 5 * self.a[0] - self.b[0] + self.b[1] + self.row.sum()
        return {"search": search, "recommendation": recommendation}


@pytest.mark.parametrize(("method", "expected"), [("pcgrad", [0.0, 1.0]), ("ortho_lora", [0.5, 1.5])])
def test_one_vector_hides_a_conflict_that_one_matrix_shows(method: str, expected: list[float]) -> None:
    pair = Pair()
    step = SurgeryStep(list(pair.parameters()), {"a": pair.a, "b": pair.b}, method, SCHEDULE)
    logs = step([pair.losses()])
    assert pair.a.grad is not None
    assert pair.b.grad is not None
    torch.testing.assert_close(pair.a.grad, torch.tensor([10.0, 0.0]))
    torch.testing.assert_close(pair.b.grad, torch.tensor(expected))
    assert logs["conflicts"] == (0.0 if method == "pcgrad" else 0.5)
    assert logs["cosine"] == pytest.approx((25 - 1) / (26 * 27) ** 0.5)
    torch.testing.assert_close(pair.row.grad, torch.full((2,), 2.0))


@pytest.mark.parametrize(("objective", "expected"), [("search", [0.5, 0.5]), ("recommendation", [0.0, 1.0])])
@pytest.mark.parametrize("factor", [1.0, -1.0])
def test_one_objectives_part_is_what_the_surgery_leaves_of_it(
    objective: str, expected: list[float], factor: float
) -> None:
    pair = Pair()
    step = SurgeryStep(list(pair.parameters()), {"a": pair.a, "b": pair.b}, "ortho_lora", SCHEDULE)
    logs = step.alone([pair.losses()], objective, factor)
    torch.testing.assert_close(pair.b.grad, factor * torch.tensor(expected))
    torch.testing.assert_close(pair.a.grad, factor * torch.tensor([5.0, 0.0]))
    assert logs["conflicts"] == 0.5


def test_micro_batches_add_up_before_the_surgery() -> None:
    whole, parts = Pair(), Pair()
    logs = [
        SurgeryStep(list(pair.parameters()), {"a": pair.a, "b": pair.b}, "ortho_lora", SCHEDULE)(batches)
        for pair, batches in (
            (whole, [whole.losses()]),
            (parts, [{name: loss / 2 for name, loss in parts.losses().items()} for _ in range(2)]),
        )
    ]
    torch.testing.assert_close(parts.b.grad, whole.b.grad)
    assert logs[0] == pytest.approx(logs[1])


def test_one_objective_alone_is_plain_adamw() -> None:
    pair = Pair()
    step = SurgeryStep(list(pair.parameters()), {"a": pair.a, "b": pair.b}, "pcgrad", SCHEDULE)
    logs = step([{"recommendation": pair.losses()["recommendation"]}])
    assert "conflicts" not in logs
    torch.testing.assert_close(pair.b.grad, torch.tensor([-1.0, 1.0]))
