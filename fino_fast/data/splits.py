"""The samples of one split, found by their place in it, without a list of them."""

import numpy as np
from numpy.typing import NDArray

from .index import Index

_BLOCK = 512
_CHUNK = 1 << 11  # blocks that are counted at a time


class Split:
    """Which samples of an index belong to a split, in ascending order.

    Rank and select (Jacobson 1989): kept is only how many of the split's samples lie before each
    block of 512, that is 8 bytes for 512 samples; the rest is in the memory-mapped index.
    """

    def __init__(self, index: Index, code: int) -> None:
        self._index = index
        self._code = code
        blocks = -(-len(index) // _BLOCK)
        self._before = np.zeros(blocks + 1, dtype=np.int64)
        forms: set[tuple[int, int]] = set()
        for first in range(0, blocks, _CHUNK):
            part = index[first * _BLOCK : (first + _CHUNK) * _BLOCK]
            mine = part["split"] == code
            counts = np.add.reduceat(mine, np.arange(0, len(mine), _BLOCK), dtype=np.int64)
            self._before[first + 1 : first + 1 + len(counts)] = counts
            pairs = np.bincount(part["form"][mine].astype(np.int64) << 8 | part["channels"][mine])
            forms |= {divmod(pair, 256) for pair in np.flatnonzero(pairs).tolist()}
        np.cumsum(self._before, out=self._before)
        self.forms = sorted(forms)
        """The (form, channels) that its samples have."""

    def __len__(self) -> int:
        return int(self._before[-1])

    def rows(self, places: NDArray[np.int64]) -> NDArray[np.int64]:
        """Sample numbers (int64 [n]) of the samples at `places` of the split, each in [0, len)."""
        block = np.searchsorted(self._before, places, side="right") - 1
        candidates = block[:, None] * _BLOCK + np.arange(_BLOCK)
        inside = candidates < len(self._index)
        codes = self._index["split"][np.where(inside, candidates, 0)]
        seen = np.cumsum(inside & (codes == self._code), axis=1)
        wanted = places - self._before[block] + 1
        within: NDArray[np.int64] = np.argmax(seen == wanted[:, None], axis=1)
        return np.asarray(block * _BLOCK + within)
