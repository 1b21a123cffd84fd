"""One batch of the loss with everything in it, and what the oracle says of it."""

from dataclasses import dataclass, field

import oracle
import torch
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss
from fino_fast.factors import Factor

NAN = float("nan")
CPU_BACKENDS = ["eager", "native"]


def labels(images: int, classes: int, missing: int = 0, seed: int = 0) -> Tensor:
    """[B] int64; the first `missing` entries of a shuffle are −1."""
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(classes, (images,), generator=generator)
    codes[torch.randperm(images, generator=generator)[:missing]] = -1
    return codes


def values(images: int, dim: int, missing: int = 0, seed: int = 0) -> Tensor:
    """[B, d] fp64 in [0, 1); `missing` entries are NaN."""
    generator = torch.Generator().manual_seed(seed)
    y = torch.rand(images, dim, generator=generator, dtype=torch.float64)
    y.view(-1)[torch.randperm(images * dim, generator=generator)[:missing]] = NAN
    return y


def factors() -> list[Factor]:
    """A linear, a prototype and a continuous factor of both roles, all with orthogonal terms."""
    return [
        Categorical("cell_line", 5, head="linear", weight=0.5, orthogonal=0.3, label_smoothing=0.1),
        Categorical("plate", 7, role="suppress", weight=0.7, orthogonal=0.2, temperature=0.25),
        Continuous(
            "exposure", 2, role="suppress", weight=0.9, orthogonal=0.4, activation="tanh",
            low=(-1.0, 0.0), high=(2.0, 1.0),
        ),
        Continuous("depth", 1, weight=0.2, mean=0.4, std=0.3),
    ]  # fmt: skip


def metadata(images: int) -> dict[str, Tensor]:
    return {
        "cell_line": labels(images, 5, missing=images // 4, seed=1),
        "plate": labels(images, 7, missing=images // 5, seed=2),
        "exposure": values(images, 2, missing=images // 3, seed=3),
        "depth": values(images, 1, missing=images // 3, seed=4)[:, 0],
    }


def embeddings(views: int, images: int, dim: int, seed: int = 0) -> Tensor:
    """[V, B, D] fp64 that requires a gradient; off centre, rows of different sizes."""
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(views, images, dim, generator=generator, dtype=torch.float64)
    z = z * (0.5 + torch.rand(views, images, 1, generator=generator, dtype=torch.float64)) + 0.3
    return z.requires_grad_()


def scaled(factor: Continuous, y: Tensor) -> Tensor:
    """Targets of a head, [B, d] fp64, as the definition scales them."""
    y = y.reshape(len(y), factor.dim).double()

    def columns(value: object) -> Tensor:
        return torch.as_tensor(value, dtype=torch.float64).expand(factor.dim)

    if factor.low is None:
        return (y - columns(factor.mean)) / columns(factor.std)
    share = (y - columns(factor.low)) / (columns(factor.high) - columns(factor.low))
    return share if factor.activation == "sigmoid" else 2 * share - 1


def bank_of(factor: Categorical, dim: int) -> oracle.Bank:
    ema = factor.concentration == "ema"
    return oracle.Bank(factor.num_classes, dim, factor.temperature, factor.momentum, ema)


@dataclass
class Expected:
    """What the oracle says of one step."""

    loss: Tensor
    terms: dict[str, Tensor]
    z_gradient: Tensor
    p_gradient: Tensor | None
    parameter_gradients: dict[str, Tensor]
    guide_gradients: dict[str, Tensor] = field(default_factory=dict)


def expect(
    criterion: FinoLoss,
    z: Tensor,
    data: dict[str, Tensor],
    banks: dict[str, oracle.Bank],
    projections: Tensor | None = None,
    guidance: float = 1.0,
    scales: dict[str, float] | None = None,
) -> Expected:
    """The step of `criterion` (heads without hidden layers) by the oracle, in fp64."""
    z = z.detach().double().requires_grad_()
    views = len(z)
    terms, z_gradient, p_gradient = {}, torch.zeros_like(z), None
    parameters: dict[str, Tensor] = {}
    guides: dict[str, Tensor] = {}
    loss = torch.zeros((), dtype=torch.float64)

    if criterion.contrastive is not None:
        p = z if projections is None else projections.detach().double().requires_grad_()
        tau = torch.tensor(criterion.contrastive.temperature, dtype=torch.float64).requires_grad_()
        term = oracle.info_nce(p, tau, criterion.contrastive.two_tower)
        by_p, by_tau = torch.autograd.grad(term, [p, tau])
        if projections is None:
            z_gradient += criterion.contrastive_weight * by_p
        else:
            p_gradient = criterion.contrastive_weight * by_p
        # log τ is the parameter.
        parameters["log_temperature"] = (criterion.contrastive_weight * by_tau * tau).detach()
        terms["contrastive"] = term.detach()
        loss += criterion.contrastive_weight * term.detach()

    for factor in criterion.factors:
        name, rows = factor.name, z.flatten(0, 1)
        if isinstance(factor, Continuous):
            y = scaled(factor, data[name]).repeat(views, 1)
            valid = [i for i in range(len(y)) if not y[i].isnan().any()]
            x = y[valid]
        else:
            y = data[name].tolist() * views
            x, valid = oracle.design(y)
        if isinstance(factor, Categorical) and factor.head == "prototype":
            term, leaves = oracle.prototype(rows, banks[name], y), []
        else:
            head = criterion.heads[name]
            leaves = [t.detach().double().requires_grad_() for t in (head.weight, head.bias)]
            if isinstance(factor, Continuous):
                term = oracle.continuous(rows, *leaves, y, factor.activation)
            else:
                term = oracle.linear(rows, *leaves, y, factor.label_smoothing)
        by_z, *by_leaves = torch.autograd.grad(term, [z, *leaves], materialize_grads=True)
        weight = factor.weight * (scales[name] if scales else 1.0)
        sign = 1 if factor.role == "preserve" else -1
        z_gradient += sign * guidance * weight * by_z
        for leaf, gradient in zip(("weight", "bias"), by_leaves, strict=False):
            parameters[f"heads.{name}.{leaf}"] = weight * gradient
        terms[name], guides[name] = term.detach(), by_z
        loss += weight * term.detach()
        if factor.orthogonal:
            term = oracle.orthogonal(rows, x, valid, factor.role)
            z_gradient += guidance * factor.orthogonal * torch.autograd.grad(term, z)[0]
            terms[f"{name}/orthogonal"] = term.detach()
            loss += factor.orthogonal * term.detach()
    return Expected(loss, terms, z_gradient, p_gradient, parameters, guides)
