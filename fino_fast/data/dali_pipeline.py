"""The DALI pipeline: decoding, cropping, resizing and normalising in C++ threads, or on a GPU."""

import contextlib
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from fino_fast.errors import DataError, MissingExtraError

from .pipeline import DamagedSamples, PixelForm, decode_sample
from .shardset import DamagedSample, ShardSet
from .torch_pipeline import self_normalized
from .views import Draws, Views, affine


def import_dali() -> Any:
    """nvidia.dali, or the error that says which extra brings it."""
    try:
        import nvidia.dali
        import nvidia.dali.fn
        import nvidia.dali.types
    except ImportError as error:
        raise MissingExtraError("nvidia-dali", "dali") from error
    return nvidia.dali


class DaliPipeline:
    """One graph for the life of a loader; batches of any size up to `batch_size` go through it."""

    depth = 2

    def __init__(
        self,
        shards: ShardSet,
        views: Views,
        form: PixelForm,
        batch_size: int,
        threads: int,
        device: torch.device,
        view_counts: Sequence[tuple[int, int]],
    ) -> None:
        """
        Args:
            view_counts: (number, size) of the views of each kind.
        """
        self._shards = shards
        self._views = views
        self._form = form
        self._batch_size = batch_size
        self._threads = threads
        self._device = device
        self._view_counts = view_counts
        self._submitted: deque[tuple[Sequence[int], Sequence[bytes]]] = deque()
        self._pipe: Any = None

    def submit(
        self, rows: Sequence[int], payloads: Sequence[bytes], draws: Sequence[Draws]
    ) -> None:
        if self._pipe is None:
            self._pipe = self._build()
            self._start(rows[:1], payloads[:1], draws)
        self._feed(payloads, draws)
        self._pipe.schedule_run()
        self._submitted.append((rows, payloads))

    def result(self) -> list[torch.Tensor]:
        rows, payloads = self._submitted.popleft()
        outputs = iter(self._outputs(rows, payloads))
        tensors = []
        for count, size in self._view_counts:
            shape = (count, len(rows), self._form.channels, size, size)
            stack = torch.empty(shape, device=self._device)
            for v in range(count):
                stack[v] = _to_torch(next(outputs))
            tensors.append(
                stack if self._views.normalize else self_normalized(stack, self._form.white)
            )
        if self._device.type == "cuda":
            # The copies above read DALI's memory, which is about to be used again.
            torch.cuda.current_stream(self._device).synchronize()
        self._pipe.release_outputs()
        return tensors

    def reset(self) -> None:
        if sys.is_finalizing():
            return  # DALI has taken its pipelines down with the interpreter
        # Nobody wants these batches any more: their damaged samples are nobody's concern.
        with contextlib.suppress(DataError):
            while self._submitted and self._pipe is not None:
                self._outputs(*self._submitted.popleft())
                self._pipe.release_outputs()

    def _start(
        self, rows: Sequence[int], payloads: Sequence[bytes], draws: Sequence[Draws]
    ) -> None:
        """Go through the first scheduling, in which DALI runs `depth` batches: of one image."""
        for _ in range(self.depth):
            self._feed(payloads, draws)
        self._pipe.schedule_run()
        for _ in range(self.depth):
            self._outputs(rows, payloads)
            self._pipe.release_outputs()

    def _feed(self, payloads: Sequence[bytes], draws: Sequence[Draws]) -> None:
        """Hand one batch to the graph; of the draws, those of the first `len(payloads)` images."""
        n = len(payloads)

        def feed(name: str, array: NDArray[np.generic]) -> None:
            self._pipe.feed_input(name, np.ascontiguousarray(array[:n]))

        encoded = [np.frombuffer(payload, dtype=np.uint8) for payload in payloads]
        self._pipe.feed_input("encoded", encoded)
        view = 0
        for d in draws:
            shift, divisor = affine(self._views, d, self._form.channels, self._form.white)
            boxes = d.boxes.astype(np.int32)
            for v in range(len(boxes)):
                feed(f"start{view}", boxes[v][:, [1, 0]])
                feed(f"end{view}", boxes[v][:, [3, 2]])
                feed(f"hflip{view}", d.hflip[v].astype(np.int32))
                if self._views.vflip:
                    feed(f"vflip{view}", d.vflip[v].astype(np.int32))
                if self._views.normalize:
                    feed(f"shift{view}", shift[v])
                    feed(f"divisor{view}", divisor[v])
                view += 1

    def _outputs(self, rows: Sequence[int], payloads: Sequence[bytes]) -> Any:
        """The oldest scheduled batch; the caller releases it.

        Raises:
            DamagedSamples: samples do not decode; all that was scheduled is forgotten.
            DataError: DALI failed on sound ones; the same.
        """
        try:
            return self._pipe.share_outputs()
        except RuntimeError as error:
            self._pipe = None
            self._submitted.clear()
            raise self._blame(rows, payloads, error) from error

    def _blame(
        self, rows: Sequence[int], payloads: Sequence[bytes], error: RuntimeError
    ) -> DataError:
        """DALI does not say which samples broke a batch: find them."""
        faults = {}
        for i, (row, payload) in enumerate(zip(rows, payloads, strict=True)):
            try:
                decode_sample(self._shards, row, payload)
            except DamagedSample as fault:
                faults[i] = fault
        if faults:
            return DamagedSamples(faults)
        return DataError(f"{self._shards.folder}: DALI failed on a batch of sound images: {error}")

    def _build(self) -> Any:
        dali = import_dali()
        fn, types = dali.fn, dali.types
        gpu = self._device.type == "cuda"
        form = self._form
        pipe = dali.Pipeline(
            batch_size=self._batch_size,
            num_threads=self._threads,
            device_id=(self._device.index or 0) if gpu else None,
            prefetch_queue_depth=self.depth,
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
            sizes = [size for count, size in self._view_counts for _ in range(count)]
            pipe.set_outputs(*[self._view(dali, image, i, size) for i, size in enumerate(sizes)])
        pipe.build()
        return pipe

    def _view(self, dali: Any, image: Any, i: int, size: int) -> Any:
        """The graph of one view."""
        fn, types = dali.fn, dali.types

        def argument(name: str, dtype: Any, ndim: int) -> Any:
            return fn.external_source(name=f"{name}{i}", dtype=dtype, ndim=ndim)

        # A slice before the resize: the filter must not look beyond the box.
        crop = fn.slice(
            image,
            start=argument("start", types.INT32, 1),
            end=argument("end", types.INT32, 1),
            axes=(0, 1),
        )
        view = fn.resize(
            crop,
            size=(size, size),
            interp_type=types.INTERP_LINEAR,
            antialias=True,
            dtype=types.FLOAT,
        )
        if self._form.stored != self._form.channels:
            view = fn.cat(*[view] * self._form.channels, axis=2)
        if self._views.vflip:
            view = fn.flip(view, horizontal=0, vertical=argument("vflip", types.INT32, 0))
        statistics = {}
        if self._views.normalize:
            statistics = {
                "mean": argument("shift", types.FLOAT, 1),
                "std": argument("divisor", types.FLOAT, 1),
            }
        # The horizontal flip costs nothing here, where every pixel is moved anyway.
        return fn.crop_mirror_normalize(
            view, mirror=argument("hflip", types.INT32, 0), **statistics, output_layout="CHW"
        )


def _to_torch(batch: Any) -> torch.Tensor:
    """A DALI batch of equal shapes as a tensor that shares its memory."""
    return torch.utils.dlpack.from_dlpack(batch.as_tensor())
