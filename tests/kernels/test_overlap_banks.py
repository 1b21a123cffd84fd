"""The overlap of the orthogonal terms as a bank of the sweep."""

from collections import Counter
from dataclasses import replace
from typing import Any

import pytest
import torch
from cuda_case import by_reference, call, categories, rows
from cuda_case import values as continuous
from kernel_case import head_call, launched, names
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from fino_fast import overlap
from fino_fast.factors import Role
from fino_fast.reference import DENOMINATOR_EPS
from fino_fast.terms import OrthogonalCall, Step
from fino_fast.triton import Triton

pytestmark = pytest.mark.usefixtures("cuda_launches")


def terms(calls: list[OrthogonalCall]) -> list[Tensor]:
    """R of every call."""
    return Triton().step(Step(orthogonal=calls)).overlaps


def gradient(z: Tensor, weighted: list[tuple[float, OrthogonalCall]]) -> Tensor:
    """Of Σ weight · R at z."""
    calls = [replace(call, weight=weight) for weight, call in weighted]
    total = Triton().step(Step(orthogonal=calls)).orthogonal
    assert total is not None
    return torch.autograd.grad(total, z)[0]


@pytest.mark.parametrize(("n", "width", "classes"), [(1, 1, 1), (40, 31, 100), (70, 40, 5)])
def test_values_and_gradients(n: int, width: int, classes: int, device: torch.device) -> None:
    z = rows(n, width)
    designs: list[tuple[Tensor, Role, int]] = [
        (categories(n, classes), "preserve", classes),
        (continuous(n, 2), "preserve", 0),
        (categories(n, classes, seed=7), "suppress", classes),
        (torch.full((n,), -1), "preserve", 4),
        (torch.zeros(n, dtype=torch.int64), "preserve", 4),
    ]
    x = z.to(device).requires_grad_()
    calls = [call(x, *design) for design in designs]
    exact = [by_reference(z.double(), design, role) for design, role, _ in designs]
    found = terms(calls)
    for value, (expected, _) in zip(found, exact, strict=True):
        torch.testing.assert_close(value.cpu().double(), expected, rtol=1e-5, atol=1e-7)
    weights = (1.0, -2.0, 3.0, 1.0, 1.0)
    at_z = gradient(x, list(zip(weights, calls, strict=True)))
    wanted = sum(weight * at for weight, (_, at) in zip(weights, exact, strict=True))
    assert isinstance(wanted, Tensor)
    size = max(float(wanted.abs().max()), 1e-3)
    assert float((at_z.cpu().double() - wanted).abs().max()) <= 2e-5 * size


@pytest.mark.parametrize("form", [overlap.SWEEP, overlap.SQUARES], ids=["sweep", "squares"])
def test_strided_rows(form: int, device: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    """Transposed, gaps between rows, gaps between columns, and one row for all."""
    monkeypatch.setattr(overlap, "_form", lambda call, *sizes: form)
    n, width = 37, 20
    base, labels = rows(n, 2 * width).to(device), categories(n, 4)
    for view in (
        base[:, :width].T.contiguous().T,
        base[:, 5 : 5 + width],
        base[:, ::2],
        base[:1, :width].expand(n, width),
    ):
        assert view.stride() != (width, 1)
        z = view.detach().requires_grad_()
        expected, at = by_reference(view.cpu().double(), labels, "preserve")
        of = call(z, labels, "preserve", 4)
        torch.testing.assert_close(terms([of])[0].cpu().double(), expected, rtol=1e-5, atol=1e-7)
        found = gradient(z, [(1.0, of)]).cpu().double()
        assert float((found - at).abs().max()) <= 2e-5 * max(float(at.abs().max()), 1e-3)


def test_the_sweep_and_the_products_agree(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    z = rows(40, 20).to(device).requires_grad_()
    calls = [call(z, categories(40, k, seed=k), "preserve", k) for k in (4, 9)]
    results = []
    for form in (overlap.SWEEP, overlap.SQUARES):
        monkeypatch.setattr(overlap, "_form", lambda call, *sizes, form=form: form)
        with launched() as seen:
            results.append((*terms(calls), gradient(z, [(1.0, calls[0]), (2.0, calls[1])])))
        assert bool(seen) == (form == overlap.SWEEP)
    for swept, multiplied in zip(*results, strict=True):
        torch.testing.assert_close(swept, multiplied, rtol=1e-4, atol=1e-6)


class Products(TorchDispatchMode):
    """Counts the library's batched products."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func.overloadpacket.__name__ == "bmm"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [1, 3])
def test_the_products_of_all_factors_are_one_batch(number: int, device: torch.device) -> None:
    z = rows(40, 5).to(device).requires_grad_()
    calls = [call(z, categories(40, 30, seed=k), "preserve", 30) for k in range(number)]
    assert {overlap._form(of, 40, 30, 5) for of in calls} == {overlap.SQUARES}
    with Products() as products:
        total = Triton().step(Step(orthogonal=calls)).orthogonal
        assert products.count == 2
        assert total is not None
        torch.autograd.grad(total, z)
    assert products.count == 2 + 4


def plain(z: Tensor, labels: Tensor, classes: int) -> Tensor:
    """R of categories without missing rows, everything in the dtype of z but the last sums."""
    member = torch.nn.functional.one_hot(labels, classes).to(z.dtype)
    z = z - z.mean(0)
    means = (member.T @ z) / member.sum(0).clamp_min(1)[:, None]
    u = z - member @ means
    wide = torch.promote_types(z.dtype, torch.float32)
    overlaps = (u @ means.T).to(wide).square() @ member.sum(0).to(wide)
    s = (member @ means).to(wide).square().sum()
    return overlaps.sum() / (s * u.to(wide).square().sum()).clamp_min(DENOMINATOR_EPS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_as_exact_as_plain_pytorch(dtype: torch.dtype, device: torch.device) -> None:
    """Errors to fp64 at most twice those of PyTorch in the same dtype."""
    labels = torch.randint(0, 5, (90,), generator=torch.Generator().manual_seed(3))
    z = (rows(90, 40) - 10).to(dtype)
    results = []
    for x in (z.clone(), z.double()):
        x.requires_grad_()
        value = plain(x, labels, 5)
        results.append((value.detach(), torch.autograd.grad(value, x)[0]))
    x = z.to(device).requires_grad_()
    whole = replace(call(x, labels, "preserve", 5), guidance=None)
    ours = (terms([whole])[0].cpu(), gradient(x, [(1.0, whole)]).cpu())
    for mine, theirs, exact in zip(ours, *results, strict=True):
        mine_off, their_off = ((t.double() - exact).norm() for t in (mine, theirs))
        rounding = torch.finfo(theirs.dtype).eps / 2 * exact.norm()
        if device.type == "cuda" and dtype == torch.float32:
            # Tensor cores cut their sums off, which a mean of squares does not average out.
            rounding *= 2
        assert mine_off <= 2 * max(their_off, rounding)


@pytest.mark.parametrize("scale", [1e10, 1e-8])
def test_sums_far_from_one(scale: float, device: torch.device) -> None:
    """‖S‖²‖U‖² does not fit fp32, though R does; and a batch that is almost constant gives 0."""
    z, design = rows(12, 3) - 10, categories(12, 3)
    exact, _ = by_reference(z.double(), design, "preserve")
    x = (scale * z).to(device).requires_grad_()
    of = call(x, design, "preserve", 3)
    expected = exact if scale > 1 else torch.zeros_like(exact)
    torch.testing.assert_close(terms([of])[0].cpu().double(), expected, rtol=1e-5, atol=0)
    assert gradient(x, [(1.0, of)]).isfinite().all()


def test_one_step_with_heads_on_the_same_rows(
    device: torch.device, cuda_launches: Counter[str]
) -> None:
    """A frozen embedding, trained heads: the overlap takes no gradient; and the other way round."""
    head = head_call("linear", 30, 20, 7, torch.float32)
    z = rows(30, 20).to(device)
    for trained in (False, True):
        x = z.clone().requires_grad_(trained)
        weight = head.bank.to(device).requires_grad_(not trained)
        moved = replace(
            head, x=x, bank=weight, offset=head.offset.to(device), target=head.target.to(device),
            inv_count=head.inv_count.to(device),
        )  # fmt: skip
        of = call(x, categories(30, 4), "preserve", 4)
        with launched() as seen:
            result = Triton().step(Step(heads=[moved], orthogonal=[of]))
        assert names(seen) == ["operands", "sweep"]
        assert result.guides is not None
        assert result.orthogonal is not None
        with launched() as seen:
            torch.autograd.grad(result.guides + result.orthogonal, x if trained else weight)
        at_rows = ["rows"] if trained else []
        assert names(seen) == ["operands", *at_rows, "banks", "combine"]
        assert cuda_launches["fino_overlap_gradient"] == trained
