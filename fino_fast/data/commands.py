"""`fino-fast ingest`, `verify` and `inspect`: command lines, bars and summaries."""

import time
from pathlib import Path
from typing import Literal, Self

from pydantic import Field
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from fino_fast.config import CommandModel
from fino_fast.errors import ConfigError, DataError

from .declaration import Declaration
from .engines import Engine, LocalEngine, RayEngine, processors
from .files import Location, LocationField, committed, local_copy
from .infer import infer_schema
from .ingest import SHARD_BYTES, Allowance, Report, Request, ingest
from .inspect import contact_sheet, summary_lines
from .manifest import Manifest, SealedShard
from .schema import shorten
from .shardset import ShardSet
from .verify import verify
from .write import Receipt


class Ingest(CommandModel):
    """Turn a table and a folder of images into sealed shards.

    Run it again after any interruption: only what is not committed is done. Run it again with rows
    appended to the table: only they are added. Exit codes: 0 sealed, 1 error, 2 too many rejects,
    3 disk full.
    """

    table: LocationField
    """CSV or Parquet file with one row an image: a path or an fsspec URL like s3://bucket/x.csv."""
    images: LocationField
    """Folder that the table's paths start from: a path or URL."""
    id: str
    """Column with a unique id for every image."""
    path: str
    """Column with the image's path below the image folder."""
    schema_path: Path = Field(alias="schema")
    """YAML file that declares the factors."""
    infer: bool = False
    """Only write a first schema, from what the table holds, to the path given by --schema."""
    out: LocationField | None = None
    """Folder of the shards: a path or URL; not needed with --infer."""
    engine: Literal["local", "ray"] = "local"
    """Where shards are written: processes of this machine, or Ray tasks."""
    ray_address: str | None = None
    """Ray cluster to use; a local Ray is started when left out."""
    workers: int | None = Field(default=None, ge=1)
    """Worker processes on this machine; one a processor that it may use when left out."""
    shard_of: str | None = None
    """"i/n": write only every n-th shard from the i-th on (0 ≤ i < n), for n processes without a
    cluster (a Slurm array); the last one to end seals."""
    seed: int = Field(default=0, ge=0)
    """Seed of the one shuffle that spreads the rows over the shards."""
    shard_bytes: int = Field(default=SHARD_BYTES, ge=1, le=1 << 40)
    """Size of a shard, about."""
    check: bool = True
    """Decode every image once before it is taken."""
    max_reject: str = "0.1%"
    """Rejected images up to which the set is sealed: a share like 0.1% or a number like 25."""
    retry_rejects: bool = False
    """Try the rejected rows again."""

    def run(self) -> int:
        if self.infer:
            with local_copy(self.table) as table:
                infer_schema(table, self.id, self.path, self.schema_path)
            print(f"{self.schema_path}: written; set the roles in it, then ingest without --infer")
            return 0
        if self.out is None:
            raise ConfigError("the command line: --out is missing: where shall the shards go?")
        if self.ray_address is not None and self.engine != "ray":
            raise ConfigError("the command line: --ray-address is for --engine ray")
        request = Request(
            table=self.table,
            images=self.images,
            id_column=self.id,
            path_column=self.path,
            declaration=Declaration.from_yaml(self.schema_path),
            out=self.out,
            seed=self.seed,
            shard_bytes=self.shard_bytes,
            check=self.check,
            max_reject=Allowance.parse(self.max_reject),
            retry_rejects=self.retry_rejects,
            part=parse_part(self.shard_of) if self.shard_of else None,
        )
        workers = self.workers or processors()
        engine: Engine = LocalEngine(workers)
        if self.engine == "ray":
            engine = RayEngine(workers, self.ray_address)
        with _IngestBar() as bar:
            report = ingest(request, engine, bar)
        print(summary(self.out, report))
        return 0


class _IngestBar:
    """Rows a second, MB a second, rejected rows and time left on a terminal; silent in a pipe."""

    def __init__(self) -> None:
        # disable=None: a bar on a terminal alone.
        self._bar = tqdm(unit="row", unit_scale=True, disable=None, desc="planning")
        self._begun = time.monotonic()
        self._bytes = self._rejected = 0

    def begin(self, phase: str, rows: int = 0) -> None:
        self._bar.set_description_str(phase, refresh=False)
        if rows:
            self._bar.reset(rows)
            self._begun, self._bytes = time.monotonic(), 0
        self._bar.refresh()

    def written(self, receipt: Receipt) -> None:
        self._bytes += receipt.bytes
        self._rejected += receipt.rejected
        rate = self._bytes / 1e6 / (time.monotonic() - self._begun)
        self._bar.set_postfix_str(f"{rate:.1f} MB/s, {self._rejected} rejected", refresh=False)
        self._bar.update(receipt.rows)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()


class Verify(CommandModel):
    """Read a sealed set back and check every count, size and hash.

    Exit codes: 0 all is well, 1 something is not; the shards are named.
    """

    shards: CliPositionalArg[LocationField]
    """Folder of the shards: a path or URL."""

    def run(self) -> int:
        sealed = Manifest.read(self.shards)
        size = sum(shard.bytes for shard in sealed.shards)
        with tqdm(total=size, unit="B", unit_scale=True, disable=None) as bar:

            def progress(shard: SealedShard) -> None:
                bar.update(shard.bytes)

            faults = verify(self.shards, progress)
        for fault in faults:
            print(fault)
        if faults:
            raise DataError(f"{self.shards}: {len(faults)} shards or plans are not as sealed")
        print(f"{self.shards}: {sealed.samples} samples in {len(sealed.shards)} shards are sound")
        return 0


class Inspect(CommandModel):
    """Look at a sealed set before training: a contact sheet and every factor's distribution."""

    shards: CliPositionalArg[LocationField]
    """Folder of the shards: a path or URL."""
    sheet: Path = Path("contact-sheet.png")
    """Where to write the contact sheet."""
    split: str | None = None
    """Split to take its images from; the adaptation split when left out."""
    count: int = Field(default=64, ge=1, le=4096)
    """Images on it."""
    seed: int = Field(default=0, ge=0)
    """Which images."""
    channel: int = Field(default=0, ge=0, le=5)
    """What to show of images with other than 1 or 3 channels, from 0."""

    def run(self) -> int:
        shards = ShardSet.open(self.shards)
        split = self.split or shards.schema.declaration.adaptation_split
        picture = contact_sheet(shards, split, self.count, self.seed, self.channel)
        with committed(self.sheet) as file:
            picture.save(file, "PNG")
        print("\n".join(summary_lines(shards)))
        print(f"\n{self.sheet}: contact sheet of the split {split!r}")
        return 0


def parse_part(text: str) -> tuple[int, int]:
    """Read "2/8" as the third of eight parts.

    Raises:
        ConfigError: it is none.
    """
    first, _, count = text.partition("/")
    if first.isdecimal() and count.isdecimal() and int(first) < int(count):
        return int(first), int(count)
    raise ConfigError(f"shard-of: {text!r} is no part like 0/8 … 7/8")


def summary(out: Location, report: Report) -> str:
    """What a person wants to know after an ingest."""
    manifest = report.manifest
    if manifest is None:
        return (
            f"{out}: {report.shards_written} shards written now, {report.shards_missing} are left "
            "to other processes; the set is not sealed yet"
        )
    size = sum(shard.bytes for shard in manifest.shards)
    lines = [
        f"{out}: {manifest.samples} samples in {len(manifest.shards)} shards, "
        f"{size / 2**20:.1f} MiB, {report.shards_written} shards written now",
        f"manifest {manifest.hash[:16]}, schema {manifest.schema_file.sha256[:16]}",
    ]
    if report.rejects:
        lines.append(f"rejected: {shorten(report.rejects)}; see rejects.parquet")
    lines += [
        f"factor {name!r}: taken as missing, outside the vocabulary: {shorten(values)}"
        for name, values in report.unknown.items()
    ]
    return "\n".join(lines)
