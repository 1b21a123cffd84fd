"""Explicit tile sizes for every architecture and dtype: nothing is tuned at run time.

Chosen so that every kernel compiles without register spills and within the chip's shared memory
(docs/gpu.md has the compiler's figures); they were not tuned by timing on a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tile loop.

    Attributes:
        rows: rows of a tile.
        columns: bank vectors of a tile.
        depth: step along the width D inside a product.
        width: columns of a gradient that one program accumulates; the logits are recomputed
            ⌈D / width⌉ times.
        warps, stages: of the compiler; stages are buffers of the software pipeline.
    """

    rows: int
    columns: int
    depth: int
    width: int
    warps: int
    stages: int


# (compute capability major, bytes of the input dtype) → tiles.
TILES = {
    (8, 2): Tiles(64, 64, 64, 128, 8, 3),
    (8, 4): Tiles(32, 32, 32, 128, 8, 2),
    (8, 8): Tiles(32, 32, 16, 64, 8, 2),
    (9, 2): Tiles(64, 64, 64, 128, 8, 4),
    (9, 4): Tiles(32, 32, 16, 128, 8, 2),
    (9, 8): Tiles(32, 32, 16, 64, 8, 2),
    (10, 2): Tiles(64, 64, 64, 256, 8, 4),
    (10, 4): Tiles(32, 32, 32, 128, 8, 2),
    (10, 8): Tiles(32, 32, 16, 64, 8, 2),
}
# The contrastive sweep holds less beside its accumulator than the heads' do: bytes of the input
# dtype → width that it can have.
PAIR_WIDTH = {2: 256}
# Small enough for a test of a few rows to cross tile borders.
INTERPRETER_TILES = Tiles(32, 32, 32, 32, 4, 1)

_forced: Tiles | None = None


@contextmanager
def forced(tiles: Tiles) -> Iterator[None]:
    """Inside, every launch takes `tiles`, whatever the device."""
    global _forced
    before, _forced = _forced, tiles
    try:
        yield
    finally:
        _forced = before


def tiles_for(x: Tensor) -> Tiles:
    """The tiles for inputs like `x`; a chip newer than the table takes its newest row."""
    if _forced is not None:
        return _forced
    if triton.knobs.runtime.interpret:
        return INTERPRETER_TILES
    major, _ = torch.cuda.get_device_capability(x.device)
    known = [architecture for architecture, _ in TILES if architecture <= major]
    return TILES[max(known, default=8), x.element_size()]


def pair_tiles(tiles: Tiles, itemsize: int) -> Tiles:
    """`tiles` as the contrastive sweeps take them for inputs of `itemsize` bytes."""
    return replace(tiles, width=max(tiles.width, PAIR_WIDTH.get(itemsize, 0)))
