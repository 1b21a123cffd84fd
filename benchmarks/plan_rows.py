"""Plan a table in a process of its own; print seconds, peak memory and what was planned as JSON.

python benchmarks/plan_rows.py table.parquet images/ out/
"""

import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from synthetic import declaration

from fino_fast.data.ingest import Request, ingest, read_plans


class PlannedError(Exception):
    """Raised in place of writing."""


class PlanOnly:
    """An engine that is asked to write once everything is planned, and ends there."""

    def run(self, function: Any, tasks: Any) -> Iterator[Any]:
        if tasks:
            raise PlannedError
        return iter(())


def high_water_mb() -> float:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    line = next(line for line in status.splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


def main() -> None:
    table, images, out = map(Path, sys.argv[1:])
    start = time.perf_counter()
    try:
        ingest(Request(table, images, "id", "file", declaration(), out), PlanOnly())
    except PlannedError:
        seconds = time.perf_counter() - start
    (plan,) = read_plans(out)
    print(json.dumps({"seconds": seconds, "peak_mb": high_water_mb(), "rows": plan.rows}))


if __name__ == "__main__":
    main()
