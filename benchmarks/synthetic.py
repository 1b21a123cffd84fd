"""Sealed sets and tables of any number of rows, made in seconds, for measurements of size.

One shard of small real images is ingested; all other shards are hard links to its tar. So manifest,
index, metadata and sample table are as large as those of a true set of that many samples, and every
read finds a sound image; only the images' bytes are shared.
"""

import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import LocalEngine
from fino_fast.data.files import sha256_of, write_json
from fino_fast.data.index import RECORD, npy_header, read_index, records_start
from fino_fast.data.ingest import Request, ingest
from fino_fast.data.manifest import MANIFEST, SealedFile
from fino_fast.data.metadata import record_type
from fino_fast.data.schema import Schema

FACTORS = {
    "plate": {"kind": "categorical", "role": "suppress"},
    "cell_line": {"kind": "categorical", "role": "preserve"},
    "exposure": {"kind": "continuous", "role": "suppress", "low": 0, "high": 2},
    "hour": {"kind": "cyclic", "role": "suppress", "period": 24},
}
_FILES = 64


def declaration() -> Declaration:
    return Declaration.model_validate({"factors": FACTORS, "split": {"column": "split"}})


def write_images(folder: Path) -> list[str]:
    """64 PNG of 40×40 noisy pixels; return their names."""
    folder.mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (_FILES, 40, 40), dtype=np.uint8)
    for i, image in enumerate(pixels):
        Image.fromarray(image).save(folder / f"{i:03d}.png")
    return [f"{i:03d}.png" for i in range(_FILES)]


def write_table(path: Path, rows: int, names: list[str]) -> None:
    """A Parquet table of `rows` rows: unique ids, paths that repeat `names`, four factors."""
    rng = np.random.default_rng(1)
    files = pa.array(names)
    strings, numbers = ("id", "file", "split", "plate", "cell_line"), ("exposure", "hour")
    schema = pa.schema(
        [(name, pa.string()) for name in strings] + [(name, pa.float64()) for name in numbers]
    )
    plates = pa.array([f"plate {i:04d}" for i in range(5000)])
    lines = pa.array([f"line {i}" for i in range(35)])
    splits = pa.array(["adapt", "test"])
    with pq.ParquetWriter(path, schema) as writer:
        for start in range(0, rows, 1 << 18):
            n = min(1 << 18, rows - start)
            place = np.arange(start, start + n)
            ids = np.char.add("cell-", np.char.zfill(place.astype(str), 10))
            columns = [
                pa.array(ids),
                files.take(pa.array(place % len(names))),
                splits.take(pa.array((place % 10 == 0).astype(int))),
                plates.take(pa.array(rng.integers(0, len(plates), n))),
                lines.take(pa.array(rng.integers(0, len(lines), n), mask=place % 50 == 0)),
                pa.array(rng.uniform(0, 2, n), mask=place % 30 == 0),
                pa.array(rng.uniform(0, 24, n)),
            ]
            writer.write_table(pa.table(columns, schema=schema))


def sealed_set(root: Path, samples: int, shard_rows: int) -> Path:
    """A sealed set of `samples` samples in shards of `shard_rows`; return its folder."""
    assert samples % shard_rows == 0
    names = write_images(root / "images")
    write_table(root / "table.parquet", shard_rows, names)
    out = root / "shards"
    request = Request(
        root / "table.parquet", root / "images", "id", "file", declaration(), out, check=False
    )
    first = ingest(request, LocalEngine(1)).manifest
    assert first is not None
    (shard,) = first.shards
    schema = Schema.read(out / first.schema_file.name)
    shards = [
        shard.model_copy(update={"name": f"shard-0000-{i:06d}", "first_row": i * shard_rows})
        for i in range(samples // shard_rows)
    ]
    for other in shards[1:]:
        os.link(out / f"{shard.name}.tar", out / f"{other.name}.tar")
    index = np.array(
        read_index(out / first.index.name, shard_rows, [shard.bytes], len(schema.splits))
    )
    start = records_start(out / first.metadata.name, record_type(schema), shard_rows)
    metadata = (out / first.metadata.name).read_bytes()[start:]
    table = pq.read_table(out / first.table.name)
    rest = table.drop_columns("id")
    with (
        (out / first.index.name).open("wb") as index_file,
        (out / first.metadata.name).open("wb") as metadata_file,
        pq.ParquetWriter(out / first.table.name, table.schema, compression="zstd") as table_file,
    ):
        index_file.write(npy_header(RECORD, samples))
        metadata_file.write(npy_header(record_type(schema), samples))
        for i in range(len(shards)):
            index["shard"] = i
            index_file.write(index.tobytes())
            metadata_file.write(metadata)
            ids = np.char.add(f"s{i:06d}-", np.arange(shard_rows).astype(str))
            place = table.column_names.index("id")
            table_file.write_table(rest.add_column(place, "id", pa.array(ids)))
    sealed = {
        name: SealedFile(name=file.name, bytes=path.stat().st_size, sha256=sha256_of(path))
        for name in ("index", "metadata", "table")
        if (file := getattr(first, name)) and (path := out / file.name)
    }
    counts = {"planned": samples, "samples": samples, "rejected": 0, "shards": shards}
    manifest = first.model_copy(update=sealed | counts)
    write_json(out / MANIFEST, manifest.model_dump(mode="json"))
    return out
