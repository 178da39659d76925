"""Slow, readable twins that the fast versions are tested against."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 (the usual name)
from torch import Tensor, nn
from transformers import AutoModelForCausalLM


def trie_prefixes(codes: list[tuple[int, ...]]) -> dict[tuple[int, ...], set[int]]:
    """Every prefix of some code tuples, the empty one included, with the codes that may follow it."""
    following: dict[tuple[int, ...], set[int]] = {}
    for item in codes:
        for depth, code in enumerate(item):
            following.setdefault(item[:depth], set()).add(code)
    return following


def trie_items(codes: list[tuple[int, ...]]) -> dict[tuple[int, ...], list[int]]:
    """Each complete tuple with the items it names, rising."""
    named: dict[tuple[int, ...], list[int]] = {}
    for number, item in enumerate(codes):
        named.setdefault(item, []).append(number)
    return named


def semantic_ids(prefixes: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """The last code is the number of earlier items with the same prefix."""
    return [(*prefix, prefixes[:row].count(prefix)) for row, prefix in enumerate(prefixes)]


def pair_counts(users: list[int], items: list[int], window: int) -> dict[tuple[int, int], int]:
    """How often two different items stand within `window` events of each other in one user's history, both ways."""
    counts: dict[tuple[int, int], int] = {}
    for i, (user, item) in enumerate(zip(users, items, strict=True)):
        for j, (other_user, other) in enumerate(zip(users, items, strict=True)):
            if user == other_user and item != other and 0 < abs(i - j) <= window:
                counts[item, other] = counts.get((item, other), 0) + 1
    return counts


def item_scores(model: Any, codes: np.ndarray, offsets: list[int], history: list[int]) -> list[float]:
    """Log-probability of every item's whole code sequence, one forward pass an item."""
    scores = []
    for item in range(len(codes)):
        tokens = [model.bos, *_tokens(codes, offsets, [*history, item])]
        with torch.no_grad():
            log_p = model.logits(model.hidden(torch.tensor([tokens[:-1]]))).log_softmax(dim=-1)[0]
        start = len(tokens) - 1 - len(offsets)
        scores.append(sum(float(log_p[start + level, tokens[start + level + 1]]) for level in range(len(offsets))))
    return scores


def slow_beam(
    model: Any, codes: np.ndarray, offsets: list[int], history: list[int], width: int
) -> list[tuple[int, ...]]:
    """The beam search in words: extend every kept prefix by every code the catalogue allows, keep the best `width`."""
    allowed = {tuple(int(c) for c in row[:depth]) for row in codes for depth in range(len(offsets) + 1)}
    kept: list[tuple[float, tuple[int, ...]]] = [(0.0, ())]
    for level, offset in enumerate(offsets):
        grown = []
        for score, prefix in kept:
            own = [code + offsets[depth] for depth, code in enumerate(prefix)]
            tokens = [model.bos, *_tokens(codes, offsets, history), *own]
            with torch.no_grad():
                log_p = model.logits(model.hidden(torch.tensor([tokens]))).log_softmax(dim=-1)[0, -1]
            following = sorted(path[level] for path in allowed if len(path) == level + 1 and path[:level] == prefix)
            grown += [(score + float(log_p[offset + code]), (*prefix, code)) for code in following]
        kept = sorted(grown, key=lambda pair: (-pair[0], pair[1]))[:width]
    return [prefix for _, prefix in kept]


def _tokens(codes: np.ndarray, offsets: list[int], items: list[int]) -> list[int]:
    return [int(code) + offset for item in items for code, offset in zip(codes[item], offsets, strict=True)]


def causal_lm(model: Any) -> Any:
    """An ordinary causal LM of the same weights: its vocabulary is the codes, then the backbone's own tokens.

    Its output is a softmax over what `model` scores: the codes, and the own tokens where the vocabulary is full.
    """
    stack = copy.deepcopy(model.stack)
    outputs = model.logits(torch.zeros(1, model.output_rows.shape[1])).shape[1]
    config = copy.deepcopy(stack.config)
    config.vocab_size, config.tie_word_embeddings = outputs, False
    config.bos_token_id = config.eos_token_id = config.pad_token_id = None
    with torch.device("meta"):
        whole = AutoModelForCausalLM.from_config(config)
    rows = torch.cat([model.input_rows, model.own_embedding]).detach()
    stack.set_input_embeddings(nn.Embedding.from_pretrained(rows))
    head = model.output_rows if outputs == model.codes else torch.cat([model.output_rows, model.other_rows])
    whole.model, whole.lm_head = stack, nn.Linear(rows.shape[1], outputs, bias=False, device="meta")
    whole.lm_head.weight = nn.Parameter(head.detach().clone())
    return whole.eval()


def generated(
    whole: Any, allowed: dict[tuple[int, ...], list[int]], prompts: torch.Tensor, width: int, levels: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """`generate()` under `prefix_allowed_tokens_fn`: tokens (B, K, L) and log-probabilities (B, K), best first.

    Args:
        whole: of `causal_lm`.
        allowed: tokens that may follow each partial path, in token numbers.
        prompts: (B, P) in the numbers of `whole`, all of one length.
        width: K.
        levels: L.
    """
    size = prompts.shape[1]
    out = whole.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        num_beams=width,
        num_return_sequences=width,
        min_new_tokens=levels,
        max_new_tokens=levels,
        do_sample=False,
        length_penalty=0.0,
        prefix_allowed_tokens_fn=lambda _, tokens: allowed[tuple(tokens[size:].tolist())],
        return_dict_in_generate=True,
        output_scores=True,
    )
    return out.sequences[:, size:].reshape(len(prompts), width, levels), out.sequences_scores.reshape(-1, width)


class NaiveGems:
    """GEMS as section 2 of its specification counts the steps: whole matrices, one map after another, float64.

    Nothing here is oriented, stacked or reduced: bases are U (m, r) or V (n, r) by `sides`, every D_s is formed whole,
    the projector is the matrix I − K Kᵀ, and the gate's gradient is autograd's. An objective absent from a batch has no
    gradient in `step`. A basis vector's sign is arbitrary: it is taken from `seen`, all else is found anew.

    Args:
        weights: W (m, n) by map; moved in place.
        protected: K (n, k) by map, which may be empty.
        ranks: by map, of the shared and of the two specific subspaces.
        sides: "left" or "right" by map.
        phi: weights of the gate's MLP, or None for α = ½.
        every, warmup: T, and the steps before the gate learns.
        refresh, on_refresh: as the settings of those names.
        gate_rate: of Adam on φ.
        shared_grad, scale: as the settings of those names.
    """

    def __init__(
        self,
        weights: dict[str, Tensor],
        protected: Mapping[str, Tensor],
        ranks: Mapping[str, tuple[int, int]],
        sides: Mapping[str, str],
        phi: Tensor | None,
        every: int,
        warmup: int,
        refresh: str,
        on_refresh: str,
        gate_rate: float,
        shared_grad: str,
        scale: float,
    ) -> None:
        self.shared_grad, self.scale, self.norms = shared_grad, scale, dict[str, float]()
        self.weights, self.sides, self.ranks = weights, sides, ranks
        self.free = {
            name: torch.eye(weight.shape[1]).double() - protected[name].double() @ protected[name].double().T
            if name in protected
            else torch.eye(weight.shape[1]).double()
            for name, weight in weights.items()
        }
        self.every, self.warmup, self.refresh, self.on_refresh = every, warmup, refresh, on_refresh
        self.bases: dict[tuple[str, str], Tensor] = {}
        self.first: dict[tuple[str, str], Tensor] = {}
        self.second: dict[tuple[str, str], Tensor] = {}
        self.counts: dict[str, int] = dict.fromkeys(("shared", "search", "recommendation"), 0)
        self.restarts: dict[tuple[str, str], int] = {}
        self.time = 0
        self.phi = None if phi is None else phi.double().clone().requires_grad_(True)
        self.gate_adam = None if self.phi is None else torch.optim.Adam([self.phi], lr=gate_rate, eps=1e-8)
        self.square, self.taught = 0.0, 0
        self.usual: Tensor | None = None
        self.before: tuple[dict[str, dict[str, Tensor]], Tensor, float] | None = None
        self.alpha = torch.zeros(2)
        self.parts: dict[str, dict[str, Tensor]] = {}
        self.slope: list[float] | None = None

    def step(
        self,
        gradients: Mapping[str, Mapping[str, Tensor]],
        losses: Mapping[str, float],
        shares: Mapping[str, float],
        rate: float,
        seen: Mapping[tuple[str, str], Tensor],
    ) -> None:
        """One step.

        Args:
            gradients: ∂L_j/∂W of each objective's token mean, by objective and map.
            losses: the token means.
            shares: of the batch's targets, by objective.
            rate: η.
            seen: bases after this step's refresh, by map and subspace, whose columns' signs are copied.
        """
        for kind, own in gradients.items():
            self.norms.setdefault(kind, sum(float(own[name].norm()) ** 2 for name in self.weights) ** 0.5)
        joint = self._joint(gradients, shares)
        sources: dict[str, Mapping[str, Any]] = {"shared": joint, **gradients}
        self._teach(joint, gradients)
        if self.time % self.every == 0:
            for kind, own in sources.items():
                for name in self.weights:
                    self._turn(name, kind, own[name], seen[name, kind])
        captured = dict[str, float]()
        for kind, own in gradients.items():
            inside = [self._into(self.bases[name, kind], own[name], name) for name in self.weights]
            captured[kind] = sum(float(one.norm()) ** 2 for one in inside) ** 0.5
            self.norms[kind] = 0.9 * self.norms[kind] + 0.1 * captured[kind]
        sources["shared"] = self._joint(gradients, shares)  # by the norms as they are now
        reduced = {
            (name, kind): self._into(self.bases[name, kind], own[name], name)
            for kind, own in sources.items()
            for name in self.weights
        }
        z = self._features(losses, captured, shares) if len(gradients) == 2 else None
        self.alpha = self._weights_of(z, gradients)
        parts = self.parts = {}
        for kind in sources:
            self.counts[kind] += 1
            parts[kind] = {name: self._adam(name, kind, reduced[name, kind]) for name in self.weights}
        scale = {"shared": 1.0, "search": float(self.alpha[0]), "recommendation": float(self.alpha[1])}
        for name, weight in self.weights.items():
            fused = sum(scale[kind] * parts[kind][name] for kind in parts)
            weight -= rate * fused @ self.free[name]
        own_parts = {kind: {n: d @ self.free[n] for n, d in parts[kind].items()} for kind in gradients}
        self.before = None if z is None else (own_parts, z, rate)
        self.time += 1

    def _joint(self, gradients: Mapping[str, Mapping[str, Tensor]], shares: Mapping[str, float]) -> dict[str, Tensor]:
        """G_shared of every map: the sum, the mean over targets, or the sum of gradients of equal norm."""
        middle = sum(self.norms[kind] for kind in gradients) / len(gradients)
        by = {
            "sum": dict.fromkeys(gradients, 1.0),
            "pooled": shares,
            "normalised": {kind: middle / self.norms[kind] for kind in gradients},
        }[self.shared_grad]
        blank = {name: torch.zeros_like(weight) for name, weight in self.weights.items()}
        return {name: sum((by[kind] * gradients[kind][name] for kind in gradients), blank[name]) for name in blank}

    def _turn(self, name: str, kind: str, gradient: Tensor, seen: Tensor) -> None:
        own, rank = gradient @ self.free[name], self.ranks[name][kind != "shared"]
        left, old = self.sides[name] == "left", self.bases.get((name, kind))
        if self.refresh == "power" and old is not None:
            new = torch.linalg.qr(own @ (own.T @ old) if left else own.T @ (own @ old)).Q
        else:
            u, _, vt = torch.linalg.svd(own, full_matrices=False)
            new = u[:, :rank] if left else vt[:rank].T
        new = new * torch.where((new * seen.double()).sum(dim=0) < 0, -1.0, 1.0)
        self.bases[name, kind] = new
        rows = gradient.shape[1] if left else gradient.shape[0]
        blank = torch.zeros((rank, rows) if left else (rows, rank), dtype=torch.float64)
        if old is None or self.on_refresh == "reset":
            self.first[name, kind], self.second[name, kind] = blank, blank.clone()
            self.restarts[name, kind] = self.counts[kind]
        elif self.on_refresh == "rotate":
            self._rotate(name, kind, new.T @ old)

    def _rotate(self, name: str, kind: str, c: Tensor) -> None:
        """M ← C M; var = max(V/bc₂ − μ², 0), V ← bc₂ |(C∘C) var + (C μ)²|; from the right with Cᵀ on the right side."""
        count = self.counts[kind]
        one, two = 1 - 0.9**count, 1 - 0.999**count
        first, second = self.first[name, kind], self.second[name, kind]
        mean = first / one
        spread = (second / two - mean**2).clamp(min=0)
        if self.sides[name] == "left":
            self.first[name, kind] = c @ first
            self.second[name, kind] = two * ((c * c) @ spread + (c @ mean) ** 2).abs()
        else:
            self.first[name, kind] = first @ c.T
            self.second[name, kind] = two * (spread @ (c * c).T + (mean @ c.T) ** 2).abs()

    def _into(self, basis: Tensor, gradient: Tensor, name: str) -> Tensor:
        return basis.T @ gradient if self.sides[name] == "left" else gradient @ basis

    def _adam(self, name: str, kind: str, reduced: Tensor) -> Tensor:
        """D_s, whole: a times what the moments say, taken back from the subspace."""
        place, count = (name, kind), self.counts[kind] - self.restarts[name, kind]
        self.first[place] = 0.9 * self.first[place] + 0.1 * reduced
        self.second[place] = 0.999 * self.second[place] + 0.001 * reduced**2
        move = self.first[place] / (1 - 0.9**count) / ((self.second[place] / (1 - 0.999**count)).sqrt() + 1e-8)
        return self.scale * (self.bases[place] @ move if self.sides[name] == "left" else move @ self.bases[place].T)

    def _features(self, losses: Mapping[str, float], norms: Mapping[str, float], shares: Mapping[str, float]) -> Tensor:
        """Search's share of the losses (over their warm-up mean), of the norms and of the targets."""
        order = ("search", "recommendation")
        now = torch.tensor([losses[kind] for kind in order], dtype=torch.float64)
        if self.usual is None:
            self.usual = now
        elif self.time <= self.warmup:
            self.usual = 0.9 * self.usual + 0.1 * now
        loud = now / self.usual
        louder = norms["search"] / (norms["search"] + norms["recommendation"])
        return torch.stack([loud[0] / loud.sum(), torch.tensor(louder), torch.tensor(shares["search"])]).double()

    def _gate(self, z: Tensor) -> Tensor:
        assert self.phi is not None
        hidden = (len(self.phi) - 2) // 6
        inner, bias, outer, last = self.phi.split([3 * hidden, hidden, 2 * hidden, 2])
        return F.softmax(F.relu(z @ inner.view(hidden, 3).T + bias) @ outer.view(2, hidden).T + last, dim=0)

    def _weights_of(self, z: Tensor | None, present: Mapping[str, object]) -> Tensor:
        if z is None:  # one objective alone: its own part counts a half, the absent one nothing
            return torch.tensor([0.5 * (kind in present) for kind in ("search", "recommendation")])
        if self.phi is None or self.time < self.warmup:
            return torch.tensor([0.5, 0.5])
        return self._gate(z).detach()

    def _teach(self, joint: Mapping[str, Any], present: Mapping[str, object]) -> None:
        """φ against h_j = −η Σ ⟨G_shared(t+1), D_j(t) (I − K Kᵀ)⟩, scaled by its running RMS, clipped to norm 1."""
        self.slope = None
        if self.before is None or self.phi is None or len(present) < 2 or self.time <= self.warmup:
            return
        parts, z, rate = self.before
        self.slope = [
            -rate * sum(float((joint[name] * parts[kind][name]).sum()) for name in self.weights)
            for kind in ("search", "recommendation")
        ]
        h = torch.tensor(self.slope, dtype=torch.float64)
        self.taught += 1
        self.square = 0.99 * self.square + 0.01 * float((h**2).mean())
        scaled = h / (self.square / (1 - 0.99**self.taught)) ** 0.5
        assert self.gate_adam is not None
        self.gate_adam.zero_grad()
        (self._gate(z) @ scaled).backward()
        nn.utils.clip_grad_norm_([self.phi], 1.0)
        self.gate_adam.step()
