"""Samples of a split by their place: the same as a list of them, for any mixture of splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fino_fast.data.index import RECORD
from fino_fast.data.splits import Split


def index_of(splits: np.ndarray) -> np.ndarray:
    index = np.zeros(len(splits), RECORD)
    index["split"] = splits
    index["form"] = splits + 1
    index["channels"] = np.where(splits == 1, 3, 1)
    return index


@given(
    count=st.sampled_from([1, 511, 512, 513, 5000]),
    share=st.sampled_from([0.0, 0.001, 0.5, 1.0]),
    seed=st.integers(0, 100),
)
def test_every_place_finds_its_sample(count: int, share: float, seed: int) -> None:
    codes = (np.random.default_rng(seed).random(count) < share).astype(np.uint16)
    index = index_of(codes)
    for code in (0, 1, 2):
        split, expected = Split(index, code), np.flatnonzero(codes == code)
        assert len(split) == len(expected)
        places = np.random.default_rng(seed).permutation(len(expected))
        np.testing.assert_array_equal(split.rows(places), expected[places])
        assert split.forms == ([(code + 1, 3 if code == 1 else 1)] if len(expected) else [])


def test_more_blocks_than_are_counted_at_a_time() -> None:
    codes = (np.arange(1_200_000) % 7 == 3).astype(np.uint16)
    split = Split(index_of(codes), 1)
    places = np.arange(len(split))[:: len(split) // 100]
    np.testing.assert_array_equal(split.rows(places), np.flatnonzero(codes)[places])


@pytest.mark.parametrize("samples", [10_000, 1_000_000])
def test_it_keeps_eight_bytes_for_512_samples(samples: int) -> None:
    split = Split(index_of(np.zeros(samples, np.uint16)), 0)
    assert sum(a.nbytes for a in vars(split).values() if isinstance(a, np.ndarray)) == (
        samples * RECORD.itemsize + 8 * (-(-samples // 512) + 1)
    )
