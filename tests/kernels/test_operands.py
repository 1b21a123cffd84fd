from dataclasses import fields

import pytest
import torch
from fino_fast.kernels.operands import (
    MOST_MATRICES,
    MOST_WORDS,
    Operand,
    Operands,
    Request,
    padded,
)
from fino_fast.kernels.table import Matrix
from kernel_case import close, launched, names, random, words_of


def operands(requests: list[Request], dtype: torch.dtype) -> list[Operand]:
    prepared = Operands(requests, requests[0].matrix.new_empty(0, dtype=dtype))
    prepared.launch([])
    return prepared.ready


def test_norms_of_matrices_of_different_shapes_and_dtypes(device: torch.device) -> None:
    matrices = [
        random(37, 5, dtype=torch.float32, seed=0),
        random(1, 300, dtype=torch.bfloat16, seed=1),
        random(16, 1, dtype=torch.float16, seed=2),
        random(3, 8, dtype=torch.float32, seed=3)[:, :5],
        random(1, 7, dtype=torch.float32, seed=4).expand(20, 7),
        random(9, 6, dtype=torch.float32, seed=5).T,
    ]
    requests = [Request(matrix.to(device), norms=True) for matrix in matrices]
    for matrix, found in zip(matrices, operands(requests, torch.float32), strict=True):
        close(found.inverse_norms.cpu(), 1 / matrix.double().norm(dim=1), torch.float32)
        width = matrix.shape[1]
        assert found.matrix.shape == (len(matrix), padded(width))
        assert torch.equal(found.matrix[:, :width].cpu(), matrix.float())
        assert found.matrix[:, width:].eq(0).all()


def test_unit_rows_and_what_they_are_divided_by(device: torch.device) -> None:
    x, by = random(5, 3, dtype=torch.float64, seed=0), torch.arange(1.0, 6, dtype=torch.float64)
    unit, divided, multiplied, both = operands(
        [
            Request(x.to(device), unit=True),
            Request(x.to(device), unit=True, divisor=by.to(device)),
            Request(x.to(device), unit=True, factor=by[2:3].to(device)),
            Request(x.to(device), divisor=by.to(device), factor=by[1].to(device)),
        ],
        torch.float64,
    )
    expected = x / x.norm(dim=1, keepdim=True)
    close(unit.matrix[:, :3].cpu(), expected, torch.float64)
    close(divided.matrix[:, :3].cpu(), expected / by[:, None], torch.float64)
    close(multiplied.matrix[:, :3].cpu(), 3 * expected, torch.float64)
    close(both.matrix[:, :3].cpu(), 2 * x / by[:, None], torch.float64)
    close(unit.inverse_norms.cpu(), 1 / x.norm(dim=1), torch.float64)


def test_a_zero_row_has_the_norm_1e_12(device: torch.device) -> None:
    (found,) = operands([Request(torch.zeros(2, 3, device=device), unit=True)], torch.float32)
    close(found.inverse_norms.cpu(), torch.full((2,), 1e12), torch.float32)
    assert found.matrix.eq(0).all()


@pytest.mark.parametrize(
    ("matrix", "copied"),
    [
        (torch.zeros(3, 32), False),
        (torch.zeros(3, 64)[:, :32], False),
        (torch.zeros(3, 32).bfloat16(), True),
        (torch.zeros(3, 31), True),
        (torch.zeros(3, 33)[:, :32], True),
        (torch.zeros(3 * 32 + 1)[1:].view(3, 32), True),
    ],
)
def test_only_what_cannot_be_read_as_it_is_gets_copied(
    matrix: torch.Tensor, copied: bool, device: torch.device
) -> None:
    # Moved with its strides and its offset.
    storage = matrix.untyped_storage().to(device=device)
    moved = torch.empty(0, dtype=matrix.dtype, device=device)
    moved.set_(storage, matrix.storage_offset(), matrix.shape, matrix.stride())
    with launched() as seen:
        (found,) = operands([Request(moved)], torch.float32)
    assert (found.matrix.data_ptr() != moved.data_ptr()) == copied
    # One launch for all, which writes the table too.
    assert names(seen) == ["operands"]
    assert sum(words_of(seen[0].arguments["matrices"], Matrix, "rows")) == (3 if copied else 0)


def test_rows_further_apart_than_a_stride_of_32_bits(device: torch.device) -> None:
    """The pages between them are never touched."""
    stride, x = 2**31 + 16, random(2, 3, dtype=torch.float16, seed=0)
    try:
        # torch.empty would be filled by the poison.
        storage = torch.UntypedStorage(2 * (stride + 3), device=device)
    except RuntimeError as error:
        pytest.skip(f"no 4 GB of address space: {error}")
    far = torch.empty(0, dtype=torch.float16, device=device).set_(storage, 0, (2, 3), (stride, 1))
    far.copy_(x)
    (found,) = operands([Request(far)], torch.float16)
    assert torch.equal(found.matrix[:, :3].cpu(), x)


def test_more_than_one_launch_can_carry(device: torch.device) -> None:
    """As of hundreds of factors; CUDA takes 32,764 bytes of arguments."""
    matrices = [
        random(1 + i % 3, 2, dtype=torch.float32, seed=i).to(device)
        for i in range(MOST_MATRICES + 5)
    ]
    prepared = Operands([Request(matrix, unit=True) for matrix in matrices], matrices[0])
    described = [1 << 63 | i << 1 | 1 for i in range(MOST_WORDS + 7)]
    with launched() as seen:
        table = prepared.launch(described)
    assert names(seen) == ["operands"] * 2
    for launch in seen:
        assert 8 * sum(len(launch.arguments[name]) for name in ("matrices", "words")) < 32_000
    for matrix, found in zip(matrices, prepared.ready, strict=True):
        expected = matrix / matrix.norm(dim=1, keepdim=True)
        close(found.matrix[:, :2].cpu(), expected.cpu(), torch.float32)
    written = table[: len(described)].view(torch.int64).cpu()
    assert torch.equal(written, torch.tensor([word - (1 << 64) for word in described]))


@pytest.mark.parametrize(("count", "carried"), [(1, 1), (3, 4), (4, 4), (33, 64), (64, 64)])
def test_few_numbers_of_matrices_are_compiled(
    count: int, carried: int, device: torch.device
) -> None:
    matrix = random(2, 3, dtype=torch.float32, seed=0).to(device)
    with launched() as seen:
        operands([Request(matrix)] * count, torch.float32)
    (launch,) = seen
    assert len(launch.arguments["matrices"]) == carried * len(fields(Matrix))
