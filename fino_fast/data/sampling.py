"""Which sample of a split stands at which place of an epoch.

Pure functions of (seed, epoch, place): nothing depends on ranks, on threads, or on where a run was
resumed, so neither does what takes the place of a damaged sample.
"""

from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from fino_fast.config import StrictModel

from .order import SHUFFLE, SUBSTITUTE, derive_key, permute, uniforms


class Groups(StrictModel):
    """Batches in which every value of a factor that occurs, occurs `size` times."""

    factor: str
    """A categorical factor of the schema, of any role; a missing value counts as one of its own."""
    size: int = Field(ge=2)
    """k: images of one value that stay together; divides the images of a rank and step."""


class Sampler(Protocol):
    """An order of the samples of a split, told by their numbers in it (0 … n − 1)."""

    def order(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        """The samples at `places` (int64 [n], each in [0, n)) of an epoch; a permutation."""

    def substitute(self, place: int, epoch: int, attempt: int) -> int:
        """A sample to show at `place` instead of the damaged one; `attempt` counts from 0."""


class Shuffled:
    """All samples in random order, without memory."""

    def __init__(self, count: int, seed: int) -> None:
        self._count = count
        self._seed = seed

    def order(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        return permute(places, self._count, derive_key(self._seed, SHUFFLE, epoch))

    def substitute(self, place: int, epoch: int, attempt: int) -> int:
        return _drawn(self._count, self._seed, place, epoch, attempt)


class Grouped:
    """All samples in random order, with k of one value side by side as long as there are k.

    The order of an epoch is made when it begins, and kept: 8 bytes a sample besides the 4 of the
    values.
    """

    def __init__(self, values: NDArray[np.int64], size: int, seed: int) -> None:
        """
        Args:
            values: the group of every sample, int64 [n].
            size: k.
            seed: of the run.
        """
        self._values = values.astype(np.int32)
        self._size = size
        self._seed = seed
        self._epoch: tuple[int, NDArray[np.int64]] | None = None

    def order(self, places: NDArray[np.int64], epoch: int) -> NDArray[np.int64]:
        return self._of(epoch)[places]

    def substitute(self, place: int, epoch: int, attempt: int) -> int:
        """One of the same group: the batch keeps its k of each value."""
        group = self._values[self._of(epoch)[place]]
        members = np.flatnonzero(self._values == group)
        return int(members[_drawn(len(members), self._seed, place, epoch, attempt)])

    def _of(self, epoch: int) -> NDArray[np.int64]:
        if self._epoch is None or self._epoch[0] != epoch:
            key = derive_key(self._seed, SHUFFLE, epoch)
            self._epoch = epoch, grouped_order(self._values, self._size, key)
        return self._epoch[1]


def grouped_order(values: NDArray[np.int32], size: int, key: int) -> NDArray[np.int64]:
    """A random order in which samples of one value come in runs of `size`.

    The samples of each value are shuffled and cut into runs; what is left of each value, fewer than
    `size`, comes at the end. The m runs of a value are spread over the epoch: the j-th stands at a
    random moment of [j/m, (j + 1)/m). So a batch is mixed as the whole is; and where all values
    have as many samples and a batch has room for one run of each, it holds exactly that.

    Args:
        values: int [n].
        size: k.
        key: from `derive_key`.

    Returns:
        int64 [n], a permutation of 0 … n − 1.
    """
    numbers = uniforms(np.arange(len(values)), 2, key)
    members = np.lexsort((numbers[:, 0], values))
    ordered = values[members]
    starts = np.flatnonzero(np.r_[True, ordered[1:] != ordered[:-1]])
    counts = np.diff(np.r_[starts, len(values)])
    start = np.repeat(starts, counts)
    runs = np.repeat(counts // size, counts)
    run = (np.arange(len(values)) - start) // size
    first = start + run * size
    jitter = numbers[first, 1]
    # What is left of a value has no full run's moment: after all of them, in random order.
    moment = np.where(run < runs, (run + jitter) / np.maximum(runs, 1), 1 + jitter)
    order: NDArray[np.int64] = members[np.lexsort((first, moment))]
    return order


def _drawn(count: int, seed: int, place: int, epoch: int, attempt: int) -> int:
    """A number below `count`."""
    key = derive_key(seed, SUBSTITUTE, epoch, attempt)
    return int(uniforms(np.array([place]), 1, key)[0, 0] * count)
