"""Error to fp64 at most twice what plain PyTorch in the same dtype loses."""

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from kernel_case import head_call, random, run_heads
from torch import Tensor

from fino_fast.terms import ContrastiveCall, Step
from fino_fast.triton import Triton

ROWS = 40
DTYPES = [torch.float32, torch.float16, torch.bfloat16]


FACTOR = 2.0


def assert_no_worse(
    ours: list[Tensor], plain: list[Tensor], exact: list[Tensor], dtype: torch.dtype
) -> None:
    for index, (mine, theirs, true) in enumerate(zip(ours, plain, exact, strict=True)):
        mine_off, theirs_off = ((x.cpu().double() - true).norm().item() for x in (mine, theirs))
        # Where plain PyTorch is lucky: one rounding of the result, or, of a mean over the rows, one
        # of their sum and of the division, and one rounding of each row in the inputs' dtype.
        rounding = torch.finfo(theirs.dtype).eps / 2
        if true.dim() == 0:
            rounding = max(2 * rounding, torch.finfo(dtype).eps / 2 / ROWS**0.5)
        floor = rounding * true.norm().item()
        assert mine_off <= FACTOR * max(theirs_off, floor), f"output {index}"


def with_gradients(loss: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
    leaves = [leaf.detach().clone().requires_grad_() for leaf in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_linear_head(dtype: torch.dtype, device: torch.device) -> None:
    call = head_call("linear", ROWS, 40, 40, dtype, seed=1)
    call = replace(call, target=call.target.clamp_min(0), inv_count=torch.tensor(1 / ROWS))

    def loss(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        logits = F.linear(x, weight, bias)
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)),
                               call.target)  # fmt: skip

    leaves = [call.x, call.bank, call.offset]
    plain = with_gradients(loss, [leaf.to(dtype) for leaf in leaves])
    exact = with_gradients(loss, [leaf.double() for leaf in leaves])
    found = run_heads([call], device)
    ours = [found.losses[0], found.rows[0], found.bank[0], found.offset[0]]
    assert_no_worse([t for t in ours if t is not None], plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_prototype_head(dtype: torch.dtype, device: torch.device) -> None:
    call = head_call("prototype", ROWS, 40, 40, dtype, seed=2)
    call = replace(
        call,
        target=call.target.clamp_min(0) % 40,
        counts=torch.ones(40, dtype=torch.int64),
        inv_count=torch.tensor(1 / ROWS),
    )

    def loss(x: Tensor) -> Tensor:
        bank, phi = F.normalize(call.bank.to(x.dtype)), call.offset.to(x.dtype)
        logits = F.normalize(x) @ bank.T / phi
        return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)),
                               call.target)  # fmt: skip

    plain, exact = with_gradients(loss, [call.x]), with_gradients(loss, [call.x.double()])
    found = run_heads([call], device)
    assert_no_worse([found.losses[0], found.rows[0]], plain, exact, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive(dtype: torch.dtype, device: torch.device) -> None:
    """The gradient at 1/τ too."""
    images, scale = ROWS // 2, torch.tensor(8.0)
    p = random(2 * images, 70, dtype=dtype, seed=3)
    same = torch.eye(2 * images, dtype=torch.bool)
    positive = torch.arange(2 * images).roll(images)

    def loss(p: Tensor, scale: Tensor) -> Tensor:
        unit = F.normalize(p)
        logits = (unit @ unit.T).to(scale.dtype) * scale
        return F.cross_entropy(logits.masked_fill(same, -torch.inf), positive)

    plain = with_gradients(loss, [p, scale])
    exact = with_gradients(loss, [p.double(), scale.double()])
    step = Triton().step

    def ours(p: Tensor, scale: Tensor) -> Tensor:
        value = step(Step(ContrastiveCall(p, scale, 2))).contrastive
        assert value is not None
        return value

    found = with_gradients(ours, [p.to(device), scale.to(device)])
    assert_no_worse(found, plain, exact, dtype)


@pytest.mark.parametrize("told", ["nothing", "high", "by PyTorch's later name"])
def test_tensorfloat32_only_where_pytorch_is_told_so(told: str) -> None:
    # A process of its own: PyTorch does not go back from one name to the other.
    setting = {
        "nothing": "",
        "high": "torch.set_float32_matmul_precision('high')",
        "by PyTorch's later name": "torch.backends.cuda.matmul.fp32_precision = 'tf32'",
    }[told]
    code = (
        "import torch\n"
        "from fino_fast.kernels.launch import input_precision\n"
        f"{setting}\n"
        "print(input_precision(torch.zeros(1)), input_precision(torch.zeros(1).bfloat16()))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.split() == ["tf32x3" if told == "nothing" else "tf32", "ieee"]
