"""The list of damaged samples that a run left out."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from fino_fast.data.prefetch import Skipped

from .metrics import keep_until
from .world import World


class SkipList:
    """`skipped-rank-<r>.jsonl` in the run's folder: one JSON object a sample that was skipped.

    Each rank writes its own file, and only where it skips something. A row has the step (from 1)
    in which another sample took its place, its id, and why.
    """

    def __init__(self, run: Path, start: int, world: World) -> None:
        """Continue the list after `start` steps.

        Rows of later steps, which will be done again, are dropped, also those of ranks that the
        run does not have any more.
        """
        self._path = run / f"skipped-rank-{world.rank}.jsonl"
        self._world = world
        self._total = 0
        if world.rank == 0:
            for path in run.glob("skipped-rank-*.jsonl"):
                keep_until(path, start)
                self._total += path.read_bytes().count(b"\n")
        self._total = world.largest(self._total)

    def note(self, step: int, skipped: Sequence[Skipped]) -> int:
        """Take in what this rank skipped in a step; return how many all ranks did so far."""
        if skipped:
            with self._path.open("a", encoding="utf-8") as file:
                file.writelines(
                    json.dumps({"step": step, **asdict(skip)}, ensure_ascii=False) + "\n"
                    for skip in skipped
                )
        self._total += self._world.total(len(skipped))
        return self._total
