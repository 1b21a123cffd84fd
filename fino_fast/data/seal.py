"""Phase 3: every planned shard is there and its counts add up; then, and only then, a manifest."""

from collections.abc import Iterator

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

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
from .plan import FACTOR, Plan, plan_folder, planned_ids
from .schema import Schema
from .tar import BLOCK
from .write import Receipt

REJECTS = "rejects.parquet"

_TABLE_COLUMNS = ["row", "id", "path", "split"]
_REJECT_COLUMNS = ["row", "table_row", "id", "path", "code", "detail"]


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
    last = plans[-1].generation
    schema = Schema.read(plan_folder(out, last) / "schema.json")
    suffix = f"{last:04d}"
    names = [f"schema-{suffix}.json", f"index-{suffix}.npy", f"samples-{suffix}.parquet"]
    names.append(f"metadata-{suffix}.npy")
    samples = sum(receipt.samples for receipt in receipts)
    write_json(out / names[0], schema.content())
    _write_index(out / names[1], out, receipts, schema)
    _write_parquet(out / names[2], _samples(out, receipts, schema))
    _write_metadata(out / names[3], _samples(out, receipts, schema), samples, schema)
    sealed = [_sealed_file(out / name) for name in names]
    manifest = Manifest(
        planned=sum(plan.rows for plan in plans),
        samples=samples,
        rejected=sum(receipt.rejected for receipt in receipts),
        plans=[plan.hash for plan in plans],
        schema_file=sealed[0],
        index=sealed[1],
        table=sealed[2],
        metadata=sealed[3],
        shards=[receipt.sealed for receipt in receipts],
    )
    remove_temporaries(out)
    write_json(out / MANIFEST, manifest.model_dump(mode="json"))
    return manifest


def _check_complete(out: Location, plans: list[Plan], receipts: list[Receipt]) -> None:
    planned = [(shard, plan) for plan in plans for shard in plan.shards]
    if len(planned) != len(receipts):
        raise DataError(f"{out}: {len(receipts)} of {len(planned)} shards are committed")
    for (shard, plan), receipt in zip(planned, receipts, strict=True):
        if (receipt.name, receipt.rows, receipt.plan_sha256) != (
            shard.name,
            shard.rows,
            plan.hash,
        ):
            raise DataError(f"{out}: shard {shard.name}: its receipt belongs to another plan")


def _sidecars(out: Location, receipts: list[Receipt], columns: list[str]) -> Iterator[pa.Table]:
    for receipt in receipts:
        path = out / f"{receipt.name}.parquet"
        try:
            table = pq.read_table(parquet_source(path), columns=columns)
        except (OSError, pa.ArrowException) as error:
            raise DataError(f"{path}: cannot be read: {error}") from error
        if len(table) != receipt.rows:
            raise DataError(f"{path}: has {len(table)} rows, its receipt says {receipt.rows}")
        yield table


def _write_index(path: Location, out: Location, receipts: list[Receipt], schema: Schema) -> None:
    samples = sum(receipt.samples for receipt in receipts)
    if samples == 0:
        raise DataError(f"{out}: not one image could be taken; see {REJECTS}")
    columns = ["status", "split", "extension", "dtype"]
    numbers = ["size", "height", "width", "channels", "crc32"]
    splits = pa.array(schema.splits, pa.string())
    with committed(path) as file:
        file.write(npy_header(RECORD, samples))
        for number, table in enumerate(_sidecars(out, receipts, [*columns, "offset", *numbers])):
            table = table.filter(pc.equal(table["status"], "ok"))
            records = np.zeros(len(table), dtype=RECORD)
            records["shard"] = number
            records["block"] = table["offset"].to_numpy() // BLOCK
            for name in numbers:
                records[name] = table[name].to_numpy()
            records["split"] = pc.index_in(table["split"], value_set=splits).to_numpy()
            forms = zip(table["extension"].to_pylist(), table["dtype"].to_pylist(), strict=True)
            records["form"] = [FORMS.index(form) for form in forms]
            file.write(records.tobytes())


def _write_metadata(
    path: Location, tables: Iterator[pa.Table], samples: int, schema: Schema
) -> None:
    with committed(path) as file:
        file.write(npy_header(record_type(schema), samples))
        for table in tables:
            file.write(pack(schema, table).tobytes())


def _samples(out: Location, receipts: list[Receipt], schema: Schema) -> Iterator[pa.Table]:
    columns = _TABLE_COLUMNS + [FACTOR + name for name in schema.factors]
    for table in _sidecars(out, receipts, ["status", *columns]):
        yield table.filter(pc.equal(table["status"], "ok")).select(columns)


def write_rejects(out: Location, plans: list[Plan], receipts: list[Receipt]) -> pa.Table:
    """Commit `rejects.parquet`: every rejected row that was not tried again since; return it."""
    kept = []
    remaining = iter(receipts)
    for i, plan in enumerate(plans):
        own = [next(remaining) for _ in plan.shards]
        lost = pa.concat_tables(
            table.filter(pc.equal(table["status"], "rejected")).select(_REJECT_COLUMNS)
            for table in _sidecars(out, own, ["status", *_REJECT_COLUMNS])
        )
        for later in plans[i + 1 :]:
            again = pc.is_in(lost["id"], value_set=planned_ids(out, later))
            lost = lost.filter(pc.invert(again))
        kept.append(lost)
    rejects = pa.concat_tables(kept)
    _write_parquet(out / REJECTS, [rejects])
    return rejects


def _write_parquet(path: Location, tables: Iterator[pa.Table] | list[pa.Table]) -> None:
    tables = iter(tables)
    first = next(tables)
    with (
        committed(path) as file,
        pq.ParquetWriter(file, first.schema, compression="zstd") as writer,
    ):
        writer.write_table(first)
        for table in tables:
            writer.write_table(table)


def _sealed_file(path: Location) -> SealedFile:
    return SealedFile(name=path.name, bytes=size_of(path), sha256=sha256_of(path))
