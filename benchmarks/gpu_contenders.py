"""What is measured on a GPU: ours, its peers, and what each of them has to return.

Made for any device, so that a test can run it in Triton's interpreter, small.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import torch
import torch.nn.functional as F
from contest import Step, gradients
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE
from fino_fast.reference import contrastive_rows
from fino_fast.terms import ContrastiveCall, HeadCall
from fino_fast.terms import Step as Terms
from fino_fast.triton import Triton

EXACT_ENTRIES = 2**27  # logits of the fp64 reference at a time: 1 GB, of which a few are held


@dataclass
class Contest:
    """Contenders for the same loss and gradients.

    Attributes:
        losses: contender → its loss; ours is "triton". A peer may not be installed: it is imported
            when it is called.
        leaves: whose gradients are taken.
        exact: makes [loss, gradient of every leaf] in fp64.
    """

    losses: dict[str, Callable[[], Tensor]]
    leaves: list[Tensor]
    exact: Callable[[], list[Tensor]]
    steps: dict[str, Step] = field(init=False)

    def __post_init__(self) -> None:
        self.steps = {
            name: lambda loss=loss: gradients(loss(), self.leaves)
            for name, loss in self.losses.items()
        }


class Liger:
    """Liger-Kernel's fused linear cross entropy."""

    @cached_property
    def _loss(self) -> Callable[..., Tensor]:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        return LigerFusedLinearCrossEntropyLoss()

    def __call__(self, x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return self._loss(weight, x, target)


def cut_cross_entropy(x: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """Apple's, with its own default of leaving out small gradients."""
    from cut_cross_entropy import linear_cross_entropy

    return linear_cross_entropy(x, weight, target)


def linear_head(rows: int, classes: int, width: int, make: dict) -> Contest:
    """Cross entropy of a linear head without a bias: not every peer takes one.

    Args:
        rows, classes, width: of x [rows, width] and of the weight [classes, width].
        make: device and dtype of both.
    """
    device = make["device"]
    x = torch.randn(rows, width, **make).requires_grad_()
    weight = (torch.randn(classes, width, **make) * 0.02).requires_grad_()
    target = torch.randint(0, classes, (rows,), device=device)
    bias, inv_count = torch.zeros(classes, device=device), torch.tensor(1 / rows, device=device)
    liger, backend = Liger(), Triton()

    def dense(x: Tensor, weight: Tensor) -> Tensor:
        return F.cross_entropy(F.linear(x, weight), target)

    def triton() -> Tensor:
        call = HeadCall("linear", x, weight, bias, target, inv_count)
        return backend.step(Terms(heads=[call])).guides

    compiled = torch.compile(dense)
    leaves = [x, weight]

    def part(first: int, last: int, x: Tensor, weight: Tensor) -> Tensor:
        own = target[first:last]
        return F.cross_entropy(F.linear(x[first:last], weight), own, reduction="sum") / rows

    losses: dict[str, Callable[[], Tensor]] = {
        "triton": triton,
        "eager": lambda: dense(x, weight),
        "torch.compile": lambda: compiled(x, weight),
        "liger": lambda: liger(x, weight, target),
        "cut_cross_entropy": lambda: cut_cross_entropy(x, weight, target),
        "chunked": lambda: F.linear_cross_entropy(x, weight, target),
    }
    return Contest(losses, leaves, lambda: _exact(part, rows, classes, leaves))


def contrastive(images: int, width: int, make: dict) -> Contest:
    """NT-Xent of two views, p [2·images, width]; `make` is its device and dtype."""
    p = torch.randn(2 * images, width, **make).requires_grad_()
    scale, backend = torch.tensor(10.0, device=make["device"]), Triton()

    def dense(p: Tensor) -> Tensor:
        return contrastive_rows(p, p, scale, 2).mean()

    compiled = torch.compile(dense)

    def part(first: int, last: int, p: Tensor) -> Tensor:
        own = p.view(2, images, width)[:, first:last].reshape(-1, width)
        return contrastive_rows(own, p, scale.double(), 2, first).sum() / (2 * images)

    losses: dict[str, Callable[[], Tensor]] = {
        "triton": lambda: backend.step(Terms(ContrastiveCall(p, scale, 2))).contrastive,
        "eager": lambda: dense(p),
        "torch.compile": lambda: compiled(p),
    }
    return Contest(losses, [p], lambda: _exact(part, images, 4 * images, [p]))


def whole_loss(images: int, width: int, device: str) -> Contest:
    """Four factors of three kinds, orthogonal terms and all, as `FinoLoss` computes them from
    z [2, images, width] in fp32.
    """
    fused = FinoLoss(
        width,
        [
            Categorical("class", 35, head="linear", orthogonal=0.01),
            Categorical("plate", 5000, role="suppress", orthogonal=0.1),
            Categorical("site", 100, role="suppress", head="linear"),
            Continuous("exposure", role="suppress", activation="sigmoid"),
        ],
        contrastive=InfoNCE(0.1),
        backend="triton",
    ).to(device)
    z = torch.randn(2, images, width, device=device)
    metadata = {
        "class": torch.randint(-1, 35, (images,), device=device),
        "plate": torch.randint(-1, 5000, (images,), device=device),
        "site": torch.randint(-1, 100, (images,), device=device),
        "exposure": torch.rand(images, device=device),
    }
    fused(z, metadata)  # fills the bank
    fused.eval()  # it stays as it is: every contender computes the same
    eager = copy.deepcopy(fused)
    eager.backend = "eager"
    z.requires_grad_()

    def exact() -> list[Tensor]:
        wide = z.detach().double().requires_grad_()
        return gradients(copy.deepcopy(eager).double()(wide, metadata), [wide])

    modules = {
        "triton": fused,
        "triton, compiled": torch.compile(fused),
        "eager": eager,
        "torch.compile": torch.compile(eager),
    }
    losses = {name: lambda module=module: module(z, metadata) for name, module in modules.items()}
    return Contest(losses, [z], exact)


def _exact(
    part: Callable[..., Tensor], count: int, logits_each: int, leaves: list[Tensor]
) -> list[Tensor]:
    """[loss, gradient of every leaf] in fp64, of parts: all logits at once would not fit a GPU.

    Args:
        part: (first, last, *leaves) → their share of the loss.
        count: rows or images.
        logits_each: how many logits one of them has.
    """
    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    size = max(1, EXACT_ENTRIES // logits_each)
    total = [torch.zeros_like(tensor) for tensor in (wide[0].new_empty(()), *wide)]
    for first in range(0, count, size):
        loss = part(first, min(first + size, count), *wide)
        for sum_so_far, more in zip(total, gradients(loss, wide), strict=True):
            sum_so_far += more
    return total
