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


def _call(name: str, device: torch.device, *arguments: Any) -> None:
    """Launch on the current stream of `device`.

    Raises:
        RuntimeError: CUDA refuses the launch.
    """
    converted = [_converted(value) for value in arguments]
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            error = getattr(_library(), name)(*converted, stream)
    else:
        error = getattr(_library(), name)(*converted, None)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error} at the launch")


def _converted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


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
    _call("fino_group_means", z.device, z, order, labels, z.shape[0], z.shape[1], out)
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


class _Bank(ctypes.Structure):
    """FinoBank of csrc/cuda/launch.h."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in
          ("order", "labels", "centroids", "temperatures", "counts", "scratch")),
        ("classes", ctypes.c_int64),
        ("momentum", ctypes.c_float),
        ("unit_norm", ctypes.c_bool),
    )  # fmt: skip


@torch.library.custom_op("fino::bank_update", mutates_args=("centroids", "temperatures", "counts"))
def bank_update(
    centroids: list[Tensor],
    temperatures: list[Tensor],
    counts: list[Tensor],
    teacher: Tensor,
    order: Tensor,
    labels: Tensor,
    momentum: list[float],
    unit_norm: list[bool],
) -> None:
    """Move prototype banks towards the rows of all views, in one launch (`heads.update_banks`).

    Args:
        centroids: [K_f, D] fp32; temperatures: [K_f] fp32; counts: [K_f] int64: bank f.
        teacher: [V, N, D] fp32.
        order, labels: [F, N]; row f as in `group_means`; −1 takes no part.
        momentum: m of every bank.
        unit_norm: `concentration="fixed"`, of every bank.
    """
    teacher, order, labels = teacher.contiguous(), order.contiguous(), labels.contiguous()
    scratch = teacher.new_empty(len(centroids), *teacher.shape[1:])
    banks = (_Bank * len(centroids))(
        *(
            _Bank(
                order[f].data_ptr(), labels[f].data_ptr(), centroids[f].data_ptr(),
                temperatures[f].data_ptr(), counts[f].data_ptr(), scratch[f].data_ptr(),
                centroids[f].shape[0], momentum[f], unit_norm[f],
            )
            for f in range(len(centroids))
        )
    )  # fmt: skip
    _call("fino_bank_update", teacher.device, banks, len(centroids), teacher, *teacher.shape)


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
