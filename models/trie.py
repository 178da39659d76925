"""Which codes may follow a partial semantic ID: the catalogue as a trie in flat arrays.

Nodes carry one number over all depths, breadth first: the root is 0, the nodes of depth d are `level_first[d]` up to
`level_first[d + 1] - 1`, ordered by their code tuples. Every edge leads to one node and edges are stored in the order
of the nodes they lead to, so edge e leads to node e + 1 and no child array is needed. The trie knows nothing of
tokens, scores or beams.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

IntArray = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Paths:
    """M edges of the trie, each for one row of a batch.

    Attributes:
        rows: (M,) row of the batch.
        parents: (M,) node the edge leaves.
        places: (M,) the edge's place among the parent's, from 0.
    """

    rows: Tensor
    parents: Tensor
    places: Tensor


@dataclass(frozen=True)
class Trie:
    """A set of code tuples of one length L, and the items each tuple names.

    Attributes:
        first: (nodes + 1,) the edges out of node v are first[v] … first[v + 1] - 1; a leaf has none.
        code: (edges,) code on each edge, rising within a node; edge e leads to node e + 1.
        leaf_first: (leaves + 1,) leaf number l names leaf_items[leaf_first[l]] … leaf_items[leaf_first[l + 1] - 1].
        leaf_items: (items,) item numbers, rising within a leaf. Leaf number = node number - level_first[L].
        level_first: first node of each depth 0 … L, then the number of nodes.
        widths: most children of any node, by depth 0 … L - 1.
    """

    first: Tensor
    code: Tensor
    leaf_first: Tensor
    leaf_items: Tensor
    level_first: tuple[int, ...]
    widths: tuple[int, ...]

    @classmethod
    def build(cls, codes: IntArray) -> Trie:
        """The trie of items 0 … n - 1.

        Args:
            codes: (n, L) semantic ID of each item, L >= 1; rows may repeat. Pass `codes[:known]` to leave later
                items out.

        Raises:
            ValueError: not a matrix of at least one level, or a negative code.
        """
        if codes.ndim != 2 or codes.shape[1] < 1:
            raise ValueError(f"codes must be (items, levels >= 1), got {codes.shape}; pass one row of codes an item")
        if codes.size and codes.min() < 0:
            raise ValueError(f"codes must be 0 or more, got {codes.min()}; renumber the codes of that level")
        node = np.zeros(len(codes), dtype=np.int64)  # each item's node within its depth
        counts, edge_codes, level_first, widths = [], [], [0, 1], []
        for level in codes.astype(np.int64).T:
            size = int(level.max(initial=0)) + 1
            edges, inverse = np.unique(node * size + level, return_inverse=True)
            children = np.bincount(edges // size, minlength=level_first[-1] - level_first[-2])
            counts.append(children)
            edge_codes.append(edges % size)
            widths.append(int(children.max(initial=0)))
            level_first.append(level_first[-1] + len(edges))
            node = inverse.reshape(-1)
        leaves = level_first[-1] - level_first[-2]
        return cls(
            first=_offsets(np.concatenate([*counts, np.zeros(leaves, dtype=np.int64)])),
            code=torch.from_numpy(np.concatenate(edge_codes)),
            leaf_first=_offsets(np.bincount(node, minlength=leaves)),
            leaf_items=torch.from_numpy(np.argsort(node, kind="stable")),
            level_first=tuple(level_first),
            widths=tuple(widths),
        )

    @property
    def levels(self) -> int:
        """L, the length of a semantic ID."""
        return len(self.widths)

    def max_children(self, depth: int) -> int:
        """Most children of any node at `depth`, 0 <= depth < L."""
        return self.widths[depth]

    def expand(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All edges out of some nodes, flat.

        Args:
            nodes: (M,) node numbers; a negative number stands for no node and has no edges.

        Returns:
            rows (E,) index into `nodes` of each edge, rising; codes (E,); children (E,) node numbers.
        """
        rows, edges = _segments(self.first, nodes)
        return rows, self.code[edges], edges + 1

    def children(self, nodes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """All edges out of some nodes, padded to the widest of them.

        Args:
            nodes: node numbers of any shape (…); a negative number has no children.

        Returns:
            codes (…, C), children (…, C) and a mask (…, C), true where there is an edge; elsewhere the code is 0 and
            the child -1. C is at least 1.
        """
        start, count = _spans(self.first, nodes)
        width = max(int(count.max()), 1) if nodes.numel() else 1
        place = torch.arange(width, device=nodes.device)
        mask = place < count.unsqueeze(-1)
        edges = torch.where(mask, start.unsqueeze(-1) + place, 0)
        codes = self.code[edges] if len(self.code) else torch.zeros_like(edges)
        return torch.where(mask, codes, 0), torch.where(mask, edges + 1, -1), mask

    def items(self, nodes: Tensor) -> tuple[Tensor, Tensor]:
        """The items named by some leaves, flat.

        Args:
            nodes: (M,) node numbers of leaves (depth L); a negative number stands for no leaf.

        Returns:
            rows (E,) index into `nodes`, rising; items (E,) item numbers, rising within a row.
        """
        leaf = torch.where(nodes < 0, nodes, nodes - self.level_first[-2])
        rows, places = _segments(self.leaf_first, leaf)
        return rows, self.leaf_items[places]

    def covered(self, rows: Tensor, leaves: Tensor) -> list[Paths]:
        """The edges that lead to nothing but some leaves, by the depth they leave (0 … L - 1).

        Args:
            rows: (F,) row of the batch that each leaf belongs to.
            leaves: (F,) leaf numbers; no pair of row and leaf twice.
        """
        nodes, found = leaves + self.level_first[-2], []
        for _ in range(self.levels):
            # The last node whose edges begin at or before this one's edge, which is edge node - 1.
            parents = torch.searchsorted(self.first, nodes - 1, right=True) - 1
            found.append(Paths(rows, parents, nodes - 1 - self.first[parents]))
            keys, counts = (rows * self.level_first[-1] + parents).unique(return_counts=True)
            rows, nodes = keys // self.level_first[-1], keys % self.level_first[-1]
            whole = counts == self.first[nodes + 1] - self.first[nodes]
            rows, nodes = rows[whole], nodes[whole]
        return found[::-1]

    def to(self, device: torch.device | str) -> Trie:
        """The same trie with its tensors on `device`."""
        moved = [part.to(device) for part in (self.first, self.code, self.leaf_first, self.leaf_items)]
        return Trie(*moved, level_first=self.level_first, widths=self.widths)

    def bytes(self) -> int:
        """Memory of the tensors, in bytes."""
        parts = (self.first, self.code, self.leaf_first, self.leaf_items)
        return sum(part.numel() * part.element_size() for part in parts)


def _offsets(counts: IntArray) -> Tensor:
    return torch.from_numpy(np.concatenate([[0], np.cumsum(counts)]).astype(np.int64))


def _spans(first: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    present = segments.clamp(min=0)
    start = first[present]
    return start, torch.where(segments < 0, 0, first[present + 1] - start)


def _segments(first: Tensor, segments: Tensor) -> tuple[Tensor, Tensor]:
    """Row and place of every entry of the CSR segments asked for, in order."""
    start, count = _spans(first, segments)
    rows = torch.repeat_interleave(torch.arange(len(segments), device=segments.device), count)
    before = torch.cumsum(count, dim=0) - count
    return rows, torch.arange(len(rows), device=segments.device) - before[rows] + start[rows]
