"""The CUDA C++ kernels of csrc/cuda as operators: the irregular parts of a step on a GPU.

They are a library of their own, free of torch, called through its C interface
(csrc/cuda/launch.h). Rows are sorted by label first, so that every sum has a fixed order.
"""

import ctypes
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from . import reference

_FILES = sorted(Path(__file__).parent.glob("_cuda.*"))
AVAILABLE = bool(_FILES)  # a constant, so that torch.compile need not look at the disk


@cache
def _library() -> ctypes.CDLL:
    return ctypes.CDLL(str(_FILES[0]))


def _call(name: str, *arguments: Tensor | int | float | bool) -> None:
    """Launch on the current stream of the first argument's device.

    Raises:
        RuntimeError: CUDA refuses the launch.
    """
    first = arguments[0]
    assert isinstance(first, Tensor)
    converted = [_converted(value) for value in arguments]
    if first.is_cuda:
        with torch.cuda.device(first.device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            error = getattr(_library(), name)(*converted, stream)
    else:
        error = getattr(_library(), name)(*converted, None)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error} at the launch")


def _converted(value: Tensor | int | float | bool) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    if isinstance(value, bool):
        return ctypes.c_bool(value)
    return ctypes.c_int64(value) if isinstance(value, int) else ctypes.c_float(value)


@torch.library.custom_op("fino::group_means", mutates_args=())
def group_means(z: Tensor, order: Tensor, labels: Tensor) -> Tensor:
    """Every row becomes the mean of the rows of its label; 0 where the label is −1.

    Args:
        z: [N, D] fp32.
        order, labels: [N] int64; `order` sorts the rows by label, `labels` are the sorted ones.

    Returns:
        [N, D].
    """
    z, out = z.contiguous(), torch.empty_like(z, memory_format=torch.contiguous_format)
    _call("fino_group_means", z, order, labels, z.shape[0], z.shape[1], out)
    return out


@group_means.register_fake
def _(z: Tensor, order: Tensor, labels: Tensor) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _means_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[1:])


def _means_backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
    # The projection on the group means is symmetric.
    return group_means(gradient, *ctx.saved_tensors), None, None


group_means.register_autograd(_means_backward, setup_context=_means_context)


@torch.library.custom_op("fino::bank_update", mutates_args=("centroids", "temperatures", "counts"))
def bank_update(
    centroids: Tensor,
    temperatures: Tensor,
    counts: Tensor,
    teacher: Tensor,
    order: Tensor,
    labels: Tensor,
    momentum: float,
    unit_norm: bool,
) -> None:
    """Move a prototype bank towards the rows of one view (`heads.PrototypeHead.update`).

    Args:
        centroids: [K, D] fp32; temperatures: [K] fp32; counts: [K] int64: the bank.
        teacher: [N, D] fp32.
        order, labels: as in `group_means`; −1 takes no part.
        momentum: m.
        unit_norm: `concentration="fixed"`.
    """
    teacher = teacher.contiguous()
    _call(
        "fino_bank_update", teacher, order, labels, *teacher.shape, centroids.shape[0],
        float(momentum), unit_norm, centroids, temperatures, counts, torch.empty_like(teacher),
    )  # fmt: skip


@bank_update.register_fake
def _(*arguments: Any) -> None:
    return None


def explained(z: Tensor, metadata: Tensor, valid: Tensor) -> Tensor:
    """`reference.explained`, by the kernel where the metadata are categories and z is fp32."""
    if metadata.dim() != 1 or z.dtype != torch.float32:
        return reference.explained(z, metadata, valid)
    labels, order = torch.sort(torch.where(valid, metadata, -1), stable=True)
    # One class alone explains nothing; what rounding leaves of its mean is no direction.
    several = labels[-1] != torch.where(labels >= 0, labels, labels[-1]).min()
    return torch.where(several, group_means(z, order, labels), 0.0)


def serves(bank: Tensor, rows: Tensor) -> bool:
    """Whether `bank_update` can update this bank from these rows."""
    fp32 = bank.dtype == torch.float32 and rows.dtype != torch.float64
    return AVAILABLE and rows.is_cuda and fp32 and bank.is_contiguous()
