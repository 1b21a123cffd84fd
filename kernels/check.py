"""`make gpu-check`: compile every kernel for GPUs that are not there, and hold it to limits.

    python -m fino_fast.kernels.check [--write docs/gpu.md] [--dtypes …] [--capabilities …]

A launch is compiled as it would be launched: the launchers run with tensors that have no memory,
and their arguments are specialised as Triton does it. The command fails where a kernel spills
registers, wants more shared memory than the chip has, uses atomics (whose order changes from run to
run), or sweeps without tensor cores.
"""

import argparse
import sys
from pathlib import Path

import torch
from torch import Tensor

from .aot import SHARED_LIMIT, Compiled, compile_launch, record
from .contrastive_backward import contrastive_backward
from .contrastive_forward import contrastive_forward
from .heads import Heads, Upstream, heads_gradient, heads_loss
from .launch import Launch
from .page import write_between
from .tiles import TILES, Tiles, forced

CAPABILITIES = tuple(SHARED_LIMIT)
DTYPES = ("bfloat16", "float16", "float32", "float64")
ROWS, CLASSES = 4096, 10_000
# Of embedding and projection: what is usual, and what no load of 16 bytes fits.
WIDTHS = ((768, 256), (769, 1))


def launches(dtype: torch.dtype, tiles: Tiles, widths: tuple[int, int]) -> list[Launch]:
    """One launch of every kernel and compile-time variant, for rows of two widths."""
    sums = torch.float64 if dtype == torch.float64 else torch.float32

    def tensor(*size: int, of: torch.dtype = sums) -> Tensor:
        return torch.empty(size, dtype=of, device="meta")

    x, p = (tensor(ROWS, width, of=dtype) for width in widths)
    one, lse = tensor(), tensor(ROWS)
    kind = list(range(5))
    sizes = [CLASSES, CLASSES, 2, 2, 2]
    target = [tensor(ROWS, of=torch.int64)] * 2 + [tensor(ROWS, 2)] * 3

    def table(heads: list[int]) -> Heads:
        return Heads(
            [x] * len(heads),
            [tensor(sizes[f], widths[0]) for f in heads],
            [tensor(sizes[f]) for f in heads],
            [target[f] for f in heads],
            [one] * len(heads),
            [tensor(sizes[f], of=torch.int64) for f in heads],
            [kind[f] for f in heads],
            [0.1 if f == 0 else 0.0 for f in heads],
        )

    trained = [0, 2, 3, 4]
    with forced(tiles), record() as recorded:
        _, _, lses, kept = heads_loss(table(kind), [f == 1 for f in kind])
        upstream = Upstream(tensor(5), [one] * 5, [0] * 5, lses, kept)
        heads_gradient(upstream, [x], table(trained), trained, True, True)
        contrastive_forward(p, p, one, 2, 0, False)
        contrastive_backward(one, p, p, one, lse, lse, 2, 0, False)
    different = {
        (entry.kernel.__name__, entry.constants.get("UPSTREAM")): entry for entry in recorded
    }
    return list(different.values())


def compiled(
    dtypes: tuple[str, ...], capabilities: tuple[int, ...]
) -> list[tuple[str, Launch, Compiled]]:
    """(dtype, launch, what the compiler made of it) of all of them."""
    results = []
    for name in dtypes:
        dtype = getattr(torch, name)
        for capability in capabilities:
            tiles = TILES[capability // 10, dtype.itemsize]
            for widths in WIDTHS:
                for launch in launches(dtype, tiles, widths):
                    results.append((name, launch, compile_launch(launch, capability)))
    return results


def faults(dtype: str, launch: Launch, result: Compiled) -> list[str]:
    """What is wrong with one compiled kernel, in words."""
    limit = SHARED_LIMIT[result.capability]
    sweeps = "COLUMNS" in launch.constants
    where = f"{result.kernel}, {dtype}, sm_{result.capability}"
    found = {
        f"spills {result.spilled} bytes": result.spilled > 0,
        f"wants {result.shared} bytes of shared memory, the limit is {limit}": result.shared
        > limit,
        "uses atomics": result.atomics,
        "uses no tensor cores": sweeps and not result.tensor_core,
    }
    return [f"{where}: {fault}" for fault, present in found.items() if present]


def table(results: list[tuple[str, Launch, Compiled]]) -> str:
    """The results as Markdown, all widths and compile-time variants of a kernel as one row."""
    rows: dict[tuple[str, str, int], list[Compiled]] = {}
    for dtype, _, result in results:
        kernel = result.kernel.removesuffix("_kernel")
        rows.setdefault((kernel, dtype, result.capability), []).append(result)
    lines = [
        "| kernel | dtype | chip | registers | spilled bytes | shared memory, KiB | tensor cores |",
        "|---|---|---|---|---|---|---|",
    ]
    for (kernel, dtype, capability), group in sorted(rows.items()):
        instructions = sorted({name for result in group for name in result.tensor_core})
        lines.append(
            f"| {kernel} | {dtype} | sm_{capability} | {max(r.registers for r in group)} | "
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
    chosen = parser.parse_args(arguments)
    results = compiled(tuple(chosen.dtypes), tuple(chosen.capabilities))
    text = table(results)
    print(text)
    wrong = [fault for result in results for fault in faults(*result)]
    for fault in wrong:
        print(f"fault: {fault}", file=sys.stderr)
    if chosen.write is not None and not wrong:
        write_between(chosen.write, "gpu-check", text)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
