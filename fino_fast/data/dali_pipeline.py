"""Decoding by DALI: what its pipelines share, and the one that only decodes, on the CPU."""

import sys
import threading
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, NamedTuple

import numpy as np
import torch

from fino_fast.errors import DataError, MissingExtraError

from .cut import Cutter, empty_views
from .pipeline import DamagedSamples, PixelForm, decode_sample
from .shardset import DamagedSample, ShardSet
from .views import Draws, Views


def import_dali() -> Any:
    """nvidia.dali, or the error that says which extra brings it."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise MissingExtraError("nvidia-dali", "dali") from error
    return nvidia.dali


class GraphLost(Exception):
    """DALI gave up a graph, with all that was scheduled: it does not say for which batch."""


class Submitted(NamedTuple):
    """A batch that DALI has in work."""

    rows: Sequence[int]
    payloads: Sequence[bytes]
    draws: Sequence[Draws]


class DaliPipeline(ABC):
    """One graph for the life of a loader; batches of any size up to `batch_size` go through it.

    A thread takes each batch from DALI as soon as it is there and finishes it, so that whoever
    trains only picks it up.
    """

    # One that is being finished, and two between which DALI's threads never wait.
    depth = 3

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        form: PixelForm,
        batch_size: int,
        threads: int,
        device: torch.device,
    ) -> None:
        self._shards = shards
        self._views = views
        self._form = form
        self._batch_size = batch_size
        self._threads = threads
        self._device = device
        self._pipe: Any = None
        # DALI's Python side counts what is scheduled and consumed, not safely for two threads.
        self._lock = threading.Lock()
        self._finisher = ThreadPoolExecutor(1, thread_name_prefix="fino-finish")
        self._submitted: deque[tuple[Submitted, Future[list[torch.Tensor]]]] = deque()

    @abstractmethod
    def _graph(self, dali: Any, image: Any) -> list[Any]:
        """What the graph makes of the decoded images: its outputs."""

    @abstractmethod
    def _feed_draws(self, pipe: Any, draws: Sequence[Draws], n: int) -> None:
        """Hand a graph what was drawn for the first `n` images of a batch."""

    @abstractmethod
    def _tensors(self, batch: Submitted, outputs: Any) -> list[torch.Tensor]:
        """The views of a batch, in memory of their own; the outputs are DALI's.

        Raises:
            DamagedSamples: images are not what the index says.
        """

    def submit(
        self, rows: Sequence[int], payloads: Sequence[bytes], draws: Sequence[Draws]
    ) -> None:
        batch = Submitted(rows, payloads, draws)
        with self._lock:
            if self._pipe is None:
                self._pipe = self._started(Submitted(rows[:1], payloads[:1], draws))
            pipe = self._pipe
            try:
                self._feed(pipe, batch)
                pipe.schedule_run()
                self._submitted.append((batch, self._finisher.submit(self._finish, pipe, batch)))
            except BaseException:
                # Ctrl-C in between: batches would come out for others than they were fed for.
                self._pipe = None
                raise

    def result(self) -> list[torch.Tensor]:
        # It stays there until it is given out: a `reset` after Ctrl-C has to wait for it, too.
        batch, future = self._submitted[0]
        try:
            tensors = future.result()
        except GraphLost:
            tensors = self._alone(batch)
        self._submitted.popleft()
        return tensors

    def reset(self) -> None:
        if sys.is_finalizing():
            return  # DALI has taken its pipelines down with the interpreter
        # Nobody wants these batches any more: their damaged samples are nobody's concern.
        wait([future for _, future in self._submitted])
        self._submitted.clear()

    def _finish(self, pipe: Any, batch: Submitted) -> list[torch.Tensor]:
        """The views of the oldest scheduled batch of a graph.

        Raises:
            DamagedSamples: images are not what the index says.
            GraphLost: this batch broke the graph, or one before it, or one that runs behind it.
        """
        with self._lock:
            if pipe is not self._pipe:
                raise GraphLost
            try:
                outputs = pipe.share_outputs()
            except RuntimeError as error:
                self._pipe = None
                raise GraphLost from error
        try:
            return self._taken(batch, outputs)
        finally:
            with self._lock:
                pipe.release_outputs()

    def _taken(self, batch: Submitted, outputs: Any) -> list[torch.Tensor]:
        """The views of a batch, of which nothing is DALI's any more."""
        tensors = self._tensors(batch, outputs)
        if self._device.type == "cuda":
            # What was copied from DALI's memory must be, before that is used again.
            torch.cuda.current_stream(self._device).synchronize()
        return tensors

    def _alone(self, batch: Submitted) -> list[torch.Tensor]:
        """The views of a batch, by a graph that no other batch can break.

        Raises:
            DamagedSamples: its samples do not decode, or are not what the index says.
            DataError: DALI fails on sound ones.
        """
        # Named, so that the graph outlives its outputs.
        pipe, outputs = self._first_outputs(batch, depth=1)  # noqa: RUF059
        return self._taken(batch, outputs)

    def _started(self, batch: Submitted) -> Any:
        """A graph behind its first scheduling, in which DALI runs `depth` batches: of one image.

        Raises:
            DamagedSamples: that image does not decode.
            DataError: DALI fails on it, although it is sound.
        """
        pipe, _ = self._first_outputs(batch, self.depth)
        pipe.release_outputs()
        return pipe

    def _first_outputs(self, batch: Submitted, depth: int) -> tuple[Any, Any]:
        """A new graph that has run `batch` as often as it is deep, and the last time's outputs,
        which are not released.

        Raises:
            DamagedSamples: a sample of the batch does not decode.
            DataError: DALI fails on sound ones.
        """
        pipe = self._build(depth)
        for _ in range(depth):
            self._feed(pipe, batch)
        try:
            pipe.schedule_run()
            for _ in range(depth - 1):
                pipe.share_outputs()
                pipe.release_outputs()
            return pipe, pipe.share_outputs()
        except RuntimeError as error:
            raise self._blame(batch, error) from error

    def _feed(self, pipe: Any, batch: Submitted) -> None:
        encoded = [np.frombuffer(payload, dtype=np.uint8) for payload in batch.payloads]
        pipe.feed_input("encoded", encoded)
        self._feed_draws(pipe, batch.draws, len(encoded))

    def _blame(self, batch: Submitted, error: RuntimeError) -> DataError:
        """DALI does not say which samples broke a batch: find them."""
        faults = {}
        for i, (row, payload) in enumerate(zip(batch.rows, batch.payloads, strict=True)):
            try:
                decode_sample(self._shards, row, payload)
            except DamagedSample as fault:
                faults[i] = fault
        if faults:
            return DamagedSamples(faults)
        return DataError(f"{self._shards.folder}: DALI failed on a batch of sound images: {error}")

    def _build(self, depth: int) -> Any:
        dali = import_dali()
        fn, types = dali.fn, dali.types
        gpu = self._device.type == "cuda"
        form = self._form
        pipe = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
            prefetch_queue_depth=depth,
            exec_dynamic=False,
        )
        # ANY_DATA crashes DALI 2.4 on grey JPEG: name the colour space wherever there is one.
        colour = {1: types.GRAY, 3: types.RGB}.get(form.stored, types.ANY_DATA)
        with pipe:
            encoded = fn.external_source(name="encoded", dtype=types.UINT8, ndim=1)
            image = fn.decoders.image(
                encoded,
                device="mixed" if gpu else "cpu",
                output_type=colour,
                dtype=getattr(types, {"float32": "FLOAT"}.get(form.dtype, form.dtype.upper())),
                adjust_orientation=False,
            )
            pipe.set_outputs(*self._graph(dali, image))
        pipe.build()
        return pipe


class DaliDecoding(DaliPipeline):
    """DALI decodes, `Cutter` makes the views: on a CPU five times as fast as DALI's operators."""

    def _graph(self, dali: Any, image: Any) -> list[Any]:
        return [image]

    def _feed_draws(self, pipe: Any, draws: Sequence[Draws], n: int) -> None:
        """The graph draws nothing."""

    def _tensors(self, batch: Submitted, outputs: Any) -> list[torch.Tensor]:
        (decoded,) = outputs
        images = [to_torch(decoded[i]) for i in range(len(batch.rows))]
        faults = {}
        for i, (row, image) in enumerate(zip(batch.rows, images, strict=True)):
            record = self._shards.index[row]
            expected = (int(record["height"]), int(record["width"]))
            if image.shape[:2] != expected:
                faults[i] = DamagedSample(
                    f"{self._shards.describe(row)}: is {tuple(image.shape[:2])}, the index says "
                    f"{expected}"
                )
        if faults:
            raise DamagedSamples(faults)
        tensors = [empty_views(d, len(images), self._form.channels) for d in batch.draws]
        for draws, views in zip(batch.draws, tensors, strict=True):
            Cutter(self._views, draws, self._form).cut(images, 0, views)
        return tensors


def to_torch(tensor: Any) -> torch.Tensor:
    """A tensor of DALI's as one of torch's that shares its memory."""
    return torch.utils.dlpack.from_dlpack(tensor)
