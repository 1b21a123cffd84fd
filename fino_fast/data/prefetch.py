"""Reading and decoding ahead of who wants the batches, and what happens to damaged samples."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray

from fino_fast.errors import ConfigError

from .pipeline import DamagedSamples, Pipeline
from .shardset import DamagedSample
from .views import Draws


@dataclass(frozen=True)
class Skipped:
    """A sample that could not be shown, and why; another one took its place."""

    row: int
    """Its number in the set."""
    id: str
    place: int
    """Place in the epoch."""
    reason: str
    """Shard, offset and what is wrong."""


Content = bytes | DamagedSample
"""An encoded image, or what is wrong with it."""


@dataclass
class Work:
    """The samples of one batch, in every stage of its making."""

    places: NDArray[np.int64]
    """int64 [n], their places in the epoch, or in the split."""
    rows: NDArray[np.int64]
    """int64 [n], their numbers in the set."""
    draws: list[Draws]
    parts: list[Future[list[Content]]] = field(default_factory=list)
    """What is being read, in order."""
    contents: list[Content] = field(default_factory=list)
    """What was read."""
    skipped: list[Skipped] = field(default_factory=list)


Replace = Callable[[Work, int, DamagedSample], None]
"""Puts another sample in the place of the i-th of a batch, or raises the error."""


class Prefetch:
    """Reads and decodes some batches ahead, and gives them out in order."""

    def __init__(self, read: Callable[[int], bytes], threads: int) -> None:
        self._read = read
        self._threads = threads
        self._readers = ThreadPoolExecutor(threads, thread_name_prefix="fino-read")
        self._runs: dict[Pipeline, object] = {}
        """The run that each pipeline works for: the one that began last."""

    def run(
        self, pipeline: Pipeline, batches: Iterable[Work], replace: Replace
    ) -> Generator[tuple[Work, list[torch.Tensor]], None, None]:
        """Each batch with its views.

        A pipeline works for one run at a time. One that was left in its middle, and that a variable
        or a traceback may still hold, is over when another begins.

        Raises:
            ConfigError: another run of the pipeline began meanwhile.
            DamagedSample: what `replace` raises of a sample that is damaged.
            DataError: a shard cannot be read, or a pipeline failed.
        """
        reading: deque[Work] = deque()
        decoding: deque[Work] = deque()
        run = self._runs[pipeline] = object()
        pipeline.reset()
        try:
            for work in batches:
                self._check_runs(pipeline, run)
                # One task a thread: handing over every sample alone costs as much as reading it.
                work.parts = [
                    self._readers.submit(self._read_all, rows.tolist())
                    for rows in np.array_split(work.rows, self._threads)
                ]
                reading.append(work)
                if len(reading) > pipeline.depth:
                    decoding.append(self._submit(pipeline, reading.popleft(), replace))
                if len(decoding) == pipeline.depth:
                    yield self._finish(pipeline, decoding, replace)
            while reading or decoding:
                self._check_runs(pipeline, run)
                if reading:
                    decoding.append(self._submit(pipeline, reading.popleft(), replace))
                if len(decoding) == pipeline.depth or not reading:
                    yield self._finish(pipeline, decoding, replace)
        finally:
            for work in reading:
                for part in work.parts:
                    part.cancel()
            if self._runs[pipeline] is run:
                pipeline.reset()

    def _check_runs(self, pipeline: Pipeline, run: object) -> None:
        if self._runs[pipeline] is not run:
            raise ConfigError(
                "this epoch was over when another one of the same loader began; make a second "
                "Loader to read two at a time"
            )

    def _read_all(self, rows: list[int]) -> list[Content]:
        contents: list[Content] = []
        for row in rows:
            try:
                contents.append(self._read(row))
            except DamagedSample as error:
                contents.append(error)
        return contents

    def _submit(self, pipeline: Pipeline, work: Work, replace: Replace) -> Work:
        if not work.contents:
            work.contents = [content for part in work.parts for content in part.result()]
        while True:
            faults = {i: c for i, c in enumerate(work.contents) if isinstance(c, DamagedSample)}
            if faults:
                self._replace(work, faults, replace)
                continue
            payloads = [content for content in work.contents if isinstance(content, bytes)]
            try:
                pipeline.submit(work.rows.tolist(), payloads, work.draws)
            except DamagedSamples as damaged:
                self._replace(work, damaged.faults, replace)
            else:
                return work

    def _finish(
        self, pipeline: Pipeline, decoding: deque[Work], replace: Replace
    ) -> tuple[Work, list[torch.Tensor]]:
        while True:
            try:
                tensors = pipeline.result()
            except DamagedSamples as damaged:
                self._replace(decoding[0], damaged.faults, replace)
                # It comes before what else is in work, and a pipeline keeps the order.
                pipeline.reset()
                for work in decoding:
                    self._submit(pipeline, work, replace)
            else:
                return decoding.popleft(), tensors

    def _replace(self, work: Work, faults: Mapping[int, DamagedSample], replace: Replace) -> None:
        for i, error in faults.items():
            replace(work, i, error)
            (work.contents[i],) = self._read_all([int(work.rows[i])])
