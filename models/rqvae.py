"""A learned quantizer: the residual-quantised autoencoder of TIGER (Rajput et al., 2023, section 3.1)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from models.quantizer import (
    FloatArray,
    IntArray,
    centroids,
    last_level_order,
    nearest_codes,
    on_grid,
    residual_codes,
    stacked,
)

HIDDEN = (128, 64)
LATENT = 32
BATCH = 512
LEARNING_RATE = 1e-3
STEPS = 2000
COMMITMENT = 0.25  # beta of the paper
RESET_EVERY = 50  # steps after which a code that nobody chose is moved


@dataclass(frozen=True)
class RqVae:
    """The encoder and the codebooks of a trained RQ-VAE, in float64; the decoder has done its work.

    Codes are exact in the latent space as in `models.quantizer`. Training is repeatable for one seed, number of threads
    and library version; it is not bit-identical across them.

    Attributes:
        weights: (out, in) of each linear layer; ReLU between them.
        biases: (out,) of each linear layer.
        codebooks: one (codes, latent) array a level, on the grid.
    """

    weights: tuple[FloatArray, ...]
    biases: tuple[FloatArray, ...]
    codebooks: tuple[FloatArray, ...]

    @classmethod
    def fit(cls, vectors: FloatArray, levels: int, codes_per_level: int, seed: int, steps: int | None = None) -> Self:
        """Train on vectors (n, d) for 2,000 steps or `steps`, seeded; sizes by `models.quantizer.codebook_size`.

        Raises:
            ValueError: no vectors, or a number that is not finite.
        """
        rows = torch.from_numpy(on_grid(vectors)).float()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            encoder, decoder = _mlp(rows.shape[1], *HIDDEN, LATENT), _mlp(LATENT, *HIDDEN[::-1], rows.shape[1])
            codebooks = _first_codebooks(encoder, rows, levels, codes_per_level, seed)
            _train(encoder, decoder, codebooks, rows, STEPS if steps is None else steps)
        linear = [layer for layer in encoder if isinstance(layer, nn.Linear)]
        return cls(
            weights=tuple(layer.weight.detach().double().numpy() for layer in linear),
            biases=tuple(layer.bias.detach().double().numpy() for layer in linear),
            codebooks=tuple(on_grid(codebook.detach().numpy()) for codebook in codebooks),
        )

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, npt.NDArray[np.generic]]) -> Self:
        """Rebuild from `arrays()`."""
        return cls(stacked(arrays, "weight"), stacked(arrays, "bias"), stacked(arrays, "codebook"))

    @property
    def sizes(self) -> tuple[int, ...]:
        """Number of codes at each level."""
        return tuple(len(codebook) for codebook in self.codebooks)

    def encode(self, vectors: FloatArray) -> IntArray:
        """Codes (n, levels) of vectors (n, d)."""
        return residual_codes(self._latent(vectors), self.codebooks)

    def nearest(self, vector: FloatArray) -> IntArray:
        """All codes of the last level by rising distance, for one vector (d,)."""
        return last_level_order(self._latent(np.asarray(vector)[None, :])[0], self.codebooks)

    def arrays(self) -> dict[str, npt.NDArray[np.generic]]:
        """`weight.<layer>`, `bias.<layer>` and `codebook.<level>`."""
        groups = {"weight": self.weights, "bias": self.biases, "codebook": self.codebooks}
        return {f"{name}.{place}": array for name, group in groups.items() for place, array in enumerate(group)}

    def _latent(self, vectors: FloatArray) -> FloatArray:
        # float64 and then the grid: the rounding of a matmul, which may depend on the batch, is far below 2^-20.
        rows = on_grid(vectors)
        for layer, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            rows = rows @ weight.T + bias
            if layer < len(self.weights) - 1:
                rows = np.maximum(rows, 0.0)
        return on_grid(rows)


def quantise(latent: Tensor, codebooks: list[nn.Parameter]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """One pass through the levels.

    Args:
        latent: (B, latent) encoder output.
        codebooks: (codes, latent) of each level.

    Returns:
        The quantised latent (B, latent), whose gradient passes straight to `latent`; the mean over the batch of
        codebook loss + 0.25 x commitment loss, summed over the levels; the codes (B,) of each level.
    """
    residual, quantised, loss, codes = latent, torch.zeros_like(latent), latent.new_zeros(()), []
    for codebook in codebooks:
        code = torch.cdist(residual.detach(), codebook.detach()).argmin(dim=1)
        chosen = codebook[code]
        loss = loss + (residual.detach() - chosen).square().sum(dim=1).mean()
        loss = loss + COMMITMENT * (residual - chosen.detach()).square().sum(dim=1).mean()
        quantised = quantised + chosen.detach()
        residual = residual - chosen.detach()
        codes.append(code)
    return latent + (quantised - latent).detach(), loss, codes


def _mlp(*widths: int) -> nn.Sequential:
    layers: list[nn.Module] = []
    for before, after in itertools.pairwise(widths):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _first_codebooks(
    encoder: nn.Sequential, rows: Tensor, levels: int, codes_per_level: int, seed: int
) -> list[nn.Parameter]:
    """K-means on the untrained encoder's residuals, so that no code starts unused."""
    with torch.no_grad():
        residual = encoder(rows).double().numpy()
    codebooks = []
    for level in range(levels):
        codebook = centroids(residual, codes_per_level, seed + level)
        residual = residual - codebook[nearest_codes(residual, codebook)]
        codebooks.append(nn.Parameter(torch.from_numpy(codebook).float()))
    return codebooks


def _train(
    encoder: nn.Sequential, decoder: nn.Sequential, codebooks: list[nn.Parameter], rows: Tensor, steps: int
) -> None:
    optimizer = torch.optim.AdamW([*encoder.parameters(), *decoder.parameters(), *codebooks], lr=LEARNING_RATE)
    used = [torch.zeros(len(codebook), dtype=torch.bool) for codebook in codebooks]
    for step in range(1, steps + 1):
        batch = rows[torch.randint(len(rows), (min(BATCH, len(rows)),))]
        latent = encoder(batch)
        quantised, loss, codes = quantise(latent, codebooks)
        loss = loss + (decoder(quantised) - batch).square().sum(dim=1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for seen, code in zip(used, codes, strict=True):
            seen[code] = True
        # No reset so late that a moved code has no time left to settle.
        if step % RESET_EVERY == 0 and step <= steps // 2:
            _reset_dead_codes(codebooks, used, latent.detach(), codes)
            used = [torch.zeros_like(seen) for seen in used]


@torch.no_grad()
def _reset_dead_codes(codebooks: list[nn.Parameter], used: list[Tensor], latent: Tensor, codes: list[Tensor]) -> None:
    """Move every code that nobody chose onto the residual of a random vector of the batch."""
    residual = latent
    for codebook, seen, code in zip(codebooks, used, codes, strict=True):
        chosen = codebook[code]
        dead = (~seen).nonzero().squeeze(1)
        codebook[dead] = residual[torch.randint(len(residual), (len(dead),))]
        residual = residual - chosen
