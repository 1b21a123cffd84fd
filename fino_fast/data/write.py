"""Phase 2: one task writes one shard: tar, sidecar, receipt, in this order.

The receipt is the commit marker. A task is a pure function of the plan and the source files: who
runs it, how often, and what was left behind by an earlier attempt make no difference to a byte.
"""

import hashlib
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import pyarrow as pa
import pyarrow.parquet as pq

from fino_fast.errors import ConfigError, DataError

from .declaration import ImagesDeclaration
from .files import Location, committed, read_json, sha256_of, size_of, write_json
from .images import prepare
from .manifest import SealedShard
from .plan import FACTOR, PlannedShard, read_planned_rows
from .sources import Source, open_root
from .stored import ImageRejected, Stored
from .tar import TarWriter

_MAX_SAMPLE_BYTES = (1 << 32) - 1

SIDECAR_FIELDS: list[pa.Field] = [
    pa.field("row", pa.int64()),
    pa.field("table_row", pa.int64()),
    pa.field("id", pa.string()),
    pa.field("path", pa.string()),
    pa.field("split", pa.string()),
    pa.field("status", pa.string()),
    pa.field("code", pa.string()),
    pa.field("detail", pa.string()),
    pa.field("extension", pa.string()),
    pa.field("offset", pa.int64()),
    pa.field("size", pa.int64()),
    pa.field("height", pa.int64()),
    pa.field("width", pa.int64()),
    pa.field("channels", pa.int64()),
    pa.field("dtype", pa.string()),
    pa.field("axes", pa.string()),
    pa.field("crc32", pa.int64()),
    pa.field("sha256", pa.string()),
]


class Receipt(SealedShard):
    """`<shard>.json`: what was committed."""

    format: Literal["fino-fast shard"] = "fino-fast shard"
    version: Literal[1] = 1
    plan_sha256: str
    schema_sha256: str

    @property
    def sealed(self) -> SealedShard:
        """The part that the manifest repeats."""
        return SealedShard(**self.model_dump(include=set(SealedShard.model_fields)))

    @classmethod
    def read(cls, path: Location) -> Self:
        """Read a receipt.

        Raises:
            DataError: it is missing or damaged.
        """
        try:
            return cls.checked(read_json(path), str(path))
        except ConfigError as error:
            raise DataError(f"{error}; the file is damaged") from error


@dataclass(frozen=True)
class WriteTask:
    """Everything that a worker needs to write one shard."""

    out: Location
    images: Location
    generation: int
    group: int
    """Row group of the shard in the plan's row file."""
    shard: PlannedShard
    plan_sha256: str
    schema_sha256: str
    limits: ImagesDeclaration
    check: bool

    @property
    def name(self) -> str:
        return self.shard.name


def write_shard(task: WriteTask) -> Receipt:
    """Write and commit one shard.

    Raises:
        DiskFullError: no room left; nothing of this shard is committed.
        DataError: the plan is damaged, or a store fails.
        MissingExtraError: an image needs a package that is not installed.
    """
    planned = read_planned_rows(task.out, task.generation, task.group, task.shard)
    rows = planned.to_pylist()
    wanted = [Source(r["path"], r["size"], r["mtime_ns"]) for r in rows if r["code"] is None]
    reads = open_root(task.images).reads(wanted)
    outcomes: list[dict[str, Any]] = []
    tar_path = task.out / f"{task.name}.tar"
    with committed(tar_path) as file:
        tar = TarWriter(file)
        for row in rows:
            read = next(reads) if row["code"] is None else None
            outcomes.append(_write_row(tar, read, row, task))
        digest = tar.close()
    sidecar = _sidecar(planned, outcomes)
    with committed(task.out / f"{task.name}.parquet") as file:
        pq.write_table(sidecar, file, compression="zstd")
        file.flush()
        sidecar_sha256 = sha256_of(Path(file.name))
    samples = sum(outcome["status"] == "ok" for outcome in outcomes)
    receipt = Receipt(
        name=task.name,
        first_row=task.shard.first_row,
        rows=task.shard.rows,
        samples=samples,
        rejected=task.shard.rows - samples,
        bytes=tar.size,
        sha256=digest,
        sidecar_sha256=sidecar_sha256,
        plan_sha256=task.plan_sha256,
        schema_sha256=task.schema_sha256,
    )
    write_json(task.out / f"{task.name}.json", receipt.model_dump(mode="json"))
    return receipt


def committed_receipt(task: WriteTask) -> Receipt | None:
    """The receipt of a shard that needs no writing, None where it must be written (again).

    Raises:
        DataError: the folder or store does not let itself be read.
    """
    tar = task.out / f"{task.name}.tar"
    try:
        size = size_of(tar)
        receipt = Receipt.read(task.out / f"{task.name}.json")
        sidecar = sha256_of(task.out / f"{task.name}.parquet")
    except (DataError, FileNotFoundError):
        return None
    except OSError as error:
        raise DataError(f"{tar}: cannot be read: {error.strerror}") from error
    expected = (task.name, task.plan_sha256, task.shard.first_row, task.shard.rows)
    found = (receipt.name, receipt.plan_sha256, receipt.first_row, receipt.rows)
    whole = (size, sidecar) == (receipt.bytes, receipt.sidecar_sha256)
    return receipt if found == expected and whole else None


def _write_row(
    tar: TarWriter, read: Callable[[], bytes] | None, row: dict[str, Any], task: WriteTask
) -> dict[str, Any]:
    """Write one planned row, or say why not; `read` is None where the plan rejected it."""
    try:
        if read is None:
            raise ImageRejected(row["code"], row["detail"])
        stored = prepare(_content(read, row, task), task.limits, check=task.check)
        if len(stored.payload) > _MAX_SAMPLE_BYTES:
            raise ImageRejected("too_large", f"{len(stored.payload)} bytes; 4 GiB is the limit")
    except ImageRejected as rejection:
        return {"status": "rejected", "code": rejection.code, "detail": rejection.detail}
    name = f"{row['row']:012d}"
    offset = tar.add(f"{name}.{stored.extension}", stored.payload)
    tar.add(f"{name}.json", _metadata(row))
    return _placed(stored, offset)


def _content(read: Callable[[], bytes], row: dict[str, Any], task: WriteTask) -> bytes:
    """A source file's bytes.

    Raises:
        ImageRejected: the file cannot be taken.
        DataError: a store does not answer: that is no fault of the image.
    """
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"{task.images}/{row['path']}: cannot be fetched: {error.strerror}; run the same "
            "command again"
        ) from error


def _placed(stored: Stored, offset: int) -> dict[str, Any]:
    return {
        "status": "ok",
        "extension": stored.extension,
        "offset": offset,
        "size": len(stored.payload),
        "height": stored.height,
        "width": stored.width,
        "channels": stored.channels,
        "dtype": stored.dtype,
        "axes": stored.axes,
        "crc32": zlib.crc32(stored.payload),
        "sha256": hashlib.sha256(stored.payload).hexdigest(),
    }


def _metadata(row: dict[str, Any]) -> bytes:
    """The sample's `.json` member: what the table says about it, missing values as null."""
    content = {
        "id": row["id"],
        "path": row["path"],
        "row": row["row"],
        "split": row["split"],
        "metadata": {
            name.removeprefix(FACTOR): value
            for name, value in row.items()
            if name.startswith(FACTOR)
        },
    }
    text = json.dumps(
        content, sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":")
    )
    return text.encode("utf-8")


def _sidecar(planned: pa.Table, outcomes: list[dict[str, Any]]) -> pa.Table:
    """One row per planned row: where the sample is, or why it is not."""
    columns: dict[str, Any] = {}
    for field in SIDECAR_FIELDS:
        if field.name in ("row", "table_row", "id", "path", "split"):
            columns[field.name] = planned[field.name]
        else:
            columns[field.name] = pa.array([o.get(field.name) for o in outcomes], field.type)
    for name in planned.column_names:
        if name.startswith(FACTOR):
            columns[name] = planned[name]
    return pa.table(columns)
