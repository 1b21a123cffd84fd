"""`metadata-*.npy`: the encoded factors of every sample, one record of fixed size each.

A batch reads the records of its own samples, so no process holds the metadata of the others: the
system's page cache keeps one copy for all loaders of a machine.
"""

import os
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .index import records_start
from .plan import FACTOR
from .schema import Encoded, Factor, Schema

Records = NDArray[np.void]

# Encoded values of one factor at a time, in packing: 10,000 names and a shard of 100,000 samples
# would be 4 GB of indicators.
_CELLS = 1 << 24


def record_type(schema: Schema) -> np.dtype[np.void]:
    """The record of one sample: a field `f<i>` for the schema's i-th factor.

    Categories are int32 codes, −1 for missing. Numbers are float32, NaN for missing. Of several
    values each is one bit, behind a byte that is 1 where the factor is missing.
    """
    fields: list[tuple[str, str, tuple[int, ...]]] = []
    for i, factor in enumerate(schema.factors.values()):
        match factor.kind:
            case "categorical":
                fields.append((f"f{i}", "<i4", ()))
            case "multi":
                fields.append((f"f{i}", "u1", (1 + -(-factor.width // 8),)))
            case _:
                fields.append((f"f{i}", "<f4", (factor.width,)))
    return np.dtype(fields)


def pack(schema: Schema, raw: pa.Table) -> Records:
    """The records of samples whose raw metadata stand in the `factor:` columns of a table.

    Raises:
        DataError: a value is outside its vocabulary.
    """
    records = np.zeros(len(raw), record_type(schema))
    widest = max(factor.width for factor in schema.factors.values())
    rows = max(_CELLS // max(widest, 1), 1)
    for start in range(0, len(raw), rows):
        _pack_into(records[start : start + rows], schema, raw.slice(start, rows))
    return records


def _pack_into(records: Records, schema: Schema, raw: pa.Table) -> None:
    for i, (name, factor) in enumerate(schema.factors.items()):
        values = factor.encode(raw[FACTOR + name].combine_chunks())
        if factor.kind == "multi":
            missing = np.isnan(values).any(axis=1)
            records[f"f{i}"][:, 0] = missing
            records[f"f{i}"][:, 1:] = np.packbits(values == 1, axis=1)
        else:
            records[f"f{i}"] = values


def unpack(factor: Factor, field: NDArray[np.generic]) -> Encoded:
    """The field of a factor as the loss takes it (`Factor.encode`).

    Raises:
        DataError: a code is outside the vocabulary.
    """
    if factor.kind == "categorical":
        codes = field.astype(np.int64)
        if len(codes) and not -1 <= codes.min() <= codes.max() < len(factor.vocabulary):
            raise DataError(
                f"codes from {codes.min()} to {codes.max()}, the vocabulary has "
                f"{len(factor.vocabulary)} values"
            )
        return codes
    if factor.kind == "multi":
        bits = np.unpackbits(field[:, 1:].astype(np.uint8), axis=1, count=factor.width)
        indicators = bits.astype(np.float32)
        indicators[field[:, 0] != 0] = np.nan
        return indicators
    return field.astype(np.float32)


class MetadataFile:
    """The records of a sealed set, read where they are wanted.

    Raises:
        DataError: the file is missing or does not hold one record a sample.
    """

    def __init__(self, path: Path, schema: Schema, samples: int) -> None:
        self._path = path
        self._schema = schema
        self._samples = samples
        self._type = record_type(schema)
        self._start = records_start(path, self._type, samples)

    def of(self, rows: NDArray[np.int64], names: Iterable[str]) -> dict[str, Encoded]:
        """Encoded metadata of the samples `rows` (int64 [n]) by factor, for those in `names`.

        Raises:
            DataError: the file cannot be read, or is damaged.
        """
        size = self._type.itemsize
        try:
            with self._path.open("rb", buffering=0) as file:
                descriptor = file.fileno()
                data = b"".join(
                    os.pread(descriptor, size, self._start + size * row) for row in rows.tolist()
                )
        except OSError as error:
            raise DataError(f"{self._path}: cannot be read: {error.strerror}") from error
        if len(data) != size * len(rows):
            raise DataError(f"{self._path}: was cut while it was in use")
        records = np.frombuffer(data, self._type)
        return {name: self._unpacked(records, name) for name in names}

    def all(self, name: str) -> Encoded:
        """Encoded metadata of all samples for one factor.

        Raises:
            DataError: the file is damaged.
        """
        records = np.memmap(
            self._path, self._type, mode="r", offset=self._start, shape=(self._samples,)
        )
        return self._unpacked(records, name)

    def _unpacked(self, records: Records, name: str) -> Encoded:
        place = list(self._schema.factors).index(name)
        try:
            return unpack(self._schema.factors[name], records[f"f{place}"])
        except DataError as error:
            raise DataError(f"{self._path}: is damaged: factor {name!r}: {error}") from error
