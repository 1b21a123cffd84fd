"""A sealed set of shards, opened for reading."""

import functools
import os
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self, overload

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .cache import RemoteShards, check_shard_sizes, fetch_small_files
from .files import Location, location, sha256_of
from .index import FORMS, Index, place_of, read_index
from .manifest import Manifest, SealedFile
from .metadata import MetadataFile
from .plan import FACTOR
from .remote import Remote
from .schema import Encoded, Schema, number_matrix
from .splits import Split
from .table import whole

_OPEN_SHARDS = 128


class Strings(Sequence[str]):
    """Strings in Arrow's memory: a list to look at, without a Python object for each."""

    def __init__(self, values: pa.ChunkedArray) -> None:
        self._values = values

    def __len__(self) -> int:
        return len(self._values)

    @overload
    def __getitem__(self, place: int) -> str: ...
    @overload
    def __getitem__(self, place: slice) -> "Strings": ...
    def __getitem__(self, place: int | slice) -> "str | Strings":
        if isinstance(place, slice):
            return Strings(self._values[place])
        value: str = self._values[int(place)].as_py()
        return value

    def __iter__(self) -> Iterator[str]:
        for chunk in self._values.iterchunks():
            yield from chunk.to_pylist()


class DamagedSample(DataError):
    """A sample whose bytes are not those that were sealed, or do not decode.

    Files and stores that cannot be read are something else: they may answer the next time.
    """


class ShardSet:
    """Samples of a sealed set, by number: their bytes, metadata and place.

    Opening checks the manifest, the schema, the index, the encoded metadata and the size of
    everything else; the sample table is checked when it is first read, each sample's checksum
    whenever it is. `fino-fast verify` checks every byte.

    Memory does not grow with the number of samples but for the index, 28 bytes a sample, which all
    processes of a machine share; `ids`, `splits`, `encoded` and `raw` make what they are named.
    """

    def __init__(
        self,
        folder: Location,
        local: Path,
        manifest: Manifest,
        schema: Schema,
        index: Index,
        metadata: MetadataFile,
    ) -> None:
        self.folder = folder
        self._local = local
        self.manifest = manifest
        self.schema = schema
        self.index = index
        self.metadata = metadata
        """Encoded metadata of chosen samples: `metadata.of(rows, names)`."""
        self.schema_hash = manifest.schema_file.sha256
        self.manifest_hash = manifest.hash
        self._splits: dict[str, Split] = {}
        self._table_checked = False
        self._files: OrderedDict[int, int] = OrderedDict()
        self._lock = threading.Lock()
        self._remote = RemoteShards(folder, manifest.shards) if isinstance(folder, Remote) else None
        weakref.finalize(self, _close_all, self._files)

    @classmethod
    def open(cls, path: Location | str) -> Self:
        """Open a sealed set, in a folder or behind an fsspec URL.

        Of a set in an object store, everything but the shards is fetched into this machine's cache
        (`fino_fast.data.cache`); the shards are when they are read.

        Raises:
            DataError: it is not sealed, or a file is missing, cut or changed.
        """
        folder = location(path)
        manifest = Manifest.read(folder)
        files = [manifest.schema_file, manifest.index, manifest.metadata]
        if isinstance(folder, Remote):
            path = fetch_small_files(folder, [*files, manifest.table], manifest.hash)
            check_shard_sizes(folder, manifest.shards)
        else:
            path = folder
            for shard in manifest.shards:
                check_size("shard", path / f"{shard.name}.tar", shard.bytes)
        for sealed in files:
            check_file(path, sealed)
        check_size("sample table", path / manifest.table.name, manifest.table.bytes)
        schema = Schema.read(path / manifest.schema_file.name)
        sizes = [shard.bytes for shard in manifest.shards]
        index = read_index(path / manifest.index.name, manifest.samples, sizes, len(schema.splits))
        metadata = MetadataFile(path / manifest.metadata.name, schema, manifest.samples)
        return cls(folder, path, manifest, schema, index, metadata)

    def __len__(self) -> int:
        return self.manifest.samples

    def __getstate__(self) -> dict[str, Any]:
        """Another process opens its own files."""
        return self.__dict__ | {"_files": OrderedDict(), "_lock": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._files)

    @functools.cached_property
    def ids(self) -> Strings:
        """Sample ids, in the order of the index."""
        return Strings(self._column("id"))

    @property
    def splits(self) -> NDArray[np.object_]:
        """Name of every sample's split."""
        names: NDArray[np.object_] = np.array(self.schema.splits, dtype=object)
        return np.take(names, self.index["split"])

    def split(self, name: str) -> Split:
        """The samples of a split.

        Raises:
            DataError: the set has no such split, or no sample of it.
        """
        if name not in self.schema.splits:
            raise DataError(f"{self.folder}: no split {name!r}; it has {self.schema.splits}")
        if name not in self._splits:
            self._splits[name] = Split(self.index, self.schema.splits.index(name))
        if len(self._splits[name]) == 0:
            raise DataError(f"{self.folder}: split {name!r} has no sample")
        return self._splits[name]

    def rows_of(self, split: str) -> NDArray[np.int64]:
        """Numbers of all samples of a split, ascending, int64 [n]; `split` finds them one by one.

        Raises:
            DataError: the set has no such split, or no sample of it.
        """
        self.split(split)
        return np.flatnonzero(self.index["split"] == self.schema.splits.index(split))

    def encoded(self, name: str) -> Encoded:
        """One factor's metadata for all samples, as the loss takes them.

        Returns:
            int64 [n] with −1 for missing (categorical), else float32 [n, width] with NaN for
            missing, unscaled; cyclic ones as (sin, cos), multi-valued ones as indicators.

        Raises:
            DataError: the set has no such factor, or its metadata are damaged.
        """
        self.check_factor(name)
        return self.metadata.all(name)

    def raw(self, name: str) -> list[str | None] | list[list[str] | None] | NDArray[np.float64]:
        """One factor's values for all samples, as they stand in the table.

        Returns:
            strings with None for missing (categorical), lists of strings (multi), or float64
            [n] or [n, d] with NaN for missing (continuous, cyclic).

        Raises:
            DataError: the set has no such factor, or its table is damaged.
        """
        values = self.raw_column(name)
        if self.schema.factors[name].moments is None:
            strings: list[str | None] = values.to_pylist()
            return strings
        matrix = number_matrix(values)
        return matrix[:, 0] if matrix.shape[1] == 1 else matrix

    def extension(self, row: int) -> str:
        """File name extension of a sample."""
        return FORMS[int(self.index["form"][row])][0]

    def read(self, row: int) -> bytes:
        """A sample's stored bytes, checked.

        Raises:
            DamagedSample: they are not what was sealed; the message names id, shard and offset.
            DataError: the shard cannot be read, or another one lies in its place in the store.
        """
        record = self.index[row]
        shard, offset, size = place_of(record)
        try:
            data = self._read_at(shard, offset, size)
        except OSError as error:
            raise DataError(f"{self.describe(row)}: cannot be read: {error.strerror}") from error
        if len(data) != size or isal_zlib.crc32(data) != record["crc32"]:
            raise DamagedSample(
                f"{self.describe(row)}: the bytes are not those that were sealed; run "
                f"`fino-fast verify {self.folder}`, then restore or rewrite the shard"
            )
        return data

    def describe(self, row: int) -> str:
        """Where a sample is, for messages."""
        shard, offset, _ = place_of(self.index[row])
        tar = f"{self.folder / self.manifest.shards[shard].name}.tar"
        return f"sample {self.id_of(row)!r} in {tar} at offset {offset}"

    def id_of(self, row: int) -> str:
        """A sample's id, without reading those of the others: a message is no reason for that.

        Raises:
            DataError: the sample table is damaged.
        """
        self._check_table()
        path = self._local / self.manifest.table.name
        try:
            with pq.ParquetFile(path) as file:
                for group in range(file.num_row_groups):
                    count = file.metadata.row_group(group).num_rows
                    if row < count:
                        value: str = file.read_row_group(group, ["id"])["id"][row].as_py()
                        return value
                    row -= count
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        raise DataError(f"{path}: is damaged: fewer rows than samples")

    def _read_at(self, shard: int, offset: int, size: int) -> bytes:
        cached = None
        if self._remote is not None:
            cached = self._remote.local(shard)
            if cached is None:
                return self._remote.read_at(shard, offset, size)
        # pread and not mmap: a file that shrinks under a mapping kills the process, and Python
        # keeps a descriptor open for every mapping, of which there are too few for all shards.
        with self._lock:
            descriptor = self._files.pop(shard, None)
            if descriptor is None:
                path = cached or self._local / f"{self.manifest.shards[shard].name}.tar"
                descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
            self._files[shard] = descriptor
            descriptor = os.dup(descriptor)
            if len(self._files) > _OPEN_SHARDS:
                os.close(self._files.popitem(last=False)[1])
        try:
            return _read_whole(descriptor, size, offset)
        finally:
            os.close(descriptor)

    def raw_column(self, name: str) -> pa.Array:
        """One factor's values for all samples as an Arrow array; null is missing.

        Raises:
            DataError: the set has no such factor, or its table is damaged.
        """
        self.check_factor(name)
        return whole(self._column(FACTOR + name))

    def check_factor(self, name: str) -> None:
        """Refuse the name of a factor that the set does not have.

        Raises:
            DataError: there is no such factor.
        """
        if name not in self.schema.factors:
            raise DataError(
                f"{self.folder}: no factor {name!r}; it has {list(self.schema.factors)}"
            )

    def _check_table(self) -> None:
        """Compare the sample table with the manifest, once."""
        if not self._table_checked:
            check_file(self._local, self.manifest.table)
            self._table_checked = True

    def _column(self, name: str) -> pa.ChunkedArray:
        self._check_table()
        path = self._local / self.manifest.table.name
        try:
            column = pq.read_table(path, columns=[name])[name]
        except (OSError, pa.ArrowException, KeyError) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        if len(column) != len(self):
            raise DataError(f"{path}: is damaged: {len(column)} rows for {len(self)} samples")
        return column


def _close_all(files: OrderedDict[int, int]) -> None:
    """Close the shards that a set, which is gone, had open."""
    while files:
        os.close(files.popitem()[1])


def _read_whole(descriptor: int, size: int, offset: int) -> bytes:
    """`size` bytes, or as many as there are; a single call gives 2 GiB at most.

    Raises:
        OSError: they cannot be read.
    """
    data = os.pread(descriptor, size, offset)
    if len(data) == size:
        return data
    parts, have = [data], len(data)
    while parts[-1] and have < size:
        parts.append(os.pread(descriptor, size - have, offset + have))
        have += len(parts[-1])
    return b"".join(parts)


def check_file(folder: Location, sealed: SealedFile) -> None:
    """Compare a small file of the set with the manifest.

    Raises:
        DataError: it is missing or changed.
    """
    path = folder / sealed.name
    if sha256_of(path) != sealed.sha256:
        raise DataError(f"{path}: is not the file that was sealed (its SHA-256 differs)")


def check_size(what: str, path: Path, expected: int) -> None:
    """Compare a file's size with the manifest; `what` it is goes into the message.

    Raises:
        DataError: it is missing or has another size.
    """
    try:
        found = path.stat().st_size
    except OSError as error:
        raise DataError(f"{what} {path}: cannot be read: {error.strerror}") from error
    if found != expected:
        raise DataError(
            f"{what} {path}: has {found} bytes, {expected} were sealed: it was cut or replaced"
        )
