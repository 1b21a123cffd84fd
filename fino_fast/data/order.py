"""Order and randomness as pure functions: any epoch, any position, no state, no memory.

Both are counter-based: a value is a hash of (seed, epoch, position), so that a run resumed at any
step, or on another number of ranks, sees exactly what the uninterrupted run would have seen. The
arithmetic is 64-bit integer only: results do not depend on NumPy's version or the machine.
"""

import functools

import numpy as np
from numpy.typing import NDArray

_ROUNDS = 6
_GOLDEN = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1

# What a key is for: streams of different purposes must not share values.
PLAN, SHUFFLE, AUGMENT, SUBSTITUTE = 1, 2, 3, 4


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finaliser (Steele, Lea, Flood 2014): a bijection with full avalanche."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@functools.lru_cache(maxsize=256)
def derive_key(*parts: int) -> int:
    """One 64-bit key from several integers; their order counts."""
    key = 0
    for part in parts:
        word = np.array([(key + _GOLDEN + (part & _MASK)) & _MASK], dtype=np.uint64)
        key = int(_mix(_mix(word))[0])
    return key


def permute(positions: NDArray[np.int64], count: int, key: int) -> NDArray[np.int64]:
    """Where a keyed shuffle of ``range(count)`` puts each of `positions`.

    A Feistel network over the smallest power of two ≥ `count`, walked until the value falls
    below `count` (Black and Rogaway 2002): a true permutation in O(1) memory, so that no rank
    holds an array of the whole epoch.

    Args:
        positions: int64 [n], each in [0, count).
        count: size of the set.
        key: from `derive_key`.

    Returns:
        int64 [n], distinct for distinct positions.
    """
    if len(positions) and not (positions.min() >= 0 and positions.max() < count):
        raise ValueError(f"positions must lie in [0, {count})")
    bits = max(2, (count - 1).bit_length())
    low_bits = bits // 2
    low_mask = np.uint64((1 << low_bits) - 1)
    high_mask = np.uint64((1 << (bits - low_bits)) - 1)
    shift = np.uint64(low_bits)
    keys = [np.uint64(derive_key(key, i)) for i in range(_ROUNDS)]

    def encrypt(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
        high, low = values >> shift, values & low_mask
        for i in range(0, _ROUNDS, 2):
            high = high ^ (_mix(low + keys[i]) & high_mask)
            low = low ^ (_mix(high + keys[i + 1]) & low_mask)
        return (high << shift) | low

    result = encrypt(positions.astype(np.uint64))
    outside = np.flatnonzero(result >= np.uint64(count))
    while len(outside):
        result[outside] = encrypt(result[outside])
        outside = outside[result[outside] >= np.uint64(count)]
    return result.astype(np.int64)


def uniforms(positions: NDArray[np.int64], draws: int, key: int) -> NDArray[np.float64]:
    """Independent uniform numbers in [0, 1) for each position.

    Args:
        positions: int64 [n], the samples' places in the epoch.
        draws: numbers a position.
        key: from `derive_key`.

    Returns:
        float64 [n, draws].
    """
    base = _mix(positions.astype(np.uint64) * np.uint64(_GOLDEN) + np.uint64(key))
    counter = _mix(np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(_GOLDEN))
    bits = _mix(_mix(base[:, None] + counter[None, :]) ^ np.uint64(key))
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
