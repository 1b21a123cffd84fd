"""The only door to native code: a typed wrapper, a fake and the autograd formula of every operator.

The operators are registered under `torch.ops.fino` by importing the extension `fino_fast._C`
(csrc/ops.cpp). Sums are in fp32, or in fp64 for fp64 input.
"""

from importlib import import_module
from typing import Any

import torch
from torch import Tensor

from .distributed import gather_views
from .reference import accumulation_dtype

KINDS = ("linear", "prototype", "identity", "sigmoid", "tanh")  # HeadKind of csrc/cpu/sweep.h

try:
    import_module("fino_fast._C")
    LOAD_ERROR: str | None = None
except ImportError as error:
    LOAD_ERROR = (
        f"the native code is not built or does not load ({error}); install fino-fast where a "
        f"C++ compiler is present, with FINO_BUILD=1 to see what fails"
    )


def contrastive(
    rows: Tensor, columns: Tensor, logit_scale: Tensor, views: int, first: int, two_tower: bool
) -> tuple[Tensor, Tensor]:
    """The local rows' share of the contrastive loss (`reference.contrastive_rows`).

    In its backward pass the loss sends `rows` the gradient of the *whole* batch's loss, for which
    the other ranks' log-sum-exps are gathered; `columns` gets none.

    Args:
        rows: [V·B, P]; columns: [V·C, P], view-major rows of all ranks.
        logit_scale: 0-d, 1/τ.
        views: V; first: index of the first local image; two_tower: CLIP's form.

    Returns:
        (0-d Σ_i loss_i / (V·C), [V·B] log-sum-exp of every row).
    """
    result: tuple[Tensor, Tensor] = torch.ops.fino.contrastive_forward(
        rows, columns, logit_scale, views, first, two_tower
    )
    return result


def heads(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    want_x: bool,
    want_bank: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Metadata heads; the lists have one entry a head, with the meaning of `terms.HeadCall`.

    Gradients that are wanted are computed in the same visit as the loss. Those that are not are
    recomputed in the backward pass where it needs them: slower, but nothing of the bank's size is
    held meanwhile.

    Args:
        kind: indices into `KINDS`.
        want_x, want_bank: compute ∂loss/∂x, and ∂loss/∂bank and ∂loss/∂offset, now.

    Returns:
        (losses [F], metrics [F], ∂loss/∂x of every head or empty tensors).
    """
    losses, metrics, grad_x, _, _ = torch.ops.fino.heads_forward(
        x, bank, offset, target, inv_count, counts, kind, smoothing, want_x, want_bank
    )
    return losses, metrics, grad_x


def orthogonal(z: Tensor, design: Tensor, preserve: bool) -> Tensor:
    """The orthogonal suppression term R_f (`reference.orthogonal`), its gradient in the same visit.

    Args:
        z: [N, D].
        design: [N] int64 categories (negative: the row takes no part), or [N, d] orthonormal
            columns (NaN: the row takes no part).
        preserve: the role.

    Returns:
        0-d.
    """
    value: Tensor = torch.ops.fino.orthogonal_forward(z, design, preserve)[0]
    return value


def _contrastive_forward_fake(
    rows: Tensor, columns: Tensor, scale: Tensor, views: int, first: int, two_tower: bool
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(rows.dtype)
    return rows.new_empty((), dtype=dtype), rows.new_empty(rows.shape[0], dtype=dtype)


def _contrastive_backward_fake(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    lse_rows: Tensor,
    lse_columns: Tensor,
    views: int,
    first: int,
    two_tower: bool,
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), scale.new_empty(())


def _heads_forward_fake(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    kind: list[int],
    smoothing: list[float],
    want_x: bool,
    want_bank: bool,
) -> tuple[Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dtype = accumulation_dtype(x[0].dtype)

    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if wanted else (0,), dtype=dtype)

    trained = [want_bank and KINDS[k] != "prototype" for k in kind]
    return (
        x[0].new_empty(len(x), dtype=dtype),
        x[0].new_empty(len(x), dtype=dtype),
        [like(tensor, want_x) for tensor in x],
        [like(tensor, want) for tensor, want in zip(bank, trained, strict=True)],
        [like(tensor, want) for tensor, want in zip(offset, trained, strict=True)],
    )


def _orthogonal_forward_fake(z: Tensor, design: Tensor, preserve: bool) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(z.dtype)
    return z.new_empty((), dtype=dtype), z.new_empty(z.shape, dtype=dtype)


def _contrastive_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    rows, columns, logit_scale, *ctx.rest = inputs
    ctx.save_for_backward(rows, columns, logit_scale, output[1])


def _contrastive_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    rows, columns, logit_scale, lse = ctx.saved_tensors
    lse_columns = gather_views(lse, ctx.rest[0])
    grad_rows, grad_scale = torch.ops.fino.contrastive_backward(
        grad, rows, columns, logit_scale, lse, lse_columns, *ctx.rest
    )
    return grad_rows, None, grad_scale, None, None, None


def _heads_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    x, bank, offset, target, inv_count, counts, ctx.kind, ctx.smoothing, want_x, want_bank = inputs
    ctx.size, ctx.deferred = len(x), not (want_x or want_bank)
    ctx.dtypes = [tensor.dtype for tensor in (*x, *bank, *offset)]
    lists = (x, bank, offset, target, inv_count, counts) if ctx.deferred else output[2:]
    ctx.save_for_backward(*(tensor for tensors in lists for tensor in tensors))


def _heads_backward(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    size = ctx.size
    saved = list(ctx.saved_tensors)
    if ctx.deferred:
        lists = [saved[i : i + size] for i in range(0, 6 * size, size)]
        saved = [
            tensor
            for tensors in torch.ops.fino.heads_forward(
                *lists, ctx.kind, ctx.smoothing, True, True
            )[2:]
            for tensor in tensors
        ]
    scaled: list[Tensor | None] = []
    for index, (tensor, dtype) in enumerate(zip(saved, ctx.dtypes, strict=True)):
        factor = grad[index % size]
        if not tensor.numel():  # a gradient that nobody wanted
            scaled.append(None)
        elif ctx.deferred:  # just made, and perhaps as large as memory allows
            scaled.append(tensor.mul_(factor).to(dtype))
        else:
            scaled.append((tensor * factor).to(dtype))
    parts = [scaled[i : i + size] for i in range(0, 3 * size, size)]
    return (*parts, [None] * size, [None] * size, [None] * size, None, None, None, None)


def _orthogonal_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.dtype = inputs[0].dtype
    ctx.save_for_backward(output[1])


def _orthogonal_backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    (grad_z,) = ctx.saved_tensors
    return (grad_z * grad).to(ctx.dtype), None, None


if LOAD_ERROR is None:
    for _name, _fake in (
        ("contrastive_forward", _contrastive_forward_fake),
        ("contrastive_backward", _contrastive_backward_fake),
        ("heads_forward", _heads_forward_fake),
        ("orthogonal_forward", _orthogonal_forward_fake),
    ):
        torch.library.register_fake(f"fino::{_name}", _fake)
    torch.library.register_autograd(
        "fino::contrastive_forward", _contrastive_backward, setup_context=_contrastive_context
    )
    torch.library.register_autograd(
        "fino::heads_forward", _heads_backward, setup_context=_heads_context
    )
    torch.library.register_autograd(
        "fino::orthogonal_forward", _orthogonal_backward, setup_context=_orthogonal_context
    )
