"""What the earlier generations of a set already hold of a table that is ingested again."""

from collections.abc import Callable

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .attributes import LOOKED
from .plan import FACTOR
from .spill import Spill
from .table import hashes, whole

_SHOWN = 10
_PIECE = 1 << 18


def last_planned(rows: Spill, column: Callable[[str], pa.ChunkedArray]) -> NDArray[np.int64]:
    """Where each row of a table was last planned (int64 [n], −1 for never).

    Memory holds the planned ids and 24 bytes for each of them.

    Args:
        rows: the table.
        column: a column of all planned rows.
    """
    planned = whole(column("id"))
    starts = range(0, len(planned), _PIECE)
    keys = np.concatenate([hashes(planned.slice(start, _PIECE)) for start in starts])
    # A row that was tried again was planned more than once: of equal keys the last place is last.
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    found = [_places(whole(table["id"]), planned, keys, order) for table in rows.tables()]
    return np.concatenate(found)


def _places(
    ids: pa.Array, planned: pa.Array, keys: NDArray[np.int64], order: NDArray[np.int64]
) -> NDArray[np.int64]:
    """The last place of each id among the planned ones, −1 for none.

    Args:
        ids: [n].
        planned: [m].
        keys: hashes of the planned ids, ascending, int64 [m].
        order: the place that each key belongs to, int64 [m].
    """
    wanted = hashes(ids)
    by_key = np.argsort(wanted)  # neighbours are found where the cache already is
    rank = np.empty(len(ids), np.int64)
    rank[by_key] = np.searchsorted(keys, wanted[by_key], side="right") - 1
    places = np.full(len(ids), -1)
    left = np.arange(len(ids))
    while True:
        left = left[(rank[left] >= 0) & (keys[rank[left]] == wanted[left])]
        if not len(left):
            return places
        candidates = order[rank[left]]
        equal = pc.equal(planned.take(pa.array(candidates)), ids.take(pa.array(left))).to_numpy(
            zero_copy_only=False
        )
        places[left[equal]] = candidates[equal]
        # Another id of the same hash: look at the one planned before.
        left = left[~equal]
        rank[left] -= 1


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
    names = [name for table in rows.tables() for name in table.column_names if name != LOOKED]
    for name in dict.fromkeys(names):
        former = whole(column(name))
        start = 0
        for table in rows.tables():
            span = slice(start, start + len(table))
            start += len(table)
            places = np.flatnonzero(kept[span])
            now = whole(table[name]).take(pa.array(places))
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
