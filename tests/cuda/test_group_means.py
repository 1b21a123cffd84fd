import ctypes

import pytest
import torch
from torch import Tensor

from fino_fast import cuda, reference


def group_means(z: Tensor, labels: Tensor) -> Tensor:
    ordered, order = torch.sort(labels, stable=True)
    return cuda.group_means(z, order, ordered)


@pytest.fixture(autouse=True)
def library(on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: on_host)


@pytest.mark.parametrize(
    ("rows", "width", "classes"), [(1, 1, 1), (13, 70, 4), (11, 33, 1), (9, 5, 100)]
)
def test_means_by_label(rows: int, width: int, classes: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(-1, classes, (rows,))
    z = torch.randn(rows, width)
    expected = torch.zeros(rows, width)
    for label in labels[labels >= 0].unique():
        expected[labels == label] = z[labels == label].mean(0)
    torch.testing.assert_close(group_means(z, labels), expected, rtol=1e-6, atol=1e-6)
    transposed = z.T.contiguous().T
    torch.testing.assert_close(group_means(transposed, labels), expected, rtol=1e-6, atol=1e-6)


def test_rows_without_label_become_zero_whatever_they_hold() -> None:
    z = torch.tensor([[torch.nan], [1.0], [3.0], [torch.inf]])
    assert group_means(z, torch.tensor([-1, 7, 7, -1])).flatten().tolist() == [0, 2, 2, 0]


def test_operator() -> None:
    torch.manual_seed(1)
    ordered, order = torch.sort(torch.randint(-1, 3, (6,)), stable=True)
    z = torch.randn(6, 3, requires_grad=True)
    torch.library.opcheck(cuda.group_means, (z, order, ordered))


@pytest.mark.parametrize("role", ["preserve", "suppress"])
@pytest.mark.parametrize("classes", [0, 1, 4])
def test_orthogonal_term_equals_the_reference(role: str, classes: int) -> None:
    torch.manual_seed(2)
    labels = torch.randint(-1, classes, (9,))
    labels[0] = classes - 1
    results = []
    for explained in (cuda.explained, reference.explained):
        z = torch.randn(9, 5, generator=torch.Generator().manual_seed(3)).requires_grad_()
        term = reference.orthogonal(z, labels, role, explained)
        results.append((term, *torch.autograd.grad(term, z)))
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_a_refused_launch_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refusing:
        def fino_group_means(self, *arguments: object) -> int:
            return 2

    monkeypatch.setattr(cuda, "_library", Refusing)
    with pytest.raises(RuntimeError, match="fino_group_means: CUDA error 2"):
        group_means(torch.randn(2, 2), torch.zeros(2, dtype=torch.int64))
