"""Values of the heads and their gradients at the rows."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from fino_fast.kernels.launch import Launch, intercepted
from fino_fast.kernels.operands import MOST_WORDS
from fino_fast.kernels.table import FIELDS
from fino_fast.kernels.tiles import INTERPRETER_TILES, TILES, forced
from kernel_case import (
    TOLERANCE,
    check_heads,
    head_call,
    inverse,
    names,
    random,
    run_heads,
)

from fino_fast.ops import KINDS
from fino_fast.terms import HeadCall


def heads_of_every_kind(n: int, depth: int, classes: int, dtype: torch.dtype) -> list[HeadCall]:
    """All five kinds on one x; three outputs where they are continuous."""
    x = random(n, depth, dtype=dtype, seed=0)
    sizes = [classes, classes, 3, 3, 3]
    return [
        replace(head_call(kind, n, depth, size, dtype, seed=10 * i), x=x)
        for i, (kind, size) in enumerate(zip(KINDS, sizes, strict=True))
    ]


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_kind_in_one_table(dtype: torch.dtype, device: torch.device) -> None:
    check_heads(heads_of_every_kind(37, 40, 45, dtype), device)


@pytest.mark.parametrize(
    ("n", "depth", "classes"),
    [(1, 1, 1), (5, 33, 1), (3, 2, 40), (2, INTERPRETER_TILES.sweeps[0].holds + 1, 3)],
)
def test_odd_shapes(n: int, depth: int, classes: int, device: torch.device) -> None:
    check_heads(heads_of_every_kind(n, depth, classes, torch.float64), device)


def test_heads_of_different_widths(device: torch.device) -> None:
    check_heads(
        [
            head_call("linear", 9, 70, 5, torch.float64, seed=1),
            head_call("sigmoid", 9, 3, 2, torch.float64, seed=2),
            head_call("prototype", 9, 17, 40, torch.float64, seed=3),
        ],
        device,
    )


def test_banks_of_different_dtypes(device: torch.device) -> None:
    half = head_call("linear", 9, 20, 5, torch.bfloat16, seed=1)
    whole = head_call("linear", 9, 20, 5, torch.bfloat16, seed=3)
    check_heads([half, replace(whole, bank=whole.bank.bfloat16())], device)


def test_label_smoothing(device: torch.device) -> None:
    check_heads(
        [head_call("linear", 33, 9, 40, torch.float64, seed=4, label_smoothing=0.1)], device
    )


def test_strided_rows_and_banks(device: torch.device) -> None:
    call = head_call("linear", 9, 20, 35, torch.float64, seed=5)
    wide = random(9, 40, dtype=torch.float64, seed=6)
    for x in (call.x.T.contiguous().T, wide[:, 10:30], call.x[:1].expand(9, 20)):
        check_heads([replace(call, x=x, bank=call.bank.T.contiguous().T)], device)


def test_all_missing_is_zero_even_where_the_rows_are_not_finite(device: torch.device) -> None:
    calls = heads_of_every_kind(5, 7, 4, torch.float32)
    x = torch.full_like(calls[0].x, torch.nan)
    calls = [
        replace(c, x=x, target=torch.full_like(c.target, -1 if c.target.dim() == 1 else torch.nan))
        for c in calls
    ]
    found = run_heads(calls, device)
    assert found.losses.eq(0).all()
    assert found.metrics.eq(0).all()
    gradients = (*found.rows, *found.bank, *found.offset)
    assert all(gradient is None or gradient.eq(0).all() for gradient in gradients)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_a_row_without_target_may_hold_anything(device: torch.device) -> None:
    calls = heads_of_every_kind(9, 7, 4, torch.float32)
    for call in calls:
        missing = call.target.clone()
        missing[4] = -1 if missing.dim() == 1 else torch.nan
        x = call.x.clone()
        x[4] = torch.inf
        valid = missing >= 0 if missing.dim() == 1 else ~missing.isnan()
        check_heads(
            [replace(call, x=x, target=missing, inv_count=inverse(valid, torch.float32))], device
        )


def test_a_bank_without_any_class(device: torch.device) -> None:
    call = head_call("prototype", 5, 7, 4, torch.float32)
    call = replace(
        call,
        counts=torch.zeros(4, dtype=torch.int64),
        bank=torch.zeros(4, 7),
        target=torch.full((5,), -1),
    )
    found = run_heads([call], device)
    assert found.losses.item() == 0
    assert found.metrics.item() == 0
    assert found.rows[0].eq(0).all()


def test_logits_of_ten_thousand(device: torch.device) -> None:
    call = head_call("linear", 9, 6, 40, torch.float32, seed=7)
    check_heads([replace(call, bank=call.bank * 4e4)], device)


def test_small_temperatures(device: torch.device) -> None:
    call = head_call("prototype", 9, 6, 40, torch.float32, seed=8)
    check_heads([replace(call, offset=torch.full((40,), 0.01))], device)


def test_a_zero_row_is_scaled_and_not_projected(device: torch.device) -> None:
    call = head_call("prototype", 9, 6, 40, torch.float64, seed=9)
    call.x[2] = 0
    check_heads(
        [replace(call, target=call.target.clamp_min(0) * 0 + int(call.counts.argmax()))], device
    )


def test_the_first_of_equal_logits_is_the_prediction(device: torch.device) -> None:
    call = head_call("linear", 4, 6, 70, torch.float32, seed=10)
    target = torch.tensor([0, 1, 69, -1])
    call = replace(
        call, bank=torch.zeros(70, 6), offset=torch.zeros(70), target=target,
        inv_count=inverse(target >= 0, torch.float32),
    )  # fmt: skip
    assert run_heads([call], device).metrics.item() == pytest.approx(1 / 3)


def test_a_bank_split_among_programs(device: torch.device) -> None:
    calls = [
        head_call("linear", 3, 5, 300, torch.float64, seed=11, label_smoothing=0.25),
        head_call("prototype", 3, 5, 200, torch.float64, seed=12),
        head_call("tanh", 3, 5, 40, torch.float64, seed=13),
    ]
    check_heads(calls, device)


@pytest.mark.parametrize("programs", [1, 2, 3, 16])
def test_banks_of_a_space_split_among_programs_as_one(
    programs: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shares that begin and end inside banks, that hold many of them, and that are one tile."""
    monkeypatch.setattr("fino_fast.kernels.forward.WANTED_PROGRAMS", programs)
    calls = heads_of_every_kind(7, 5, 150, torch.float64)
    calls.insert(1, head_call("linear", 7, 3, 70, torch.float64, seed=11, label_smoothing=0.25))
    check_heads(calls, device)


def test_more_heads_than_one_launch_can_describe(device: torch.device) -> None:
    """Another launch of `operands`, and of nothing else."""
    most = MOST_WORDS // FIELDS.value
    assert f"{most} banks" in (Path(__file__).parents[2] / "docs" / "gpu.md").read_text("utf-8")
    first = head_call("tanh", 2, 3, 1, torch.float64)
    calls = [
        replace(head_call("tanh", 2, 3, 1, torch.float64, seed=f), x=first.x)
        for f in range(most + 1)
    ]
    seen: list[Launch] = []
    # Not run: what a table of two launches holds is tested in test_operands.
    with intercepted(seen.append):
        run_heads(calls, device)
    back = ["rows", "banks", "combine"]
    assert names(seen) == [*["operands"] * 2, "sweep", *["operands"] * 2, *back]


@pytest.mark.parametrize("key", TILES, ids=str)
def test_tiles_of_a_gpu(key: tuple[int, torch.dtype], device: torch.device) -> None:
    """Of all GPUs; the last tile of the columns has fewer than any step of the second product."""
    _, dtype = key
    with forced(TILES[key]):
        check_heads(heads_of_every_kind(70, 33, 67, dtype), device)
