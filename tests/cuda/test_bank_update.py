import copy
import ctypes

import pytest
import torch
from torch import Tensor

from fino_fast import Categorical
from fino_fast.heads import PrototypeHead


def update(library: ctypes.CDLL, head: PrototypeHead, teacher: Tensor, labels: Tensor) -> None:
    """One view of `PrototypeHead.update` by the CUDA kernel."""
    ordered, order = torch.sort(labels, stable=True)
    scratch = torch.full_like(teacher, torch.nan)
    pointers = [
        ctypes.c_void_p(tensor.data_ptr())
        for tensor in (head.centroids, head.temperatures, head.counts, scratch)
    ]
    assert (
        library.fino_bank_update(
            ctypes.c_void_p(teacher.data_ptr()),
            ctypes.c_void_p(order.data_ptr()),
            ctypes.c_void_p(ordered.data_ptr()),
            ctypes.c_int64(teacher.shape[0]),
            ctypes.c_int64(teacher.shape[1]),
            ctypes.c_float(head.factor.momentum),
            ctypes.c_bool(head.factor.concentration == "fixed"),
            *pointers,
            None,
        )
        == 0
    )


def both(
    library: ctypes.CDLL, head: PrototypeHead, views: Tensor, labels: Tensor
) -> tuple[PrototypeHead, PrototypeHead]:
    """(bank by the kernel, bank by PyTorch) after the views in order."""
    by_kernel, by_torch = copy.deepcopy(head), copy.deepcopy(head)
    for view in views:
        update(library, by_kernel, view.contiguous(), labels)
    by_torch.update(views, labels)
    return by_kernel, by_torch


def equal(found: PrototypeHead, expected: PrototypeHead) -> None:
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(found.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("concentration", ["fixed", "ema"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (9, 130)])
def test_views_in_order(on_host: ctypes.CDLL, concentration: str, rows: int, width: int) -> None:
    torch.manual_seed(0)
    factor = Categorical("plate", 6, momentum=0.9, concentration=concentration)
    views = torch.randn(3, rows, width)
    equal(*both(on_host, PrototypeHead(factor, width), views, torch.randint(-1, 4, (rows,))))


def test_a_row_that_is_not_finite_is_left_out(on_host: ctypes.CDLL) -> None:
    torch.manual_seed(1)
    views = torch.randn(1, 4, 3)
    views[0, 1, 2] = torch.inf
    views[0, 2, 0] = torch.nan
    head = PrototypeHead(Categorical("plate", 3), 3)
    found, expected = both(on_host, head, views, torch.tensor([0, 0, 1, -1]))
    equal(found, expected)
    assert found.counts.tolist() == [1, 0, 0]


def test_no_valid_row_changes_nothing(on_host: ctypes.CDLL) -> None:
    head = PrototypeHead(Categorical("plate", 3), 2)
    found, _ = both(on_host, head, torch.randn(1, 4, 2), torch.full((4,), -1))
    equal(found, head)
