"""Claim: the whole loss in one pass beats plain PyTorch, in time and memory."""

from typing import Any, Literal

import pytest
import torch
from contest import Step, gradients, measure
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE

VIEWS, DIM, WIDTH, LINEAR, PROTOTYPES = 2, 768, 256, 1000, 12_493


class Case:
    """Contrastive, linear, prototype and continuous terms, all with orthogonal ones."""

    def __init__(self, images: int, dtype: torch.dtype, small: bool = False) -> None:
        torch.manual_seed(0)
        dim, self.classes = (384, 50) if small else (DIM, PROTOTYPES)
        self.linear = 20 if small else LINEAR
        self.dim, self.dtype = dim, dtype
        self.z = torch.randn(VIEWS, images, dim).to(dtype).requires_grad_()
        self.p = torch.randn(VIEWS, images, WIDTH).to(dtype).requires_grad_()
        self.metadata = {
            "linear": torch.randint(0, self.linear, (images,)),
            "prototype": torch.randint(0, self.classes, (images,)),
            "continuous": torch.rand(images),
        }
        self.bank = torch.nn.functional.normalize(torch.randn(self.classes, dim), dim=1)
        self.weight = torch.randn(self.linear, dim) * 0.02

    def step(
        self,
        backend: Literal["native", "eager"],
        balance: bool = False,
        dtype: torch.dtype | None = None,
    ) -> Step:
        criterion = FinoLoss(
            self.dim,
            [
                Categorical("linear", self.linear, head="linear", orthogonal=0.1),
                Categorical(
                    "prototype", self.classes, role="suppress", temperature=0.1, orthogonal=0.1
                ),
                Continuous(
                    "continuous", role="suppress", activation="sigmoid", low=0.0, high=1.0,
                    orthogonal=0.1,
                ),
            ],
            contrastive=InfoNCE(0.1),
            balance=balance,
            backend=backend,
        )  # fmt: skip
        # The banks stand still: a result that drifts from round to round could not be checked.
        criterion.eval()
        criterion.heads["prototype"].centroids.copy_(self.bank)
        criterion.heads["prototype"].counts.fill_(1)
        with torch.no_grad():
            criterion.heads["linear"].weight.copy_(self.weight)
            for tensor in (
                criterion.heads["linear"].bias,
                *criterion.heads["continuous"].parameters(),
            ):
                tensor.fill_(0.01)
        z, p = self.z, self.p
        if dtype is not None:
            criterion.to(dtype)
            z, p = (t.detach().to(dtype).requires_grad_() for t in (z, p))
        if balance:
            criterion.train()  # only then are the norms taken
            criterion._update_banks = lambda teacher, values: None
        leaves = [z, p, *criterion.parameters()]

        def run() -> list[Tensor]:
            with torch.autocast("cpu", torch.bfloat16, enabled=z.dtype == torch.bfloat16):
                loss = criterion(z, self.metadata, projections=p)
            return gradients(loss, leaves)

        return run

    @property
    def flops(self) -> float:
        rows = self.z.shape[1] * VIEWS
        orthogonal = 1.5 * 2 * (rows + self.linear) * self.dim**2  # of the one that is preserved
        return (
            2 * 2 * rows**2 * WIDTH
            + 3 * 2 * rows * self.linear * self.dim
            + 2 * 2 * rows * self.classes * self.dim
            + orthogonal
        )


@pytest.mark.parametrize("images", [2048])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_fino_loss(benchmark: Any, images: int, dtype: str) -> None:
    case = Case(images, torch.bfloat16 if dtype == "bf16" else torch.float32)
    measure(
        benchmark,
        {"native": case.step("native"), "eager": case.step("eager")},
        flops=case.flops,
        exact=case.step("eager", dtype=torch.float64)(),
    )


@pytest.mark.parametrize("images", [32])
def test_fino_loss_of_a_small_batch(benchmark: Any, images: int) -> None:
    """D = 384, few classes: what a call costs beside the arithmetic."""
    case = Case(images, torch.float32, small=True)
    measure(
        benchmark,
        {"native": case.step("native"), "eager": case.step("eager")},
        exact=case.step("eager", dtype=torch.float64)(),
    )


@pytest.mark.parametrize("images", [2048])
def test_gradient_balance(benchmark: Any, images: int) -> None:
    """What `balance=True` adds: it must not be a backward pass for every guide."""
    case = Case(images, torch.float32)
    steps = {"native": case.step("native", balance=True), "unbalanced": case.step("native")}
    # The first step sets the norms; later ones meet the same gradients and leave them as they are.
    measure(
        benchmark,
        steps,
        flops=case.flops,
        exact={
            "native": case.step("eager", balance=True, dtype=torch.float64)(),
            "unbalanced": case.step("eager", dtype=torch.float64)(),
        },
    )
