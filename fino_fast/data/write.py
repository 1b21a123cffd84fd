"""Phase 2: one task writes one shard: tar, sidecar, receipt, in this order.

The receipt is the commit marker. A task is a pure function of the plan and the source files: who
runs it, how often, and what was left behind by an earlier attempt make no difference to a byte.
"""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, Self

import pyarrow as pa
import pyarrow.parquet as pq
from isal import isal_zlib

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
_TOGETHER = 256 << 10
"""Bytes of images that are hashed and written in one go. Decoding drives what the rest needs out of
the processor's caches: taking turns once in twenty small images makes an ingest 6 % faster.
"""
# Made once: `json.dumps` would make one a sample.
_JSON = json.JSONEncoder(sort_keys=True, ensure_ascii=False, allow_nan=False, separators=(",", ":"))

_FROM_PLAN = ["row", "table_row", "id", "path", "split"]


class Outcome(NamedTuple):
    """What became of a planned row: the sidecar's columns behind those of the plan."""

    status: Literal["ok", "rejected"]
    code: str | None = None
    detail: str | None = None
    extension: str | None = None
    offset: int | None = None
    size: int | None = None
    height: int | None = None
    width: int | None = None
    channels: int | None = None
    dtype: str | None = None
    axes: str | None = None
    crc32: int | None = None
    sha256: str | None = None


_NUMBERS = {"offset", "size", "height", "width", "channels", "crc32"}


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
    sealed_sha256: str | None = None
    """Of the tar, by the manifest of an earlier seal."""

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
    tar_path = task.out / f"{task.name}.tar"
    with committed(tar_path) as file:
        tar = TarWriter(file)
        outcomes = list(_write_rows(tar, task, planned))
        digest = tar.close()
    sidecar = _sidecar(planned, outcomes)
    with committed(task.out / f"{task.name}.parquet") as file:
        pq.write_table(sidecar, file, compression="zstd")
        file.flush()
        sidecar_sha256 = sha256_of(Path(file.name))
    samples = sum(outcome.status == "ok" for outcome in outcomes)
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
    shard = task.shard
    expected = (task.name, task.plan_sha256, task.schema_sha256, shard.first_row, shard.rows)
    found = (
        receipt.name, receipt.plan_sha256, receipt.schema_sha256, receipt.first_row, receipt.rows,
    )  # fmt: skip
    whole = (size, sidecar) == (receipt.bytes, receipt.sidecar_sha256)
    if whole and task.sealed_sha256 not in (None, receipt.sha256):
        # Written again since, or damaged. Otherwise tars are not read: they may be terabytes.
        whole = sha256_of(tar) == receipt.sha256
    return receipt if found == expected and whole else None


Read = Callable[[], bytes]


def _rows(planned: pa.Table, task: WriteTask) -> Iterator[tuple[int, str, Read, dict[str, Any]]]:
    """Of each planned row its number, path, what gives its image, and the sample's description:
    what the table says about it, missing values as None.
    """
    columns = {name: planned[name].to_pylist() for name in planned.column_names}
    rows, paths, codes = columns["row"], columns["path"], columns["code"]
    found = zip(paths, columns["size"], columns["mtime_ns"], codes, strict=True)
    wanted = [Source(path, size, mtime) for path, size, mtime, code in found if code is None]
    reads = open_root(task.images).reads(wanted)
    factors = {name.removeprefix(FACTOR): name for name in columns if name.startswith(FACTOR)}
    values = zip(*(columns[name] for name in factors.values()), strict=True)
    told = zip(columns["id"], columns["split"], values, strict=True)
    for row, path, code, detail, (id_, split, metadata) in zip(
        rows, paths, codes, columns["detail"], told, strict=True
    ):
        read = next(reads) if code is None else partial(_reject, code, detail)
        description = {
            "id": id_,
            "metadata": dict(zip(factors, metadata, strict=True)),
            "path": path,
            "row": row,
            "split": split,
        }
        yield row, path, read, description


def _reject(code: str, detail: str) -> bytes:
    """In place of reading what the plan rejected."""
    raise ImageRejected(code, detail)


def _write_rows(tar: TarWriter, task: WriteTask, planned: pa.Table) -> Iterator[Outcome]:
    """Write every planned row, or say why not; in order."""
    taken: list[tuple[int, dict[str, Any], Stored | Outcome]] = []
    held = 0
    for row, path, read, description in _rows(planned, task):
        taken.append((row, description, _take(task, path, read)))
        held += _held(taken[-1][-1])
        if held >= _TOGETHER:
            yield from [_add(tar, *each) for each in taken]
            taken.clear()
            held = 0
    yield from [_add(tar, *each) for each in taken]


def _take(task: WriteTask, path: str, read: Read) -> Stored | Outcome:
    """What to store of a planned row, or why it is rejected."""
    try:
        stored = prepare(_fetched(task, path, read), task.limits, check=task.check)
        if len(stored.payload) > _MAX_SAMPLE_BYTES:
            raise ImageRejected("too_large", f"{len(stored.payload)} bytes; 4 GiB is the limit")
    except ImageRejected as rejection:
        return Outcome("rejected", rejection.code, rejection.detail)
    return stored


def _fetched(task: WriteTask, path: str, read: Read) -> bytes:
    """A row's file.

    Raises:
        DataError: a store does not answer: that is no fault of the image.
    """
    try:
        return read()
    except OSError as error:
        raise DataError(
            f"{task.images}/{path}: cannot be fetched: {error.strerror}; run the same command again"
        ) from error


def _held(taken: Stored | Outcome) -> int:
    return len(taken.payload) if isinstance(taken, Stored) else 0


def _add(tar: TarWriter, row: int, description: dict[str, Any], taken: Stored | Outcome) -> Outcome:
    """Write the two members of a row that was taken."""
    if isinstance(taken, Outcome):
        return taken
    name = f"{row:012d}"
    offset = tar.add(f"{name}.{taken.extension}", taken.payload)
    tar.add(f"{name}.json", _JSON.encode(description).encode("utf-8"))
    return Outcome(
        status="ok",
        extension=taken.extension,
        offset=offset,
        size=len(taken.payload),
        height=taken.height,
        width=taken.width,
        channels=taken.channels,
        dtype=taken.dtype,
        axes=taken.axes,
        crc32=isal_zlib.crc32(taken.payload),
        sha256=hashlib.sha256(taken.payload).hexdigest(),
    )


def _sidecar(planned: pa.Table, outcomes: list[Outcome]) -> pa.Table:
    """One row per planned row: where the sample is, or why it is not."""
    columns: dict[str, Any] = {name: planned[name] for name in _FROM_PLAN}
    for name, values in zip(Outcome._fields, zip(*outcomes, strict=True), strict=True):
        columns[name] = pa.array(values, pa.int64() if name in _NUMBERS else pa.string())
    for name in planned.column_names:
        if name.startswith(FACTOR):
            columns[name] = planned[name]
    return pa.table(columns)
