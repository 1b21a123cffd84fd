"""The whole of ingestion: plan, write, seal, and everything that makes a rerun safe."""

import hashlib
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from fino_fast.errors import ConfigError, DataError, TooManyRejectsError

from .attributes import LOOKED, PREFIX, Attributes
from .declaration import Declaration
from .engines import Engine
from .files import (
    Location,
    canonical_json,
    local_copy,
    make_folder,
    read_json,
    remove_temporaries,
    sha256_of,
)
from .known import check_unchanged, last_planned
from .lock import locked
from .manifest import MANIFEST, Manifest
from .plan import (
    Inputs,
    Plan,
    changed,
    check_rows,
    make_plan,
    plan_folder,
    planned_columns,
    planned_schema,
    row_table,
)
from .remote import Remote
from .schema import shorten
from .seal import REJECTS, seal, write_rejects
from .spill import Spill, scratch_folder
from .table import TableParser, column_names, table_chunks
from .write import Receipt, WriteTask, committed_receipt, write_shard

SHARD_BYTES = 256 << 20
LOCK = "ingest.lock"
RIVAL = "another ingest"
_SHOWN = 10
_CONNECTIONS = 16


@dataclass(frozen=True)
class Allowance:
    """How many images may be rejected: a share of all rows, or a number."""

    share: float | None = None
    count: int | None = None

    @classmethod
    def parse(cls, text: str) -> "Allowance":
        """Read "0.1%" as a share and "25" as a number.

        Raises:
            ConfigError: it is neither.
        """
        number = text.strip().removesuffix("%")
        try:
            value = float(number) / 100 if text.strip().endswith("%") else int(number)
        except ValueError:
            value = -1
        if isinstance(value, int) and value >= 0:
            return cls(count=value)
        if isinstance(value, float) and 0 <= value <= 1:
            return cls(share=value)
        raise ConfigError(f"max-reject: {text!r} is neither a share like 0.1% nor a number like 25")

    def of(self, rows: int) -> int:
        """The number of images that may be rejected among `rows`."""
        return self.count if self.count is not None else int((self.share or 0.0) * rows)


@dataclass(frozen=True)
class Request:
    """What to ingest, from where, to where."""

    table: Location
    images: Location
    id_column: str
    path_column: str
    declaration: Declaration
    out: Location
    seed: int = 0
    shard_bytes: int = SHARD_BYTES
    check: bool = True
    max_reject: Allowance = Allowance(share=0.001)
    retry_rejects: bool = False
    part: tuple[int, int] | None = None
    """(i, n): write every n-th shard from the i-th on; n such processes make a set."""


@dataclass
class Report:
    """What an ingest did, and what the whole set holds now."""

    manifest: Manifest | None
    """None where other processes still have shards to write."""
    shards_written: int
    rejects: dict[str, int]
    """Rejected rows of the whole set by code."""
    unknown: dict[str, dict[str, int]] = field(default_factory=dict)
    """Values outside a declared vocabulary, taken as missing, by factor."""
    shards_missing: int = 0
    """Shards that other processes have not written yet."""


class Progress(Protocol):
    """Who wants to know how far an ingest is."""

    def begin(self, phase: Literal["planning", "writing", "sealing"], rows: int = 0) -> None:
        """A phase begins; `rows` are to be written in it."""

    def written(self, receipt: Receipt) -> None:
        """A shard was committed."""


def ingest(request: Request, engine: Engine, progress: Progress | None = None) -> Report:
    """Bring a table and its images into `request.out`, as far as they are not there yet.

    A rerun after any interruption does only what is not committed. A rerun with rows appended to
    the table adds these rows.

    Raises:
        ConfigError: the command and the set do not fit together.
        DataError: table, images or set cannot be used.
        TooManyRejectsError: more images were rejected than allowed; the shards stay, unsealed.
        DiskFullError: no room left.
    """
    if not _is_folder(request.images):
        raise ConfigError(f"{request.images}: is no folder of images")
    make_folder(request.out)
    with local_copy(request.table) as table:
        return _ingest(request, table, engine, progress)


def _is_folder(images: Location) -> bool:
    try:
        return images.is_dir()
    except OSError as error:
        raise DataError(f"{images}: cannot be read: {error.strerror}") from error


def _ingest(request: Request, table: Path, engine: Engine, progress: Progress | None) -> Report:
    """The whole of it, with a table on this machine."""
    inputs = _inputs(request, table)
    if request.part is not None:
        return _ingest_part(request, table, inputs, engine, progress)
    with locked(request.out / LOCK, RIVAL):
        remove_temporaries(request.out)
        plans = read_plans(request.out)
        _check_inputs(request, plans, inputs)
        # An unfinished plan is finished before another one is made: it knows its rows, whatever has
        # become of the table since.
        written = _write_missing(request, plans, engine, progress)
        unknown = _plan_further(request, table, plans, inputs, progress)
        written += _write_missing(request, plans, engine, progress)
        return _finish(request, plans, written, unknown, progress)


def _ingest_part(
    request: Request, table: Path, inputs: Inputs, engine: Engine, progress: Progress | None
) -> Report:
    """One of several processes that share the shards of one plan without talking to each other.

    Whoever comes first makes the plan, whoever ends last seals; in between nobody holds the lock,
    as each writes files that no other one writes.
    """
    if request.retry_rejects:
        raise ConfigError(
            "rejects are tried again by one ingest for all, without a share of shards"
        )
    with locked(request.out / LOCK, RIVAL, wait=True):
        plans = read_plans(request.out)
        _check_inputs(request, plans, inputs)
        unknown = {}
        if not plans or plans[-1].inputs != inputs:
            unknown = _plan_further(request, table, plans, inputs, progress)
    written = _write_missing(request, plans, engine, progress)
    with locked(request.out / LOCK, RIVAL, wait=True):
        remaining = _committed(write_tasks(request, plans)).count(None)
        if remaining:
            return Report(None, written, {}, unknown, remaining)
        remove_temporaries(request.out)
        return _finish(request, plans, written, unknown, progress)


def _plan_further(
    request: Request,
    table: Path,
    plans: list[Plan],
    inputs: Inputs,
    progress: Progress | None,
) -> dict[str, dict[str, int]]:
    """Append a plan of what is new in the table, if anything; return the unknown values."""
    if plans and plans[-1].inputs == inputs and not request.retry_rejects:
        return {}
    if progress:
        progress.begin("planning")
    with Spill(scratch_folder(request.out)) as rows:
        unknown = _read_rows(request, table, rows)
        new = _plan_new_rows(request, plans, inputs, rows)
        plans += [new] if new else []
        return unknown


def _finish(
    request: Request,
    plans: list[Plan],
    written: int,
    unknown: dict[str, dict[str, int]],
    progress: Progress | None,
) -> Report:
    """Seal what is complete.

    Raises:
        TooManyRejectsError: more images were rejected than allowed.
        DataError: a shard is missing.
    """
    if progress:
        progress.begin("sealing")
    receipts = _receipts(request, plans)
    rejects = write_rejects(request.out, plans, receipts)
    _check_rejects(request, rejects, sum(receipt.samples for receipt in receipts))
    manifest = seal(request.out, plans, receipts)
    return Report(manifest, written, dict(Counter(rejects["code"].to_pylist())), unknown)


def read_plans(out: Location) -> list[Plan]:
    """All plans of a set, in order; a plan without its `plan.json` was never committed.

    Raises:
        DataError: a plan is damaged, or not the one by which the set was sealed.
    """
    plans: list[Plan] = []
    while (plan_folder(out, len(plans)) / "plan.json").is_file():
        plan = Plan.read(plan_folder(out, len(plans)))
        first_row = plans[-1].first_row + plans[-1].rows if plans else 0
        if (plan.generation, plan.first_row) != (len(plans), first_row):
            raise DataError(f"{plan_folder(out, len(plans))}: belongs to another place in a set")
        plans.append(plan)
    for generation, digest in enumerate(_sealed_plans(out)):
        # Without it, or by another one, committed shards would be written over.
        if generation >= len(plans) or plans[generation].hash != digest:
            raise DataError(changed(plan_folder(out, generation) / "plan.json"))
    return plans


def _sealed_tars(out: Location) -> dict[str, str]:
    """SHA-256 of the shards that the last seal named."""
    try:
        return {shard.name: shard.sha256 for shard in Manifest.read(out).shards}
    except DataError:
        return {}  # none yet, by an earlier version, or damaged: it is written anew


def _sealed_plans(out: Location) -> list[object]:
    """Hashes of the plans that the last seal named, by whatever version."""
    try:
        plans = read_json(out / MANIFEST).get("plans")
    except DataError:
        return []  # none yet, or damaged: it is written anew
    return plans if isinstance(plans, list) else []


def _inputs(request: Request, table: Path) -> Inputs:
    declaration = canonical_json(request.declaration.model_dump(mode="json"))
    return Inputs(
        table_sha256=sha256_of(table),
        declaration_sha256=hashlib.sha256(declaration).hexdigest(),
        id_column=request.id_column,
        path_column=request.path_column,
        seed=request.seed,
        shard_bytes=request.shard_bytes,
    )


def _check_inputs(request: Request, plans: list[Plan], inputs: Inputs) -> None:
    """Refuse to mix rows that were read by different rules."""
    if not plans:
        return
    known = plans[-1].inputs
    names = {
        "declaration_sha256": "the schema file",
        "id_column": "--id",
        "path_column": "--path",
    }
    for name, what in names.items():
        if getattr(known, name) != getattr(inputs, name):
            raise ConfigError(
                f"{request.out}: {what} is not what the set was made with; rows read by different "
                "rules do not mix: use the former, or another --out (roles and weights can be "
                "changed in the training configuration)"
            )


def write_tasks(request: Request, plans: list[Plan]) -> list[WriteTask]:
    """One task a planned shard, in order."""
    tasks = []
    sealed = _sealed_tars(request.out)
    for plan in plans:
        plan_sha256 = plan.hash  # of the whole plan: not once a shard
        tasks += [
            WriteTask(
                out=request.out,
                images=request.images,
                generation=plan.generation,
                group=group,
                shard=shard,
                plan_sha256=plan_sha256,
                schema_sha256=plan.schema_sha256,
                limits=request.declaration.images,
                check=request.check,
                sealed_sha256=sealed.get(shard.name),
            )
            for group, shard in enumerate(plan.shards)
        ]
    return tasks


def _receipts(request: Request, plans: list[Plan]) -> list[Receipt]:
    """The receipts of all committed shards, in order."""
    return [receipt for receipt in _committed(write_tasks(request, plans)) if receipt is not None]


def _committed(tasks: list[WriteTask]) -> list[Receipt | None]:
    """Each task's receipt, or None where the shard is not committed; in order."""
    if not tasks or not isinstance(tasks[0].out, Remote):
        return [committed_receipt(task) for task in tasks]
    with ThreadPoolExecutor(_CONNECTIONS) as pool:
        return list(pool.map(committed_receipt, tasks))


def _write_missing(
    request: Request, plans: list[Plan], engine: Engine, progress: Progress | None
) -> int:
    """Write every planned shard (of this process's part) that has no receipt; count them."""
    first, step = request.part or (0, 1)
    tasks = write_tasks(request, plans)[first::step]
    missing = [
        task for task, receipt in zip(tasks, _committed(tasks), strict=True) if receipt is None
    ]
    for plan in plans:
        if any(task.generation == plan.generation for task in missing):
            check_rows(request.out, plan)
    if missing and progress:
        progress.begin("writing", sum(task.shard.rows for task in missing))
    for receipt in engine.run(write_shard, missing):
        if progress:
            progress.written(receipt)
    return len(missing)


def _read_rows(request: Request, path: Path, rows: Spill) -> dict[str, dict[str, int]]:
    """Check the table and set its rows aside; return the unknown values."""
    declaration = request.declaration
    columns = [request.id_column, request.path_column]
    columns += [declaration.split.column] if declaration.split else []
    for name in declaration.factors:
        columns += [c for c in declaration.columns_of(name) if not c.startswith(PREFIX)]
    attributes = Attributes(declaration, request.images, request.path_column)
    attributes.check_table(column_names(path, declaration.table.delimiter))
    parser = TableParser(declaration, request.id_column, request.path_column)
    for chunk in table_chunks(path, list(dict.fromkeys(columns)), declaration.table.delimiter):
        whole = attributes.added_to(chunk)
        parsed = row_table(parser.parse(whole))
        if LOOKED in whole.column_names:
            parsed = parsed.append_column(LOOKED, whole[LOOKED])
        rows.write(parsed)
    if parser.rows == 0:
        raise DataError(f"{path}: has no rows")
    attributes.check_found()
    parser.check(lambda: (table["id"].combine_chunks() for table in rows.tables()))
    return parser.unknown


def _plan_new_rows(request: Request, plans: list[Plan], inputs: Inputs, rows: Spill) -> Plan | None:
    """Plan what no earlier generation planned, and, if asked for, what was rejected."""
    count = sum(len(table) for table in rows.tables())
    fresh, again, previous = np.ones(count, dtype=bool), np.zeros(count, dtype=bool), None
    if plans:
        previous = planned_schema(request.out, plans[-1])
        for plan in plans:
            check_rows(request.out, plan)

        def column(name: str) -> pa.ChunkedArray:
            return pa.concat_tables(planned_columns(request.out, plan, [name]) for plan in plans)[
                name
            ]

        where = last_planned(rows, column)
        fresh = where < 0
        if request.retry_rejects:
            rejects = write_rejects(request.out, plans, _receipts(request, plans))
            rejected = rejects["id"].combine_chunks()
            hits = [pc.is_in(table["id"], value_set=rejected) for table in rows.tables()]
            again = np.concatenate([hit.to_numpy() for hit in hits])
        check_unchanged(rows, column, where, kept=~fresh & ~again)
    if not (fresh | again).any():
        return None
    return make_plan(
        out=request.out,
        generation=len(plans),
        first_row=plans[-1].first_row + plans[-1].rows if plans else 0,
        inputs=inputs,
        declaration=request.declaration,
        rows=rows,
        chosen=fresh | again,
        fresh=fresh,
        images=request.images,
        previous=previous,
    )


def _check_rejects(request: Request, rejects: pa.Table, samples: int) -> None:
    allowed = request.max_reject.of(samples + len(rejects))
    if len(rejects) <= allowed:
        return
    lines = [
        f"id {row['id']!r}, {row['path']!r}: {row['code']}: {row['detail']}"
        for row in rejects.slice(0, _SHOWN).to_pylist()
    ]
    if len(rejects) > _SHOWN:
        lines.append(f"and {len(rejects) - _SHOWN} more in {request.out / REJECTS}")
    raise TooManyRejectsError(
        f"{len(rejects)} of {samples + len(rejects)} images were rejected "
        f"({shorten(Counter(rejects['code'].to_pylist()))}), {allowed} are allowed, so the set is "
        "not sealed; correct the files and add --retry-rejects, or raise --max-reject\n  "
        + "\n  ".join(lines)
    )
