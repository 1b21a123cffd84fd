"""The FINO objective in plain PyTorch: the oracle of the tests and the `eager` backend.

Every function takes flat, view-major rows: row r = v·B + b is view v of image b, and N = V·B. Dense
matrices are stored on purpose; the fused backends compute the same without them.

Sums are in fp32 (fp64 for fp64 input) whatever the input's dtype.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .factors import Continuous, Factor, InfoNCE, Role
from .frozen import frozen
from .groups import group_slots, group_sums

NORM_EPS = 1e-12  # x̂ = x / max(‖x‖, NORM_EPS)
DENOMINATOR_EPS = 1e-12  # below it the orthogonal term is 0


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """fp64 for fp64 input, else fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def normalize(rows: Tensor) -> Tensor:
    """x̂ = x / max(‖x‖, 1e-12) by row."""
    return F.normalize(rows, dim=-1, eps=NORM_EPS)


def contrastive_rows(
    rows: Tensor,
    columns: Tensor,
    logit_scale: Tensor,
    views: int,
    first: int = 0,
    two_tower: bool = False,
) -> Tensor:
    """Contrastive loss of every row: logsumexp of its logits minus the mean of its positives.

    s_ij = logit_scale · ⟨p̂_i, p̂_j⟩ over the columns j ≠ i (two towers: the columns of the other
    view); the positives are the other views of the same image.

    Args:
        rows: [V·B, P], the rows whose loss is wanted.
        columns: [V·C, P], the whole batch, view-major; images first … first+B−1 are the rows'.
        logit_scale: 0-d, 1/τ.
        views: V.
        first: index in the whole batch of the rows' first image.
        two_tower: CLIP's form; V = 2.

    Returns:
        [V·B].
    """
    dtype = accumulation_dtype(rows.dtype)
    logits = logit_scale.to(dtype) * (normalize(rows.to(dtype)) @ normalize(columns.to(dtype)).T)
    per_view, images = rows.shape[0] // views, columns.shape[0] // views
    view = torch.arange(rows.shape[0], device=rows.device) // per_view
    image = torch.arange(rows.shape[0], device=rows.device) % per_view + first
    column = torch.arange(columns.shape[0], device=rows.device)
    same_view = view[:, None] == column[None] // images
    same_image = image[:, None] == column[None] % images
    left_out = same_view if two_tower else same_view & same_image
    positive = same_image & ~same_view
    lse = torch.logsumexp(logits.masked_fill(left_out, -torch.inf), dim=1)
    return lse - (logits * positive).sum(1) / (views - 1)


def linear_cross_entropy(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, label_smoothing: float = 0.0
) -> tuple[Tensor, Tensor]:
    """Sum over the valid rows of the cross entropy of W x + b, and the number of hits.

    Args:
        x: [N, D].
        weight, bias: [K, D], [K].
        target: [N] int64; −1 is missing and takes no part.
        label_smoothing: ε.

    Returns:
        (0-d loss sum, 0-d number of rows whose largest logit is the target's).
    """
    dtype = accumulation_dtype(x.dtype)
    x = torch.where((target >= 0)[:, None], x, 0.0)  # a row that takes no part may hold anything
    logits = x.to(dtype) @ weight.to(dtype).T + bias.to(dtype)
    loss = F.cross_entropy(
        logits, target, ignore_index=-1, reduction="sum", label_smoothing=label_smoothing
    )
    return loss, (logits.argmax(1) == target).sum().to(dtype)


def prototype_cross_entropy(
    x: Tensor, centroids: Tensor, temperatures: Tensor, counts: Tensor, target: Tensor
) -> tuple[Tensor, Tensor]:
    """Sum over the valid rows of the cross entropy of ⟨x̂, ĉ_k⟩/φ_k, and the number of hits.

    Classes with count 0 are not in the softmax. The bank gets no gradient.

    Args:
        x: [N, D].
        centroids: [K, D]; temperatures: [K], φ; counts: [K] int64.
        target: [N] int64; −1 takes no part (`trainable_target` makes it so for unseen classes).

    Returns:
        (0-d loss sum, 0-d number of hits).
    """
    dtype = accumulation_dtype(x.dtype)
    # The buffers move before the backward pass; what it needs of them is kept as it is now.
    bank = normalize(centroids.detach().to(dtype)) / temperatures.detach().to(dtype)[:, None]
    bank, unseen, target = frozen(bank), frozen(counts == 0), frozen(target)
    x = torch.where((target >= 0)[:, None], x, 0.0)
    # The lowest finite number, not −inf: a bank without any class must not give NaN.
    logits = (normalize(x.to(dtype)) @ bank.T).masked_fill(unseen, torch.finfo(dtype).min)
    loss = F.cross_entropy(logits, target, ignore_index=-1, reduction="sum")
    return loss, (logits.argmax(1) == target).sum().to(dtype)


def trainable_target(target: Tensor, counts: Tensor) -> Tensor:
    """Targets with −1 also where the class's own count in the bank is 0. [N] int64."""
    return torch.where(counts[target.clamp_min(0)] > 0, target, -1)


def squared_error(
    x: Tensor, weight: Tensor, bias: Tensor, target: Tensor, activation: str
) -> tuple[Tensor, Tensor]:
    """Sum over the observed entries of (act(W x + b) − target)², twice.

    Args:
        x: [N, D].
        weight, bias: [d, D], [d].
        target: [N, d], scaled; NaN is missing.
        activation: `identity`, `sigmoid` or `tanh`.

    Returns:
        (0-d sum, the same without gradient).
    """
    dtype = accumulation_dtype(x.dtype)
    x = torch.where(target.isnan().all(1)[:, None], 0.0, x)
    prediction = x.to(dtype) @ weight.to(dtype).T + bias.to(dtype)
    if activation != "identity":
        prediction = torch.sigmoid(prediction) if activation == "sigmoid" else prediction.tanh()
    target = target.to(dtype)
    # Missing targets become the prediction itself, so that no NaN enters the backward pass.
    target = torch.where(target.isnan(), prediction.detach(), target)
    loss = (prediction - target).square().sum()
    return loss, loss.detach()


def constants(numbers: Sequence[float], like: Tensor) -> Tensor:
    """[n] fp64 on the device of `like`.

    Filled there: copying them from the host would make it wait, and no CUDA graph could hold it.
    """
    return torch.stack([like.new_full((), number, dtype=torch.float64) for number in numbers])


def scaled_target(factor: Continuous, values: Tensor, dtype: torch.dtype) -> Tensor:
    """Targets of a continuous factor in the units of its head: (y − offset)·scale.

    Args:
        values: [B] or [B, d]; [V, B] or [V, B, d] where each view has its own.

    Returns:
        [B, d], or [V·B, d], view-major.
    """
    values = values.reshape(-1, factor.dim)
    offset, scale = factor.affine
    # fp64 until the subtraction is done: a time stamp in seconds does not fit fp32.
    wide = (values.double() - constants(offset, values)) * constants(scale, values)
    return wide.to(dtype)


def rows_of(values: Tensor, z: Tensor) -> Tensor:
    """Metadata of every row of z, view-major: those of the images repeated for each view.

    Args:
        values: [B, …] one entry an image, or [V·B, …] one a row already.
        z: [V·B, D].
    """
    return values.repeat(z.shape[0] // values.shape[0], *[1] * (values.dim() - 1))


def orthonormal_design(values: Tensor, valid: Tensor) -> Tensor:
    """An orthonormal basis of the column space of the centred design matrix.

    Modified Gram–Schmidt, each column twice; a column that the earlier ones explain (a constant,
    a multiple) becomes zero. It needs no LAPACK, hence no host synchronisation on a GPU.

    Args:
        values: [N, d], no NaN in valid rows.
        valid: [N] bool.

    Returns:
        [N, d] fp64, zero in invalid rows.
    """
    mask = valid[:, None].double()
    x = torch.where(valid[:, None], values.double(), 0.0)
    size = x.norm(dim=0)
    x = (x - x.sum(0) / mask.sum().clamp_min(1)) * mask
    basis = torch.zeros_like(x)
    for j in range(x.shape[1]):
        column = x[:, j]
        for _ in range(2):
            column = column - basis @ (basis.T @ column)
        norm = column.norm()
        # 1e-6 of the column's size: values that came as fp32 carry no more than that.
        basis[:, j] = torch.where(norm > 1e-6 * size[j], column / norm.clamp_min(1e-300), 0.0)
    return basis


def explained(z: Tensor, metadata: Tensor, valid: Tensor) -> Tensor:
    """S = ΠZ: the part of the centred embedding that the factor explains.

    Args:
        z: [N, D], centred over the valid rows and zero elsewhere.
        metadata: [N] int64 categories, or [N, d] scaled continuous values.
        valid: [N] bool.

    Returns:
        [N, D], zero in invalid rows.
    """
    if metadata.dim() == 1:
        slots = group_slots(metadata)
        size = group_sums(valid.to(z.dtype), slots)
        means = group_sums(z, slots) / size.clamp_min(1)[:, None]
        # One class alone explains nothing; what rounding leaves of its mean is no direction.
        several = (size > 0).sum() > 1
        return torch.where(several & valid[:, None], means[slots], 0.0)
    basis = orthonormal_design(metadata, valid).to(z.dtype)
    return basis @ (basis.T @ z)


def orthogonal(z: Tensor, metadata: Tensor, role: Role) -> Tensor:
    """The orthogonal suppression term R_f of one factor, in [0, 1].

    preserve: ‖S Uᵀ‖²_F / (‖S‖²_F ‖U‖²_F); suppress: ‖S‖²_F / ‖Z‖²_F; with S = ΠZ, U = (I − Π)Z.

    Args:
        z: [N, D].
        metadata: [N] int64 (−1 missing) or [N, d] scaled values (NaN missing; a row takes part
            where all its values are observed).
        role: of the factor.

    Returns:
        0-d; 0 where the denominator is below 1e-12.
    """
    z = z.to(accumulation_dtype(z.dtype))
    valid = metadata >= 0 if metadata.dim() == 1 else ~metadata.isnan().any(1)
    mask = valid[:, None].to(z.dtype)
    # where, not a product: an invalid row may hold anything.
    z = torch.where(valid[:, None], z, 0.0)
    z = (z - z.sum(0) / mask.sum().clamp_min(1)) * mask
    s = explained(z, metadata, valid)
    if role == "suppress":
        numerator, denominator = s.square().sum(), z.square().sum()
    else:
        u = z - s
        # An S or U of the size of Z's rounding is zero: normalised, it would be a random direction.
        noise = (16 * torch.finfo(z.dtype).eps) ** 2 * z.square().sum()
        signal, rest = s.square().sum(), u.square().sum()
        denominator = torch.where((signal > noise) & (rest > noise), signal * rest, 0.0)
        if z.shape[0] < z.shape[1]:
            numerator = (s @ u.T).square().sum()
        else:  # ‖S Uᵀ‖² = tr(SᵀS · UᵀU)
            numerator = ((s.T @ s) * (u.T @ u)).sum()
    defined = denominator >= DENOMINATOR_EPS
    return torch.where(defined, numerator / torch.where(defined, denominator, 1.0), 0.0)


class _ScaleGradient(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor, scale: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:  # type: ignore[no-untyped-def]
        return gradient * ctx.saved_tensors[0], None  # a 0-d scale does not widen the dtype


def scale_gradient(x: Tensor, scale: Tensor) -> Tensor:
    """Identity whose gradient is multiplied by `scale` (0-d); −λ is gradient reversal."""
    scaled: Tensor = _ScaleGradient.apply(x, scale)
    return scaled


def balance_scales(norms: Tensor) -> Tensor:
    """s_f = geometric mean of all n / n_f over the guides whose norm is known (n_f > 0), else 1.

    Args:
        norms: [F], the running gradient norms; 0 = not known yet.
    """
    known = norms > 0
    logs = torch.where(known, norms, 1.0).log()
    mean = (logs * known).sum() / known.sum().clamp_min(1)
    return torch.where(known, (mean - logs).exp(), 1.0)


def fino_loss(
    embeddings: Tensor,
    metadata: Mapping[str, Tensor],
    factors: Sequence[Factor],
    heads: Mapping[str, Mapping[str, Tensor]],
    *,
    contrastive: InfoNCE | None = None,
    contrastive_weight: float = 1.0,
    projections: Tensor | None = None,
    guidance: float = 1.0,
    guide_scales: Mapping[str, float] | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The whole objective of one rank, written to be read beside its definition.

    L = w · L_contrastive + Σ_f weight_f · L_f + Σ_f orthogonal_f · R_f

    It is stateless: no bank update, no hidden layers, no balance other than the given scales.

    Args:
        embeddings: [V, B, D].
        metadata: factor name → [B] int64 (−1 missing) or [B]/[B, d] float (NaN missing), where
            each view has its own value [V, B]/[V, B, d].
        factors: the descriptions; `hidden` must be empty.
        heads: factor name → `weight`, `bias`, or `centroids`, `temperatures`, `counts`.
        contrastive: None leaves the term out.
        contrastive_weight: w.
        projections: [V, B, P], else the embeddings themselves.
        guidance: λ.
        guide_scales: s_f of the gradient balance, by factor name.

    Returns:
        (loss, terms): 0-d loss and the terms `contrastive`, `<name>`, `<name>/orthogonal`.
    """
    views = embeddings.shape[0]
    z = embeddings.flatten(0, 1)
    dtype = accumulation_dtype(z.dtype)
    total, terms = z.new_zeros((), dtype=dtype), {}

    if contrastive is not None:
        p = z if projections is None else projections.flatten(0, 1)
        scale = z.new_tensor(1 / contrastive.temperature, dtype=dtype)
        per_row = contrastive_rows(p, p, scale, views, two_tower=contrastive.two_tower)
        terms["contrastive"] = per_row.mean()
        total = total + contrastive_weight * terms["contrastive"]

    for factor in factors:
        head, name = heads[factor.name], factor.name
        sign = 1.0 if factor.role == "preserve" else -1.0
        z_f = scale_gradient(z, z.new_tensor(sign * guidance, dtype=dtype))
        if isinstance(factor, Continuous):
            y = rows_of(scaled_target(factor, metadata[name], dtype), z)
            loss, _ = squared_error(z_f, head["weight"], head["bias"], y, factor.activation)
            count = (~y.isnan()).sum()
        else:
            y = rows_of(metadata[name], z)
            if factor.head == "prototype":
                target = trainable_target(y, head["counts"])
                loss, _ = prototype_cross_entropy(
                    z_f, head["centroids"], head["temperatures"], head["counts"], target
                )
            else:
                target = y
                loss, _ = linear_cross_entropy(
                    z_f, head["weight"], head["bias"], target, factor.label_smoothing
                )
            count = (target >= 0).sum()
        terms[name] = loss / count.clamp_min(1)
        balance = 1.0 if guide_scales is None else guide_scales[name]
        total = total + balance * factor.weight * terms[name]
        if factor.orthogonal:
            z_o = scale_gradient(z, z.new_tensor(guidance, dtype=dtype))
            terms[f"{name}/orthogonal"] = orthogonal(z_o, y, factor.role)
            total = total + factor.orthogonal * terms[f"{name}/orthogonal"]
    return total, terms
