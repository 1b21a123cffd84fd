import ctypes

import pytest
import torch
from torch import Tensor


def group_means(library: ctypes.CDLL, z: Tensor, labels: Tensor) -> Tensor:
    ordered, order = torch.sort(labels, stable=True)
    out = torch.full_like(z, torch.nan)
    z = z.contiguous()
    assert (
        library.fino_group_means(
            ctypes.c_void_p(z.data_ptr()),
            ctypes.c_void_p(order.data_ptr()),
            ctypes.c_void_p(ordered.data_ptr()),
            ctypes.c_int64(z.shape[0]),
            ctypes.c_int64(z.shape[1]),
            ctypes.c_void_p(out.data_ptr()),
            None,
        )
        == 0
    )
    return out


@pytest.mark.parametrize(
    ("rows", "width", "classes"), [(1, 1, 1), (13, 70, 4), (11, 33, 1), (9, 5, 100)]
)
def test_means_by_label(on_host: ctypes.CDLL, rows: int, width: int, classes: int) -> None:
    torch.manual_seed(0)
    labels = torch.randint(-1, classes, (rows,))
    z = torch.randn(rows, width)
    expected = torch.zeros(rows, width)
    for label in labels[labels >= 0].unique():
        expected[labels == label] = z[labels == label].mean(0)
    torch.testing.assert_close(group_means(on_host, z, labels), expected, rtol=1e-6, atol=1e-6)


def test_rows_without_label_become_zero_whatever_they_hold(on_host: ctypes.CDLL) -> None:
    z = torch.tensor([[torch.nan], [1.0], [3.0], [torch.inf]])
    labels = torch.tensor([-1, 7, 7, -1])
    assert group_means(on_host, z, labels).flatten().tolist() == [0, 2, 2, 0]


def test_the_projection_is_its_own_transpose(on_host: ctypes.CDLL) -> None:
    torch.manual_seed(1)
    labels = torch.randint(-1, 3, (10,))
    matrix = group_means(on_host, torch.eye(10), labels)
    torch.testing.assert_close(matrix, matrix.T)
    torch.testing.assert_close(matrix @ matrix, matrix)
