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

_FILES = sorted(Path(__file__).parent.glob("_cuda.*"))
AVAILABLE = bool(_FILES)  # a constant, so that torch.compile need not look at the disk

NO_KERNEL_IMAGE = 209  # cudaErrorNoKernelImageForDevice


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
        describe = _library().fino_error_string
        describe.restype = ctypes.c_char_p
        advice = ""
        if error == NO_KERNEL_IMAGE:
            major, minor = torch.cuda.get_device_capability(device)
            advice = f"; build fino-fast with TORCH_CUDA_ARCH_LIST={major}.{minor}"
        raise RuntimeError(f"{name}: CUDA error {error}, {describe(error).decode()}{advice}")


def _converted(value: Any) -> Any:
    if isinstance(value, Tensor):
        return ctypes.c_void_p(value.data_ptr())
    return ctypes.c_int64(value) if isinstance(value, int) else value


def _structure(name: str, fields: dict[str, Any]) -> type[ctypes.Structure]:
    """A struct of csrc/cuda/launch.h."""
    return type(name, (ctypes.Structure,), {"_fields_": tuple(fields.items())})


def _table(structure: type[ctypes.Structure], entries: list[dict[str, Any]]) -> Any:
    """An array of structs; of a tensor its address is taken, None is null."""
    return (structure * len(entries))(
        *(
            structure(
                **{
                    name: value.data_ptr() if isinstance(value, Tensor) else value
                    for name, value in entry.items()
                }
            )
            for entry in entries
        )
    )


_Factor = _structure(
    "FinoFactor",
    dict.fromkeys(
        ("order", "labels", "basis", "means", "sizes", "group", "mean", "squares", "rest"),
        ctypes.c_void_p,
    )
    | {"groups": ctypes.c_int64},
)
_Product = _structure(
    "FinoProduct",
    dict.fromkeys(("a", "b", "sizes"), ctypes.c_void_p)
    | {"rows": ctypes.c_int64, "columns": ctypes.c_int64, "parts": ctypes.c_void_p},
)
_Overlap = _structure(
    "FinoOverlap",
    {
        "squares": ctypes.c_void_p, "numerator": ctypes.c_void_p, "parts": ctypes.c_int64,
        "groups": ctypes.c_int64, "sums": ctypes.c_void_p, "share": ctypes.c_void_p,
        "coefficients": ctypes.c_void_p,
    },
)  # fmt: skip
_OverlapGradient = _structure(
    "FinoOverlapGradient",
    dict.fromkeys(
        ("group", "basis", "mean", "means", "rest", "rest_side", "signal_side", "coefficients",
         "scale"),
        ctypes.c_void_p,
    )
    | {"groups": ctypes.c_int64},
)  # fmt: skip
STRIPE = 32  # kFinoStripe
PARTS = 64  # kFinoParts
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # FinoType


@torch.library.custom_op("fino::group_statistics", mutates_args=())
def group_statistics(
    z: Tensor,
    order: Tensor,
    labels: Tensor,
    basis: list[Tensor],
    groups: list[int],
    want_rest: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    """What every factor explains of the centred rows Z, and what it leaves; in one launch.

    A category explains its mean, continuous values with the orthonormal design Q explain Q·QᵀZ. In
    both cases S = ΠZ is given by a matrix M of few rows, and U = Z − S. One category alone explains
    nothing. The host does not learn how many categories there are: M has a row for each that there
    may be, and zeros in those that are left over.

    Args:
        z: [N, D] fp32, fp16 or bf16; sums are in fp64.
        order, labels: [F, N] int64; `order` sorts the rows of every factor by label, `labels` are
            the sorted ones. Rows of −1 take no part and may hold anything. For continuous values
            the label is 0.
        basis: [N, d] fp64 each, Q; empty for categories.
        groups: G_f, rows of M: at least the number of different labels, or d.
        want_rest: for which factors U is wanted.

    Returns:
        (M of all factors one below the other [ΣG, D]; rows of every group [ΣG] (1 for a column of
        Q); number of the group of every row [F, N] int64, −1 where it is missing; mean over the
        rows that take part [F, D] fp64; ‖S‖² and ‖U‖² by stripes of 32 columns and groups
        [2, ⌈D/32⌉, ΣG], for continuous values ‖U‖² all in their first; U [N, D] or empty of
        every factor). fp32 where nothing else is said.
    """
    z, order, labels = z.contiguous(), order.contiguous(), labels.contiguous()
    basis = [q.contiguous() for q in basis]
    results = _statistics_like(z, order, groups, want_rest)
    means, sizes, group, mean, squares, rest = results
    _call(
        "fino_group_statistics",
        z.device,
        _table(
            _Factor,
            [
                {
                    "order": order[f],
                    "labels": labels[f],
                    "basis": _or_null(basis[f]),
                    "means": means[first:],
                    "sizes": sizes[first:],
                    "group": group[f],
                    "mean": mean[f],
                    "squares": squares[0, 0, first:],
                    "rest": _or_null(rest[f]),
                    "groups": groups[f],
                }
                for f, first in enumerate(_starts(groups))
            ],
        ),
        len(groups), z, TYPES[z.dtype], *z.shape, sum(groups),
    )  # fmt: skip
    return results


@group_statistics.register_fake
def _(
    z: Tensor,
    order: Tensor,
    labels: Tensor,
    basis: list[Tensor],
    groups: list[int],
    want_rest: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    return _statistics_like(z, order, groups, want_rest)


def _statistics_like(
    z: Tensor, order: Tensor, groups: list[int], want_rest: list[bool]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    (n, width), total = z.shape, sum(groups)
    sums = torch.float32
    return (
        z.new_empty(total, width, dtype=sums),
        z.new_empty(total, dtype=sums),
        torch.empty_like(order, memory_format=torch.contiguous_format),
        z.new_empty(len(groups), width, dtype=torch.float64),
        z.new_empty(2, -(-width // STRIPE), total, dtype=sums),
        [z.new_empty((n, width) if wanted else (0,), dtype=sums) for wanted in want_rest],
    )


@torch.library.custom_op("fino::product_sums", mutates_args=())
def product_sums(a: list[Tensor], b: list[Tensor], sizes: list[Tensor]) -> list[Tensor]:
    """Σ_ij a_ij · b_ij · sizes_j of every pair of matrices, in parts; one launch for all.

    Args:
        a, b: [R, C] fp32.
        sizes: [C] fp32; empty is 1.

    Returns:
        [64] fp64 each, to be summed: squares of squares may not fit fp32.
    """
    parts = [matrix.new_empty(PARTS, dtype=torch.float64) for matrix in a]
    a, b = ([matrix.contiguous() for matrix in matrices] for matrices in (a, b))
    table = _table(
        _Product,
        [
            {
                "a": a[i],
                "b": b[i],
                "sizes": _or_null(sizes[i]),
                "rows": a[i].shape[0],
                "columns": a[i].shape[1],
                "parts": parts[i],
            }
            for i in range(len(a))
        ],
    )
    _call("fino_product_sums", a[0].device, table, len(a))
    return parts


@product_sums.register_fake
def _(a: list[Tensor], b: list[Tensor], sizes: list[Tensor]) -> list[Tensor]:
    return [matrix.new_empty(PARTS, dtype=torch.float64) for matrix in a]


@torch.library.custom_op("fino::overlap_shares", mutates_args=())
def overlap_shares(
    squares: Tensor, groups: list[int], numerator: list[Tensor]
) -> tuple[Tensor, Tensor, Tensor]:
    """The orthogonal terms R of all factors from their sums; in one launch.

    Args:
        squares, groups: of `group_statistics`.
        numerator: ‖S Uᵀ‖² of every factor in parts to be summed, fp64; empty: suppress, which needs
            none.

    Returns:
        (R [F]; coefficients of the gradient [F, 3] fp64; ‖S‖² and ‖U‖² by group [2, ΣG]).
    """
    squares, numerator = squares.contiguous(), [parts.contiguous() for parts in numerator]
    results = _shares_like(squares, groups)
    shares, coefficients, sums = results
    table = _table(
        _Overlap,
        [
            {
                "squares": squares[0, 0, first:],
                "numerator": _or_null(numerator[f]),
                "parts": numerator[f].numel(),
                "groups": groups[f],
                "sums": sums[0, first:],
                "share": shares[f],
                "coefficients": coefficients[f],
            }
            for f, first in enumerate(_starts(groups))
        ],
    )
    _call("fino_overlap_shares", squares.device, table, len(groups), squares.shape[1], sum(groups))
    return results


@overlap_shares.register_fake
def _(squares: Tensor, groups: list[int], numerator: list[Tensor]) -> tuple[Tensor, Tensor, Tensor]:
    return _shares_like(squares, groups)


def _shares_like(squares: Tensor, groups: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    return (
        squares.new_empty(len(groups)),
        squares.new_empty(len(groups), 3, dtype=torch.float64),
        squares.new_empty(2, sum(groups)),
    )


@torch.library.custom_op("fino::overlap_gradient", mutates_args=())
def overlap_gradient(
    scale: Tensor,
    z: Tensor,
    means: Tensor,
    group: Tensor,
    mean: Tensor,
    coefficients: Tensor,
    basis: list[Tensor],
    groups: list[int],
    rest: list[Tensor],
    rest_side: list[Tensor],
    signal_side: list[Tensor],
) -> Tensor:
    """The gradient at z of Σ_f scale_f · R_f; in one launch.

    Args:
        scale: [F] fp32.
        z, basis, groups: as in `group_statistics`; means, group, mean, rest: its results.
        coefficients: of `overlap_shares`.
        rest_side: U·SᵀS [N, D] of every factor; signal_side: M·UᵀU [G, D]. Empty: suppress.

    Returns:
        [N, D], in the dtype of z.
    """
    z, scale, means, group, mean, coefficients = (
        tensor.contiguous() for tensor in (z, scale, means, group, mean, coefficients)
    )
    basis, rest, rest_side, signal_side = (
        [matrix.contiguous() for matrix in matrices]
        for matrices in (basis, rest, rest_side, signal_side)
    )
    out = torch.empty_like(z)
    table = _table(
        _OverlapGradient,
        [
            {
                "group": group[f],
                "basis": _or_null(basis[f]),
                "mean": mean[f],
                "means": means[first:],
                "rest": _or_null(rest[f]),
                "rest_side": _or_null(rest_side[f]),
                "signal_side": _or_null(signal_side[f]),
                "coefficients": coefficients[f],
                "scale": scale[f],
                "groups": groups[f],
            }
            for f, first in enumerate(_starts(groups))
        ],
    )
    _call("fino_overlap_gradient", z.device, table, len(groups), z, TYPES[z.dtype], *z.shape, out)
    return out


@overlap_gradient.register_fake
def _(
    scale: Tensor,
    z: Tensor,
    means: Tensor,
    group: Tensor,
    mean: Tensor,
    coefficients: Tensor,
    basis: list[Tensor],
    groups: list[int],
    rest: list[Tensor],
    rest_side: list[Tensor],
    signal_side: list[Tensor],
) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _or_null(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


_Bank = _structure(
    "FinoBank",
    dict.fromkeys(
        ("order", "labels", "centroids", "temperatures", "counts", "scratch"), ctypes.c_void_p
    )
    | {"classes": ctypes.c_int64, "momentum": ctypes.c_float, "unit_norm": ctypes.c_bool},
)


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
        order, labels: [F, N]; row f as in `group_statistics`; −1 takes no part.
        momentum: m of every bank.
        unit_norm: `concentration="fixed"`, of every bank.
    """
    teacher, order, labels = teacher.contiguous(), order.contiguous(), labels.contiguous()
    scratch = teacher.new_empty(len(centroids), *teacher.shape[1:])
    banks = _table(
        _Bank,
        [
            {
                "order": order[f],
                "labels": labels[f],
                "centroids": centroids[f],
                "temperatures": temperatures[f],
                "counts": counts[f],
                "scratch": scratch[f],
                "classes": centroids[f].shape[0],
                "momentum": momentum[f],
                "unit_norm": unit_norm[f],
            }
            for f in range(len(centroids))
        ],
    )
    _call("fino_bank_update", teacher.device, banks, len(centroids), teacher, *teacher.shape)


@bank_update.register_fake
def _(*arguments: Any) -> None:
    return None


def serves_rows(z: Tensor) -> bool:
    """Whether `group_statistics` takes these rows."""
    return AVAILABLE and z.is_cuda and z.dtype in TYPES


def serves(bank: Tensor, rows: Tensor) -> bool:
    """Whether `bank_update` can update this bank from these rows."""
    fp32 = bank.dtype == torch.float32 and rows.dtype != torch.float64
    return AVAILABLE and rows.is_cuda and fp32 and bank.is_contiguous()
