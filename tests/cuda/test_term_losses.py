"""The losses by the kernel of csrc/cuda, on the host, against plain PyTorch and fp64."""

import ctypes
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from cuda_case import Counting, run_from_the_last_thread
from fino_fast.kernels.bank import Bank
from fino_fast.kernels.epilogues import PAIRS
from fino_fast.kernels.losses import Sums, reduce_sums
from torch import Tensor

from fino_fast import cuda
from fino_fast.ops import KINDS

LINEAR, PROTOTYPE, IDENTITY = (KINDS.index(kind) for kind in ("linear", "prototype", "identity"))


@pytest.fixture(autouse=True)
def count(on_host: ctypes.CDLL, monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter[str]]:
    library = Counting(on_host)
    monkeypatch.setattr(cuda, "_library", lambda: library)
    return library.calls


def term(kind: int, n: int, classes: int, smoothing: float = 0.0, seed: int = 0) -> Bank:
    """A term of which only what its end needs is filled."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.empty(0, dtype=torch.int64)
    if kind <= PROTOTYPE:
        target = torch.randint(-1, classes, (n,), generator=generator)
    one, nothing = torch.ones(()), torch.empty(0, dtype=torch.int64)
    return Bank(
        kind, 0, torch.empty(n, 1), torch.empty(classes, 1), one, target, one / n, nothing,
        smoothing, 0.5 + seed, one,
    )  # fmt: skip


def sums_of(banks: list[Bank], splits: list[int], logits: list[Tensor]) -> Sums:
    """What a sweep leaves of these logits [N, K], each bank in so many parts."""
    n = banks[0].x.shape[0]
    planes: list[Tensor] = []
    best: list[Tensor] = []
    for bank, parts, s in zip(banks, splits, logits, strict=True):
        labels = bank.target if bank.kind <= PROTOTYPE else torch.zeros(n, dtype=torch.int64)
        taken = torch.where(labels >= 0, s.gather(1, labels.clamp_min(0)[:, None])[:, 0], 0.0)
        first = 0
        for part in s.tensor_split(parts, 1):
            inside = (labels >= first) & (labels < first + part.shape[1])
            planes.append(
                torch.stack(
                    [
                        part.logsumexp(1), part.amax(1), torch.where(inside, taken, 0.0),
                        part.sum(1),
                    ]
                )
            )  # fmt: skip
            best.append(part.argmax(1).int() + first)
            first += part.shape[1]
    return Sums(torch.cat(planes, 1), torch.cat(best), torch.empty(len(banks), n), splits)


def by_kernel(banks: list[Bank], sums: Sums, monkeypatch: pytest.MonkeyPatch) -> tuple[Tensor, ...]:
    with monkeypatch.context() as patched:
        patched.setattr(cuda, "serves_sums", lambda _: True)
        return *reduce_sums(banks, sums), sums.lse.clone()


def every_kind(n: int) -> tuple[list[Bank], list[int], list[Tensor]]:
    kinds = ((LINEAR, 40, 0.1), (PROTOTYPE, 7, 0.0), (IDENTITY, 3, 0.0), (PAIRS.value, 9, 0.0))
    banks = [term(kind, n, k, smoothing, f) for f, (kind, k, smoothing) in enumerate(kinds)]
    generator = torch.Generator().manual_seed(n)
    logits = [30 * torch.randn(n, len(bank.vectors), generator=generator) for bank in banks]
    return banks, [3, 1, 2, 4], logits


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("n", [1, 33, 1025, 2500])
def test_every_kind(
    n: int, reverse: bool, on_host: ctypes.CDLL, count: Counter[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """By the kernel and by PyTorch, in one launch: as exact as fp32 is."""
    banks, splits, logits = every_kind(n)
    exact = [replace(bank, x=bank.x.double(), inv_count=bank.inv_count.double()) for bank in banks]
    expected = sums_of(exact, splits, [s.double() for s in logits])
    expected.lse = expected.lse.double()
    wanted = (*reduce_sums(exact, expected), expected.lse)
    for bank, s, lse in zip(banks, logits, expected.lse, strict=True):
        if bank.kind != IDENTITY:
            torch.testing.assert_close(lse, s.double().logsumexp(1))
    sums = sums_of(banks, splits, logits)
    plain = (*reduce_sums(banks, sums), sums.lse.clone())
    assert not count
    sums.lse = torch.full_like(sums.lse, torch.nan)
    run_from_the_last_thread(on_host, reverse)
    found = by_kernel(banks, sums, monkeypatch)
    run_from_the_last_thread(on_host, False)
    assert count["fino_term_losses"] == 1
    assert count.keys() <= {"fino_term_losses", "host_order"}
    for mine, theirs, true in zip(found, plain, wanted, strict=True):
        torch.testing.assert_close(mine.double(), true, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(theirs.double(), true, rtol=1e-5, atol=1e-5)


def test_the_value_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """Cross entropy of PyTorch, label smoothing included, over the rows that have a label."""
    bank, logits = term(LINEAR, 50, 6, smoothing=0.2), torch.randn(50, 6)
    bank.target[:3] = -1
    bank.inv_count = 1 / (bank.target >= 0).sum()
    sums = sums_of([bank], [2], [logits])
    for loss, metric, weighted, *_ in (
        reduce_sums([bank], sums), by_kernel([bank], sums, monkeypatch)
    ):  # fmt: skip
        expected = torch.nn.functional.cross_entropy(
            logits, bank.target, ignore_index=-1, label_smoothing=0.2
        )
        torch.testing.assert_close(loss, expected[None])
        torch.testing.assert_close(weighted, bank.weight * expected[None])
        hits = (logits.argmax(1) == bank.target)[bank.target >= 0].float().mean()
        torch.testing.assert_close(metric, hits[None])


def test_rows_without_a_label_may_hold_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    bank, logits = term(LINEAR, 20, 5, smoothing=0.1), torch.randn(20, 5)
    bank.target[::2] = -1
    expected = reduce_sums([bank], sums_of([bank], [2], [logits]))
    logits[::2] = torch.tensor([torch.nan, torch.inf, -torch.inf, 1e38, 0.0])
    sums = sums_of([bank], [2], [logits])
    torch.testing.assert_close(reduce_sums([bank], sums), expected)
    torch.testing.assert_close(by_kernel([bank], sums, monkeypatch)[:3], expected)
    bank.target[:] = -1
    for found in (reduce_sums([bank], sums), by_kernel([bank], sums, monkeypatch)[:3]):
        assert [value.item() for value in found] == [0, 0, 0]


@pytest.mark.parametrize("part", [0, 1])
def test_a_nan_in_any_part_of_a_bank_shows(part: int, monkeypatch: pytest.MonkeyPatch) -> None:
    bank, logits = term(LINEAR, 20, 4), torch.randn(20, 4)
    bank.target[:] = 0
    logits[5, 2 * part] = torch.nan
    sums = sums_of([bank], [2], [logits])
    assert reduce_sums([bank], sums)[0].isnan().all()
    assert by_kernel([bank], sums, monkeypatch)[0].isnan().all()


def test_the_first_of_equal_logits_in_several_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    bank = term(LINEAR, 3, 6)
    bank.target = torch.tensor([0, 2, 5])
    sums = sums_of([bank], [3], [torch.zeros(3, 6)])
    for found in (reduce_sums([bank], sums), by_kernel([bank], sums, monkeypatch)):
        torch.testing.assert_close(found[1], torch.tensor([1 / 3]))


def test_more_terms_than_a_launch_takes(
    count: Counter[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    banks = [term(LINEAR, 4, 3, seed=f) for f in range(35)]
    logits = [torch.randn(4, 3) for _ in banks]
    sums = sums_of(banks, [1] * 35, logits)
    expected = (*reduce_sums(banks, sums), sums.lse.clone())
    torch.testing.assert_close(by_kernel(banks, sums, monkeypatch), expected)
    assert count == {"fino_term_losses": 1}


def test_operator() -> None:
    banks, splits, logits = every_kind(9)
    sums = sums_of(banks, splits, logits)
    none = torch.empty(0, dtype=torch.int64)
    labels = [bank.target if bank.kind <= PROTOTYPE else none for bank in banks]
    torch.library.opcheck(
        cuda.term_losses,
        (
            sums.partial, sums.best, labels, [bank.inv_count for bank in banks], splits,
            [len(bank.vectors) for bank in banks], [bank.smoothing for bank in banks],
            [bank.weight for bank in banks],
            [False, False, True, False], sums.lse,
        ),
    )  # fmt: skip
