"""Explicit tile sizes for every architecture and dtype: nothing is tuned at run time.

Chosen so that every kernel compiles without register spills and within the chip's shared memory
(docs/gpu.md has the compiler's figures); they were not tuned by timing on a device.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

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
        holds: outer vectors of so many columns at most are held in shared memory while the inner
            ones pass; wider ones are read again for every inner tile.
        outer: vectors of a tile that a program takes: rows, or in `banks` vectors of the bank.
        inner: vectors of a tile that pass: of the bank, or rows.
        depth: step along the summed dimension inside a product.
        compiler: see there.
    """

    holds: int
    outer: int
    inner: int
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
        # A step reads what tiles have written, and no further.
        if self.chunk % self.inner or self.inner % self.step:
            raise ValueError(f"a chunk holds whole tiles, and a tile whole steps, found {self}")


@dataclass(frozen=True)
class Tiles:
    """Sizes of all tile loops of a chip and dtype.

    Attributes:
        sweeps: without a gradient; those with the largest tiles first.
        rows: for the gradients at the rows, likewise.
        banks: for those at the banks, likewise.
    """

    sweeps: tuple[Sizes, ...]
    rows: tuple[Gradient, ...]
    banks: tuple[Gradient, ...]

    def __post_init__(self) -> None:
        for sizes in (self.sweeps[-1], self.rows[-1], self.banks[-1]):
            if sizes.holds:
                raise ValueError(f"the last take vectors of any width and hold none, found {sizes}")


# About one for every multiprocessor of a large GPU: its registers leave no room for a second one.
WANTED_PROGRAMS = 160
AnySizes = TypeVar("AnySizes", bound=Sizes)


def choose(sizes: Sequence[AnySizes], depth: int, vectors: int) -> AnySizes:
    """The sizes for `vectors` outer vectors of `depth` columns.

    Of those that hold such vectors, or of the others where none does, the first whose tiles fill a
    GPU; the last, which has the smallest, where they are too few for that.
    """
    fitting = [s for s in sizes if 0 < s.holds >= depth] or [s for s in sizes if not s.holds]
    filling = (s for s in fitting if triton.cdiv(vectors, s.outer) >= WANTED_PROGRAMS)
    return next(filling, fitting[-1])


def pieces(sizes: Sizes, depths: Iterable[int]) -> tuple[int, ...]:
    """In how many pieces vectors of all these widths are held; 0: they are not.

    Args:
        sizes: chosen by the widest of them.
    """
    counts = (triton.cdiv(depth, sizes.depth) if sizes.holds else 0 for depth in depths)
    return tuple(sorted(set(counts)))


# Below, in this order: holds, outer, inner, depth, compiler, and of gradients step, width, chunk.
_HALF_80 = Tiles(
    (
        Sizes(512, 128, 32, 64, Compiler(8, 1)),
        Sizes(1024, 64, 32, 32, Compiler(8, 1)),
        Sizes(0, 128, 64, 64, Compiler(8, 3)),
    ),
    (
        Gradient(1024, 64, 16, 128, Compiler(8, 2), 16, 64, 1024),
        Gradient(0, 64, 64, 32, Compiler(8, 3), 32, 128, 1024),
    ),
    (
        Gradient(1024, 64, 32, 32, Compiler(8, 2), 32, 64, 1024),
        Gradient(0, 64, 64, 32, Compiler(8, 3), 32, 128, 1024),
    ),
)
# Of sm_90 and later.
_HALF_768 = Gradient(768, 128, 32, 64, Compiler(8, 2), 32, 64, 512)
_HALF_1536 = Gradient(1536, 64, 32, 64, Compiler(8, 2), 32, 128, 1024)
_HALF_LARGE = Gradient(0, 128, 64, 64, Compiler(8, 3), 64, 128, 512)
_HALF_SMALL = Gradient(0, 64, 64, 64, Compiler(8, 3), 64, 128, 1024)
_HALF_90 = Tiles(
    (
        Sizes(768, 128, 64, 64, Compiler(8, 1)),
        Sizes(1536, 64, 64, 64, Compiler(8, 1)),
        Sizes(0, 128, 64, 64, Compiler(8, 3)),
    ),
    (_HALF_768, _HALF_1536, _HALF_LARGE, _HALF_SMALL),
    (replace(_HALF_768, inner=64), _HALF_1536, _HALF_LARGE, _HALF_SMALL),
)
_HALF_GRADIENTS_100 = (_HALF_768, _HALF_1536, replace(_HALF_LARGE, width=64), _HALF_SMALL)
_HALF_100 = Tiles(
    (
        Sizes(768, 128, 32, 64, Compiler(8, 1)),
        Sizes(1536, 64, 32, 64, Compiler(8, 1)),
        Sizes(0, 128, 64, 64, Compiler(8, 3)),
    ),
    _HALF_GRADIENTS_100,
    _HALF_GRADIENTS_100,
)
_SINGLE_LARGE = Gradient(0, 128, 64, 16, Compiler(8, 2), 16, 64, 512)
_SINGLE_SMALL = replace(_SINGLE_LARGE, outer=64)
_SINGLE_80 = Tiles(
    (Sizes(256, 64, 16, 16, Compiler(8, 1)), Sizes(0, 64, 64, 16, Compiler(8, 2))),
    (Gradient(0, 64, 32, 16, Compiler(8, 2), 16, 32, 512),),
    # Plain TensorFloat-32 spills with 64 vectors.
    (_SINGLE_LARGE,),
)
_SINGLE_90 = Tiles(
    (
        Sizes(384, 64, 32, 32, Compiler(8, 1)),
        Sizes(0, 128, 64, 16, Compiler(8, 2)),
        Sizes(0, 64, 64, 16, Compiler(8, 2)),
    ),
    (_SINGLE_LARGE, _SINGLE_SMALL),
    (_SINGLE_LARGE, _SINGLE_SMALL),
)
_SINGLE_100 = Tiles(
    (Sizes(0, 64, 64, 16, Compiler(8, 2)),),
    (_SINGLE_LARGE, _SINGLE_SMALL),
    # With steps of 16 it spills.
    tuple(replace(sizes, depth=32, step=32) for sizes in (_SINGLE_LARGE, _SINGLE_SMALL)),
)
_DOUBLE_GRADIENT = Gradient(0, 64, 32, 16, Compiler(8, 2), 16, 32, 256)
_DOUBLE = Tiles(
    (Sizes(0, 64, 32, 16, Compiler(8, 2)),),
    (_DOUBLE_GRADIENT,),
    (_DOUBLE_GRADIENT,),
)
# (compute capability major, dtype of the rows) → tiles.
TILES = {
    (8, torch.bfloat16): _HALF_80,
    (8, torch.float16): _HALF_80,
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
# Chips with less shared memory for a block hold nothing: an A100 has 163 KB, those of 8.6, 8.9 and
# 12.0, as in workstations, 99.
HELD_BYTES = 160 * 1024
# Programs among which the tiles of a gradient are shared out: each has room for the coefficients of
# one chunk, so this bounds their memory.
WORKERS = 512
# Small enough for a test of a few rows to cross the borders of tiles and chunks.
_INTERPRETER_GRADIENT = Gradient(0, 32, 32, 32, Compiler(4, 1), 32, 32, 64)
_INTERPRETER_HELD = replace(_INTERPRETER_GRADIENT, holds=96)
INTERPRETER_TILES = Tiles(
    (Sizes(96, 32, 32, 32, Compiler(4, 1)), Sizes(0, 32, 32, 32, Compiler(4, 1))),
    (_INTERPRETER_HELD, _INTERPRETER_GRADIENT),
    (_INTERPRETER_HELD, _INTERPRETER_GRADIENT),
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


def tiles_of(major: int, shared: int, dtype: torch.dtype) -> Tiles:
    """The tiles of a chip; one newer than the table takes its newest row.

    One with little shared memory takes those of compute capability 8 that hold nothing.

    Args:
        major: of its compute capability.
        shared: bytes of shared memory that one block may ask for.
        dtype: of the rows.
    """
    if shared < HELD_BYTES:
        tiles = TILES[8, dtype]
        return Tiles(_unheld(tiles.sweeps), _unheld(tiles.rows), _unheld(tiles.banks))
    known = [architecture for architecture, _ in TILES if architecture <= major]
    return TILES[max(known, default=8), dtype]


def _unheld(sizes: Iterable[AnySizes]) -> tuple[AnySizes, ...]:
    return tuple(s for s in sizes if not s.holds)


def tiles_for(x: Tensor) -> Tiles:
    """The tiles for inputs like `x`."""
    if _forced is not None:
        return _forced
    if triton.knobs.runtime.interpret:
        return INTERPRETER_TILES
    chip: Any = torch.cuda.get_device_properties(x.device)  # not all of it is in the stubs
    return tiles_of(chip.major, chip.shared_memory_per_block_optin, x.dtype)
