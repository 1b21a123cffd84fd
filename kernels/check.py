"""`make gpu-check`: compile every kernel for GPUs that are not there, and hold it to limits.

    python -m fino_fast.kernels.check [--write docs/gpu.md] [--dtypes …] [--capabilities …]
                                      [--widths …]

A launch is compiled as it would be launched: the launchers run with tensors that have no memory,
and their arguments are specialised as Triton does it. The command fails where a kernel spills
registers, wants more shared memory than the chip has, uses atomics (whose order changes from run to
run), or sweeps without tensor cores.
"""

import argparse
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from .aot import SHARED_LIMIT, Compiled, compile_launch, record, specialised
from .backward import Upstream, backward
from .bank import Bank, Batch
from .banks import banks_kernel
from .combine import combine_kernel
from .epilogues import OVERLAP, PAIRS, PROTOTYPE, TANH
from .forward import forward
from .launch import Launch
from .operands import operands_kernel, sum_dtype
from .page import write_between
from .rows import rows_kernel
from .sweep import sweep_kernel
from .tiles import TILES, AnySizes, Tiles, forced, tiles_of

CAPABILITIES = tuple(SHARED_LIMIT)
TF32 = "tf32"
# By name; float32 by plain TensorFloat-32 products, too.
DTYPES = {
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float32": torch.float32,
    TF32: torch.float32,
    "float64": torch.float64,
}
# So many rows and classes that the largest tiles are taken.
ROWS, CLASSES, VIEWS = 65_536, 10_000, 2
# Of embedding and projection: what is usual, and what is not held and no load of 16 bytes fits.
WIDTHS = ((768, 256), (1537, 1))
SMALL = 384  # a width that is held beside the widest ones
HEADS, GROUPS = 2, 35
# Other numbers of heads and rows, for which nothing is compiled again: the compiler knows of
# multiples of 16 and of one; 16 banks.
OTHERS = 14, 65_546
# Numbers of heads for which `operands` is compiled; the other kernels do not depend on them.
MANY_HEADS = (12, 40)


def launches(
    dtype: torch.dtype, tiles: Tiles, widths: tuple[int, int], heads: int = HEADS, rows: int = ROWS
) -> list[Launch]:
    """The launches of a step with banks of every kind, forward and backward, also if balanced.

    Args:
        dtype: of the rows.
        tiles: of the chip.
        widths: of embedding and projection.
        heads: how many.
        rows: N.
    """
    sums = sum_dtype(dtype)

    def tensor(*size: int, of: torch.dtype = sums) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    z, p = (tensor(rows, width, of=dtype) for width in widths)
    one, labels, none = tensor(), tensor(rows, of=torch.int64), tensor(0, of=torch.int64)

    def bank(kind: int, space: int, x: Tensor, vectors: Tensor) -> Bank:
        classes = vectors.shape[0]
        target = labels if kind <= PROTOTYPE.value else tensor(rows, classes)
        return Bank(
            kind, space, x, vectors, tensor(classes), target, one, tensor(classes, of=torch.int64),
            0.1 if kind == 0 else 0.0, 0.03, one,
        )  # fmt: skip

    kinds = [f % (TANH.value + 1) for f in range(heads)]
    banks = [bank(k, 0, z, tensor(2 if k > PROTOTYPE.value else CLASSES, widths[0])) for k in kinds]
    batch = Batch(VIEWS, 0, False)
    banks.append(Bank(PAIRS.value, 1, p, p, one, none, one, none, 0.0, 1.0, one, batch))
    u = tensor(rows, widths[0], of=dtype)
    means, zeros = tensor(GROUPS, widths[0]), tensor(GROUPS)
    banks.append(Bank(OVERLAP.value, 2, u, means, one, zeros, one, none, 0.0, 1.0, one))
    with forced(tiles), record() as recorded:
        result = forward(banks)
        prototypes = iter(result.prototypes)
        for entry in banks:
            if entry.kind == PROTOTYPE.value:
                entry.vectors, entry.is_ready = next(prototypes), True
        upstream = [Upstream(one, lse, lse, True) for lse in result.lse]
        backward(banks, upstream, [z, p, u], [], True)
    with forced(tiles), record() as balanced:
        forward(banks[:heads], True)
    # The heads alone have widths of their own; all else is the same.
    return recorded + [launch for launch in balanced if launch.kernel is rows_kernel]


@dataclass(frozen=True)
class Checked:
    """One launch and what the compiler made of it.

    Attributes:
        dtype: its name in DTYPES.
        constants: the compile-time arguments.
        result: see there.
    """

    dtype: str
    constants: dict[str, Any]
    result: Compiled


def compiled(
    dtypes: Iterable[str], capabilities: Iterable[int], widths: Sequence[int] = ()
) -> list[Checked]:
    """All launches for all of these, as many at a time as there are processors for this process.

    Args:
        widths: of the embeddings; empty: all that `every_launch` knows.
    """
    tasks = list(product(dtypes, capabilities, [tuple(widths)]))
    # Not forked: PyTorch has threads by now. By Ctrl-C they end; by default they would go on with
    # what they compile, minutes, while the pool waits for them.
    with ProcessPoolExecutor(
        len(os.sched_getaffinity(0)),
        get_context("spawn"),
        initializer=signal.signal,
        initargs=(signal.SIGINT, signal.SIG_DFL),
    ) as pool:
        return [checked for found in pool.map(_compiled, tasks) for checked in found]


def _compiled(task: tuple[str, int, tuple[int, ...]]) -> list[Checked]:
    name, capability, widths = task
    with products("high" if name == TF32 else "highest"):
        dtype = DTYPES[name]
        tiles = tiles_of(capability // 10, SHARED_LIMIT[capability], dtype)
        wanted = every_launch(dtype, tiles, widths)
    if name == TF32:
        # The others take no products.
        wanted = [launch for launch in wanted if "PRECISION" in launch.constants]
    return [Checked(name, x.constants, compile_launch(x, capability)) for x in wanted]


@contextmanager
def products(precision: str) -> Iterator[None]:
    """Inside, fp32 products have this precision (`torch.set_float32_matmul_precision`)."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def every_launch(dtype: torch.dtype, tiles: Tiles, widths: Sequence[int] = ()) -> list[Launch]:
    """The launches that are compiled for one chip.

    Args:
        widths: of the embeddings, if only these, and of tiles the largest that take them.
    """
    if widths:
        pairs = [(width, WIDTHS[0][1]) for width in widths]
        return [launch for pair in pairs for launch in launches(dtype, tiles, pair)]
    held = {SMALL} | {s.holds for s in (*tiles.sweeps, *tiles.rows, *tiles.banks) if s.holds}
    every = dict.fromkeys((*WIDTHS, *((width, WIDTHS[0][1]) for width in sorted(held))))
    wanted = [
        launch
        for level in levels(tiles)
        for widths in every
        for launch in launches(dtype, level, widths)
    ]
    for heads in MANY_HEADS:
        of_many = launches(dtype, tiles, WIDTHS[0], heads)
        wanted += [launch for launch in of_many if launch.kernel is operands_kernel]
    return wanted


def levels(tiles: Tiles) -> list[Tiles]:
    """The tiles without their first, second, … sizes, so that each of them is the first once."""

    def without(sizes: tuple[AnySizes, ...], first: int) -> tuple[AnySizes, ...]:
        return sizes[first:] or sizes[-1:]

    most = max(len(sizes) for sizes in (tiles.sweeps, tiles.rows, tiles.banks))
    return [
        Tiles(without(tiles.sweeps, i), without(tiles.rows, i), without(tiles.banks, i))
        for i in range(most)
    ]


def compiled_again() -> list[str]:
    """The kernels whose code depends on the number of rows or banks, in words."""
    tiles = TILES[9, torch.bfloat16]
    kernels = (sweep_kernel, rows_kernel, banks_kernel, combine_kernel)
    of_step, of_another = (
        [
            (launch.kernel.__name__, specialised(launch, 90)[1:])
            for launch in launches(torch.bfloat16, tiles, WIDTHS[0], heads, rows)
            if launch.kernel in kernels
        ]
        for heads, rows in ((HEADS, ROWS), OTHERS)
    )
    return [
        f"{kernel} is compiled again for another number of rows or banks; see do_not_specialize"
        for (kernel, one), (_, another) in zip(of_step, of_another, strict=True)
        if one != another
    ]


def faults(checked: Checked) -> list[str]:
    """What is wrong with one compiled kernel, in words."""
    constants, result = checked.constants, checked.result
    limit = SHARED_LIMIT[result.capability]
    sweeps = "COLUMNS" in constants
    # Tensor cores of workstations know no fp64.
    needs_tensor_cores = sweeps and (checked.dtype, result.capability) != ("float64", 86)
    where = f"{result.kernel}, {checked.dtype}, sm_{result.capability}"
    found = {
        f"spills {result.spilled} bytes": result.spilled > 0,
        f"wants {result.shared} bytes of shared memory, the limit is {limit}": result.shared
        > limit,
        "uses atomics": result.atomics,
        "uses no tensor cores": needs_tensor_cores and not result.tensor_core,
    }
    return [f"{where}: {fault}" for fault, present in found.items() if present]


def table(results: list[Checked]) -> str:
    """The results as Markdown, all widths and compile-time variants of a kernel as one row.

    Tiles that hold rows of different widths, or none, stand apart. What the compiler makes of a
    kernel differs from version to version of Triton, so it is named.
    """
    held: dict[tuple[str, str, int, int, int], int] = {}
    groups: dict[tuple[str, str, int, int, int], list[Compiled]] = {}
    for checked in results:
        dtype, sizes, result = checked.dtype, checked.constants, checked.result
        kernel = result.kernel.removesuffix("_kernel")
        width = max(sizes.get("HELD", ()), default=0) * sizes["DEPTH"]
        tile = (sizes["ROWS"], sizes["COLUMNS"]) if width else (0, 0)
        key = kernel, dtype, result.capability, *tile
        held[key] = max(width, held.get(key, 0))
        groups.setdefault(key, []).append(result)
    lines = [
        f"Triton {triton.__version__}",
        "",
        "| kernel | dtype | chip | held up to D | registers | spilled bytes | "
        "shared memory, KiB | tensor cores |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for key in sorted(groups, key=lambda key: (*key[:3], held[key])):
        (kernel, dtype, capability, *_), group = key, groups[key]
        instructions = sorted({name for result in group for name in result.tensor_core})
        lines.append(
            f"| {kernel} | {dtype} | sm_{capability} | {held[key] or '—'} | "
            f"{max(r.registers for r in group)} | "
            f"{max(r.spilled for r in group)} | {max(r.shared for r in group) / 1024:.1f} | "
            f"{', '.join(instructions) or '—'} |"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Compile, report, and return 1 where a limit is broken."""
    parser = argparse.ArgumentParser(prog="python -m fino_fast.kernels.check")
    parser.add_argument("--write", type=Path, help="put the table between the marks of this page")
    parser.add_argument("--dtypes", nargs="+", default=DTYPES, choices=DTYPES)
    parser.add_argument(
        "--capabilities", nargs="+", type=int, default=CAPABILITIES, choices=CAPABILITIES
    )
    parser.add_argument("--widths", nargs="+", type=int, default=(), help="of the embeddings")
    chosen = parser.parse_args(arguments)
    results = compiled(chosen.dtypes, chosen.capabilities, chosen.widths)
    text = table(results)
    print(text)
    wrong = [fault for checked in results for fault in faults(checked)] + compiled_again()
    for fault in wrong:
        print(f"fault: {fault}", file=sys.stderr)
    if chosen.write is not None and not wrong:
        write_between(chosen.write, "gpu-check", text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
