"""Add rows to a large set; print seconds, peak memory and what was added as JSON.

python benchmarks/append_rows.py make folder/ 10000000
python benchmarks/append_rows.py lengthen folder/ 100000
python benchmarks/append_rows.py append folder/ 100000

`make` plans a table of that many rows and seals it with shards that were never written: sidecars
and receipts are those of a true set, the tars are holes of the right size. `append` ingests the
table with more rows behind it: what is compared, planned, written and sealed is as in a true set.
"""

import json
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import pyarrow.parquet as pq
from plan_rows import high_water_mb
from synthetic import declaration, write_images, write_table

from fino_fast.data.engines import LocalEngine
from fino_fast.data.files import sha256_of, write_json
from fino_fast.data.ingest import Request, ingest
from fino_fast.data.manifest import Manifest
from fino_fast.data.plan import read_planned_rows
from fino_fast.data.write import Outcome, Receipt, WriteTask, _sidecar

_PLACE = 4096
"""Bytes from one sample to the next."""


def forge_shard(task: WriteTask) -> Receipt:
    """What `write_shard` leaves of a shard, but for the images."""
    planned = read_planned_rows(task.out, task.generation, task.group, task.shard)
    rows = task.shard.rows
    image = Outcome("ok", None, None, "png", 0, 1700, 40, 40, 1, "uint8", "", 0, "0" * 64)
    outcomes = [image._replace(offset=512 + _PLACE * i) for i in range(rows)]
    sidecar = task.out / f"{task.name}.parquet"
    pq.write_table(_sidecar(planned, outcomes), sidecar, compression="zstd")
    with (task.out / f"{task.name}.tar").open("wb") as tar:
        tar.truncate(_PLACE * rows)
    receipt = Receipt(
        name=task.name,
        first_row=task.shard.first_row,
        rows=rows,
        samples=rows,
        rejected=0,
        bytes=_PLACE * rows,
        sha256="0" * 64,
        sidecar_sha256=sha256_of(sidecar),
        plan_sha256=task.plan_sha256,
        schema_sha256=task.schema_sha256,
    )
    write_json(task.out / f"{task.name}.json", receipt.model_dump(mode="json"))
    return receipt


class Forging:
    """An engine that writes shards without images."""

    def run(self, function: Callable[..., Any], tasks: Sequence[Any]) -> Iterator[Any]:
        return LocalEngine(2).run(forge_shard, tasks)


def request(folder: Path, table: str) -> Request:
    return Request(
        folder / table, folder / "images", "id", "file", declaration(), folder / "shards"
    )


def make(folder: Path, rows: int) -> dict[str, Any]:
    names = write_images(folder / "images")
    write_table(folder / "table.parquet", rows, names)
    report = ingest(request(folder, "table.parquet"), Forging())
    assert report.manifest is not None
    return {"samples": report.manifest.samples}


def lengthen(folder: Path, more: int) -> None:
    """Write `longer.parquet`: the rows of `table.parquet`, and others behind them."""
    names = sorted(path.name for path in (folder / "images").iterdir())
    write_table(folder / "more.parquet", more, names)
    later = pq.read_table(folder / "more.parquet")
    ids = pc.binary_join_element_wise("later", later["id"], "-")
    place = later.column_names.index("id")
    with (
        pq.ParquetFile(folder / "table.parquet") as former,
        pq.ParquetWriter(folder / "longer.parquet", former.schema_arrow) as longer,
    ):
        for group in range(former.num_row_groups):
            longer.write_table(former.read_row_group(group))
        longer.write_table(later.set_column(place, "id", ids))


def append(folder: Path, more: int) -> dict[str, Any]:
    before = Manifest.read(folder / "shards").samples
    start = time.perf_counter()
    report = ingest(request(folder, "longer.parquet"), LocalEngine(2))
    seconds = time.perf_counter() - start
    assert report.manifest is not None
    assert report.manifest.samples == before + more
    return {"seconds": seconds, "peak_mb": high_water_mb(), "shards": report.shards_written}


def main() -> None:
    command, folder, *counts = sys.argv[1:]
    function = {"make": make, "lengthen": lengthen, "append": append}[command]
    print(json.dumps(function(Path(folder), *map(int, counts))))


if __name__ == "__main__":
    main()
