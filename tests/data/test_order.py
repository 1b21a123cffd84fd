"""Order and draws: true permutations, uniform, independent of anything but their key."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fino_fast.data.order import derive_key, permute, uniforms


@given(count=st.integers(1, 3000), key=st.integers(0, 2**64 - 1))
def test_permute_hits_every_place_once(count: int, key: int) -> None:
    shuffled = permute(np.arange(count), count, key)
    assert np.array_equal(np.sort(shuffled), np.arange(count))


@given(count=st.integers(2, 10**12), key=st.integers(0, 2**64 - 1), data=st.data())
def test_permute_of_a_part_is_the_part_of_the_whole(
    count: int, key: int, data: st.DataObject
) -> None:
    places = data.draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=50, unique=True))
    together = permute(np.array(places), count, key)
    apart = [permute(np.array([place]), count, key)[0] for place in places]
    assert together.tolist() == apart
    assert len(set(apart)) == len(apart)


def test_permute_spreads_neighbours_over_the_whole() -> None:
    count = 100_000
    shuffled = permute(np.arange(count), count, derive_key(0, 2, 0))
    # A uniform shuffle puts 10 ± 1 % of any tenth of the input into any tenth of the output.
    table = np.histogram2d(np.arange(count), shuffled, bins=10)[0]
    assert stats.chisquare(table.ravel()).pvalue > 1e-4
    assert abs(stats.spearmanr(np.arange(count), shuffled).statistic) < 0.02


def test_small_permutations_are_all_reached_about_equally() -> None:
    orders = [tuple(permute(np.arange(4), 4, derive_key(seed))) for seed in range(2400)]
    _, counts = np.unique(orders, axis=0, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


def test_permute_refuses_places_outside() -> None:
    with pytest.raises(ValueError, match="positions"):
        permute(np.array([5]), 5, 1)
    with pytest.raises(ValueError, match="positions"):
        permute(np.array([-1]), 5, 1)


def test_uniforms_are_uniform_and_uncorrelated() -> None:
    numbers = uniforms(np.arange(20_000), 6, derive_key(7, 3, 0))
    assert numbers.shape == (20_000, 6)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    for column in numbers.T:
        assert stats.kstest(column, "uniform").pvalue > 1e-4
    correlation = np.corrcoef(np.concatenate([numbers, np.roll(numbers, 1, axis=0)], 1).T)
    assert np.abs(correlation - np.eye(12)).max() < 0.04


def test_uniforms_depend_on_position_and_key_only() -> None:
    key = derive_key(1, 3, 5)
    whole = uniforms(np.arange(100), 8, key)
    assert np.array_equal(uniforms(np.array([42, 7]), 8, key), whole[[42, 7]])
    assert np.array_equal(uniforms(np.arange(100), 3, key), whole[:, :3])
    assert not np.array_equal(uniforms(np.arange(100), 8, derive_key(1, 3, 6)), whole)


def test_values_never_change_between_versions() -> None:
    """Order is part of what a seed means: these were recorded when the format was fixed."""
    assert permute(np.arange(8), 8, derive_key(0, 2, 0)).tolist() == RECORDED_ORDER
    assert uniforms(np.array([3]), 2, derive_key(0, 3, 0))[0].tolist() == RECORDED_DRAWS


RECORDED_ORDER = [7, 2, 6, 1, 0, 4, 3, 5]
RECORDED_DRAWS = [0.5155699294634823, 0.8451047495044295]
