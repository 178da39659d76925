"""Equally shaped linear maps under GEMS: their subspaces, the images of each objective's gradient, and the update.

Everything is oriented as in `regularizers.subspace`: `rows × cols` with the bases on the right. For a map whose side is
"left" that is the transpose of its weight, and only the null space, which always lies on the side of the weight's
inputs, has to know. Letters: L maps, R = Σ r_s columns of all subspaces side by side, the shared one first.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from models.input_moments import linear_maps
from regularizers import subspace
from regularizers.gate import LEARNED
from regularizers.null_space import Protection, decay_to_start, project
from regularizers.subspace import JOINED, ranks_of, side_of, too_large
from stages.errors import UserError
from stages.method_config import GemsConfig

BETAS = (0.9, 0.999)


@dataclass(frozen=True)
class Fusion:
    """Squared norms of one stack's update, summed over its maps (without the rate).

    Attributes:
        applied: of what left the weights.
        whole: of D after the null space, before `fuse_norm`.
        shared: of the shared part of D alone.
        raw: of D before the null space.
    """

    applied: float

    whole: float
    shared: float
    raw: float


class Stack:
    """L maps of one shape and side.

    Args:
        maps: by name, all of one shape.
        side: "left" or "right".
        protected: K (n, k) of each map that has one.
        ranks: of the shared and of each specific subspace.
        settings: of the method.
    """

    def __init__(
        self,
        maps: Mapping[str, nn.Linear],
        side: str,
        protected: Mapping[str, Tensor],
        ranks: tuple[int, int],
        settings: GemsConfig,
    ) -> None:
        self.names = list(maps)
        self.weights = [module.weight for module in maps.values()]
        self.right = side == "right"
        self.device = self.weights[0].device
        self.protected = [protected.get(name) for name in self.names]
        self.ranks, self.settings = ranks, settings
        shape = self.weights[0].shape
        self.rows, self.cols = shape if self.right else (shape[1], shape[0])
        self.guards = settings.null_space != "off" and any(one is not None for one in self.protected)
        self.starts = (
            [w.detach().clone() for w in self.weights] if settings.weight_decay == "to_start_projected" else []
        )
        self.widths: tuple[int, ...] = ()
        self.basis = torch.empty(len(self.names), self.cols, 0, device=self.device)
        self.first = self.second = torch.empty(len(self.names), self.rows, 0, device=self.device)
        self.steps = torch.zeros(0, dtype=torch.int64)
        self.age = torch.zeros(len(self.names), 0, dtype=torch.int64)
        self.moved: Tensor | None = None
        self.images: dict[str, Tensor] = {}
        self.full: dict[str, dict[int, Tensor]] = {}
        self.begun: dict[str, set[int]] = {}
        self.restarts = torch.zeros(len(self.names), 0, dtype=torch.int64)
        self.grow((ranks[0],))

    def grow(self, widths: tuple[int, ...]) -> None:
        """Have subspaces of these ranks; those there keep their state, new ones wait for a first refresh."""
        extra, count = sum(widths) - sum(self.widths), len(widths) - len(self.widths)
        layers = len(self.names)
        fresh = torch.cat([torch.eye(self.cols, width) for width in widths[len(self.widths) :]], dim=1)
        self.basis = torch.cat([self.basis, fresh.to(self.device).expand(layers, -1, -1)], dim=2)
        blank = torch.zeros(layers, self.rows, extra, device=self.device)
        self.first, self.second = torch.cat([self.first, blank], dim=2), torch.cat([self.second, blank], dim=2)
        self.steps = torch.cat([self.steps, torch.zeros(count, dtype=torch.int64)])
        self.age = torch.cat([self.age, torch.full((layers, count), -1)], dim=1)
        self.restarts = torch.cat([self.restarts, torch.zeros(layers, count, dtype=torch.int64)], dim=1)
        self.widths = widths
        for name, image in self.images.items():  # a frame holds the basis, and sometimes the reach after it
            frames = image.split(max(1, sum(widths) - extra), dim=2)
            self.images[name] = torch.cat([part for frame in frames for part in (frame, blank)], dim=2)
        self.moved = None
        self.gram = self.gram_reach = torch.empty(layers, sum(widths), sum(widths), device=self.device)
        self.reach = self.basis if not (self.right and self.guards) else torch.empty_like(self.basis)
        if self.reach is not self.basis:
            self.gram_reach = torch.empty_like(self.gram)
        self.derive(range(layers))

    def part(self, number: int) -> slice:
        """Columns of subspace `number`: 0 is the shared one."""
        start = sum(self.widths[:number])
        return slice(start, start + self.widths[number])

    def born(self, number: int) -> bool:
        """Whether every map has had a first refresh of that subspace."""
        return number < len(self.widths) and bool((self.age[:, number] >= 0).all())

    def derive(self, layers: Sequence[int]) -> None:
        """What follows from the bases: the directions updates really take, and the inner products among them."""
        for i in layers:
            self.gram[i] = self.basis[i].T @ self.basis[i]
            if self.reach is not self.basis:
                self.reach[i] = project(self.basis[i].T, self.protected[i], self.settings.null_space).T
                self.gram_reach[i] = self.reach[i].T @ self.reach[i]

    def frame(self, layer: int) -> Tensor:
        """(cols, R) what gradients are projected on; (cols, 2R) where the gate needs the reach besides the basis."""
        if self.settings.basis_from == "gradient_in_null" or self.reach is self.basis:
            return self.reach[layer]
        if self.settings.gate == "hypergradient":
            return torch.cat([self.basis[layer], self.reach[layer]], dim=1)
        return self.basis[layer]

    def through(self, image: Tensor) -> Tensor:
        """(L, rows, R) of an image: its projections on the reach."""
        return image[..., -sum(self.widths) :]

    def expect(self, objective: str) -> None:
        """Have room for an objective's gradients."""
        if objective not in self.images:
            self.images[objective] = self.first.new_zeros(len(self.names), self.rows, self.frame(0).shape[1])
            self.full[objective], self.begun[objective] = {}, set()

    @torch.no_grad()
    def collect(self, objective: str, layer: int, keep: bool) -> None:
        """Take the gradient a backward has just left in one map's `.grad`: project it at once, and drop it.

        Args:
            objective: whose it is.
            layer: number of the map.
            keep: hold it whole besides; all micro-batches of a step or none, a part of a sum being of no use.
        """
        weight, whole, begun = self.weights[layer], self.full[objective], self.begun[objective]
        if weight.grad is None:
            return
        gradient = self.orient(weight.grad)
        self.images[objective][layer].addmm_(gradient, self.frame(layer))
        if layer in whole:
            whole[layer].add_(gradient)
        elif keep and layer not in begun:
            whole[layer] = gradient
        begun.add(layer)
        weight.grad = None

    def orient(self, matrix: Tensor) -> Tensor:
        """The view of a weight-shaped matrix that has the bases on its right, or back."""
        return matrix if self.right else matrix.T

    def check_finite(self, objective: str, step: int) -> None:
        """Raise where a gradient is not finite.

        Raises:
            UserError: names map, objective and step.
        """
        sizes = self.images[objective].flatten(1).sum(dim=1)
        for i, name in enumerate(self.names):
            whole = self.full[objective].get(i)
            if not (sizes[i].isfinite() and (whole is None or whole.sum().isfinite())):
                raise UserError(
                    f"the gradient of {name} is not finite for objective {objective!r} at step {step}; "
                    "lower training.full_learning_rate. Nothing was saved"
                )

    def refresh(self, number: int, layer: int, gradient: Tensor, generator: torch.Generator) -> None:
        """Turn subspace `number` of one map to `gradient` (rows, cols), its moments after it."""
        own, part = self.settings, self.part(number)
        if own.basis_from == "gradient_in_null" and self.guards:
            inputs_last = gradient if self.right else gradient.T
            gradient = self.orient(project(inputs_last, self.protected[layer], own.null_space))
        old, first_time = self.basis[layer][:, part].clone(), int(self.age[layer, number]) < 0
        new = subspace.refreshed(own.refresh, gradient, old, first_time, generator)
        if own.separate and number:
            new = subspace.separated(new, self.basis[layer][:, self.part(0)])
        self.age[layer, number] = 0
        if new is old:
            return
        moments = subspace.carried_moments(
            own.on_refresh,
            self.first[layer][:, part],
            self.second[layer][:, part],
            old,
            new,
            int(self.steps[number]),
            BETAS,
        )
        if own.on_refresh == "reset":
            self.restarts[layer, number] = self.steps[number]
        self.basis[layer][:, part] = new
        self.first[layer][:, part], self.second[layer][:, part] = moments

    def project_again(self, layers: Sequence[int]) -> None:
        """Images of the whole gradients of refreshed maps in their new bases."""
        self.derive(layers)
        for objective, whole in self.full.items():
            for i in layers:
                if i in whole:
                    self.images[objective][i] = whole[i] @ self.frame(i)

    def move(self, gradients: Sequence[Tensor | None], factors: Sequence[float], rate: float, decay: float) -> Fusion:
        """Adam in each subspace, back and fused, without the null space, off the weights.

        Args:
            gradients: (L, rows, r_s) a subspace; None leaves its state untouched and contributes nothing.
            factors: of each subspace's contribution: a, a·α, a·α.
            rate: η, applied once.
            decay: λ of `weight_decay`, 0 for none.
        """
        raw = torch.zeros_like(self.first)
        for number, gradient in enumerate(gradients):
            if gradient is not None:
                part = self.part(number)
                self.steps[number] += 1
                raw[..., part] = subspace.adam(
                    self.first[..., part], self.second[..., part], gradient, self._counted(number), BETAS,
                    self.settings.eps,
                )  # fmt: skip
        self.age += (self.age >= 0).long()
        steps = raw if self.right or not self.guards else self._guarded(raw)
        self.moved = steps if self.settings.gate in LEARNED and len(self.widths) == 3 else None
        columns = torch.repeat_interleave(torch.tensor(factors), torch.tensor(self.widths)).to(self.device)
        fused = steps * columns
        sizes = self._sizes(fused, raw if steps is raw else raw * columns, same=steps is raw)
        if self.settings.fuse_norm == "shared":
            fused = fused * (sizes[1] / sizes[0].clamp_min(1e-30)).sqrt()[:, None, None]
        for i, weight in enumerate(self.weights):
            if decay:
                self._decay(i, weight, rate * decay)
            self._subtract(i, weight, fused[i], rate)
        whole, shared, before = (float(size.sum()) for size in sizes)
        return Fusion(shared if self.settings.fuse_norm == "shared" else whole, whole, shared, before)

    def _counted(self, number: int) -> int | Tensor:
        """Steps that the moments of a subspace hold: t_s, or with `reset` (L, 1, 1) those since each map's refresh."""
        if self.settings.on_refresh != "reset":
            return int(self.steps[number])
        return (self.steps[number] - self.restarts[:, number]).to(self.device)[:, None, None]

    def _subtract(self, layer: int, weight: Tensor, fused: Tensor, rate: float) -> None:
        if self.right:
            weight.data.addmm_(fused, self.reach[layer].T, alpha=-rate)
        else:
            weight.data.addmm_(self.reach[layer], fused.T, alpha=-rate)

    def shift(self, factors: Sequence[float], rate: float) -> None:
        """Move once more along the last step's directions; they are forgotten.

        Args:
            factors: of each subspace's contribution, what they changed by.
            rate: η of that step.
        """
        if self.moved is None:
            return
        columns = torch.repeat_interleave(torch.tensor(factors), torch.tensor(self.widths)).to(self.device)
        for i, weight in enumerate(self.weights):
            self._subtract(i, weight, self.moved[i] * columns, rate)
        self.moved = None

    def _guarded(self, raw: Tensor) -> Tensor:
        """(L, n, R) directions of a left-sided stack without the protected inputs."""
        how = self.settings.null_space
        return torch.stack([project(one.T, self.protected[i], how).T for i, one in enumerate(raw)])

    def _sizes(self, fused: Tensor, raw: Tensor, same: bool) -> tuple[Tensor, Tensor, Tensor]:
        """(L,) squared norms of D, of its shared part and of D before the null space, from (R, R) inner products."""
        inner, shared = fused.mT @ fused, self.part(0)
        after = inner * self.gram_reach
        before = (inner if same else raw.mT @ raw) * self.gram
        return after.sum(dim=(1, 2)), after[:, shared, shared].sum(dim=(1, 2)), before.sum(dim=(1, 2))

    def _decay(self, layer: int, weight: Tensor, amount: float) -> None:
        if self.settings.weight_decay == "to_zero":
            weight.data.mul_(1 - amount)
        elif self.settings.weight_decay == "to_start_projected":
            pull = decay_to_start(weight.data, self.starts[layer], self.protected[layer], self.settings.null_space)
            weight.data.sub_(pull, alpha=amount)

    def forget_gradients(self) -> None:
        """Drop images and whole gradients of the step that ended."""
        self.images, self.full, self.begun = {}, {}, {}

    def overlaps(self) -> Tensor:
        """(3,) mean overlap of shared with the first, shared with the second, first with second specific basis."""
        squares, parts = self.gram.square().mean(dim=0), [self.part(number) for number in range(3)]
        pairs = ((0, 1), (0, 2), (1, 2))
        return torch.stack([squares[parts[a], parts[b]].sum() / min(self.widths[a], self.widths[b]) for a, b in pairs])

    def tensors(self) -> dict[str, Tensor]:
        """All state."""
        held = {"basis": self.basis, "first": self.first, "second": self.second, "steps": self.steps, "age": self.age}
        held |= {"restarts": self.restarts, "right": torch.tensor(self.right)}
        return held | ({"moved": self.moved} if self.moved is not None else {})

    def load(self, held: Mapping[str, Tensor]) -> None:
        """Set the state to what `tensors` gave.

        Raises:
            ValueError: rank, side or model were changed.
        """
        if held["steps"].shape != self.steps.shape:
            self.grow((self.ranks[0], self.ranks[1], self.ranks[1]))
        self.moved = None
        for name, value in self.tensors().items():
            if held[name].shape != value.shape:
                raise ValueError(
                    f"stored {name} of {self.names[0]} is {tuple(held[name].shape)}, here it is {tuple(value.shape)}; "
                    "keep rank and side, or set carry_state = false"
                )
        if bool(held["right"]) != self.right:
            sides = ("left", "right")
            raise ValueError(
                f"stored bases of {self.names[0]} lie on its {sides[bool(held['right'])]} side, here on the "
                f"{sides[self.right]}; keep side, or set carry_state = false"
            )
        for name in ("basis", "first", "second", "steps", "age", "restarts"):
            getattr(self, name).copy_(held[name])
        self.moved = held["moved"].to(self.device, copy=True) if "moved" in held else None
        self.derive(range(len(self.names)))


def make_stacks(
    maps: Mapping[str, nn.Linear], settings: GemsConfig, rank: int, protections: Mapping[str, Protection]
) -> list[Stack]:
    """Maps grouped by shape, each group with its ranks.

    Raises:
        ValueError: no maps, a weight that is not a float32 matrix, or a state larger than Adam's without
            `allow_large_state`.
    """
    if not maps:
        raise ValueError("the backbone has no linear maps for GEMS to train; use full_finetune")
    groups: dict[tuple[int, ...], dict[str, nn.Linear]] = {}
    for name, module in maps.items():
        if module.weight.dtype != torch.float32:
            raise ValueError(f"{name} is {module.weight.dtype}; small steps round away in it, load it in float32")
        groups.setdefault(tuple(module.weight.shape), {})[name] = module
    shapes = [shape for shape, group in groups.items() for _ in group]
    state = too_large(shapes, rank, settings.side, settings.subspaces)
    if state is not None and not settings.allow_large_state:
        raise ValueError(
            f"rank {rank} needs {4 * state[0]:,} bytes of bases and moments, more than Adam's {4 * state[1]:,} on the "
            "same weights; lower the rank or set allow_large_state"
        )
    moved = {id(one.basis): one.basis.to(next(iter(maps.values())).weight.device) for one in protections.values()}
    keep = {name: moved[id(one.basis)] for name, one in protections.items()}  # maps of one input still share it
    return [
        Stack(group, side_of(shape, settings.side), keep, _ranks(shape, settings, rank), settings)
        for shape, group in groups.items()
    ]


def mean_overlaps(stacks: Sequence[Stack], first: str, second: str) -> dict[str, float]:
    """Overlap of the three bases, mean over stacks, as it is logged; `first` and `second` are the objectives."""
    pairs = torch.stack([stack.overlaps() for stack in stacks]).mean(dim=0).cpu()
    names = (f"shared_{first}", f"shared_{second}", f"{first}_{second}")
    return {f"overlap/{name}": float(value) for name, value in zip(names, pairs, strict=True)}


def _ranks(shape: Sequence[int], settings: GemsConfig, rank: int) -> tuple[int, int]:
    return ranks_of(shape, rank * JOINED if settings.subspaces == "one" else rank)


def split_parameters(model: nn.Module, stack: nn.Module) -> tuple[dict[str, nn.Linear], list[nn.Parameter]]:
    """The linear maps of the decoder stack, and every other parameter that requires a gradient."""
    maps = linear_maps(stack)
    taken = {id(module.weight) for module in maps.values()}
    return maps, [p for p in model.parameters() if p.requires_grad and id(p) not in taken]
