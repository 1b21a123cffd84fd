"""The record of a run: metrics.jsonl, TensorBoard, and the clock behind images/s."""

import json
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

from torch import Tensor
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from fino_fast.errors import DataError

from .config import TrainConfig

Item = TypeVar("Item")


class Record:
    """Shows and keeps the progress of a run.

    `metrics.jsonl` has one JSON object a row, in order of `step`; `tensorboard/` has the same. Both
    get a row every `log_every` steps. The bar is silent when its output is piped. Ranks other than
    0 record nothing.
    """

    def __init__(self, config: TrainConfig, total: int, start: int, rank: int) -> None:
        """Continue the record after `start` of `total` steps.

        Rows of later steps, which will be done again, are dropped.
        """
        self.path = config.output / "metrics.jsonl"
        self._every, self._total, self._writes = config.log_every, total, rank == 0
        self._clock = Clock()
        self._closing = ExitStack()
        if not self._writes:
            return
        if self.path.exists():
            keep_until(self.path, start)
        self._file = self._closing.enter_context(self.path.open("a", encoding="utf-8"))
        self._board = self._closing.enter_context(
            SummaryWriter(str(config.output / "tensorboard"), purge_step=start + 1)
        )
        self._bar = self._closing.enter_context(
            tqdm(total=total, initial=start, unit="step", desc="train", disable=None)
        )

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time that each takes to come counts as waiting for data."""
        return self._clock.waiting(items)

    def step(self, done: int, terms: Mapping[str, Tensor | float], *, images: int) -> None:
        """Take in a step.

        Args:
            done: steps done, this one included.
            terms: what to record; 0-d tensors are read only where a row is due.
            images: images of the step, over all ranks.
        """
        self._clock.count(images)
        if not self._writes:
            return
        self._bar.update()
        if done % self._every and done != self._total:
            return
        row = {name: float(value) for name, value in terms.items()} | self._clock.read()
        self._file.write(json.dumps({"step": done, **row}) + "\n")
        self._file.flush()
        for name, value in row.items():
            self._board.add_scalar(name, value, done)
        self._bar.set_postfix_str(
            f"loss {row['loss']:.4g}, {row['images_per_second']:.0f} images/s, "
            f"{row['data_wait']:.0%} waiting for data"
            + (f", {row['skipped']:.0f} skipped" if row.get("skipped") else "")
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._closing.close()


def keep_until(path: Path, step: int) -> None:
    """Cut a metrics file after the rows of `step`, and a last row that a crash left torn.

    Raises:
        DataError: a row before that is damaged.
    """
    end = 0
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                break
            try:
                later = json.loads(line)["step"] > step
            except (ValueError, KeyError, TypeError) as error:
                raise DataError(
                    f"{path}: line {number} is not a row of metrics: {error}"
                ) from error
            if later:
                break
            end += len(line)
    os.truncate(path, end)


class Clock:
    """Images a second, and the share of the time spent waiting for data, between two readings."""

    def __init__(self) -> None:
        self._begun = time.perf_counter()
        self._waited = 0.0
        self._images = 0

    def waiting(self, items: Iterator[Item]) -> Iterator[Item]:
        """The same items; the time that each takes to come counts as waiting."""
        while True:
            asked = time.perf_counter()
            try:
                item = next(items)
            except StopIteration:
                return
            self._waited += time.perf_counter() - asked
            yield item

    def count(self, images: int) -> None:
        self._images += images

    def read(self) -> dict[str, float]:
        """`images_per_second` and `data_wait` (0 … 1) since the last reading."""
        now = time.perf_counter()
        elapsed = now - self._begun
        rates = {
            "images_per_second": self._images / elapsed,
            "data_wait": self._waited / elapsed,
        }
        self._begun, self._waited, self._images = now, 0.0, 0
        return rates
