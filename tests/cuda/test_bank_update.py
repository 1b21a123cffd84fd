import copy
import ctypes

import pytest
import torch
from torch import Tensor

from fino_fast import Categorical, cuda
from fino_fast.heads import PrototypeHead


@pytest.fixture(autouse=True)
def library(on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "_library", lambda: on_host)


def both(
    head: PrototypeHead, views: Tensor, labels: Tensor, monkeypatch: pytest.MonkeyPatch
) -> tuple[PrototypeHead, PrototypeHead]:
    """(bank by the kernel, bank by PyTorch) after the views in order."""
    by_kernel, by_torch = copy.deepcopy(head), copy.deepcopy(head)
    by_torch.update(views, labels)
    monkeypatch.setattr(cuda, "serves", lambda bank, rows: True)
    by_kernel.update(views, labels)
    return by_kernel, by_torch


def equal(found: PrototypeHead, expected: PrototypeHead) -> None:
    for name, buffer in expected.named_buffers():
        torch.testing.assert_close(found.get_buffer(name), buffer, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("concentration", ["fixed", "ema"])
@pytest.mark.parametrize(("rows", "width"), [(1, 1), (9, 130)])
def test_views_in_order(
    concentration: str, rows: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    factor = Categorical("plate", 6, momentum=0.9, concentration=concentration)
    views = torch.randn(3, rows, width)
    equal(*both(PrototypeHead(factor, width), views, torch.randint(-1, 4, (rows,)), monkeypatch))


def test_a_row_that_is_not_finite_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    views = torch.randn(1, 4, 3)
    views[0, 1, 2] = torch.inf
    views[0, 2, 0] = torch.nan
    head = PrototypeHead(Categorical("plate", 3), 3)
    found, expected = both(head, views, torch.tensor([0, 0, 1, -1]), monkeypatch)
    equal(found, expected)
    assert found.counts.tolist() == [1, 0, 0]


def test_no_valid_row_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    head = PrototypeHead(Categorical("plate", 3), 2)
    found, _ = both(head, torch.randn(1, 4, 2), torch.full((4,), -1), monkeypatch)
    equal(found, head)


def test_operator() -> None:
    bank = torch.zeros(3, 2), torch.ones(3), torch.zeros(3, dtype=torch.int64)
    order = torch.arange(4)
    torch.library.opcheck(
        cuda.bank_update, (*bank, torch.randn(4, 2), order, order // 2, 0.9, True)
    )


def test_it_is_left_to_pytorch_on_a_cpu() -> None:
    assert not cuda.serves(torch.zeros(3, 2), torch.zeros(4, 2))
