"""The only door to native code: a typed wrapper, a fake and the autograd formula of every operator.

The operators are registered under `torch.ops.fino` by importing the extension `fino_fast._C`
(csrc/ops). Sums are in fp32, or in fp64 for fp64 input.
"""

from importlib import import_module
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from .distributed import gather_views
from .reference import accumulation_dtype

KINDS = ("linear", "prototype", "identity", "sigmoid", "tanh")  # HeadKind of csrc/cpu/heads.h

try:
    import_module("fino_fast._C")
    LOAD_ERROR: str | None = None
except ImportError as error:
    LOAD_ERROR = (
        f"the native code is not built or does not load ({error}); install fino-fast where a "
        f"C++ compiler is present, with FINO_BUILD=1 to see what fails"
    )


def contrastive(
    rows: Tensor,
    logit_scale: Tensor,
    views: int,
    two_tower: bool,
    want_gradient: bool,
    deterministic: bool = False,
) -> Tensor:
    """The contrastive loss of one process's batch (`reference.contrastive_rows`).

    The gradients are computed together with the loss.

    Args:
        rows: [V·B, P], view-major.
        logit_scale: 0-d, 1/τ.
        views: V; two_tower: CLIP's form.
        want_gradient: whether the backward pass will want them.
        deterministic: of `terms.Step`, here and below.

    Returns:
        0-d mean of loss_i.
    """
    loss, _, _ = torch.ops.fino.contrastive_forward(
        rows, logit_scale, views, two_tower, want_gradient, deterministic
    )
    return cast(Tensor, loss)


def ranks_contrastive(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    views: int,
    first: int,
    two_tower: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """The local rows' share of the contrastive loss of all ranks.

    In its backward pass the loss sends `rows` the gradient of the *whole* batch's loss, for which
    the other ranks' log-sum-exps are gathered; `columns` gets none.

    Args:
        rows: [V·B, P]; columns: [V·C, P], view-major rows of all ranks.
        first: index of the first local image.

        The others are those of `contrastive`.

    Returns:
        (0-d Σ_i loss_i / (V·C), [V·B] log-sum-exp of every row).
    """
    result: tuple[Tensor, Tensor] = torch.ops.fino.ranks_contrastive_forward(
        rows, columns, logit_scale, views, first, two_tower, deterministic
    )
    return result


def heads(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    guidance: list[Tensor],
    weight: list[float],
    kind: list[int],
    smoothing: list[float],
    group: list[int],
    want_x: bool,
    want_bank: bool,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor]]:
    """Metadata heads in groups; the lists have one entry a head, with the meaning of
    `terms.HeadCall`, but for `x`, which has one a group.

    All gradients are computed in the same visit as the loss; the heads of a group share one at
    their rows.

    Args:
        kind: indices into `KINDS`.
        group: of every head, index into `x`.
        want_x, want_bank: whether the backward pass will want them.

    Returns:
        (Σ weight · loss of every group [G], losses [F], metrics [F], ∂sum/∂x of every group, or
        empty tensors). Only the sums are differentiable.
    """
    sums, losses, metrics, grad_x, _, _ = torch.ops.fino.heads_forward(
        x, bank, offset, target, inv_count, counts, guidance, weight, kind, smoothing, group,
        want_x, want_bank, deterministic,
    )  # fmt: skip
    return sums, losses.detach(), metrics.detach(), [gradient.detach() for gradient in grad_x]


def wide_head(
    x: Tensor,
    bank: Tensor,
    offset: Tensor,
    target: Tensor,
    inv_count: Tensor,
    smoothing: float,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """A linear head whose gradients are computed in the backward pass, to hold none meanwhile.

    The arguments are those of `terms.HeadCall`.

    Returns:
        (0-d loss, 0-d metric).
    """
    loss, metric, _ = torch.ops.fino.wide_head_forward(
        x, bank, offset, target, inv_count, smoothing, deterministic
    )
    return loss, metric.detach()


def orthogonal(
    z: Tensor,
    designs: list[Tensor],
    preserve: list[bool],
    weight: list[float],
    guidance: Tensor,
    deterministic: bool = False,
) -> tuple[Tensor, Tensor]:
    """The orthogonal suppression terms R_f (`reference.orthogonal`), with one gradient for all.

    Args:
        z: [N, D].
        designs: of every factor, [N] int64 categories (negative: the row takes no part), or [N, d]
            orthonormal columns (NaN: the row takes no part).
        preserve: the roles.
        weight: of every factor in the sum.
        guidance: 0-d, by which the gradient that reaches z is multiplied.

    Returns:
        (0-d Σ weight · R_f, R_f [F]). Only the sum is differentiable.
    """
    total, values, _ = torch.ops.fino.orthogonal_forward(
        z, designs, preserve, weight, guidance, deterministic
    )
    return total, values.detach()


def cut_views(
    images: list[Tensor],
    boxes: Tensor,
    mirror_x: Tensor,
    mirror_y: Tensor,
    shift: Tensor,
    divisor: Tensor,
    out: Tensor,
) -> None:
    """Views of images: a box of each, resized by an antialiased bilinear filter
    (`torch.nn.functional.interpolate`) that sees nothing beyond the box, mirrored, normalised.

    Images are shared among torch's threads; a call for one image runs in the caller's.

    Args:
        images: B of [H, W, C] or [H, W, 1], uint8, uint16 or float32.
        boxes: int64 [V, B, 4]; left, top and, excluded, right and bottom in pixels.
        mirror_x, mirror_y: bool [V, B].
        shift, divisor: float32 [V, B, C]; a view is (resized − shift) / divisor.
        out: float32 [V, B, C, S, S], written; every view of it contiguous.

    Raises:
        RuntimeError: shapes or types differ from these, or a box is empty or leaves its image.
    """
    torch.ops.fino.cut_views(images, boxes, mirror_x, mirror_y, shift, divisor, out)


def _contrastive_forward_fake(
    rows: Tensor,
    scale: Tensor,
    views: int,
    two_tower: bool,
    want_gradient: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(rows.dtype)
    return (
        rows.new_empty((), dtype=dtype),
        rows.new_empty(rows.shape if want_gradient else (0,), dtype=dtype),
        rows.new_empty(() if want_gradient else (0,), dtype=dtype),
    )


def _ranks_contrastive_forward_fake(
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    views: int,
    first: int,
    two_tower: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    dtype = accumulation_dtype(rows.dtype)
    return rows.new_empty((), dtype=dtype), rows.new_empty(rows.shape[0], dtype=dtype)


def _ranks_contrastive_backward_fake(
    grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    scale: Tensor,
    lse_rows: Tensor,
    lse_columns: Tensor,
    views: int,
    first: int,
    two_tower: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), scale.new_empty(())


def _heads_forward_fake(
    x: list[Tensor],
    bank: list[Tensor],
    offset: list[Tensor],
    target: list[Tensor],
    inv_count: list[Tensor],
    counts: list[Tensor],
    guidance: list[Tensor],
    weight: list[float],
    kind: list[int],
    smoothing: list[float],
    group: list[int],
    want_x: bool,
    want_bank: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    dtype = accumulation_dtype(x[0].dtype)

    def like(tensor: Tensor, wanted: bool) -> Tensor:
        return tensor.new_empty(tensor.shape if wanted else (0,), dtype=dtype)

    trained = [want_bank and KINDS[k] != "prototype" for k in kind]
    return (
        x[0].new_empty(len(x), dtype=dtype),
        x[0].new_empty(len(bank), dtype=dtype),
        x[0].new_empty(len(bank), dtype=dtype),
        [like(tensor, want_x) for tensor in x],
        [like(tensor, want) for tensor, want in zip(bank, trained, strict=True)],
        [like(tensor, want) for tensor, want in zip(offset, trained, strict=True)],
    )


def _wide_head_forward_fake(
    x: Tensor,
    bank: Tensor,
    offset: Tensor,
    target: Tensor,
    inv_count: Tensor,
    smoothing: float,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(x.dtype)
    loss, metric = x.new_empty((), dtype=dtype), x.new_empty((), dtype=dtype)
    return loss, metric, x.new_empty(x.shape[0], dtype=dtype)


def _wide_head_backward_fake(
    grad: Tensor,
    x: Tensor,
    bank: Tensor,
    offset: Tensor,
    target: Tensor,
    inv_count: Tensor,
    lse: Tensor,
    smoothing: float,
    want_x: bool,
    want_bank: bool,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x.new_empty(x.shape if want_x else (0,)),
        bank.new_empty(bank.shape if want_bank else (0,)),
        offset.new_empty(offset.shape if want_bank else (0,)),
    )


def _orthogonal_forward_fake(
    z: Tensor,
    designs: list[Tensor],
    preserve: list[bool],
    weight: list[float],
    guidance: Tensor,
    deterministic: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(z.dtype)
    return (
        z.new_empty((), dtype=dtype),
        z.new_empty(len(designs), dtype=dtype),
        z.new_empty(z.shape, dtype=dtype),
    )


def _cut_views_fake(
    images: list[Tensor],
    boxes: Tensor,
    mirror_x: Tensor,
    mirror_y: Tensor,
    shift: Tensor,
    divisor: Tensor,
    out: Tensor,
) -> None:
    """Writes into `out` and returns nothing."""


# Every backward pass reads the gradient of the first output alone. Unless told not to, autograd
# would make zeros for the others, as large as the rows and banks; so None is what may come.


def _scaled(saved: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    """saved · factor; in its own memory where no later backward pass can ask for it again.

    Not while a tracer watches: a compiled backward pass may not change what the forward one
    returned.
    """
    if is_in_torch_dispatch_mode() or torch._C._autograd._get_current_graph_task_keep_graph():
        return (saved * factor).to(dtype)
    # Mostly the loss is what `backward` was called on; a pass over the gradient is saved then.
    return (saved if factor.item() == 1 else saved.mul_(factor)).to(dtype)


def _contrastive_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtypes = [tensor.dtype for tensor in inputs[:2]]
    ctx.save_for_backward(*output[1:])


def _contrastive_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 6
    saved = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
    return *(_scaled(tensor, grad, dtype) for tensor, dtype in saved), *[None] * 4


def _ranks_contrastive_context(
    ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]
) -> None:
    ctx.set_materialize_grads(False)
    rows, columns, logit_scale, *ctx.rest = inputs
    ctx.save_for_backward(rows, columns, logit_scale, output[1])


def _ranks_contrastive_backward(ctx: Any, grad: Tensor | None, _: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    rows, columns, logit_scale, lse = ctx.saved_tensors
    lse_columns = gather_views(lse, ctx.rest[0])
    grad_rows, grad_scale = torch.ops.fino.ranks_contrastive_backward(
        grad, rows, columns, logit_scale, lse, lse_columns, *ctx.rest
    )
    return grad_rows, None, grad_scale, *[None] * 4


def _heads_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    x, bank, offset = inputs[:3]
    ctx.group = inputs[10]
    ctx.dtypes = [tensor.dtype for tensor in (*x, *bank, *offset)]
    ctx.save_for_backward(*(tensor for tensors in output[3:] for tensor in tensors))


def _heads_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    heads = len(ctx.group)
    groups = len(ctx.dtypes) - 2 * heads
    none = [None] * heads
    if grad is None:
        return [None] * groups, *[none] * 6, *[None] * 7
    upstream = [*range(groups), *ctx.group, *ctx.group]
    gradients = [
        # Empty: a gradient that nobody wanted.
        _scaled(tensor, grad[g], dtype) if tensor.numel() else None
        for tensor, g, dtype in zip(ctx.saved_tensors, upstream, ctx.dtypes, strict=True)
    ]
    return (
        gradients[:groups],
        gradients[groups : groups + heads],
        gradients[groups + heads :],
        *[none] * 4,
        *[None] * 7,
    )


def _wide_head_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    ctx.set_materialize_grads(False)
    *tensors, ctx.smoothing, ctx.deterministic = inputs
    ctx.save_for_backward(*tensors, output[2])


def _wide_head_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * 7
    want_x, want_bank, want_offset, *_ = ctx.needs_input_grad
    grad_x, grad_bank, grad_offset = torch.ops.fino.wide_head_backward(
        grad, *ctx.saved_tensors, ctx.smoothing, want_x, want_bank or want_offset,
        ctx.deterministic,
    )  # fmt: skip
    return (
        grad_x if want_x else None,
        grad_bank if want_bank else None,
        grad_offset if want_offset else None,
        *[None] * 4,
    )


def _orthogonal_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.set_materialize_grads(False)
    ctx.dtype, ctx.factors = inputs[0].dtype, len(inputs[1])
    ctx.save_for_backward(output[2])


def _orthogonal_backward(ctx: Any, grad: Tensor | None, *_: Any) -> tuple[Any, ...]:
    (grad_z,) = ctx.saved_tensors
    grad_z = None if grad is None else _scaled(grad_z, grad, ctx.dtype)
    return grad_z, [None] * ctx.factors, *[None] * 4


# The schemas have no defaults: arguments equal to one do not reach autograd, which until PyTorch
# 2.11 then counts a gradient too many.
if LOAD_ERROR is None:
    for _name, _fake in (
        ("contrastive_forward", _contrastive_forward_fake),
        ("ranks_contrastive_forward", _ranks_contrastive_forward_fake),
        ("ranks_contrastive_backward", _ranks_contrastive_backward_fake),
        ("heads_forward", _heads_forward_fake),
        ("wide_head_forward", _wide_head_forward_fake),
        ("wide_head_backward", _wide_head_backward_fake),
        ("orthogonal_forward", _orthogonal_forward_fake),
        ("cut_views", _cut_views_fake),
    ):
        torch.library.register_fake(f"fino::{_name}", _fake)
    torch.library.register_autograd(
        "fino::contrastive_forward", _contrastive_backward, setup_context=_contrastive_context
    )
    torch.library.register_autograd(
        "fino::ranks_contrastive_forward",
        _ranks_contrastive_backward,
        setup_context=_ranks_contrastive_context,
    )
    torch.library.register_autograd(
        "fino::heads_forward", _heads_backward, setup_context=_heads_context
    )
    torch.library.register_autograd(
        "fino::wide_head_forward", _wide_head_backward, setup_context=_wide_head_context
    )
    torch.library.register_autograd(
        "fino::orthogonal_forward", _orthogonal_backward, setup_context=_orthogonal_context
    )
