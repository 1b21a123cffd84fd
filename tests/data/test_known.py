"""Rows of a table among those already planned: by id, whatever their hashes and their length."""

import numpy as np
import pyarrow as pa
import pytest

from fino_fast.data import known
from fino_fast.data.known import last_planned
from fino_fast.data.spill import Spill
from fino_fast.data.table import whole

PLANNED = pa.chunked_array([["c", "a", "é"], ["b", "a"], ["c"]])


@pytest.mark.parametrize("piece", [1, 2, 100])
@pytest.mark.parametrize("all_alike", [False, True])
def test_each_row_is_found_where_it_was_planned_last(
    monkeypatch: pytest.MonkeyPatch, piece: int, all_alike: bool
) -> None:
    """Also where all hashes are equal: they only point to candidates."""
    monkeypatch.setattr(known, "_PIECE", piece)
    if all_alike:
        monkeypatch.setattr(known, "hashes", lambda values: np.zeros(len(values), np.int64))
    table = pa.table({"id": ["new", "a", "é", "c", "", "b"]})
    with Spill() as rows:
        for start in range(0, 6, piece):
            rows.write(table.slice(start, piece))
        found = last_planned(rows, lambda _: PLANNED)
    assert found.tolist() == [-1, 4, 2, 5, -1, 3]


@pytest.mark.parametrize(
    ("kind", "wide"),
    [
        (pa.string(), pa.large_string()),
        (pa.list_(pa.string()), pa.large_list(pa.large_string())),
        (pa.float64(), pa.float64()),
        (pa.list_(pa.float64(), 2), pa.list_(pa.float64(), 2)),
    ],
)
def test_a_column_of_any_length_is_one_array(kind: pa.DataType, wide: pa.DataType) -> None:
    """64-bit offsets, in the place of those of 32 bits that end at 2 GiB of text."""
    values = {
        pa.string(): ["a", None],
        pa.list_(pa.string()): [["a", "b"], None],
        pa.float64(): [1.5, None],
    }.get(kind, [[1.5, None], [2.0, 3.0]])
    column = pa.chunked_array([pa.array(values, kind), pa.array(values[:1], kind)])
    one = whole(column)
    assert isinstance(one, pa.Array)
    assert one.type == wide
    assert one.to_pylist() == [*values, values[0]]
    assert len(whole(pa.chunked_array([], kind))) == 0
