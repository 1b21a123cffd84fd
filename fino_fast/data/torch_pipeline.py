"""The pipeline without DALI, for machines that it has no wheel for."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch

from .cut import Cutter, empty_views
from .pipeline import DamagedSamples, PixelForm, decode_sample
from .shardset import DamagedSample, ShardSet
from .views import Draws, Views


class TorchPipeline:
    """Same samples, boxes, flips, intensities and filter as DALI's; PIL decodes."""

    depth = 2

    def __init__(
        self, shards: ShardSet, views: Views, form: PixelForm, batch_size: int, threads: int
    ) -> None:
        self._shards = shards
        self._views = views
        self._form = form
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="fino-decode")
        self._batches: deque[tuple[list[Future[None]], list[torch.Tensor]]] = deque()

    def submit(
        self, rows: Sequence[int], payloads: Sequence[bytes], draws: Sequence[Draws]
    ) -> None:
        outputs = [empty_views(d, len(rows), self._form.channels) for d in draws]
        cutters = [Cutter(self._views, d, self._form) for d in draws]

        def work(i: int) -> None:
            pixels = self._decode(rows[i], payloads[i])
            for cutter, output in zip(cutters, outputs, strict=True):
                cutter.cut([pixels], i, output)

        self._batches.append(([self._pool.submit(work, i) for i in range(len(rows))], outputs))

    def result(self) -> list[torch.Tensor]:
        futures, outputs = self._batches.popleft()
        faults = {}
        for i, future in enumerate(futures):
            try:
                future.result()
            except DamagedSample as error:
                faults[i] = error
        if faults:
            raise DamagedSamples(faults)
        return outputs

    def reset(self) -> None:
        while self._batches:
            for future in self._batches.popleft()[0]:
                future.cancel()

    def _decode(self, row: int, payload: bytes) -> torch.Tensor:
        pixels = decode_sample(self._shards, row, payload)
        # What PIL decoded may only be read, which torch has no type for.
        return torch.from_numpy(np.require(pixels, requirements=["C", "W"]))
