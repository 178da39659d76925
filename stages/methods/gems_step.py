"""One optimiser step of GEMS (Zhao et al., 2026): from losses by objective to moved weights.

Order: each objective's backward, projected at once → the gate learns from the step before → due bases are refreshed →
Adam in each subspace → fused by the gate → off the null space → one minus, one rate. Everything that is no matrix of a
linear map (token rows, norms, biases) goes through plain AdamW on the pooled gradient, as in the other methods.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from regularizers.null_space import Protection
from regularizers.subspace import caps, shared_weights, state_floats
from stages.deltas import in_words, smallest
from stages.method_config import GemsConfig
from stages.methods.contract import Losses, Schedule
from stages.methods.gems_arrivals import Arriving, Listener, due_maps
from stages.methods.gems_gate import NORM_DECAY, Batch, FusionGate
from stages.methods.gems_stack import Fusion, make_stacks, mean_overlaps
from stages.methods.parts import objective_backward, rate_at

log = logging.getLogger("stages.gems")


class GemsStep:
    """The method's step; its tensors can be stored and put back between two steps.

    Args:
        maps: linear maps whose matrices move in subspaces, by name.
        others: what plain AdamW moves.
        settings: of the method.
        rank: r.
        protections: protected inputs by map; empty without a null space.
        schedule: rates, decay and seed.

    Raises:
        ValueError: no linear maps, a matrix that is not float32, or a state larger than Adam's.
    """

    def __init__(
        self,
        maps: Mapping[str, nn.Linear],
        others: Sequence[nn.Parameter],
        settings: GemsConfig,
        rank: int,
        protections: Mapping[str, Protection],
        schedule: Schedule,
    ) -> None:
        self.settings, self.schedule, self.others = settings, schedule, list(others)
        self.protections = protections
        self.stacks = make_stacks(maps, settings, rank, protections)
        self.rank = rank
        self.capped = caps([(m.out_features, m.in_features) for m in maps.values()], rank, settings.subspaces)
        self.adamw = (
            torch.optim.AdamW(self.others, lr=schedule.learning_rate, weight_decay=schedule.weight_decay, fused=True)
            if self.others
            else None
        )
        self.objectives: list[str] = []
        """Whose the second and third subspaces are; a carried one need not have been met in this stage."""
        self.met: set[str] = set()
        self.waiting: set[str] = set()
        """Objectives whose carried subspace has not been refreshed in this stage."""
        self.saved: dict[str, int] = {}
        self.projected_bytes = 0
        self.step = torch.zeros((), dtype=torch.int64)
        self.norms = torch.zeros(2)
        self.gate = FusionGate(settings, schedule.seed)
        self.listener = Listener(self.stacks)

    def __call__(self, micro_batches: Iterable[Losses]) -> dict[str, float]:
        """Draw the micro-batches, move the weights, return numbers to log."""
        batch = self._gather(micro_batches)
        logs = {f"ce/{name}": loss for name, loss in batch.losses.items()} | {"ce": sum(batch.losses.values())}
        if not math.isfinite(logs["ce"]):  # the loop says what to do about it
            self._forget()
            return logs
        with torch.no_grad():
            self._check(batch)
            present = [name for name in self.objectives if name in batch.losses]
            rate = self.schedule.learning_rate * rate_at(int(self.step), self.schedule)
            logs |= self._learn(batch)
            logs["refresh_seconds"] = self._refresh(present, batch)
            logs |= self._measure(present)
            alpha = self._alpha(present, batch)
            logs |= self._move(present, batch, alpha, rate) | self._move_others(rate)
            alpha, seen = self._look_ahead(alpha, present, rate)
            logs |= seen
        self.step += 1
        self.gate.last_rate.fill_(rate)
        self._forget()
        return logs | self._account(alpha)

    def _gather(self, micro_batches: Iterable[Losses]) -> Batch:
        losses, shares = dict[str, float](), dict[str, float]()
        for parameter in self.others:
            parameter.grad = None
        for name, loss, share in objective_backward(micro_batches, self._expect):
            losses[name] = losses.get(name, 0.0) + loss
            shares[name] = shares.get(name, 0.0) + share
        self.listener.now = None
        self.projected_bytes = sum(image.nbytes for stack in self.stacks for image in stack.images.values())
        total = sum(shares.values())
        shares = {name: share / total for name, share in shares.items()}
        for stack in self.stacks:  # from the loop's shares to token means
            for name, share in shares.items():
                stack.images[name] /= share
                stack.full[name] = {i: whole / share for i, whole in stack.full[name].items()}
        return Batch(losses, shares)

    def _meet(self, objective: str) -> None:
        """A second objective opens the specific subspaces; until then the shared one works alone."""
        if objective in self.met:
            return
        if objective not in self.objectives:
            if len(self.objectives) == 2:
                raise ValueError(f"a third objective, {objective!r}: GEMS fuses two, {' and '.join(self.objectives)}")
            if self.objectives and objective > self.objectives[0]:  # the one met first moves to the second place
                self.norms = self.norms.flip(0)
            self.objectives = sorted([*self.objectives, objective], reverse=True)  # search, then recommendation
        self.met.add(objective)
        if self.fusing:
            for stack in self.stacks:
                if len(stack.widths) == 1:
                    stack.grow((stack.ranks[0], stack.ranks[1], stack.ranks[1]))
        log.info("gems: %s", self.sizes())

    @property
    def paired(self) -> bool:
        """Whether this stage has met both objectives; before that the shared subspace works alone."""
        return len(self.met) == 2

    @property
    def fusing(self) -> bool:
        """Whether there are paths of two objectives to weigh; `subspaces = "one"` has none."""
        return self.paired and self.settings.subspaces == "three"

    @torch.no_grad()
    def _expect(self, objective: str) -> None:
        """A backward of `objective` is about to run: say of each map whether its gradient is kept whole."""
        self._meet(objective)
        number, keep = self._number(objective), []
        for stack, due in zip(self.stacks, self._due(), strict=True):
            stack.expect(objective)
            wanted = not stack.born(0) or (self.fusing and (objective in self.waiting or not stack.born(number)))
            keep.append([wanted or one for one in due])
        self.listener.now = Arriving(objective, keep)

    def _number(self, objective: str) -> int:
        """The objective's subspace: 1 or 2."""
        return 1 + self.objectives.index(objective)

    def _due(self) -> list[list[bool]]:
        return due_maps(self.stacks, int(self.step), self.settings)

    def _check(self, batch: Batch) -> None:
        for name in batch.losses:
            parts = [stack.images[name].sum() for stack in self.stacks]
            parts += [whole.sum() for stack in self.stacks for whole in stack.full[name].values()]
            if not bool(torch.stack(parts).sum().isfinite()):
                for stack in self.stacks:
                    stack.check_finite(name, int(self.step))

    def _learn(self, batch: Batch) -> dict[str, float]:
        slope = self.gate.learn(int(self.step), self.stacks, self._shared_factors(batch.shares))
        return {} if slope is None else self._told(slope)

    def _told(self, slope: Sequence[float]) -> dict[str, float]:
        return {f"hypergradient/{name}": h for name, h in zip(self.objectives, slope, strict=True)}

    def watch(self, held_out: Callable[[], Iterable[Losses]]) -> None:
        """Where `gate = "lookahead"` finds the losses of a batch that is not the one being trained on."""
        self.gate.held_out = held_out

    def _look_ahead(self, alpha: Tensor, present: Sequence[str], rate: float) -> tuple[Tensor, dict[str, float]]:
        if len(present) < 2:
            return alpha, {}
        found = self.gate.look_ahead(int(self.step), self.stacks, rate, self._shared_factors)
        for parameter in self.others:
            parameter.grad = None
        if found is None:
            return alpha, {}
        change, slope = found
        return alpha + change, self._told(slope)

    def _shared_factors(self, shares: Mapping[str, float]) -> dict[str, float]:
        """Of each objective's gradient in the shared loss, from its share of a batch's targets."""
        present = [name for name in self.objectives if name in shares]
        norms = [float(self.norms[self.objectives.index(name)]) for name in present]
        factors = shared_weights(self.settings.shared_grad, [shares[name] for name in present], norms)
        return dict(zip(present, factors, strict=True))

    def _refresh(self, present: Sequence[str], batch: Batch) -> float:
        """Refresh what is due; seconds it took."""
        started = time.perf_counter()
        self._first_norms(present)
        factors = self._shared_factors(batch.shares)
        generator = torch.Generator().manual_seed((self.schedule.seed + int(self.step)) % 2**63)
        for stack, due in zip(self.stacks, self._due(), strict=True):
            turned = set[int]()
            for i in range(len(stack.names)):
                wholes = {name: stack.full[name][i] for name in present if i in stack.full[name]}
                if not wholes:
                    continue
                if due[i] or int(stack.age[i, 0]) < 0:
                    joint = sum(
                        (wholes[name] * factors[name] for name in wholes), stack.first.new_zeros(stack.rows, stack.cols)
                    )
                    stack.refresh(0, i, joint, generator)
                    turned.add(i)
                for name, whole in wholes.items() if self.fusing else ():
                    number = self._number(name)
                    if due[i] or name in self.waiting or int(stack.age[i, number]) < 0:
                        stack.refresh(number, i, whole, generator)
                        turned.add(i)
            if turned:
                stack.project_again(sorted(turned))
        if self.paired:
            self.waiting -= set(present)
        return time.perf_counter() - started

    def _first_norms(self, present: Sequence[str]) -> None:
        """An objective's running norm starts at that of its first whole gradient."""
        for name in present:
            place = self.objectives.index(name)
            wholes = [whole for stack in self.stacks for whole in stack.full[name].values()]
            if float(self.norms[place]) == 0 and wholes:
                self.norms[place] = torch.stack([whole.norm() for whole in wholes]).norm()

    def _measure(self, present: Sequence[str]) -> dict[str, float]:
        """Norm of each objective's gradient inside its own subspace, and their cosine inside the shared one."""
        logs = {}
        for name in present:
            number = self._number(name) if self.fusing else 0
            images = [stack.images[name][..., stack.part(number)] for stack in self.stacks]
            norm = torch.stack([image.norm() for image in images]).norm()
            place = self.objectives.index(name)
            self.norms[place] = NORM_DECAY * self.norms[place] + (1 - NORM_DECAY) * norm
            logs[f"captured_norm/{name}"] = float(norm)
        if len(present) == 2:
            inner = torch.zeros(3)
            for stack in self.stacks:
                a, b = (stack.images[name][..., stack.part(0)] for name in present)
                inner += torch.stack([(a * b).sum(), a.square().sum(), b.square().sum()]).cpu()
            logs["cosine_in_shared"] = float(inner[0] / (inner[1] * inner[2]).sqrt().clamp_min(1e-30))
        self.last_norms = torch.tensor([logs.get(f"captured_norm/{name}", 0.0) for name in self.objectives])
        return logs

    def _alpha(self, present: Sequence[str], batch: Batch) -> Tensor:
        """α (2,) in the order of `objectives`; zero for an objective the batch does not hold."""
        if not self.fusing:
            return torch.zeros(2)
        here = torch.tensor([float(name in present) for name in self.objectives])
        if len(present) < 2:
            return 0.5 * here
        losses = torch.tensor([batch.losses[name] / batch.shares[name] for name in self.objectives])
        samples = torch.tensor([batch.shares[name] for name in self.objectives])
        return self.gate.alpha(int(self.step), losses, self.last_norms, samples)

    def _move(self, present: Sequence[str], batch: Batch, alpha: Tensor, rate: float) -> dict[str, float]:
        factors, scale = self._shared_factors(batch.shares), self.settings.scale
        decay = self.schedule.weight_decay if self.settings.weight_decay != "none" else 0.0
        sizes: list[Fusion] = []
        for stack in self.stacks:
            shared = sum(
                (stack.images[name][..., stack.part(0)] * factors[name] for name in present),
                stack.first.new_zeros(len(stack.names), stack.rows, stack.widths[0]),
            )
            gradients: list[Tensor | None] = [shared]
            for name in self.objectives if len(stack.widths) > 1 else ():
                number = self._number(name)
                ready = self.paired and name in present and stack.born(number)
                gradients.append(stack.images[name][..., stack.part(number)] if ready else None)
            weights = [scale, *(scale * float(a) for a in alpha)][: len(stack.widths)]
            sizes.append(stack.move(gradients, weights, rate, decay))
            if len(present) < 2:
                stack.moved = None  # α was not the gate's choice, so there is nothing for it to learn
        whole, shared = sum(one.whole for one in sizes), sum(one.shared for one in sizes)
        return {
            "update_over_shared": math.sqrt(max(0.0, whole) / max(shared, 1e-30)),
            "removed_share": 1 - whole / max(sum(one.raw for one in sizes), 1e-30),
            "update_norm": rate * math.sqrt(max(0.0, sum(one.applied for one in sizes))),
            "rate": rate,
        }

    def _move_others(self, rate: float) -> dict[str, float]:
        if self.adamw is None:
            return {}
        self.adamw.param_groups[0]["lr"] = rate
        norm = nn.utils.clip_grad_norm_(self.others, self.schedule.clip_norm)
        self.adamw.step()
        return {"gradient_norm": float(norm)}

    def _account(self, alpha: Tensor) -> dict[str, float]:
        logs = {"single_objective": float(not self.paired), "state_bytes": float(self.state_bytes())}
        if self.fusing:
            p = alpha.clamp_min(1e-30)
            logs |= {f"alpha/{name}": float(a) for name, a in zip(self.objectives, alpha, strict=True)}
            logs["alpha_entropy"] = float(-(alpha * p.log()).sum())
            logs |= mean_overlaps(self.stacks, *self.objectives)
        return logs

    def _forget(self) -> None:
        for stack in self.stacks:
            stack.forget_gradients()

    def report(self) -> dict[str, Any]:
        """Ranks, bytes and what is protected, for `state.json`."""
        return {
            "gems": {
                "rank": self.rank,
                "corpus": Path(self.settings.corpus).name,
                "objectives": [name for name in self.objectives if name in self.met],
                "subspaces": self.objectives,
                "single_objective": not self.paired,
                "capped": self.capped,
                "state_bytes": self.state_bytes(),
                "predicted_bytes": self.predicted_bytes(),
                "protected_bytes": sum({id(one.basis): one.basis.nbytes for one in self.protections.values()}.values()),
                "protected": {name: one.numbers() for name, one in self.protections.items()},
                "checkpoint": self.saved,
            }
        }

    def stored(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Each weight whole or as the move of this stage, whichever is smaller; `report` then says which."""
        self.saved = in_words(found := smallest(before, after))
        return found

    def kept(self) -> dict[str, Tensor]:
        """`tensors`, where the next stage carries them over."""
        return self.tensors() if self.settings.carry_state else {}

    def state_bytes(self) -> int:
        """Bytes of bases and moments."""
        return sum(t.numel() * 4 for stack in self.stacks for t in (stack.basis, stack.first, stack.second))

    def predicted_bytes(self) -> int:
        """`state_bytes` by the formula, of the subspaces that are open."""
        return sum(4 * len(s.names) * state_floats(s.rows, s.cols, s.widths) for s in self.stacks)

    def sizes(self) -> str:
        """Bytes of the state, counted and predicted, and of the parameters that no subspace moves, in words."""
        own = f"{self.state_bytes():,} bytes of bases and moments (predicted {self.predicted_bytes():,})"
        rest = f"{sum(p.nbytes for p in self.others):,} of rows and norms under AdamW"
        return f"{own} for {' and '.join(self.objectives)}; {rest}"

    def whole_bytes(self) -> int:
        """Bytes of the whole gradients held now, for bases that are made anew."""
        return sum(one.nbytes for stack in self.stacks for own in stack.full.values() for one in own.values())

    def tensors(self) -> dict[str, Tensor]:
        """All state as tensors; `load` of a step built the same way goes on bit for bit."""
        held: dict[str, Tensor] = {}
        for n, stack in enumerate(self.stacks):
            held |= {f"stack{n}.{name}": value for name, value in stack.tensors().items()}
        held |= {"step": self.step, "norms": self.norms} | self.gate.tensors()
        for n, parameter in enumerate(self.others):
            state = self.adamw.state[parameter] if self.adamw is not None else {}
            held |= {f"adamw{n}.{name}": value for name, value in state.items()}
        return {name: value.detach().clone() for name, value in held.items()}

    def load(self, held: Mapping[str, Tensor], objectives: Sequence[str], carry: bool = False) -> None:
        """Put back what `tensors` gave.

        Args:
            held: stored tensors.
            objectives: those of the stored step's subspaces.
            carry: from the stage before: only bases, moments and gate, and steps are counted anew.

        Raises:
            ValueError: shapes of another rank, side or model.
        """
        for n, stack in enumerate(self.stacks):
            own = f"stack{n}."
            stack.load({name.removeprefix(own): value for name, value in held.items() if name.startswith(own)})
        self.gate.load(held, carry)
        self.objectives = list(objectives)
        self.norms = held["norms"].clone()
        if carry:
            self.waiting = set(objectives)
            for stack in self.stacks:
                stack.moved = None
            return
        self.met = set(objectives)
        self.step = held["step"].clone()
        for n, parameter in enumerate(self.others):
            own = f"adamw{n}."
            state = {name.removeprefix(own): v.clone() for name, v in held.items() if name.startswith(own)}
            state = {name: v if name == "step" else v.to(parameter.device) for name, v in state.items()}
            if state and self.adamw is not None:
                self.adamw.state[parameter] = state
