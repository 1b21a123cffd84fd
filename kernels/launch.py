"""The one place where kernels are launched: here launches are counted, recorded or compiled."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .tiles import Tiles

Runner = Callable[["Launch"], None]


@dataclass(frozen=True)
class Launch:
    """One kernel launch on a one-dimensional grid.

    Attributes:
        kernel: the `triton.jit` function.
        programs: size of the grid.
        device: where it runs.
        arguments: run-time arguments by name; tuples are tables with one entry a bank.
        constants: compile-time arguments by name.
        warps, stages: for the compiler.
    """

    kernel: Any
    programs: int
    device: torch.device
    arguments: dict[str, Any]
    constants: dict[str, Any]
    warps: int
    stages: int


def run(launch: Launch) -> None:
    """Launch on the current stream, without waiting."""
    on_gpu = launch.device.type == "cuda"
    with torch.cuda.device(launch.device) if on_gpu else nullcontext():
        launch.kernel[(launch.programs,)](
            **launch.arguments,
            **launch.constants,
            num_warps=launch.warps,
            num_stages=launch.stages,
        )


_runner: Runner = run


@contextmanager
def intercepted(runner: Runner) -> Iterator[None]:
    """Inside, `runner` gets every launch; it may call `run` or not."""
    global _runner
    before, _runner = _runner, runner
    try:
        yield
    finally:
        _runner = before


def launch(
    kernel: Any,
    programs: int,
    like: Tensor,
    tiles: Tiles,
    constants: dict[str, Any],
    **arguments: Any,
) -> None:
    """Launch `kernel` on the device of `like`."""
    _runner(Launch(kernel, programs, like.device, arguments, constants, tiles.warps, tiles.stages))


def input_precision(x: Tensor) -> str:
    """How the tensor cores take products of rows like `x`.

    For fp32 that is `tf32x3`: three TensorFloat-32 products that together are as exact as fp32.
    Plain `tf32` is taken only where PyTorch is told so, by
    `torch.set_float32_matmul_precision("high")`.
    """
    if x.dtype != torch.float32:
        return "ieee"
    return "tf32x3" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def sweep_constants(x: Tensor, tiles: Tiles) -> dict[str, Any]:
    """The compile-time arguments that every sweep over rows like `x` takes."""
    return {
        "SUM": triton.language.float64 if x.dtype == torch.float64 else triton.language.float32,
        "ROWS": tiles.rows,
        "COLUMNS": tiles.columns,
        "DEPTH": tiles.depth,
        "WIDTH": tiles.width,
        "PRECISION": input_precision(x),
        # The interpreter's bf16 product is wrong; there the operands are widened first.
        "WIDEN": bool(triton.knobs.runtime.interpret) and x.dtype == torch.bfloat16,
    }
