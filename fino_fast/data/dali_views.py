"""The whole recipe as a DALI graph, for a GPU: decoded, cut, resized and normalised there.

It runs on a CPU too, by the same operators, which is how it is tested without a GPU.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from .cut import self_normalized
from .dali_pipeline import DaliPipeline, Submitted, to_torch
from .pipeline import PixelForm
from .shardset import ShardSet
from .views import Draws, Views, affine


class DaliViews(DaliPipeline):
    """One output of the graph a view."""

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
        super().__init__(shards, views, form, batch_size, threads, device)
        self._view_counts = view_counts

    def _graph(self, dali: Any, image: Any) -> list[Any]:
        sizes = [size for count, size in self._view_counts for _ in range(count)]
        return [self._view(dali, image, i, size) for i, size in enumerate(sizes)]

    def _feed_draws(self, pipe: Any, draws: Sequence[Draws], n: int) -> None:
        def feed(name: str, array: NDArray[np.generic]) -> None:
            pipe.feed_input(name, np.ascontiguousarray(array[:n]))

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

    def _tensors(self, batch: Submitted, outputs: Any) -> list[torch.Tensor]:
        views = iter(outputs)
        tensors = []
        for count, size in self._view_counts:
            shape = (count, len(batch.rows), self._form.channels, size, size)
            stack = torch.empty(shape, device=self._device)
            for v in range(count):
                stack[v] = to_torch(next(views).as_tensor())
            tensors.append(
                stack if self._views.normalize else self_normalized(stack, self._form.white)
            )
        return tensors

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
