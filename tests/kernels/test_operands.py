import pytest
import torch
from fino_fast.kernels.operands import Operand, Operands, Request, padded
from kernel_case import close, launched, names, random


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
    unit, divided, multiplied = operands(
        [
            Request(x.to(device), unit=True),
            Request(x.to(device), unit=True, divisor=by.to(device)),
            Request(x.to(device), unit=True, factor=by[2:3].to(device)),
        ],
        torch.float64,
    )
    expected = x / x.norm(dim=1, keepdim=True)
    close(unit.matrix[:, :3].cpu(), expected, torch.float64)
    close(divided.matrix[:, :3].cpu(), expected / by[:, None], torch.float64)
    close(multiplied.matrix[:, :3].cpu(), 3 * expected, torch.float64)
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
    assert len(seen[0].arguments["matrix"]) == copied
