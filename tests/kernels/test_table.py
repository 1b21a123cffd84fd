"""Descriptors in device memory: what one launch writes, the next reads."""

from dataclasses import fields

import pytest
import torch
import triton
import triton.language as tl
from fino_fast.kernels import table as table_of_banks
from fino_fast.kernels.operands import Operands
from fino_fast.kernels.table import (
    CLASSES,
    FIELDS,
    FIRST_PROGRAM,
    WALK,
    WEIGHT,
    Descriptor,
    X,
    entries_of,
    find,
    integer,
    number,
    pointer,
    words,
)


@triton.jit
def read_kernel(table, entries, program, walk, classes, weight, first):
    bank = table + find(table, entries, FIELDS, FIRST_PROGRAM, program) * FIELDS
    tl.store(walk, integer(bank, WALK))
    tl.store(classes, integer(bank, CLASSES))
    tl.store(weight, number(bank, WEIGHT, tl.float64))
    tl.store(first, tl.load(pointer(bank, X, tl.float32)))


def descriptor(x: torch.Tensor, weight: float, walk: int, first_program: int) -> Descriptor:
    return Descriptor(
        space=0, kind=0, x=x, x_stride=16, depth=16, norms=x, bank=x, bank_stride=16,
        classes=2**30 + 1, offset=x, target=x, target_stride=2, counts=x, smoothing=0.0,
        inv_count=x, weight=weight, walk=walk, first_program=first_program,
    )  # fmt: skip


@pytest.mark.parametrize(("program", "entry"), [(0, 0), (2, 0), (3, 1), (4, 3), (9, 3)])
def test_what_was_written_is_read(program: int, entry: int, device: torch.device) -> None:
    """Numbers above and below 2, whose bits begin otherwise; −1; past a bank of no program."""
    x = torch.tensor([1.5, 2.5, 3.5, 4.5], device=device)
    weights, begins = [0.1, 3e7, 0.0, 2.0], [0, 3, 4, 4]
    table = [
        descriptor(x[f:], weight, f - 1, begin)
        for f, (weight, begin) in enumerate(zip(weights, begins, strict=True))
    ]
    address = Operands([], x).launch(words(table))
    walk, classes = (torch.empty(1, dtype=torch.int32, device=device) for _ in range(2))
    weight, first = torch.empty(1, dtype=torch.float64, device=device), torch.empty_like(x[:1])
    read_kernel[(1,)](address, len(table), program, walk, classes, weight, first)
    assert walk.item() == entry - 1
    assert classes.item() == 2**30 + 1
    assert weight.item() == pytest.approx(weights[entry], rel=1e-15)
    assert first.item() == x[entry].item()


@triton.jit
def neighbours_kernel(table, entries, walk, program, first, last, index):
    begin, end = entries_of(table, entries, FIELDS, WALK, walk)
    tl.store(first, begin)
    tl.store(last, end)
    tl.store(index, find(table, entries, FIELDS, FIRST_PROGRAM, program))


@pytest.mark.parametrize(
    ("walk", "first", "last"), [(-1, 0, 3), (0, 3, 130), (1, 130, 131), (2, 131, 300)]
)
def test_neighbours_in_a_table_longer_than_one_look(
    walk: int, first: int, last: int, device: torch.device
) -> None:
    """Looked through 128 entries at a time; of those that begin with one program, the last."""
    x = torch.ones(1, device=device)
    walks = [-1] * 3 + [0] * 127 + [1] + [2] * 169
    table = [descriptor(x, 1.0, number, 5 * (number + 1)) for number in walks]
    address = Operands([], x).launch(words(table))
    found = torch.empty(3, dtype=torch.int32, device=device)
    program = 5 * (walk + 1) + 4
    neighbours_kernel[(1,)](address, len(table), walk, program, found, found[1:], found[2:])
    assert found.tolist() == [first, last, last - 1]


def test_names_stand_in_the_order_of_the_fields() -> None:
    renamed = {"depth": "DEPTH_OF", "width": "WIDTH_OF"}
    for place, field in enumerate(fields(Descriptor)):
        assert getattr(table_of_banks, renamed.get(field.name, field.name.upper())).value == place
