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
    """The library.

    Raises:
        RuntimeError: it does not load.
    """
    try:
        return ctypes.CDLL(str(_FILES[0]))
    except OSError as error:
        raise RuntimeError(
            f"the CUDA C++ kernels do not load: {error}. They are built for the CUDA of the torch "
            f"that was installed then; this torch has CUDA {torch.version.cuda}. Build fino-fast "
            "again in this environment (FINO_CPU_ONLY=1 builds it without them)"
        ) from error


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
_Overlap = _structure(
    "FinoOverlap",
    dict.fromkeys(("squares", "sizes"), ctypes.c_void_p)
    | {"groups": ctypes.c_int64}
    | dict.fromkeys(("sums", "factors", "scale", "share", "coefficients"), ctypes.c_void_p)
    | {"preserve": ctypes.c_bool},
)
_OverlapGradient = _structure(
    "FinoOverlapGradient",
    dict.fromkeys(
        ("group", "basis", "mean", "means", "sizes", "at_rest", "at_means", "coefficients",
         "scale"),
        ctypes.c_void_p,
    )
    | {"groups": ctypes.c_int64},
)  # fmt: skip
STRIPE = 32  # kFinoStripe
TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}  # FinoType


@torch.library.custom_op("fino::group_statistics", mutates_args=())
def group_statistics(
    z: Tensor,
    order: Tensor,
    labels: Tensor,
    basis: list[Tensor],
    groups: list[int],
    want_rest: list[bool],
    first: int,
    local: int,
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
        first, local: of which rows U is wanted.

    Returns:
        (M of all factors one below the other [ΣG, D]; rows of every group [ΣG] (1 for a column of
        Q); number of the group of every row [F, N] int64, −1 where it is missing; mean over the
        rows that take part [F, D] fp64; ‖S‖² and ‖U‖² by stripes of 32 columns and groups
        [2, ⌈D/32⌉, ΣG], for continuous values ‖U‖² all in their first; U [local, D] in the
        dtype of z, or empty, of every factor). fp32 where nothing else is said.
    """
    z, order, labels = z.contiguous(), order.contiguous(), labels.contiguous()
    basis = [q.contiguous() for q in basis]
    results = _statistics_like(z, order, groups, want_rest, local)
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
                    "means": means[start:],
                    "sizes": sizes[start:],
                    "group": group[f],
                    "mean": mean[f],
                    "squares": squares[0, 0, start:],
                    "rest": _or_null(rest[f]),
                    "groups": groups[f],
                }
                for f, start in enumerate(_starts(groups))
            ],
        ),
        len(groups), z, TYPES[z.dtype], *z.shape, sum(groups), first, local,
    )  # fmt: skip
    return results


@group_statistics.register_fake
def _(
    z: Tensor, order: Tensor, *others: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    _, _, groups, want_rest, _, local = others
    return _statistics_like(z, order, groups, want_rest, local)


def _statistics_like(
    z: Tensor, order: Tensor, groups: list[int], want_rest: list[bool], local: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor]]:
    (_, width), total = z.shape, sum(groups)
    sums = torch.float32
    return (
        z.new_empty(total, width, dtype=sums),
        z.new_empty(total, dtype=sums),
        torch.empty_like(order, memory_format=torch.contiguous_format),
        z.new_empty(len(groups), width, dtype=torch.float64),
        z.new_empty(2, -(-width // STRIPE), total, dtype=sums),
        [z.new_empty((local, width) if wanted else (0,)) for wanted in want_rest],
    )


@torch.library.custom_op("fino::overlap_shares", mutates_args=())
def overlap_shares(
    squares: Tensor, sizes: Tensor, groups: list[int], preserve: list[bool], count: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """R of the factors to suppress, and what the sweep needs of the others; in one launch.

    Args:
        squares, sizes, groups: of `group_statistics`.
        preserve: which factors are to be swept.
        count: N.

    Returns:
        (R [F], 1 where it is to be swept; the factor of U [F] and those of the rows of M [ΣG] in
        the sweep; coefficients of the gradient [F, 2] fp64; ‖S‖² and ‖U‖² by group [2, ΣG]). What
        has no use in a factor is 0.
    """
    squares, sizes = squares.contiguous(), sizes.contiguous()
    results = _shares_like(squares, groups)
    shares, scales, factors, coefficients, sums = results
    table = _table(
        _Overlap,
        [
            {
                "squares": squares[0, 0, first:],
                "sizes": sizes[first:],
                "groups": groups[f],
                "sums": sums[0, first:],
                "factors": factors[first:],
                "scale": scales[f],
                "share": shares[f],
                "coefficients": coefficients[f],
                "preserve": preserve[f],
            }
            for f, first in enumerate(_starts(groups))
        ],
    )
    _call(
        "fino_overlap_shares",
        squares.device,
        table,
        len(groups),
        squares.shape[1],
        sum(groups),
        count,
    )
    return results


@overlap_shares.register_fake
def _(
    squares: Tensor, sizes: Tensor, groups: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return _shares_like(squares, groups)


def _shares_like(
    squares: Tensor, groups: list[int]
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    return (
        squares.new_empty(len(groups)),
        squares.new_empty(len(groups)),
        squares.new_empty(sum(groups)),
        squares.new_empty(len(groups), 2, dtype=torch.float64),
        squares.new_empty(2, sum(groups)),
    )


@torch.library.custom_op("fino::overlap_gradient", mutates_args=())
def overlap_gradient(
    scale: Tensor,
    z: Tensor,
    means: Tensor,
    sizes: Tensor,
    group: Tensor,
    mean: Tensor,
    coefficients: Tensor,
    basis: list[Tensor],
    groups: list[int],
    at_rest: list[Tensor],
    at_means: Tensor,
) -> Tensor:
    """The gradient at z of the orthogonal terms; in one launch.

    Args:
        scale: [F] fp32, the gradients at the shares.
        z, basis, groups: as in `group_statistics`; means, sizes, group, mean: its results.
        coefficients: of `overlap_shares`.
        at_rest: [N, D] in the dtype of z of every factor, the gradient at U; empty: suppress.
        at_means: [ΣG, D] fp32, those at M; not read of factors to suppress.

    Returns:
        [N, D], in the dtype of z.
    """
    z, scale, means, sizes, group, mean, coefficients, at_means = (
        tensor.contiguous()
        for tensor in (z, scale, means, sizes, group, mean, coefficients, at_means)
    )
    basis, at_rest = ([matrix.contiguous() for matrix in of] for of in (basis, at_rest))
    out = torch.empty_like(z)
    table = _table(
        _OverlapGradient,
        [
            {
                "group": group[f],
                "basis": _or_null(basis[f]),
                "mean": mean[f],
                "means": means[first:],
                "sizes": sizes[first:],
                "at_rest": _or_null(at_rest[f]),
                "at_means": at_means[first:] if at_rest[f].numel() else None,
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
def _(scale: Tensor, z: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _or_null(tensor: Tensor) -> Tensor | None:
    return tensor if tensor.numel() else None


def _starts(sizes: list[int]) -> list[int]:
    return [sum(sizes[:i]) for i in range(len(sizes))]


_Term = _structure(
    "FinoTerm",
    dict.fromkeys(
        ("sums", "best", "labels", "inv_count", "lse", "loss", "metric", "weighted"),
        ctypes.c_void_p,
    )
    | dict.fromkeys(("splits", "classes"), ctypes.c_int64)
    | dict.fromkeys(("smoothing", "weight"), ctypes.c_double)
    | {"is_error": ctypes.c_bool},
)


@torch.library.custom_op("fino::term_losses", mutates_args=("lse",))
def term_losses(
    sums: Tensor,
    best: Tensor,
    labels: list[Tensor],
    inv_count: list[Tensor],
    splits: list[int],
    classes: list[int],
    smoothing: list[float],
    weight: list[float],
    is_error: list[bool],
    lse: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Losses and metrics of heads and contrastive term, from their rows' sums; in one launch.

    Args:
        sums: [4, P] fp32, P = N · Σ splits: of every term one after the other, and of every part of
            its bank, the rows' log-sum-exps; largest logits; logits of the targets, or squared
            errors; sums of all logits.
        best: [P] int32, classes of the largest logits.
        labels: [N] int64 each, −1 is missing; empty where there are none.
        inv_count: 0-d fp32 each.
        splits, classes, smoothing, weight: of every term.
        is_error: which terms are squared errors; the others are cross entropies.
        lse: [E, N] fp32; filled with the log-sum-exps over all parts.

    Returns:
        (losses, metrics, losses times weights), [E] fp32.
    """
    sums, best = sums.contiguous(), best.contiguous()
    labels = [label.contiguous() for label in labels]
    n = lse.shape[1]
    results = losses, metrics, weighted = _losses_like(sums, splits)
    table = _table(
        _Term,
        [
            {
                "sums": sums[0, n * first :],
                "best": best[n * first :],
                "labels": _or_null(labels[e]),
                "inv_count": inv_count[e],
                "lse": lse[e],
                "loss": losses[e],
                "metric": metrics[e],
                "weighted": weighted[e],
                "splits": splits[e],
                "classes": classes[e],
                "smoothing": smoothing[e],
                "weight": weight[e],
                "is_error": is_error[e],
            }
            for e, first in enumerate(_starts(splits))
        ],
    )
    _call("fino_term_losses", sums.device, table, len(splits), sums.shape[1], n)
    return results


@term_losses.register_fake
def _(
    sums: Tensor, best: Tensor, labels: Any, inv_count: Any, splits: list[int], *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    return _losses_like(sums, splits)


def _losses_like(sums: Tensor, splits: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    losses, metrics, weighted = (sums.new_empty(len(splits)) for _ in range(3))
    return losses, metrics, weighted


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


def serves_sums(sums: Tensor) -> bool:
    """Whether `term_losses` takes the sums of a sweep."""
    return AVAILABLE and sums.is_cuda and sums.dtype == torch.float32


def serves(bank: Tensor, rows: Tensor) -> bool:
    """Whether `bank_update` can update this bank from these rows."""
    fp32 = bank.dtype == torch.float32 and rows.dtype != torch.float64
    return AVAILABLE and rows.is_cuda and fp32 and bank.is_contiguous()
