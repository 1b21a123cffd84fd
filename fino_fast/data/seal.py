"""Phase 3: every planned shard is there and its counts add up; then, and only then, a manifest."""

from collections.abc import Iterator
from typing import IO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from fino_fast.errors import DataError

from .files import (
    Location,
    committed,
    parquet_source,
    remove_temporaries,
    sha256_of,
    size_of,
    write_json,
)
from .index import FORMS, RECORD, npy_header
from .manifest import MANIFEST, Manifest, SealedFile
from .metadata import pack, record_type
from .plan import FACTOR, Plan, planned_among, planned_schema
from .schema import Schema
from .tar import BLOCK
from .write import Receipt

REJECTS = "rejects.parquet"

_TABLE_COLUMNS = ["row", "id", "path", "split"]
_PLACES = ["offset", "size", "height", "width", "channels", "crc32", "extension", "dtype"]
_REJECTS = pa.schema(
    [("row", pa.int64()), ("table_row", pa.int64())]
    + [(name, pa.string()) for name in ("id", "path", "code", "detail")]
)


def seal(out: Location, plans: list[Plan], receipts: list[Receipt]) -> Manifest:
    """Write index, metadata, sample table and schema, and commit the manifest.

    The files that an earlier seal's manifest names stay until the new manifest stands, so a reader
    sees the old set or the new one.

    Args:
        out: folder of the set.
        plans: every generation, in order.
        receipts: of every shard, in order.

    Raises:
        DataError: a shard is missing or its counts disagree with its plan.
    """
    _check_complete(out, plans, receipts)
    schema = planned_schema(out, plans[-1])
    samples = sum(receipt.samples for receipt in receipts)
    if samples == 0:
        raise DataError(f"{out}: not one image could be taken; see {REJECTS}")
    suffix = f"{plans[-1].generation:04d}"
    schema_path, index_path = out / f"schema-{suffix}.json", out / f"index-{suffix}.npy"
    table_path, metadata_path = out / f"samples-{suffix}.parquet", out / f"metadata-{suffix}.npy"
    write_json(schema_path, schema.content())
    with (
        committed(index_path) as index,
        committed(table_path) as table,
        committed(metadata_path) as metadata,
    ):
        _write_samples(index, table, metadata, out, receipts, schema)
    manifest = Manifest(
        planned=sum(plan.rows for plan in plans),
        samples=samples,
        rejected=sum(receipt.rejected for receipt in receipts),
        plans=[plan.hash for plan in plans],
        schema_file=_sealed_file(schema_path),
        index=_sealed_file(index_path),
        table=_sealed_file(table_path),
        metadata=_sealed_file(metadata_path),
        shards=[receipt.sealed for receipt in receipts],
    )
    remove_temporaries(out)
    write_json(out / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _check_complete(out: Location, plans: list[Plan], receipts: list[Receipt]) -> None:
    planned = [
        (shard, plan_sha256)
        for plan, plan_sha256 in zip(plans, [plan.hash for plan in plans], strict=True)
        for shard in plan.shards
    ]
    if len(planned) != len(receipts):
        raise DataError(f"{out}: {len(receipts)} of {len(planned)} shards are committed")
    for (shard, plan_sha256), receipt in zip(planned, receipts, strict=True):
        expected = (shard.name, shard.rows, plan_sha256)
        if (receipt.name, receipt.rows, receipt.plan_sha256) != expected:
            raise DataError(f"{out}: shard {shard.name}: its receipt belongs to another plan")


def _sidecars(out: Location, receipts: list[Receipt], columns: list[str]) -> Iterator[pa.Table]:
    for receipt in receipts:
        path = out / f"{receipt.name}.parquet"
        try:
            # Not `read_table`, which takes as long again to look for a data set of many files.
            with pq.ParquetFile(parquet_source(path)) as file:
                table = file.read(columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        if len(table) != receipt.rows:
            raise DataError(f"{path}: has {len(table)} rows, its receipt says {receipt.rows}")
        yield table


def _write_samples(
    index: IO[bytes],
    table: IO[bytes],
    metadata: IO[bytes],
    out: Location,
    receipts: list[Receipt],
    schema: Schema,
) -> None:
    """Index, sample table and metadata, in one pass over the sidecars."""
    samples = sum(receipt.samples for receipt in receipts)
    index.write(npy_header(RECORD, samples))
    metadata.write(npy_header(record_type(schema), samples))
    kept = _TABLE_COLUMNS + [FACTOR + name for name in schema.factors]
    writer = None
    for number, sidecar in enumerate(_sidecars(out, receipts, ["status", *_PLACES, *kept])):
        part = sidecar.filter(pc.equal(sidecar["status"], "ok"))
        index.write(_records(part, number, schema).tobytes())
        metadata.write(pack(schema, part).tobytes())
        part = part.select(kept)
        writer = writer or pq.ParquetWriter(table, part.schema, compression="zstd")
        writer.write_table(part)
    if writer is not None:
        writer.close()


def _records(samples: pa.Table, shard: int, schema: Schema) -> NDArray[np.void]:
    """The index of one shard's samples."""
    records = np.zeros(len(samples), dtype=RECORD)
    records["shard"] = shard
    records["block"] = samples["offset"].to_numpy() // BLOCK
    for name in ("size", "height", "width", "channels", "crc32"):
        records[name] = samples[name].to_numpy()
    splits = pa.array(schema.splits, pa.string())
    records["split"] = pc.index_in(samples["split"], value_set=splits).to_numpy()
    forms = zip(samples["extension"].to_pylist(), samples["dtype"].to_pylist(), strict=True)
    records["form"] = [FORMS.index(form) for form in forms]
    return records


def write_rejects(out: Location, plans: list[Plan], receipts: list[Receipt]) -> pa.Table:
    """Commit `rejects.parquet`: every rejected row that was not tried again since; return it."""
    kept = []
    remaining = iter(receipts)
    for i, plan in enumerate(plans):
        own = [next(remaining) for _ in plan.shards]
        lost = _lost(out, own)
        if len(lost):
            for later in plans[i + 1 :]:
                again = planned_among(out, later, lost["id"]).combine_chunks()
                lost = lost.filter(pc.invert(pc.is_in(lost["id"], value_set=again)))
        kept.append(lost)
    rejects = pa.concat_tables(kept)
    with committed(out / REJECTS) as file:
        pq.write_table(rejects, file, compression="zstd")
    return rejects


def _lost(out: Location, receipts: list[Receipt]) -> pa.Table:
    """The rejected rows of some shards."""
    columns = ["status", *_REJECTS.names]
    tables = [
        table.filter(pc.equal(table["status"], "rejected")).select(_REJECTS.names)
        for table in _sidecars(out, [receipt for receipt in receipts if receipt.rejected], columns)
    ]
    return pa.concat_tables([_REJECTS.empty_table(), *tables])


def _sealed_file(path: Location) -> SealedFile:
    return SealedFile(name=path.name, bytes=size_of(path), sha256=sha256_of(path))
