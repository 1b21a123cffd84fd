"""torch.compile(fullgraph=True) equals eager: values, terms, gradients and buffers over steps."""

import copy
import math
from collections.abc import Callable

import pytest
import torch
from loss_case import embeddings, labels, values
from torch import Tensor
from torch._dynamo.testing import CompileCounter

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, LambdaSchedule

IMAGES, DIM = 9, 6


@pytest.fixture(autouse=True)
def _fresh_compiler() -> None:
    torch._dynamo.reset()


def data(step: int) -> dict[str, Tensor]:
    return {
        "type": labels(IMAGES, 5, missing=2, seed=step),
        "keys": labels(IMAGES, 7, missing=2, seed=step + 9),
        "deep": values(IMAGES, 2, missing=4, seed=step),
    }


def steps(criterion: FinoLoss, call: Callable[..., object]) -> list[dict[str, Tensor]]:
    """Three steps of a growing λ: the loss, its terms, every gradient, and the buffers after."""
    records = []
    for step in range(3):
        criterion.set_progress((step + 1) / 3)
        z, p = embeddings(2, IMAGES, DIM, seed=step), embeddings(2, IMAGES, 4, seed=9 + step)
        chosen = {factor.name: data(step)[factor.name] for factor in criterion.factors}
        given = {} if criterion.contrastive is None else {"projections": p}
        loss, terms = call(z, chosen, return_terms=True, **given)
        inputs = {"z": z, **given, **dict(criterion.named_parameters())}
        gradients = torch.autograd.grad(loss, list(inputs.values()))
        records.append(
            {"loss": loss.detach(), **terms}
            | {f"gradient {n}": g for n, g in zip(inputs, gradients, strict=True)}
            | {f"buffer {n}": b.clone() for n, b in criterion.named_buffers()}
        )
    return records


def assert_equal(compiled: list[dict[str, Tensor]], eager: list[dict[str, Tensor]]) -> None:
    for step, (ours, theirs) in enumerate(zip(compiled, eager, strict=True)):
        assert ours.keys() == theirs.keys()
        for name, value in theirs.items():
            where = f"step {step}, {name}"
            torch.testing.assert_close(
                ours[name], value, rtol=1e-9, atol=1e-11, msg=lambda m, w=where: f"{w}: {m}"
            )


def test_fullgraph_equals_eager(backend: str) -> None:
    """Everything at once, through AOTAutograd."""
    torch.manual_seed(0)
    plain = FinoLoss(
        DIM,
        [
            Categorical("type", 5, head="linear", orthogonal=0.3, label_smoothing=0.1),
            Categorical("keys", 7, role="suppress", orthogonal=0.2, concentration="ema"),
            Continuous("deep", 2, role="suppress", activation="tanh", hidden=(7,), orthogonal=0.4),
        ],
        contrastive=InfoNCE(0.2, learnable=True),
        schedule=LambdaSchedule("linear"),
        balance=True,
        backend=backend,
    ).double()
    traced = copy.deepcopy(plain)
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    assert_equal(steps(traced, compiled), steps(plain, plain))


def test_lambda_does_not_recompile(backend: str) -> None:
    criterion = FinoLoss(
        DIM,
        [Categorical("type", 5, head="linear", orthogonal=0.3), Categorical("keys", 7)],
        contrastive=InfoNCE(0.2),
        schedule=LambdaSchedule("linear"),
        backend=backend,
    ).double()
    counter = CompileCounter()
    steps(criterion, torch.compile(criterion, fullgraph=True, backend=counter))
    assert counter.frame_count == 1


@pytest.mark.parametrize("concentration", ["fixed", "ema"])
def test_inductor_sends_the_gradient_of_the_bank_the_loss_saw(concentration: str) -> None:
    """Its partitioner recomputes in the backward pass what it can, when the bank has moved."""
    plain = FinoLoss(
        DIM, [Categorical("keys", 7, concentration=concentration)], contrastive=None,
        schedule=LambdaSchedule("linear"), backend="eager",
    ).double()  # fmt: skip
    traced = copy.deepcopy(plain)
    assert_equal(steps(traced, torch.compile(traced, fullgraph=True)), steps(plain, plain))


def test_views_in_a_list_under_autocast(backend: str) -> None:
    criterion = FinoLoss(
        DIM,
        [Categorical("a", 3, head="linear"), Continuous("b", hidden=(5,))],
        contrastive=InfoNCE(0.3, two_tower=True),
        backend=backend,
    ).eval()
    backbone, x = torch.nn.Linear(4, DIM), torch.randn(2, IMAGES, 4)
    batch = {"a": labels(IMAGES, 3, missing=2), "b": values(IMAGES, 1, missing=2).float()}

    def step(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return criterion([backbone(view) for view in x.unbind(0)], batch)

    loss, expected = torch.compile(step, fullgraph=True, backend="eager")(x), step(x)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    mine, theirs = (torch.autograd.grad(value, backbone.weight)[0] for value in (loss, expected))
    torch.testing.assert_close(mine, theirs, rtol=0.02, atol=1e-4)


def test_values_are_not_checked_while_tracing(backend: str) -> None:
    criterion = FinoLoss(DIM, [Continuous("y")], contrastive=None, backend=backend)
    compiled = torch.compile(criterion, fullgraph=True, backend=CompileCounter())
    z, y = torch.randn(1, 4, DIM), torch.tensor([0.0, 1.0, math.inf, 2.0])
    assert compiled(z, {"y": y}).isinf()
    with pytest.raises(ValueError, match=r"'y'.*row 2"):
        criterion(z, {"y": y})
