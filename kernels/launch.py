"""The one place where kernels are launched: here launches are counted, recorded or compiled."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from .tiles import Compiler, Gradient, Sizes, pieces

Runner = Callable[["Launch"], None]


@dataclass(frozen=True)
class Launch:
    """One kernel launch on a one-dimensional grid.

    Attributes:
        kernel: the `triton.jit` function.
        programs: size of the grid.
        device: where it runs.
        arguments: run-time arguments by name.
        constants: compile-time arguments by name.
        compiler: warps and stages.
    """

    kernel: Any
    programs: int
    device: torch.device
    arguments: dict[str, Any]
    constants: dict[str, Any]
    compiler: Compiler


def run(launch: Launch) -> None:
    """Launch on the current stream, without waiting."""
    on_gpu = launch.device.type == "cuda"
    with torch.cuda.device(launch.device) if on_gpu else nullcontext():
        launch.kernel[(launch.programs,)](
            **launch.arguments,
            **launch.constants,
            num_warps=launch.compiler.warps,
            num_stages=launch.compiler.stages,
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
    compiler: Compiler,
    constants: dict[str, Any],
    **arguments: Any,
) -> None:
    """Launch `kernel` on the device of `like`."""
    _runner(Launch(kernel, programs, like.device, arguments, constants, compiler))


def input_precision(x: Tensor) -> str:
    """How the tensor cores take products of rows like `x`.

    For fp32 that is `tf32x3`: three TensorFloat-32 products that together are as exact as fp32.
    Plain `tf32` is taken only where PyTorch is told so, by
    `torch.set_float32_matmul_precision("high")` or one of its later names.
    """
    if x.dtype != torch.float32:
        return "ieee"
    # It knows what was set by the former name; the getter of that one refuses the later ones.
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def element_type(dtype: torch.dtype) -> Any:
    """Triton's name of `dtype`."""
    return getattr(triton.language, str(dtype).removeprefix("torch."))


def sum_type(dtype: torch.dtype) -> Any:
    """Triton's name of the dtype of sums over numbers of `dtype`."""
    return element_type(torch.float64 if dtype == torch.float64 else torch.float32)


def sweep_constants(
    x: Tensor, sizes: Sizes, rows: int, columns: int, depths: Iterable[int]
) -> dict[str, Any]:
    """The compile-time arguments that every sweep over rows like `x` takes.

    Args:
        x: of the dtype of the launch.
        sizes: of the tile loop.
        rows, columns: of a tile of logits.
        depths: widths of the outer vectors.
    """
    constants = {
        "TYPE": element_type(x.dtype),
        "SUM": sum_type(x.dtype),
        "ROWS": rows,
        "COLUMNS": columns,
        "DEPTH": sizes.depth,
        "HELD": pieces(sizes, depths),
        "PRECISION": input_precision(x),
        # The interpreter's bf16 product is wrong; there the operands are widened first.
        "WIDEN": bool(triton.knobs.runtime.interpret) and x.dtype == torch.bfloat16,
    }
    if isinstance(sizes, Gradient):
        constants |= {"STEP": sizes.step, "WIDTH": sizes.width, "CHUNK": sizes.chunk}
    return constants
