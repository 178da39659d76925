"""Numbers for texts as they are met, by a hash table that looks a whole batch up at once."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import polars as pl

NONE = np.uint32(2**32 - 1)
USED = np.uint64(2**63)
"""Set in every key, so that 0 is a free slot."""
Keys = npt.NDArray[np.uint64]
Numbers = npt.NDArray[np.uint32]


class Names:
    """The same text has the same number in every batch; numbers run from 0 in no particular order."""

    def __init__(self) -> None:
        self._keys: Keys = np.zeros(2, np.uint64)  # open addressing: at most half of the slots are used
        self._numbers: Numbers = np.zeros(2, np.uint32)
        self._met: list[tuple[Keys, Numbers]] = []
        self._texts = pl.Series([], dtype=pl.String)
        self._odd: dict[str, int] = {}  # texts whose key another text has

    @property
    def size(self) -> int:
        """How many texts were met."""
        return len(self._texts)

    def codes(self, column: pl.Series) -> Numbers:
        """(N,) the texts' numbers; null has that of the empty text."""
        column = column.fill_null("") if column.null_count() else column
        keys = hashes(column) | USED
        found = self._looked_up(keys)
        missing = np.flatnonzero(found == NONE)
        if len(missing):
            fresh, first, back = np.unique(keys[missing], return_index=True, return_inverse=True)
            found[missing] = self.size + back
            self._add(fresh, column.gather(missing[first]))
        # A key is no proof: the texts themselves are compared.
        other = (self._texts.gather(found) != column).arg_true()
        for row in other.to_list():
            found[row] = self._odd_number(column[row])
        return found

    def ranked(self) -> tuple[pl.Series, Numbers]:
        """The texts sorted, and (size,) the place of each number's text among them."""
        order = self._texts.arg_sort()
        places = np.empty(self.size, dtype=np.uint32)
        places[order.to_numpy()] = np.arange(self.size, dtype=np.uint32)
        return self._texts.gather(order), places

    def _odd_number(self, text: str) -> int:
        if text not in self._odd:
            self._odd[text] = self.size
            self._texts = pl.concat([self._texts, pl.Series([text])])
        return self._odd[text]

    def _looked_up(self, keys: Keys) -> Numbers:
        slots, last = self._slots(keys), len(self._keys) - 1
        there = self._keys[slots]
        found = np.where(there == keys, self._numbers[slots], NONE)
        rows = np.flatnonzero((there != keys) & (there != 0))
        slots = slots[rows]
        while len(rows):
            slots = (slots + 1) & last
            there, wanted = self._keys[slots], keys[rows]
            hit = there == wanted
            found[rows[hit]] = self._numbers[slots[hit]]
            going = ~hit & (there != 0)
            rows, slots = rows[going], slots[going]
        return found

    def _slots(self, keys: Keys) -> npt.NDArray[np.intp]:
        return (keys & np.uint64(len(self._keys) - 1)).astype(np.intp)

    def _add(self, keys: Keys, texts: pl.Series) -> None:
        """Give keys that are not there yet, each once, the next numbers."""
        numbers = np.arange(self.size, self.size + len(keys), dtype=np.uint32)
        self._texts = pl.concat([self._texts, texts], rechunk=True)
        self._met.append((keys, numbers))
        if 2 * self.size <= len(self._keys):
            self._place(keys, numbers)
            return
        slots = 1 << (4 * self.size - 1).bit_length()
        self._keys, self._numbers = np.zeros(slots, np.uint64), np.zeros(slots, np.uint32)
        for pair in self._met:
            self._place(*pair)

    def _place(self, keys: Keys, numbers: Numbers) -> None:
        slots, last = self._slots(keys), len(self._keys) - 1
        while len(keys):
            free = self._keys[slots] == 0
            self._keys[slots[free]] = keys[free]  # of several that want a slot the last one gets it
            rest = self._keys[slots] != keys
            self._numbers[slots[~rest]] = numbers[~rest]
            keys, numbers, slots = keys[rest], numbers[rest], (slots[rest] + 1) & last


def hashes(column: pl.Series) -> Keys:
    """(N,) a number for each text, equal for equal ones and seldom for others."""
    return column.hash().to_numpy()
