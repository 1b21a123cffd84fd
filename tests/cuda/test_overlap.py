"""The orthogonal terms by the kernels of csrc/cuda against the reference.

The sweep of `preserve` is plain PyTorch here; tests/kernels has it.
"""

import copy
import ctypes
from collections import Counter
from collections.abc import Iterator

import pytest
import torch
from cuda_case import (
    SHAPES,
    Counting,
    by_products,
    by_reference,
    call,
    categories,
    missing,
    rows,
    sorted_labels,
)
from cuda_case import values as continuous
from loss_case import embeddings, labels
from torch import Tensor

from fino_fast import Categorical, Continuous, FinoLoss, InfoNCE, backends, cuda, overlap, reference
from fino_fast.eager import Eager
from fino_fast.factors import Role
from fino_fast.reference import orthonormal_design
from fino_fast.terms import Step, StepResult


@pytest.fixture(autouse=True)
def count(on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    library = Counting(on_host)
    monkeypatch.setattr(cuda, "_library", lambda: library)
    monkeypatch.setattr(cuda, "serves_rows", lambda z: z.dtype in cuda.TYPES)
    return library.calls


def error(found: Tensor, expected: Tensor) -> float:
    return float((found.detach().double() - expected.detach().double()).abs().max())


@pytest.mark.parametrize("role", ["preserve", "suppress"])
@pytest.mark.parametrize(("n", "width", "classes"), SHAPES)
def test_as_exact_as_the_reference(role: Role, n: int, width: int, classes: int) -> None:
    """Value and gradient: error to fp64 at most twice that of PyTorch in fp32, or a rounding."""
    z = rows(n, width)
    for design, of in (
        (categories(n, classes), classes),
        (continuous(n, 2), 0),
        (torch.arange(n), n),
        (torch.zeros(n, dtype=torch.int64), 4),
        (torch.full((n,), -1), 4),
    ):
        x = torch.where(missing(design)[:, None], torch.nan, z).requires_grad_()
        (term,) = by_products([call(x, design, role, of)])
        (gradient,) = torch.autograd.grad(term, x)
        exact, exact_gradient = by_reference(z.double(), design, role)
        theirs, their_gradient = by_reference(z, design, role)
        assert error(term, exact) <= 2 * error(theirs, exact) + 1e-6
        # The size of a gradient's entries: R has degree 0 in the centred rows.
        size = 1 / max(1e-3, float(z.std(0, correction=0).square().mean() * z.numel()) ** 0.5)
        rounding = 1e-6 * size
        assert (
            error(gradient, exact_gradient) <= 2 * error(their_gradient, exact_gradient) + rounding
        )


@pytest.mark.parametrize("form", [overlap.SWEEP, overlap.SQUARES])
def test_both_forms_of_the_numerator(form: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(overlap, "_form", lambda call, *sizes: form)
    z = rows(30, 9)
    for design, classes in ((categories(30, 4), 4), (continuous(30, 2), 0)):
        x = z.clone().requires_grad_()
        (term,) = by_products([call(x, design, "preserve", classes)])
        exact, exact_gradient = by_reference(z.double(), design, "preserve")
        torch.testing.assert_close(term.double(), exact, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(term, x)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-8)


def test_many_classes_of_several_factors_beside_wide_values() -> None:
    """All forms in one launch; those of many classes are one batch, of different numbers."""
    designs = [categories(20, 19, seed=1), continuous(20, 4), categories(20, 15, seed=2)]
    z = rows(20, 5)
    x = z.clone().requires_grad_()
    classes = (19, 0, 15)
    calls = [call(x, *of) for of in zip(designs, ["preserve"] * 3, classes, strict=True)]
    assert [len(split.swept) for split in overlap.split(calls)] == [1]
    for term, design in zip(by_products(calls), designs, strict=True):
        exact, exact_gradient = by_reference(z.double(), design, "preserve")
        torch.testing.assert_close(term.double(), exact, rtol=1e-5, atol=0)
        (gradient,) = torch.autograd.grad(term, x, retain_graph=True)
        torch.testing.assert_close(gradient.double(), exact_gradient, rtol=1e-4, atol=1e-8)


def test_one_gradient_for_all_factors_in_a_fixed_number_of_launches(count: Counter[str]) -> None:
    designs = [categories(20, 3), continuous(20, 2), categories(20, 9, seed=7)]
    classes, roles = [3, 0, 9], ["preserve", "preserve", "suppress"]
    z = rows(20, 6)
    expected = sum(
        weight * by_reference(z.double(), design, role)[1]
        for weight, design, role in zip((1.0, -2.0, 3.0), designs, roles, strict=True)
    )
    x = z.clone().requires_grad_()
    terms = by_products([call(x, *of) for of in zip(designs, roles, classes, strict=True)])
    assert count == {"fino_group_statistics": 1, "fino_overlap_shares": 1}
    (gradient,) = torch.autograd.grad(terms[0] - 2 * terms[1] + 3 * terms[2], x)
    assert count["fino_overlap_gradient"] == 1
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-4, atol=1e-8)


def test_more_factors_than_a_launch_takes() -> None:
    z, expected = rows(6, 3), torch.zeros(6, 3)
    designs = [categories(6, 3, seed=f) for f in range(34)]
    for design in designs:
        expected += by_reference(z, design, "suppress")[1]
    x = z.clone().requires_grad_()
    terms = by_products([call(x, design, "suppress", 3) for design in designs])
    (gradient,) = torch.autograd.grad(torch.stack(terms).sum(), x)
    torch.testing.assert_close(gradient, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision(dtype: torch.dtype) -> None:
    """U is kept in the dtype of the rows, all else is not."""
    design = categories(25, 4)
    z = rows(25, 33).to(dtype)
    for role, loss in (("preserve", torch.finfo(dtype).eps), ("suppress", 1e-6)):
        x = z.clone().requires_grad_()
        (term,) = by_products([call(x, design, role, 4)])
        exact, exact_gradient = by_reference(z.double(), design, role)
        assert term.dtype == torch.float32
        torch.testing.assert_close(term.double(), exact, rtol=loss, atol=0)
        (gradient,) = torch.autograd.grad(1000 * term, x)
        assert gradient.dtype == dtype
        size = float(exact_gradient.abs().max())
        close = {"rtol": torch.finfo(dtype).eps, "atol": 1000 * (loss + 1e-4) * size}
        torch.testing.assert_close(gradient.double(), 1000 * exact_gradient, **close)


def test_a_difference_that_fp16_has_no_room_for() -> None:
    z = torch.tensor([[-60000.0, 1.0], [60000.0, 2.0], [60000.0, 5.0], [60000.0, 3.0]]).half()
    x = z.requires_grad_()
    (term,) = by_products([call(x, torch.tensor([0, 0, 1, 1]), "preserve", 2)])
    assert term.isfinite()
    assert torch.autograd.grad(term, x)[0].isfinite().all()


def test_fp64_is_left_to_the_reference(count: Counter[str]) -> None:
    z, design = rows(9, 4).double().requires_grad_(), categories(9, 3)
    (term,) = by_products([call(z, design, "preserve", 3)])
    assert torch.equal(term, reference.orthogonal(z, design, "preserve"))
    assert not count


def test_sums_far_from_one() -> None:
    """‖S‖²‖U‖² does not fit fp32, though R does; and a batch that is almost constant gives 0."""
    z, design = rows(12, 3) - 10, categories(12, 3)
    exact, _ = by_reference(z.double(), design, "preserve")
    for scale, expected in ((1e10, exact), (1e-8, torch.zeros_like(exact))):
        x = (scale * z).requires_grad_()
        (term,) = by_products([call(x, design, "preserve", 3)])
        torch.testing.assert_close(term.double(), expected, rtol=1e-5, atol=0)
        assert torch.autograd.grad(term, x)[0].isfinite().all()


@pytest.mark.parametrize("preserve", [[True, False], [False, False], [True, True]])
def test_operators(preserve: list[bool]) -> None:
    designs = [categories(6, 3), continuous(6, 2)]
    order, ordered = sorted_labels(designs)
    empty = torch.empty(0, dtype=torch.float64)
    basis = [empty, orthonormal_design(designs[1], ~missing(designs[1]))]
    z = rows(6, 3).requires_grad_()
    # The test of gradients compares them with themselves under another mode.
    torch.library.opcheck(
        overlap.overlap_split, (z, z.detach(), order, ordered, basis, [3, 2], preserve, 0)
    )


def test_operators_of_the_parts() -> None:
    z, designs = rows(6, 3), [categories(6, 3), continuous(6, 2)]
    order, ordered = sorted_labels(designs)
    basis = [torch.empty(0, dtype=torch.float64), torch.rand(2, 6, dtype=torch.float64).T]
    groups, preserve = [3, 2], [True, False]
    means, sizes, group, mean, squares, rest = cuda.group_statistics(
        z, order, ordered, basis, groups, preserve, 0, 6
    )
    torch.library.opcheck(cuda.overlap_shares, (squares, sizes, groups, preserve, 6))
    *_, coefficients, sums = cuda.overlap_shares(squares, sizes, groups, preserve, 6)
    torch.testing.assert_close(sums, squares.sum(1))
    arguments = (
        torch.ones(2), z, means, sizes, group, mean, coefficients, basis, groups, rest, 2 * means,
    )  # fmt: skip
    torch.library.opcheck(cuda.overlap_gradient, arguments)
    turned = [
        [t.T.contiguous().T if t.dim() == 2 else t for t in argument]
        if isinstance(argument, list) and isinstance(argument[0], Tensor)
        else argument
        for argument in arguments
    ]
    assert torch.equal(cuda.overlap_gradient(*turned), cuda.overlap_gradient(*arguments))


class Mixed(Eager):
    """The orthogonal terms as on a GPU, the rest as on a CPU."""

    def step(self, step: Step) -> StepResult:
        calls = list(step.orthogonal)
        result = super().step(Step(step.contrastive, step.heads, (), step.balanced))
        shares = torch.stack(by_products(calls))
        weights = reference.constants([call.weight for call in calls], shares)
        result.orthogonal = (weights.to(shares.dtype) * shares).sum()
        result.overlaps = list(shares.detach().unbind(0))
        return result


def test_a_compiled_step_equals_a_plain_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(backends._FUSED, "native", Mixed())
    torch._dynamo.reset()
    plain = FinoLoss(
        6,
        [
            Categorical("type", 5, orthogonal=0.3),
            Categorical("keys", 7, role="suppress", orthogonal=0.2),
            Continuous("deep", orthogonal=0.4),
        ],
        contrastive=InfoNCE(0.2),
        backend="native",
    )
    plain.set_progress(0.1)
    traced, eager = copy.deepcopy(plain), copy.deepcopy(plain)
    eager.backend = "eager"
    compiled = torch.compile(traced, fullgraph=True, backend="aot_eager")
    data = {"type": labels(9, 5, missing=2), "keys": labels(9, 7, missing=1)}
    data["deep"] = torch.rand(9)
    z = embeddings(2, 9, 6).detach().float()
    results = []
    for criterion in (plain, compiled, eager):
        x = z.clone().requires_grad_()
        loss, terms = criterion(x, data, return_terms=True)
        results.append({"loss": loss, "z": torch.autograd.grad(loss, x)[0], **terms})
    by_kernels, by_compiler, expected = results
    for name, value in by_kernels.items():
        torch.testing.assert_close(by_compiler[name], value, rtol=1e-6, atol=1e-7)
        torch.testing.assert_close(expected[name], value, rtol=1e-4, atol=1e-6)
