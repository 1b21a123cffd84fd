import copy
import ctypes

import pytest
import torch
from torch import Tensor

from fino_fast import Categorical, cuda
from fino_fast.heads import PrototypeHead, update_banks


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
    banks = (
        [torch.zeros(3, 2), torch.zeros(5, 2)],
        [torch.ones(3), torch.ones(5)],
        [torch.zeros(3, dtype=torch.int64), torch.zeros(5, dtype=torch.int64)],
    )
    order = torch.arange(4).repeat(2, 1)
    torch.library.opcheck(
        cuda.bank_update,
        (*banks, torch.randn(2, 4, 2), order, order // 2, [0.9, 0.5], [True, False]),
    )


def test_one_launch_moves_the_banks_of_all_heads(
    on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch
) -> None:
    """More banks than one launch takes, of different sizes, rules and labels."""
    torch.manual_seed(2)
    heads = [
        PrototypeHead(
            Categorical(
                f"f{f}", 3 + f % 5, momentum=0.5 + f / 100,
                concentration="ema" if f % 2 else "fixed",
            ),
            7,
        )
        for f in range(33)
    ]  # fmt: skip
    # Two rows a bank: the host runs a block for each, and every thread of a block as a thread.
    labels = [torch.randint(-1, 3, (2,)) for _ in heads]
    views = torch.randn(2, 2, 7)
    update_banks(heads, views, [label.clamp_min(0) for label in labels])
    expected = copy.deepcopy(heads)
    update_banks(expected, -views, labels)
    calls = []

    class Counting:
        def fino_bank_update(self, banks: object, count: ctypes.c_int64, *rest: object) -> int:
            calls.append(count.value)
            return int(on_host.fino_bank_update(banks, count, *rest))

    monkeypatch.setattr(cuda, "_library", Counting)
    monkeypatch.setattr(cuda, "serves", lambda bank, rows: True)
    update_banks(heads, -views, labels)
    for found, wanted in zip(heads, expected, strict=True):
        equal(found, wanted)
    assert calls == [33]


def test_it_is_left_to_pytorch_on_a_cpu() -> None:
    assert not cuda.serves(torch.zeros(3, 2), torch.zeros(4, 2))
