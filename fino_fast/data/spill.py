"""Rows that do not have to fit into memory: on disk in the order they came, or shuffled."""

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fino_fast.errors import DataError, DiskFullError

from .files import FULL, Location

_BUCKET_ROWS = 1 << 17
_BUCKETS = 256  # each has a file open, of which a process may have 1024


def scratch_folder(out: Location) -> Path | None:
    """Where rows are set aside on the way to `out`; None is the system's temporary folder."""
    return out if isinstance(out, Path) else None


class Spill:
    """Tables of one schema in a temporary file without a name, which is gone with the process.

    Args:
        folder: where there is room for it; the system's temporary folder when left out.

    Raises:
        DataError: the folder takes no file.
        DiskFullError: no room left.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self._folder = folder
        with self._writing():
            self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 - closed by `close`
        self._writer: pa.RecordBatchStreamWriter | None = None

    def write(self, table: pa.Table) -> None:
        """Append a table.

        Raises:
            DiskFullError: no room left.
            DataError: the disk fails.
        """
        with self._writing():
            if self._writer is None:
                self._writer = pa.ipc.new_stream(self._file, table.schema)
            self._writer.write_table(table)
            self._file.flush()

    def tables(self) -> Iterator[pa.Table]:
        """What was written, in the same pieces, as often as asked for; ends the writing.

        Raises:
            DiskFullError, DataError: as `write` does, for what ends the stream.
        """
        if self._writer is None:
            return
        with self._writing():
            self._writer.close()
            self._file.seek(0)
        with pa.ipc.open_stream(self._file) as reader:
            for batch in reader:
                yield pa.Table.from_batches([batch])

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            place = self._folder or tempfile.gettempdir()
            if error.errno in FULL:
                raise DiskFullError(
                    f"{place}: no room left to sort the rows of the table ({error.strerror}); free "
                    "some space and run the same command again"
                ) from error
            raise DataError(
                f"{place}: rows of the table cannot be sorted there: {error.strerror or error}"
            ) from error

    def close(self) -> None:
        # A full disk was reported when it was met; what is still buffered is not wanted any more.
        with contextlib.suppress(OSError):
            self._file.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Shuffle:
    """An external shuffle: rows are put aside by the range of their place, and ordered range by
    range, so that memory holds one range and not the table.

    Args:
        count: rows of the whole.
        folder: where there is room for them; the system's temporary folder when left out.
    """

    def __init__(self, count: int, folder: Path | None = None) -> None:
        buckets = min(-(-count // _BUCKET_ROWS), _BUCKETS)
        self._size = -(-count // buckets)
        self._buckets = [Spill(folder) for _ in range(buckets)]

    def add(self, table: pa.Table, places: NDArray[np.int64]) -> None:
        """Rows, and the place of each in the order to come, int64 [n] in [0, count).

        Raises:
            DiskFullError: no room left.
        """
        order = np.argsort(places)
        ordered = places[order]
        table = table.take(pa.array(order)).append_column("place", pa.array(ordered))
        ends = np.searchsorted(ordered, np.arange(1, len(self._buckets) + 1) * self._size)
        start = 0
        for bucket, end in zip(self._buckets, ends.tolist(), strict=True):
            if end > start:
                bucket.write(table.slice(start, end - start).combine_chunks())
            start = end

    def ordered(self) -> Iterator[pa.Table]:
        """All rows by place, in pieces."""
        for bucket in self._buckets:
            piece = pa.concat_tables(bucket.tables())
            order = np.argsort(piece["place"].to_numpy())
            yield piece.take(pa.array(order)).drop_columns("place")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        for bucket in self._buckets:
            bucket.close()


def regrouped(pieces: Iterator[pa.Table], lengths: list[int]) -> Iterator[pa.Table]:
    """The same rows in tables of the given lengths."""
    left = next(pieces)
    for length in lengths:
        while len(left) < length:
            left = pa.concat_tables([left, next(pieces)])
        yield left.slice(0, length).combine_chunks()
        left = left.slice(length)
