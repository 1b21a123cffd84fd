"""What the sweeps cost, and the times that follow from a chip's limits: predicted, not measured.

python -m fino_fast.kernels.roofline [--write docs/gpu.md]
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from triton import cdiv

from .backward import split_rows
from .forward import MAX_SPLITS, share_of
from .page import write_between
from .tiles import TILES, Gradient, Sizes, Tiles, choose


@dataclass(frozen=True)
class Cost:
    """Work of one launch.

    Attributes:
        flops: of the matrix products, padding of the tiles included.
        moved: bytes of matrices that the programs load and store, in the L2 cache or beyond it.
        needed: bytes that memory has to deliver once.
    """

    flops: int
    moved: int
    needed: int

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.moved + other.moved, self.needed + other.needed)


def sweep(
    outer: int, inner: int, depth: int, tile: tuple[int, int], itemsize: int, step: int,
    held: bool = False,
) -> Cost:  # fmt: skip
    """Logits of `outer` vectors, which own programs, with `inner` ones.

    Args:
        depth: width D of both.
        tile: of outer and inner vectors.
        itemsize: bytes of an entry.
        step: along D inside a product.
        held: the outer vectors stay where they are; `read_once` is their reading.
    """
    outer_tiles, inner_tiles = cdiv(outer, tile[0]), cdiv(inner, tile[1])
    flops = 2 * outer_tiles * tile[0] * inner_tiles * tile[1] * cdiv(depth, step) * step
    outer_bytes, inner_bytes = outer * depth * itemsize, inner * depth * itemsize
    moved = outer_tiles * inner_bytes + (0 if held else inner_tiles * outer_bytes)
    return Cost(flops, moved, outer_bytes + inner_bytes)


def read_once(entries: int, itemsize: int, shares: int = 1) -> Cost:
    """Outer vectors that are held: read once, or once for each share of the inner ones."""
    return Cost(0, entries * itemsize * shares, 0)


def swept(n: int, classes: int, depth: int, itemsize: int, sizes: Sizes) -> Cost:
    """One bank alone on its rows, by `sweep_kernel`."""
    held = depth <= sizes.holds
    cost = sweep(n, classes, depth, (sizes.outer, sizes.inner), itemsize, sizes.depth, held)
    if not held:
        return cost
    tiles = cdiv(classes, sizes.inner)
    shares = cdiv(tiles, share_of(tiles, cdiv(n, sizes.outer)))
    return cost + read_once(n * depth, itemsize, shares)


def gradient_sweep(
    outer: int, inner: int, depth: int, itemsize: int, sizes: Gradient, written: int, parts: int = 1
) -> Cost:
    """Σ_j coefficient_ij · inner vector j for every outer vector i, logits included.

    Args:
        outer, inner, depth, itemsize: as in `sweep`.
        sizes: of the tile loop.
        written: bytes of an entry of the gradient.
        parts: into which the inner vectors are split, each with a gradient of its own.
    """
    outer_tiles = cdiv(outer, sizes.outer)
    chunks = parts * cdiv(cdiv(inner, parts), sizes.chunk)
    inner_step = cdiv(inner, sizes.step) * sizes.step  # chunks are multiples of it
    inner_tile = cdiv(inner, sizes.inner) * sizes.inner
    width = cdiv(depth, sizes.width) * sizes.width
    rows, sums = outer_tiles * sizes.outer, max(itemsize, 4)
    flops = 2 * rows * inner_step * width
    # Coefficients: written once, read for every width. Vectors: once more for every outer tile.
    moved = itemsize * rows * (inner_tile + inner_step * width // sizes.width)
    moved += outer_tiles * inner * depth * itemsize
    # The sums of a chunk: written, and read for the next; at the end read and written out.
    moved += sums * rows * width * (2 * chunks - parts) + parts * outer * depth * (sums + written)
    held = depth <= sizes.holds
    tile = (sizes.outer, sizes.inner)
    cost = sweep(outer, inner, depth, tile, itemsize, sizes.depth, held)
    if held:
        cost += read_once(outer * depth, itemsize, parts)
    return cost + Cost(flops, moved, parts * outer * depth * written)


def copied(entries: int, itemsize: tuple[int, int]) -> Cost:
    """Entries converted from one size to another by `operands`: read twice, written once."""
    moved = entries * (2 * itemsize[0] + itemsize[1])
    return Cost(0, moved, entries * sum(itemsize))


def rows_read(entries: int, itemsize: int) -> Cost:
    """Entries whose norms are taken, by `operands`."""
    return Cost(0, entries * itemsize, entries * itemsize)


def values_read(entries: int, sums: int) -> Cost:
    """Targets of continuous outputs, or of an overlap; every sweep reads them once."""
    return Cost(0, entries * sums, entries * sums)


def combined(entries: int, parts: int, sums: int, itemsize: int) -> Cost:
    """Entries of a gradient that `combine` adds from its parts and writes in its own dtype."""
    moved = entries * (parts * sums + itemsize)
    return Cost(0, moved, moved)


def contrastive_cost(n: int, m: int, width: int, itemsize: int, tiles: Tiles, widest: int) -> Cost:
    """Forward and backward of N local rows against M columns.

    Args:
        widest: width of the widest rows of the step, by which the tiles are chosen.
    """
    sums = max(4, itemsize)
    # Both passes take the norms of the rows and copy the columns.
    operands = rows_read(n * width, itemsize) + copied(m * width, (itemsize, itemsize))
    return (
        operands
        + swept(n, m, width, itemsize, choose(tiles.sweeps, widest, n * MAX_SPLITS))
        + operands
        + gradient_sweep(n, m, width, itemsize, choose(tiles.rows, widest, n), sums)
        + combined(n * width, 1, sums, itemsize)
    )


def head_cost(
    n: int, depth: int, classes: int, itemsize: tuple[int, int], tiles: Tiles, trained: bool
) -> Cost:
    """A head with its gradients: at the rows, and at the bank where it is `trained`.

    Args:
        itemsize: bytes of an entry of rows and bank; the bank is converted to the rows' dtype.
    """
    size, sums = itemsize[0], max(4, itemsize[0])
    cost = (
        copied(classes * depth, (itemsize[1], size))
        + swept(n, classes, depth, size, choose(tiles.sweeps, depth, n * MAX_SPLITS))
        + gradient_sweep(n, classes, depth, size, choose(tiles.rows, depth, n), sums)
        + combined(n * depth, 1, sums, size)
    )
    if not trained:
        # Both passes take the norms of the rows.
        return cost + rows_read(n * depth, size) + rows_read(n * depth, size)
    # Backward the bank is converted again.
    at_bank = choose(tiles.banks, depth, classes * MAX_SPLITS)
    _, parts = split_rows(cdiv(classes, at_bank.outer), n, at_bank)
    return (
        cost
        + copied(classes * depth, (itemsize[1], size))
        + gradient_sweep(classes, n, depth, size, at_bank, sums, parts)
        + combined(classes * depth, parts, sums, itemsize[1])
    )


def overlap_cost(n: int, depth: int, groups: int, itemsize: int, tiles: Tiles) -> Cost:
    """The overlap of a factor of few groups, with its gradients at U and M."""
    sums = max(4, itemsize)
    # Both passes multiply U by its factor; three sweeps read the targets, which are zero.
    operands, zeros = copied(n * depth, (itemsize, itemsize)), values_read(n * groups, sums)
    head = head_cost(n, depth, groups, (itemsize, sums), tiles, trained=True)
    return head + operands + operands + zeros + zeros + zeros


@dataclass(frozen=True)
class Chip:
    """Limits of a GPU, per second, by its vendor's data sheet.

    Attributes:
        flops: dense bf16 tensor-core products.
        l2: bytes from the L2 cache; 5,120 a clock is A100's published figure, taken for the others.
        memory: bytes from memory.
    """

    name: str
    major: int
    flops: float
    l2: float
    memory: float

    def seconds(self, cost: Cost) -> tuple[float, str]:
        """(the longest of the three, its name)."""
        times = {
            "tensor cores": cost.flops / self.flops,
            "L2": cost.moved / self.l2,
            "memory": cost.needed / self.memory,
        }
        limit = max(times, key=lambda name: times[name])
        return times[limit], limit


CHIPS = (
    Chip("A100 80 GB SXM", 8, 312e12, 5120 * 1.41e9, 2.0e12),
    Chip("H100 SXM", 9, 989e12, 5120 * 1.83e9, 3.35e12),
    Chip("H200 SXM", 9, 989e12, 5120 * 1.83e9, 4.8e12),
)
BATCHES = (4096, 16384, 65536)
VIEWS, PROJECTION, DEPTH, CLASSES, GROUPS = 2, 256, 768, 10_000, 35
BF16, FP32 = 2, 4


def table() -> str:
    """Predicted times of one rank with the whole batch, in ms, as Markdown."""
    lines = [
        "| B | chip | contrastive, ms | limit | linear, ms | limit | prototype, ms | limit | "
        "overlap, ms | limit |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for images in BATCHES:
        rows = VIEWS * images
        for chip in CHIPS:
            tiles = TILES[chip.major, torch.bfloat16]
            costs = (
                contrastive_cost(rows, rows, PROJECTION, BF16, tiles, DEPTH),
                head_cost(rows, DEPTH, CLASSES, (BF16, FP32), tiles, trained=True),
                head_cost(rows, DEPTH, CLASSES, (BF16, FP32), tiles, trained=False),
                overlap_cost(rows, DEPTH, GROUPS, BF16, tiles),
            )
            cells = []
            for cost in costs:
                seconds, limit = chip.seconds(cost)
                cells.append(f"{1e3 * seconds:.3g} | {limit}")
            lines.append(f"| {images:,} | {chip.name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Print the table, and put it into a page."""
    parser = argparse.ArgumentParser(prog="python -m fino_fast.kernels.roofline")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    chosen = parser.parse_args(arguments)
    text = table()
    print(text)
    if chosen.write is not None:
        write_between(chosen.write, "roofline", text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
