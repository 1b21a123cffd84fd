"""Load real shards for minutes: epochs, resumes and killed processes; memory and files stay flat.

python benchmarks/soak.py --seconds 600

Two ranks share every epoch of a set of real images. Rank 0 lives through the whole run; it breaks
off every third epoch in its middle and goes on from a saved state. Rank 1 is killed (SIGKILL) again
and again, and started anew from the last state that it saved. At the end three things must hold, or
the exit code is 1: every completed epoch showed each sample exactly once, over both ranks and all
their lives; a step that was done again had the same samples; and rank 0's resident memory and open
files are at the end what they were after its first epochs.
"""

import argparse
import json
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import elpv_dataset
from PIL import Image

from fino_fast.data import Loader, ShardSet, Views
from fino_fast.data.declaration import Declaration
from fino_fast.data.engines import LocalEngine
from fino_fast.data.ingest import Request, ingest

IMAGES, BATCH, RANKS = 384, 16, 2
SAVE_EVERY = 4  # steps; the last ones before a kill are done again
GROWTH = 0.05  # of the resident memory, from the second quarter of the run to the last
LIFE = (1.0, 15.0)  # seconds that rank 1 lives from its first step on


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=600.0)
    parser.add_argument("--rank", type=int, help="be this rank (started by the run itself)")
    parser.add_argument("--folder", type=Path)
    options = parser.parse_args()
    if options.rank is not None:
        work(options.folder, options.rank)
    with tempfile.TemporaryDirectory(prefix="fino-fast-soak-") as folder:
        return supervise(Path(folder), options.seconds)


def make_set(folder: Path) -> None:
    """Shards of real solar cells: PNG as they are, every third as JPEG."""
    images = folder / "images"
    images.mkdir()
    sources = sorted(Path(elpv_dataset.__file__).parent.rglob("*.png"))[:IMAGES]
    lines = ["id,file,cell"]
    for i, source in enumerate(sources):
        name = f"{i:04d}.{'jpg' if i % 3 == 0 else 'png'}"
        if i % 3 == 0:
            Image.open(source).save(images / name, quality=90)
        else:
            (images / name).write_bytes(source.read_bytes())
        lines.append(f"{i},{name},{i % 7}")
    table = folder / "table.csv"
    table.write_text("\n".join(lines), encoding="utf-8")
    factors = {"cell": {"kind": "categorical", "role": "suppress"}}
    declaration = Declaration.model_validate({"factors": factors})
    out = folder / "shards"
    request = Request(table, images, "id", "file", declaration, out, shard_bytes=2 << 20)
    assert ingest(request, LocalEngine(2)).manifest is not None


def work(folder: Path, rank: int) -> None:
    """One rank, for ever: epochs from the saved state on, a line in its log for every step."""
    shards = ShardSet.open(folder / "shards")
    views = Views(size=160, local_count=2, local_size=64)
    loader = Loader(shards, views, BATCH, rank=rank, world_size=RANKS, threads=1)
    saved = folder / f"state-{rank}.json"
    state = json.loads(saved.read_bytes()) if saved.exists() else loader.state(0, 0)
    with (folder / f"log-{rank}.jsonl").open("a", encoding="utf-8", buffering=1) as log:
        log.write("\n")  # the last life's last line may be torn
        while True:
            loader.check_state(state)
            epoch, step = state["epoch"], state["step"]
            half = loader.steps_per_epoch // 2
            breaks_off = rank == 0 and epoch % 3 == 2 and step < half
            for batch in loader.epoch(epoch, start_step=step):
                assert len(batch.metadata["cell"]) == len(batch.rows)
                step += 1
                log.write(json.dumps({"step": [epoch, step], "rows": batch.rows.tolist()}) + "\n")
                stops = breaks_off and step == half
                if stops or step % SAVE_EVERY == 0:
                    state = save(saved, loader.state(epoch, step))
                if stops:
                    break
            if step == loader.steps_per_epoch:
                log.write(json.dumps({"use": usage()}) + "\n")
                state = save(saved, loader.state(epoch + 1, 0))


def save(path: Path, state: dict[str, Any]) -> dict[str, Any]:
    """Write a state so that a kill leaves the former or the new one."""
    new = path.with_suffix(".new")
    new.write_text(json.dumps(state), encoding="utf-8")
    new.replace(path)
    return state


def usage() -> dict[str, float]:
    """Resident memory in MB, open files and threads of this process."""
    status = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    fields = dict(line.split(":", 1) for line in status)
    return {
        "resident MB": int(fields["VmRSS"].split()[0]) / 1024,
        "open files": len(list(Path("/proc/self/fd").iterdir())),
        "threads": int(fields["Threads"]),
    }


def supervise(folder: Path, seconds: float) -> int:
    """Run both ranks for a time, kill rank 1 now and then, and judge."""
    make_set(folder)
    end = time.monotonic() + seconds
    draws = random.Random(0)
    ranks = [start(folder, rank) for rank in range(RANKS)]
    kills = 0
    try:
        while time.monotonic() < end:
            wait_for_steps(folder / "log-1.jsonl", ranks, end)
            time.sleep(max(0.0, min(draws.uniform(*LIFE), end - time.monotonic())))
            for rank, process in enumerate(ranks):
                if process.poll() is not None:
                    print(f"rank {rank} ended by itself with {process.returncode}")
                    return 1
            if time.monotonic() < end:
                ranks[1].send_signal(signal.SIGKILL)
                ranks[1].wait()
                kills += 1
                ranks[1] = start(folder, 1)
    finally:
        for process in ranks:
            process.kill()
            process.wait()
    faults = judge(folder, kills)
    print("\n".join(faults) or "flat, and each sample exactly once")
    return 1 if faults else 0


def wait_for_steps(log: Path, ranks: "list[subprocess.Popen[bytes]]", end: float) -> None:
    """Until the log grows by some steps, a rank ends, or the time is over."""

    def size() -> int:
        return log.stat().st_size if log.exists() else 0

    before = size()
    while size() < before + 1000 and time.monotonic() < end:
        if any(process.poll() is not None for process in ranks):
            return
        time.sleep(0.2)


def start(folder: Path, rank: int) -> "subprocess.Popen[bytes]":
    command = [sys.executable, __file__, "--rank", str(rank), "--folder", str(folder)]
    return subprocess.Popen(command)


def judge(folder: Path, kills: int) -> list[str]:
    """Print the table; return what is wrong."""
    faults: list[str] = []
    steps: list[dict[tuple[int, int], list[int]]] = []
    again = 0
    for rank in range(RANKS):
        mine: dict[tuple[int, int], list[int]] = {}
        for line in records(folder / f"log-{rank}.jsonl"):
            if "step" in line:
                key = (line["step"][0], line["step"][1])
                again += key in mine
                if mine.setdefault(key, line["rows"]) != line["rows"]:
                    faults.append(f"rank {rank}, epoch and step {key}: other samples than before")
        steps.append(mine)
    if not all(steps):
        return [f"rank {rank} did no step" for rank, mine in enumerate(steps) if not mine]
    epochs = min(max(epoch for epoch, _ in mine) for mine in steps)
    for epoch in range(epochs):
        shown = Counter(
            row for mine in steps for (e, _), rows in mine.items() if e == epoch for row in rows
        )
        if sorted(shown.elements()) != list(range(IMAGES)):
            faults.append(f"epoch {epoch}: {len(shown)} samples, {shown.total()} times")
    uses = [line["use"] for line in records(folder / "log-0.jsonl") if "use" in line]
    if epochs < 3 or len(uses) < 8:
        faults.append(f"only {epochs} epochs: too short a run to judge")
        return faults
    print(f"{epochs} epochs of {IMAGES} images, {kills} kills, {again} steps done again")
    print(f"{'rank 0':>12} | {'2nd quarter':>11} | {'last quarter':>12} | {'greatest':>8}")
    quarter = len(uses) // 4
    for name in uses[0]:
        values = [use[name] for use in uses]
        early = statistics.median(values[quarter : 2 * quarter])
        late = statistics.median(values[-quarter:])
        print(f"{name:>12} | {early:11.1f} | {late:12.1f} | {max(values):8.1f}")
        if late > early * (1 + GROWTH if name == "resident MB" else 1):
            faults.append(f"{name} grew from {early:.1f} to {late:.1f}")
    return faults


def records(path: Path) -> list[dict[str, Any]]:
    """The lines of a log but for those that a kill has torn: their steps were done again."""
    parsed: list[dict[str, Any]] = []
    if not path.exists():
        return parsed
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("{") and line.endswith("}"):
            parsed.append(json.loads(line))
    return parsed


if __name__ == "__main__":
    sys.exit(main())
