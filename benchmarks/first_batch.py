"""From an empty process to the first batch of a set; print seconds and memory as JSON.

python benchmarks/first_batch.py shards/
"""

import json
import sys
import time
from pathlib import Path

BEGUN = time.perf_counter()


def memory() -> dict[str, int]:
    """Bytes: `resident`, and `own`, which no file backs and no other process can share."""
    lines = Path("/proc/self/smaps_rollup").read_text(encoding="ascii").splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return {"resident": sizes["Rss"], "own": sizes["Anonymous"]}


def main() -> None:
    import torch  # noqa: F401 - timed alone: most of a start is not ours

    imported = time.perf_counter() - BEGUN
    from fino_fast.data import Loader, ShardSet, Views

    shards = ShardSet.open(Path(sys.argv[1]))
    loader = Loader(shards, Views(mean=[0.5], std=[0.5]), 64, backend="dali", threads=2)
    batches = loader.epoch(0)
    batch = next(batches)
    seconds = time.perf_counter() - BEGUN
    found = {"seconds": seconds, "torch_seconds": imported, "samples": len(loader)}
    found |= {"images": len(batch.rows)} | memory()
    batches.close()
    print(json.dumps(found))


if __name__ == "__main__":
    main()
