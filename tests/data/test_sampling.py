"""Batches of k samples of each value: every sample once, k together, the same from everywhere."""

import itertools
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fino_fast.data import Groups, Loader, ShardSet
from fino_fast.data.order import derive_key
from fino_fast.data.sampling import grouped_order
from fino_fast.errors import ConfigError, DataError

from .test_loader import SMALL, order_loader, places
from .test_skips import damage

CAMERAS = Groups(factor="camera", size=3)


@given(
    values=st.lists(st.integers(-1, 6), min_size=1, max_size=300),
    size=st.integers(2, 9),
    key=st.integers(0, 2**64 - 1),
)
def test_every_sample_once_and_full_runs_first(values: list[int], size: int, key: int) -> None:
    codes = np.array(values, dtype=np.int32)
    order = grouped_order(codes, size, key)
    assert np.array_equal(np.sort(order), np.arange(len(codes)))
    full = sum(count // size for count in Counter(values).values())
    runs = codes[order][: full * size].reshape(full, size)
    assert (runs == runs[:, :1]).all()
    assert all(count < size for count in Counter(codes[order][full * size :].tolist()).values())


def test_equal_values_fill_every_batch_equally() -> None:
    codes = np.repeat(np.arange(6), 40).astype(np.int32)
    for seed in range(20):
        batches = codes[grouped_order(codes, 4, derive_key(seed))].reshape(-1, 24)
        for batch in batches:
            assert Counter(batch.tolist()) == dict.fromkeys(range(6), 4)


def test_unequal_values_are_spread_over_the_epoch() -> None:
    codes = np.repeat([0, 1, 2], [3000, 900, 300]).astype(np.int32)
    shares = codes[grouped_order(codes, 3, derive_key(1))].reshape(10, 420)
    for part in shares:
        counts = Counter(part.tolist())
        assert abs(counts[0] - 300) <= 6
        assert abs(counts[1] - 90) <= 6
        assert abs(counts[2] - 30) <= 6


def test_each_sample_may_stand_anywhere() -> None:
    """Within its value a sample's place is uniform, from epoch to epoch."""
    codes = np.repeat([0, 1], [12, 12]).astype(np.int32)
    found = [int(np.argsort(grouped_order(codes, 3, derive_key(7, e)))[5]) for e in range(2400)]
    _, counts = np.unique(found, return_counts=True)
    assert len(counts) == 24
    assert stats.chisquare(counts).pvalue > 1e-4


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("drop_last", [False, True])
def test_ranks_and_pipelines_agree(sealed: ShardSet, ranks: int, drop_last: bool) -> None:
    options: dict[str, Any] = {"groups": CAMERAS, "drop_last": drop_last}
    alone = order_loader(sealed, 12, **options)
    expected = places(alone, 2)
    parts = [
        places(order_loader(sealed, 12 // ranks, rank=r, world_size=ranks, **options), 2)
        for r in range(ranks)
    ]
    assert {len(part) for part in parts} == {alone.steps_per_epoch}
    assert [list(itertools.chain(*step)) for step in zip(*parts, strict=True)] == expected
    seen = list(itertools.chain(*expected))
    assert len(set(seen)) == len(seen) == 48
    cameras = sealed.encoded("camera")
    full = sum(c // 3 for c in Counter(cameras[sealed.rows_of("adapt")].tolist()).values())
    for run in np.array(seen[: 3 * full]).reshape(full, 3):
        assert len(set(cameras[run].tolist())) == 1


def test_dali_and_torch_show_the_same(sealed: ShardSet) -> None:
    pair = [Loader(sealed, SMALL, 6, backend=b, groups=CAMERAS) for b in ("dali", "torch")]
    for dali, plain in zip(*[each.epoch(1) for each in pair], strict=True):
        assert torch.equal(dali.rows, plain.rows)
        assert torch.equal(dali.boxes, plain.boxes)


def test_resumed_anywhere_with_other_ranks(sealed: ShardSet) -> None:
    before = order_loader(sealed, 6, groups=CAMERAS)
    whole = places(before, 3)
    for step in range(len(whole) + 1):
        state = before.state(3, step)
        assert places(before, 3, start_step=step) == whole[step:]
        seen = list(itertools.chain(*whole[:step]))
        for rank in range(2):
            after = order_loader(sealed, 3, rank=rank, world_size=2, groups=CAMERAS)
            epoch, sample = after.resume_point(state)
            seen += list(itertools.chain(*places(after, epoch, start_sample=sample)))
        assert sorted(seen) == sealed.rows_of("adapt").tolist()
    with pytest.raises(ConfigError, match="cannot resume: groups was"):
        order_loader(sealed, 6).check_state(state)


def test_what_replaces_a_damaged_sample_is_of_its_group(sealed: ShardSet, tmp_path: Path) -> None:
    shutil.copytree(sealed.folder, tmp_path / "shards")
    shards = damage(tmp_path / "shards", ["s0006", "s0021", "s0043"])
    cameras = sealed.encoded("camera")
    whole = places(order_loader(sealed, 6, groups=CAMERAS), 0)
    skipping = places(order_loader(shards, 6, groups=CAMERAS, on_error="skip"), 0)
    assert skipping != whole
    for was, now in zip(whole, skipping, strict=True):
        assert cameras[was].tolist() == cameras[now].tolist()


def test_senseless_groups(sealed: ShardSet) -> None:
    with pytest.raises(ConfigError, match="'exposure' is continuous; expected a categorical"):
        Loader(sealed, SMALL, 6, groups=Groups(factor="exposure", size=2))
    with pytest.raises(DataError, match="no factor 'well'"):
        Loader(sealed, SMALL, 6, groups=Groups(factor="well", size=2))
    with pytest.raises(ConfigError, match=r"groups\.size: 4 does not divide the 6 images"):
        Loader(sealed, SMALL, 6, groups=Groups(factor="camera", size=4))
