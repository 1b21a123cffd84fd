"""Sealed sets and tables of any number of rows, made in seconds, for measurements of size.

One shard of small real images is ingested; all other shards are hard links to its tar. So manifest,
index, metadata and sample table are as large as those of a true set of that many samples, and every
read finds a sound image; only the images' bytes are shared.
"""

import hashlib
import os
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import LocalEngine
from fino_fast.data.ingest import Request, ingest, read_plans
from fino_fast.data.plan import PlannedShard
from fino_fast.data.seal import seal
from fino_fast.data.write import Receipt

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
    )  # fmt: skip
    assert ingest(request, LocalEngine(1)).manifest is not None
    (plan,) = read_plans(out)
    (first,) = plan.shards
    receipt = Receipt.read(out / f"{first.name}.json")
    sidecar = pq.read_table(out / f"{first.name}.parquet")
    shards = [
        PlannedShard(name=f"shard-0000-{i:06d}", first_row=i * shard_rows, rows=shard_rows)
        for i in range(samples // shard_rows)
    ]
    plan = plan.model_copy(update={"shards": shards, "rows": samples})
    receipts = [receipt]
    for i, shard in enumerate(shards[1:], 1):
        os.link(out / f"{first.name}.tar", out / f"{shard.name}.tar")
        ids = np.char.add(f"s{i:06d}-", np.arange(shard_rows).astype(str))
        table = sidecar.set_column(sidecar.column_names.index("id"), "id", pa.array(ids))
        path = out / f"{shard.name}.parquet"
        pq.write_table(table, path, compression="zstd")
        changed = {"name": shard.name, "first_row": shard.first_row, "plan_sha256": plan.hash}
        changed["sidecar_sha256"] = hashlib.sha256(path.read_bytes()).hexdigest()
        receipts.append(receipt.model_copy(update=changed))
    receipts[0] = receipt.model_copy(update={"plan_sha256": plan.hash})
    seal(out, [plan], receipts)
    return out
