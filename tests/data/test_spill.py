"""Rows on disk: as they were, in any order that is asked for, and no file is left."""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from fino_fast.data import spill as spill_module
from fino_fast.data.spill import Shuffle, Spill, regrouped
from fino_fast.errors import DiskFullError


def table(start: int, count: int) -> pa.Table:
    numbers = range(start, start + count)
    lists = [None if i % 5 == 0 else ["a"] * (i % 3) for i in numbers]
    return pa.table(
        {
            "i": list(numbers),
            "text": [None if i % 7 == 0 else f"é{i}" for i in numbers],
            "lists": pa.array(lists, pa.list_(pa.string())),
            "pair": pa.array([[i, None] for i in numbers], pa.list_(pa.float64(), 2)),
        }
    )


def test_a_spill_gives_back_what_was_written_as_often_as_asked(tmp_path: Path) -> None:
    parts = [table(0, 10), table(10, 1), table(11, 300)]
    with Spill(tmp_path) as spill:
        for part in parts:
            spill.write(part)
        for _ in range(2):
            assert [found.equals(part) for found, part in zip(spill.tables(), parts, strict=True)]
            assert pa.concat_tables(spill.tables()).equals(pa.concat_tables(parts))
        assert list(tmp_path.iterdir()) == []
    with Spill(tmp_path) as spill:
        assert list(spill.tables()) == []


@pytest.mark.parametrize("count", [1, 99, 100, 101, 1234])
def test_a_shuffle_orders_rows_by_their_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, count: int
) -> None:
    monkeypatch.setattr(spill_module, "_BUCKET_ROWS", 100)
    places = np.random.default_rng(count).permutation(count)
    with Shuffle(count, tmp_path) as shuffle:
        for start in range(0, count, 70):
            part = table(start, min(70, count - start))
            shuffle.add(part, places[start : start + len(part)])
        pieces = list(shuffle.ordered())
        assert len(pieces) == -(-count // 100)
        expected = table(0, count).take(pa.array(np.argsort(places)))
        assert pa.concat_tables(pieces).equals(expected)
        lengths = [1, count // 2, count - count // 2 - 1] if count > 2 else [count]
        groups = list(regrouped(shuffle.ordered(), lengths))
        assert [len(group) for group in groups] == lengths
        assert pa.concat_tables(groups).equals(expected)


def test_a_full_disk_is_said_so() -> None:
    with Spill() as spill:
        full = os.open("/dev/full", os.O_RDWR)
        os.dup2(full, spill._file.fileno())
        os.close(full)
        with pytest.raises(DiskFullError, match="No space left"):
            spill.write(table(0, 10_000))
