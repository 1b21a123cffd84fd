"""What a worker of an ingestion holds; apart, as a worker imports the module of its task."""

from pathlib import Path

from fino_fast.data.write import WriteTask, write_shard


def resident_after(task: WriteTask) -> int:
    """Write a shard; bytes that this worker then holds."""
    write_shard(task)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * 4096
