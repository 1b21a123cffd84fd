"""`fino-fast verify`: read everything back and compare it with what was sealed."""

import hashlib
from collections.abc import Callable

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from fino_fast.errors import DataError

from .files import Location, open_read, parquet_source, sha256_of
from .index import FORMS, place_of
from .manifest import SealedShard
from .plan import Plan, check_rows, plan_folder, planned_schema
from .shardset import ShardSet, check_file
from .tar import BLOCK, member_header
from .write import Receipt


def verify(folder: Location, progress: Callable[[SealedShard], None] | None = None) -> list[str]:
    """Check counts, sizes and hashes of everything in a sealed set.

    Args:
        folder: the set.
        progress: called after each shard.

    Returns:
        One line for each shard or plan that is not as it was sealed; empty when all is well.

    Raises:
        DataError: the set cannot even be opened (not sealed, a shard cut, the index damaged), or
            its sample table has changed.
    """
    shards = ShardSet.open(folder)
    sealed = shards.manifest
    # Opening compared copies in the cache where the set lies in an object store.
    for file in (sealed.schema_file, sealed.index, sealed.metadata, sealed.table):
        check_file(folder, file)
    faults: list[str] = []
    for generation, digest in enumerate(sealed.plans):
        try:
            _verify_plan(folder, generation, digest)
        except DataError as error:
            faults.append(f"{error}; readers need no plan, adding rows does")
    first = 0
    for number, shard in enumerate(shards.manifest.shards):
        try:
            _verify_shard(shards, number, shard, first)
        except DataError as error:
            faults.append(f"shard {shard.name}: {error}")
        except OSError as error:
            faults.append(f"shard {shard.name}: cannot be read: {error.strerror}")
        first += shard.samples
        if progress:
            progress(shard)
    return faults


def _verify_plan(folder: Location, generation: int, digest: str) -> None:
    """Check what a later ingest reads of an earlier one.

    Raises:
        DataError: a file is missing or changed.
    """
    plan = Plan.read(plan_folder(folder, generation))
    if plan.hash != digest:
        raise DataError(f"{plan_folder(folder, generation)}/plan.json: is not what was sealed")
    check_rows(folder, plan)
    planned_schema(folder, plan)


def _verify_shard(shards: ShardSet, number: int, shard: SealedShard, first: int) -> None:
    """Check one shard, whose samples start at record `first` of the index.

    Raises:
        DataError: anything about it is not as sealed.
    """
    folder = shards.folder
    sidecar_path = folder / f"{shard.name}.parquet"
    if sha256_of(sidecar_path) != shard.sidecar_sha256:
        raise DataError(f"{sidecar_path.name} is not the file that was sealed")
    if Receipt.read(folder / f"{shard.name}.json").sealed != shard:
        raise DataError(f"{shard.name}.json and the manifest disagree")
    try:
        sidecar = pq.read_table(parquet_source(sidecar_path))
    except (OSError, pa.ArrowException) as error:
        raise DataError(f"{sidecar_path.name} cannot be read: {error}") from error
    samples = sidecar.filter(pc.equal(sidecar["status"], "ok")).to_pylist()
    records = shards.index[first : first + shard.samples]
    if len(sidecar) != shard.rows or len(samples) != shard.samples:
        raise DataError(f"{sidecar_path.name} does not hold the rows that were sealed")
    digest = hashlib.sha256()
    place = 0
    with open_read(folder / f"{shard.name}.tar") as tar:

        def advance(to: int) -> bytes:
            nonlocal place
            data = tar.read(to - place)
            digest.update(data)
            place = to
            return data

        for sample, record in zip(samples, records, strict=True):
            name = f"{sample['row']:012d}.{sample['extension']}"
            if place_of(record) != (number, sample["offset"], sample["size"]):
                raise DataError(f"{name} (id {sample['id']!r}): the index points elsewhere")
            if FORMS[record["form"]] != (sample["extension"], sample["dtype"]):
                raise DataError(f"{name} (id {sample['id']!r}): the index names another form")
            before = advance(sample["offset"])
            payload = advance(sample["offset"] + sample["size"])
            if before[-BLOCK:] != member_header(name, sample["size"]):
                raise DataError(f"{name} (id {sample['id']!r}): is not where it was sealed")
            if hashlib.sha256(payload).hexdigest() != sample["sha256"]:
                raise DataError(f"{name} (id {sample['id']!r}): the bytes have changed")
        advance(shard.bytes)
        if digest.hexdigest() != shard.sha256:
            raise DataError("the tar's SHA-256 differs: a byte outside the images has changed")
