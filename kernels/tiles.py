"""Explicit tile sizes for every architecture and dtype: nothing is tuned at run time.

Chosen so that every kernel compiles without register spills and within the chip's shared memory
(docs/gpu.md has the compiler's figures); they were not tuned by timing on a device.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar

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
class Sizes:
    """Sizes of one tile loop.

    Attributes:
        holds: rows of so many columns at most are held in shared memory while a program walks the
            banks on them; wider ones are read again for every tile of a bank.
        rows: rows of a tile.
        columns: bank vectors of a tile.
        depth: step along the summed dimension inside a product.
        compiler: see there.
    """

    holds: int
    rows: int
    columns: int
    depth: int
    compiler: Compiler


@dataclass(frozen=True)
class Gradient(Sizes):
    """Sizes of a tile loop with a second product, coefficients by vectors.

    Attributes:
        step: along the vectors inside the second product.
        width: columns of a gradient that are accumulated at a time.
        chunk: vectors whose coefficients a program keeps between its two products.
    """

    step: int
    width: int
    chunk: int

    def __post_init__(self) -> None:
        if any(self.chunk % size for size in (self.rows, self.columns, self.step)):
            raise ValueError(f"a chunk holds whole tiles and steps, found {self}")


@dataclass(frozen=True)
class Tiles:
    """Sizes of all tile loops of a chip and dtype.

    Attributes:
        sweeps: without a gradient, by the width of rows that they hold; the last takes all others.
        rows: for the gradients at the rows, likewise.
        banks: for those at the banks; as many rows as columns, more do not fit the registers.
    """

    sweeps: tuple[Sizes, ...]
    rows: tuple[Gradient, ...]
    banks: Gradient

    def __post_init__(self) -> None:
        if self.banks.rows != self.banks.columns:
            raise ValueError(f"tiles of banks are square, found {self.banks}")
        for sizes in (self.sweeps[-1], self.rows[-1], self.banks):
            if sizes.holds:
                raise ValueError(f"the last take rows of any width and hold none, found {sizes}")


AnySizes = TypeVar("AnySizes", bound=Sizes)


def holding(sizes: Sequence[AnySizes], depth: int) -> AnySizes:
    """The first of them that holds rows of `depth` columns; the last one where none does."""
    return next((size for size in sizes if depth <= size.holds), sizes[-1])


def pieces(sizes: Sizes, depths: Iterable[int]) -> tuple[int, ...]:
    """In how many pieces rows of all these widths are held; 0: they are not.

    Args:
        sizes: chosen by the widest of them.
    """
    counts = (triton.cdiv(depth, sizes.depth) if sizes.holds else 0 for depth in depths)
    return tuple(sorted(set(counts)))


_HALF_80 = Tiles(
    (Sizes(1024, 64, 32, 64, Compiler(8, 1)), Sizes(0, 128, 64, 64, Compiler(8, 3))),
    (
        Gradient(768, 64, 32, 64, Compiler(8, 3), 32, 64, 512),
        Gradient(0, 64, 32, 32, Compiler(8, 3), 32, 64, 512),
    ),
    Gradient(0, 64, 64, 32, Compiler(8, 3), 32, 64, 512),
)
# Scaling the coefficients takes registers.
_FP16_80 = replace(
    _HALF_80,
    rows=(Gradient(768, 64, 32, 64, Compiler(8, 3), 32, 32, 512), _HALF_80.rows[-1]),
)
# Of sm_90 and later, for rows of any width, and for the banks.
_ANY_WIDTH_HALF = Gradient(0, 64, 64, 64, Compiler(8, 3), 64, 64, 512)
_HALF_90 = Tiles(
    (
        Sizes(768, 128, 64, 64, Compiler(8, 1)),
        Sizes(1024, 64, 32, 64, Compiler(4, 1)),
        Sizes(0, 128, 64, 64, Compiler(8, 3)),
    ),
    (
        Gradient(768, 128, 32, 64, Compiler(8, 2), 32, 64, 512),
        _ANY_WIDTH_HALF,
    ),
    _ANY_WIDTH_HALF,
)
_HALF_100 = Tiles(
    (Sizes(768, 128, 32, 64, Compiler(8, 1)), Sizes(0, 128, 64, 64, Compiler(8, 3))),
    (_ANY_WIDTH_HALF,),
    _ANY_WIDTH_HALF,
)
_SINGLE_80 = Tiles(
    (Sizes(256, 64, 16, 32, Compiler(8, 1)), Sizes(0, 64, 32, 32, Compiler(8, 2))),
    (Gradient(0, 32, 32, 32, Compiler(8, 2), 32, 32, 256),),
    Gradient(0, 32, 32, 32, Compiler(8, 2), 32, 32, 256),
)
# Eight warps spill, where products are plain TensorFloat-32.
_FOUR_WARPS = Gradient(0, 32, 32, 16, Compiler(4, 2), 16, 32, 256)
_SINGLE_90 = Tiles(
    (Sizes(256, 64, 32, 16, Compiler(8, 1)), Sizes(0, 64, 32, 16, Compiler(8, 2))),
    (_FOUR_WARPS,),
    _FOUR_WARPS,
)
_SINGLE_100 = Tiles(
    (Sizes(0, 64, 32, 16, Compiler(8, 2)),),
    (Gradient(0, 32, 32, 16, Compiler(8, 2), 16, 32, 256),),
    Gradient(0, 32, 32, 16, Compiler(8, 2), 16, 32, 256),
)
_DOUBLE = Tiles(
    (Sizes(0, 32, 32, 16, Compiler(8, 2)),),
    (Gradient(0, 32, 32, 16, Compiler(8, 2), 16, 32, 128),),
    Gradient(0, 32, 32, 16, Compiler(8, 2), 16, 32, 128),
)
# (compute capability major, dtype of the rows) → tiles.
TILES = {
    (8, torch.bfloat16): _HALF_80,
    (8, torch.float16): _FP16_80,
    (8, torch.float32): _SINGLE_80,
    (8, torch.float64): _DOUBLE,
    (9, torch.bfloat16): _HALF_90,
    (9, torch.float16): _HALF_90,
    (9, torch.float32): _SINGLE_90,
    (9, torch.float64): _DOUBLE,
    (10, torch.bfloat16): _HALF_100,
    (10, torch.float16): _HALF_100,
    (10, torch.float32): _SINGLE_100,
    (10, torch.float64): _DOUBLE,
}
# Programs among which the tiles of a gradient are shared out: each has room for the coefficients of
# one chunk, so this bounds their memory.
WORKERS = 512
# Small enough for a test of a few rows to cross the borders of tiles and chunks.
_INTERPRETER_GRADIENT = Gradient(0, 32, 32, 32, Compiler(4, 1), 32, 32, 64)
INTERPRETER_TILES = Tiles(
    (Sizes(96, 32, 32, 32, Compiler(4, 1)), Sizes(0, 32, 32, 32, Compiler(4, 1))),
    (Gradient(96, 32, 32, 32, Compiler(4, 1), 32, 32, 64), _INTERPRETER_GRADIENT),
    _INTERPRETER_GRADIENT,
)

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
