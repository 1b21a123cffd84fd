"""The pipeline in plain PyTorch and PIL, for machines that DALI has no wheel for."""

from collections import deque
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor

import numpy as np
import torch
import torch.nn.functional as F

from .pipeline import DamagedSamples, PixelForm, decode_sample
from .shardset import DamagedSample, ShardSet
from .views import Draws, Views, affine

_EPSILON = 1e-6


class TorchPipeline:
    """Same boxes, flips and intensities as the DALI pipeline; resized by the same filter."""

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
        outputs = [
            torch.empty(len(d.boxes), len(rows), self._form.channels, d.size, d.size) for d in draws
        ]
        maps = [affine(self._views, d, self._form.channels, self._form.white) for d in draws]

        def work(i: int) -> None:
            pixels = self._decode(rows[i], payloads[i])
            for output, draw, (shift, divisor) in zip(outputs, draws, maps, strict=True):
                for v in range(len(draw.boxes)):
                    view = self._cut(pixels, draw, v, i)
                    if self._views.normalize:
                        view = (view - torch.from_numpy(shift[v, i])[:, None, None]) / (
                            torch.from_numpy(divisor[v, i])[:, None, None]
                        )
                    else:
                        view = self_normalized(view, self._form.white)
                    output[v, i] = view

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

    def _decode(self, row: int, payload: bytes) -> np.ndarray:
        pixels = decode_sample(self._shards, row, payload)
        if pixels.shape[2] != self._form.stored:
            return np.repeat(pixels, self._form.stored, axis=2)
        return pixels

    def _cut(self, pixels: np.ndarray, draw: Draws, v: int, i: int) -> torch.Tensor:
        """One view [C, H, W] in the units of the stored pixels."""
        left, top, right, bottom = draw.boxes[v, i]
        crop = torch.from_numpy(pixels[top:bottom, left:right].astype(np.float32))
        view = F.interpolate(
            crop.permute(2, 0, 1)[None], (draw.size, draw.size), mode="bilinear", antialias=True
        )[0]
        flips = [dim for dim, flip in ((2, draw.hflip[v, i]), (1, draw.vflip[v, i])) if flip]
        view = view.flip(flips) if flips else view
        return view.expand(self._form.channels, -1, -1)


def self_normalized(view: torch.Tensor, white: float) -> torch.Tensor:
    """Each channel of [..., H, W] less its mean, over its standard deviation."""
    mean = view.mean((-2, -1), keepdim=True)
    variance = view.var((-2, -1), keepdim=True, correction=0)
    return (view - mean) / (variance + (_EPSILON * white) ** 2).sqrt()
