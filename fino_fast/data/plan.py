"""Phase 1: the table alone decides what every shard will hold.

A plan is a pure function of the table, the declaration, the state of the files and a seed: rows are
shuffled once and cut into shards by bytes. A shard is a range of planned rows, never "what worker 3
wrote", so any worker can write any shard, any number of times, with the same bytes.
"""

import hashlib
from collections.abc import Iterator
from typing import IO, Literal, Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray
from pydantic import Field

from fino_fast.config import StrictModel
from fino_fast.errors import ConfigError, DataError

from .declaration import Declaration
from .files import (
    Location,
    canonical_json,
    committed,
    make_folder,
    parquet_source,
    read_json,
    sha256_of,
    write_json,
)
from .freezing import SchemaBuilder
from .order import PLAN, derive_key, permute
from .schema import Schema
from .spill import Shuffle, Spill, regrouped, scratch_folder
from .survey import surveyed
from .table import Rows

_LAST_SHARD, _LAST_GENERATION = 999_999, 9_999
FACTOR = "factor:"
"""Prefix of the columns that hold raw metadata in every Parquet file of a set."""


class Inputs(StrictModel):
    """What a plan was made from; the same inputs resume it."""

    table_sha256: str
    declaration_sha256: str
    id_column: str
    path_column: str
    seed: int
    shard_bytes: int = Field(ge=1)


class PlannedShard(StrictModel):
    """A range of planned rows."""

    name: str = Field(pattern=r"^shard-\d{4}-\d{6}$")
    first_row: int = Field(ge=0)
    rows: int = Field(ge=1)


class Plan(StrictModel):
    """`plan.json` of one generation: one ingest that added rows to the set."""

    format: Literal["fino-fast plan"] = "fino-fast plan"
    version: Literal[1] = 1
    generation: int = Field(ge=0)
    inputs: Inputs
    first_row: int = Field(ge=0)
    rows: int = Field(ge=1)
    shards: list[PlannedShard] = Field(min_length=1)
    rows_sha256: str
    schema_sha256: str

    @classmethod
    def read(cls, folder: Location) -> Self:
        """Read `plan.json` of a generation's folder.

        Raises:
            DataError: it is missing or damaged.
        """
        path = folder / "plan.json"
        try:
            plan = cls.checked(read_json(path), str(path))
        except ConfigError as error:
            raise DataError(f"{error}; the file is damaged") from error
        row = plan.first_row
        for shard in plan.shards:
            if shard.first_row != row:
                raise DataError(f"{path}: is damaged: shard {shard.name} starts at a wrong row")
            row += shard.rows
        if row != plan.first_row + plan.rows:
            raise DataError(f"{path}: is damaged: its shards do not add up to {plan.rows} rows")
        return plan

    @property
    def hash(self) -> str:
        """SHA-256 of `plan.json`."""
        return hashlib.sha256(canonical_json(self.model_dump(mode="json"))).hexdigest()


def plan_folder(out: Location, generation: int) -> Location:
    return out / f"plan-{generation:04d}"


def make_plan(
    out: Location,
    generation: int,
    first_row: int,
    inputs: Inputs,
    declaration: Declaration,
    rows: Spill,
    chosen: NDArray[np.bool_],
    fresh: NDArray[np.bool_],
    images: Location,
    previous: Schema | None,
) -> Plan:
    """Plan the chosen rows as one generation and commit the plan; `plan.json` is written last.

    Memory holds 16 bytes a row and one of the ranges that the rows are shuffled in.

    Args:
        out: folder of the set.
        generation: number of this ingest, from 0.
        first_row: planned rows of the earlier generations.
        inputs: what the plan is made from.
        declaration: the declared schema.
        rows: the table, checked, in the columns of `row_table`.
        chosen: which of its rows to plan.
        fresh: False for rows that an earlier generation planned already.
        images: the folder that paths start from.
        previous: the frozen schema of the earlier generations.

    Raises:
        ConfigError: more shards than their names can count.
        DataError: the rows give no usable schema, or rows were added too often.
        DiskFullError: no room left.
    """
    if generation > _LAST_GENERATION:
        raise DataError(
            f"{out}: rows were added {_LAST_GENERATION} times, which is all that names of shards "
            "count; ingest the whole table into another --out"
        )
    schema = _frozen(declaration, rows, chosen, fresh, previous)
    count = int(np.count_nonzero(chosen))
    key = derive_key(inputs.seed, PLAN, generation)
    sizes = np.zeros(count, np.int64)
    folder = plan_folder(out, generation)
    make_folder(folder)
    shuffle = Shuffle(count, scratch_folder(folder))
    with committed(folder / "rows.parquet") as file, shuffle:
        done = 0
        for table in surveyed(images, _chosen(rows, chosen)):
            places = permute(np.arange(done, done + len(table)), count, key)
            sizes[places] = table["size"].to_numpy()
            shuffle.add(table, places)
            done += len(table)
        shards = list(_cut(sizes, generation, first_row, inputs.shard_bytes))
        _write_rows(file, shuffle.ordered(), shards)
    schema_sha256 = write_json(folder / "schema.json", schema.content())
    plan = Plan(
        generation=generation,
        inputs=inputs,
        first_row=first_row,
        rows=count,
        shards=shards,
        rows_sha256=sha256_of(folder / "rows.parquet"),
        schema_sha256=schema_sha256,
    )
    write_json(folder / "plan.json", plan.model_dump(mode="json"))
    return plan


def row_table(rows: Rows) -> pa.Table:
    """Checked rows as a table: id, path, split and the factors' raw values."""
    return pa.table(
        {"id": rows.ids, "path": rows.paths, "split": rows.splits}
        | {FACTOR + name: raw for name, raw in rows.raw.items()}
    )


def _frozen(
    declaration: Declaration,
    rows: Spill,
    chosen: NDArray[np.bool_],
    fresh: NDArray[np.bool_],
    previous: Schema | None,
) -> Schema:
    builder = SchemaBuilder(declaration, previous)
    for table in _chosen(rows, chosen):
        raw = {name: table[FACTOR + name].combine_chunks() for name in declaration.factors}
        counts = pa.array(fresh[table["table_row"].to_numpy()])
        builder.add(raw, table["split"].combine_chunks(), counts)
    return builder.schema()


def _chosen(rows: Spill, chosen: NDArray[np.bool_]) -> Iterator[pa.Table]:
    """The chosen rows in the order of the table, with their row numbers in it, from 0."""
    start = 0
    for table in rows.tables():
        places = np.flatnonzero(chosen[start : start + len(table)])
        if len(places):
            numbers = pa.array(places + start)
            yield table.take(pa.array(places)).add_column(0, "table_row", numbers)
        start += len(table)


def _write_rows(file: IO[bytes], pieces: Iterator[pa.Table], shards: list[PlannedShard]) -> None:
    """The rows in planned order, one row group a shard, so that its worker reads nothing else."""
    writer = None
    tables = regrouped(pieces, [shard.rows for shard in shards])
    for shard, table in zip(shards, tables, strict=True):
        numbers = np.arange(shard.first_row, shard.first_row + shard.rows)
        table = table.add_column(0, "row", pa.array(numbers))
        writer = writer or pq.ParquetWriter(file, table.schema, compression="zstd")
        writer.write_table(table, row_group_size=shard.rows)
    if writer is not None:
        writer.close()


def _cut(
    sizes: NDArray[np.int64], generation: int, first_row: int, shard_bytes: int
) -> Iterator[PlannedShard]:
    """Consecutive ranges of about `shard_bytes`; a larger image has a shard of its own.

    Raises:
        ConfigError: there are more of them than their names can count.
    """
    # Members cost two headers and padding besides the image; small images would otherwise
    # make shards of many times the wanted size.
    ends = np.cumsum(sizes + 2048)
    start, number, before = 0, 0, 0
    while start < len(sizes):
        if number > _LAST_SHARD:
            raise ConfigError(
                f"shard-bytes: {shard_bytes} makes more than {_LAST_SHARD + 1} shards of these "
                f"{len(sizes)} rows; give more"
            )
        end = max(int(np.searchsorted(ends, before + shard_bytes, side="right")), start + 1)
        yield PlannedShard(
            name=f"shard-{generation:04d}-{number:06d}",
            first_row=first_row + start,
            rows=end - start,
        )
        before, start, number = int(ends[end - 1]), end, number + 1


def check_rows(out: Location, plan: Plan) -> None:
    """Compare a plan's row file with what was planned: a flipped bit in it would be a wrong cell.

    Raises:
        DataError: it is missing or changed.
    """
    path = plan_folder(out, plan.generation) / "rows.parquet"
    if sha256_of(path) != plan.rows_sha256:
        raise DataError(changed(path))


def planned_schema(out: Location, plan: Plan) -> Schema:
    """The schema that a plan froze.

    Raises:
        DataError: its file is missing, damaged or changed.
    """
    path = plan_folder(out, plan.generation) / "schema.json"
    schema = Schema.read(path)
    if schema.hash != plan.schema_sha256:
        raise DataError(changed(path))
    return schema


def changed(path: Location) -> str:
    """What to say of a plan's file that is another one."""
    return (
        f"{path}: is not the file that was planned (missing, or another SHA-256); restore it, or "
        "ingest into another --out"
    )


def planned_among(out: Location, plan: Plan, ids: pa.ChunkedArray) -> pa.ChunkedArray:
    """Those of some ids that a plan holds.

    Raises:
        DataError: the row file cannot be read.
    """
    # Not the other way round: the ids of a whole plan may be too long for one array.
    planned = planned_columns(out, plan, ["id"])["id"]
    return planned.filter(pc.is_in(planned, value_set=ids.combine_chunks()))


def planned_columns(out: Location, plan: Plan, columns: list[str]) -> pa.Table:
    """Some columns of all rows of a plan, in planned order.

    Raises:
        DataError: the row file cannot be read.
    """
    path = plan_folder(out, plan.generation) / "rows.parquet"
    try:
        return pq.read_table(parquet_source(path), columns=columns)
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error


def read_planned_rows(out: Location, generation: int, group: int, shard: PlannedShard) -> pa.Table:
    """The planned rows of one shard, which are row group `group` of the plan's row file.

    Raises:
        DataError: the row file is damaged.
    """
    path = plan_folder(out, generation) / "rows.parquet"
    try:
        with pq.ParquetFile(parquet_source(path)) as file:
            table = file.read_row_group(group)
    except (OSError, pa.ArrowException, IndexError) as error:
        raise DataError(f"{path}: cannot be read: {error}") from error
    rows = table["row"]
    if len(rows) != shard.rows or rows[0].as_py() != shard.first_row:
        raise DataError(f"{path}: is damaged: shard {shard.name} does not find its rows")
    return table
