"""Explicit tile sizes for every architecture and dtype: nothing is tuned at run time.

Chosen so that every kernel compiles without register spills and within the chip's shared memory
(docs/gpu.md has the compiler's figures); they were not tuned by timing on a device.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import triton
from torch import Tensor


@dataclass(frozen=True)
class Compiler:
    """What the compiler is told beside the sizes.

    Attributes:
        warps: of a program.
        stages: buffers of the software pipeline.
    """

    warps: int
    stages: int


@dataclass(frozen=True)
class Tiles:
    """Sizes of the tile loop.

    Attributes:
        sweep_rows: rows of a tile where no gradient is taken.
        rows: rows of a tile where one is; its epilogue holds more.
        columns: bank vectors of a tile.
        depth: step along the summed dimension inside a product.
        width: columns of a gradient that are accumulated at a time.
        chunk: vectors whose coefficients a program holds between its two products.
        compiler: see there.
    """

    sweep_rows: int
    rows: int
    columns: int
    depth: int
    width: int
    chunk: int
    compiler: Compiler

    def __post_init__(self) -> None:
        if any(self.chunk % size for size in (self.rows, self.columns, self.depth)):
            raise ValueError(f"a chunk holds whole tiles and steps, found {self}")


# (compute capability major, dtype of the rows) → tiles.
TILES = {
    (8, torch.bfloat16): Tiles(128, 64, 64, 32, 64, 512, Compiler(8, 3)),
    (8, torch.float16): Tiles(128, 64, 64, 32, 64, 512, Compiler(8, 3)),
    (8, torch.float32): Tiles(64, 32, 32, 32, 32, 256, Compiler(8, 2)),
    (8, torch.float64): Tiles(32, 32, 32, 16, 32, 128, Compiler(8, 2)),
    (9, torch.bfloat16): Tiles(128, 128, 64, 64, 64, 512, Compiler(8, 3)),
    (9, torch.float16): Tiles(128, 64, 64, 64, 64, 512, Compiler(8, 3)),
    (9, torch.float32): Tiles(64, 32, 32, 16, 32, 256, Compiler(8, 2)),
    (9, torch.float64): Tiles(32, 32, 32, 16, 32, 128, Compiler(8, 2)),
    (10, torch.bfloat16): Tiles(128, 64, 64, 64, 64, 512, Compiler(8, 3)),
    (10, torch.float16): Tiles(128, 64, 64, 64, 64, 512, Compiler(8, 3)),
    (10, torch.float32): Tiles(64, 32, 32, 16, 32, 256, Compiler(8, 2)),
    (10, torch.float64): Tiles(32, 32, 32, 16, 32, 128, Compiler(8, 2)),
}
# Programs among which the tiles of a gradient are shared out: each has room for the coefficients of
# one chunk, so this bounds their memory.
WORKERS = 512
# Small enough for a test of a few rows to cross the borders of tiles and chunks.
INTERPRETER_TILES = Tiles(32, 32, 32, 32, 32, 64, Compiler(4, 1))

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
    return TILES[max(known, default=8), x.dtype]
