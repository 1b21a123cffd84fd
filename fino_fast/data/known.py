"""What the earlier generations of a set already hold of a table that is ingested again."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .plan import FACTOR
from .spill import Spill

_SHOWN = 10


def last_planned(rows: Spill, column: Callable[[str], pa.ChunkedArray]) -> NDArray[np.int64]:
    """Where each row of a table was last planned (int64 [n], −1 for never).

    Args:
        rows: the table.
        column: a column of all planned rows.
    """
    planned = column("id")
    # A row that was tried again was planned more than once: searching backwards finds its last.
    backwards = planned.take(pa.array(np.arange(len(planned))[::-1])).combine_chunks()
    ids = pa.chunked_array([table["id"].combine_chunks() for table in rows.tables()])
    found = pc.fill_null(pc.index_in(ids, value_set=backwards), len(planned)).to_numpy()
    where: NDArray[np.int64] = len(planned) - 1 - found.astype(np.int64)
    return where


def check_unchanged(
    rows: Spill,
    column: Callable[[str], pa.ChunkedArray],
    where: NDArray[np.int64],
    kept: NDArray[np.bool_],
) -> None:
    """Refuse a table that says something else about a sample that is already in the set.

    Args:
        rows: the table.
        column: a column of all planned rows; one at a time is in memory.
        where: where each row was last planned.
        kept: which rows are compared.

    Raises:
        DataError: cells differ; the message lists them by id.
    """
    count, changes = 0, list[str]()
    names = [name for table in rows.tables() for name in table.column_names]
    for name in dict.fromkeys(names):
        former = column(name)
        start = 0
        for table in rows.tables():
            span = slice(start, start + len(table))
            start += len(table)
            places = np.flatnonzero(kept[span])
            now = table[name].take(pa.array(places))
            before = former.take(pa.array(where[span][places]))
            if now.equals(before):
                continue
            ids = table["id"].take(pa.array(places)).to_pylist()
            for sample, old, new in zip(ids, before.to_pylist(), now.to_pylist(), strict=True):
                if old != new:
                    count += 1
                    if len(changes) < _SHOWN:
                        shown = name.removeprefix(FACTOR)
                        changes.append(f"id {sample!r}: {shown} was {old!r}, now {new!r}")
    if count:
        raise DataError(
            f"the table differs from what is already in the set in {count} cells; shards "
            "are never rewritten: use another --out, or other ids\n  " + "\n  ".join(changes)
        )
