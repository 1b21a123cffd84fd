"""What the sweeps cost, and the times that follow from a chip's limits: predicted, not measured.

python -m fino_fast.kernels.roofline [--write docs/gpu.md]
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from triton import cdiv

from .page import write_between
from .tiles import TILES, Tiles, pair_tiles


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
    outer: int,
    inner: int,
    depth: int,
    tile: tuple[int, int],
    itemsize: tuple[int, int],
    tiles: Tiles,
    gradient: bool,
) -> Cost:
    """A sweep of `outer` vectors over `inner` ones.

    Args:
        outer: vectors that own programs (the rows; of a bank's gradient, the bank).
        inner: vectors that every program goes through.
        depth: width D of both.
        tile: of outer and inner vectors.
        itemsize: bytes of an entry of outer and inner vectors.
        tiles: for the step and the width.
        gradient: whether Σ coefficient · inner vector is accumulated, [outer, D].
    """
    outer_tiles, inner_tiles = cdiv(outer, tile[0]), cdiv(inner, tile[1])
    pair = 2 * outer_tiles * tile[0] * inner_tiles * tile[1]
    parts = cdiv(depth, tiles.width) if gradient else 1
    steps = cdiv(depth, tiles.depth) * tiles.depth
    # The logits once for every part of the width; then that part of the gradient.
    flops = pair * parts * (steps + (tiles.width if gradient else 0))
    outer_bytes = outer * depth * itemsize[0]
    inner_bytes = inner * depth * itemsize[1]
    moved = parts * (inner_tiles * outer_bytes + outer_tiles * inner_bytes)
    if gradient:
        # The operand of the second product; the vectors' own rows once more, and the result.
        moved += outer_tiles * inner_bytes + 2 * outer_bytes
    return Cost(flops, moved, outer_bytes + inner_bytes)


def contrastive_cost(n: int, m: int, width: int, itemsize: int, tiles: Tiles) -> Cost:
    """Forward and backward of N local rows against M columns."""
    tiles = pair_tiles(tiles, itemsize)
    shape = n, m, width, (tiles.rows, tiles.columns), (itemsize, itemsize), tiles
    return sweep(*shape, gradient=False) + sweep(*shape, gradient=True)


def head_cost(
    n: int, depth: int, classes: int, itemsize: tuple[int, int], tiles: Tiles, trained: bool
) -> Cost:
    """A head with its gradients: at the rows, and at the bank where it is `trained`."""
    rows = sweep(n, classes, depth, (tiles.rows, tiles.columns), itemsize, tiles, True)
    if not trained:
        return rows
    back = (itemsize[1], itemsize[0])
    return rows + sweep(classes, n, depth, (tiles.columns, tiles.rows), back, tiles, True)


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
VIEWS, PROJECTION, DEPTH, CLASSES = 2, 256, 768, 10_000
BF16, FP32 = 2, 4


def table() -> str:
    """Predicted times of one rank with the whole batch, in ms, as Markdown."""
    lines = [
        "| B | chip | contrastive, ms | limit | linear, ms | limit | prototype, ms | limit |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for images in BATCHES:
        rows = VIEWS * images
        for chip in CHIPS:
            tiles = TILES[chip.major, BF16]
            costs = (
                contrastive_cost(rows, rows, PROJECTION, BF16, tiles),
                head_cost(rows, DEPTH, CLASSES, (BF16, FP32), tiles, trained=True),
                head_cost(rows, DEPTH, CLASSES, (BF16, FP32), tiles, trained=False),
            )
            cells = []
            for cost in costs:
                seconds, limit = chip.seconds(cost)
                cells.append(f"{1e3 * seconds:.1f} | {limit}")
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
