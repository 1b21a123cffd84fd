import torch
from fino_fast.kernels.inverse_norms import inverse_norms
from kernel_case import close, random


def test_matrices_of_different_shapes_and_dtypes(device: torch.device) -> None:
    matrices = [
        random(37, 5, dtype=torch.float32, seed=0),
        random(1, 300, dtype=torch.bfloat16, seed=1),
        random(16, 1, dtype=torch.float16, seed=2),
        random(3, 8, dtype=torch.float32, seed=3)[:, :5],
        random(1, 7, dtype=torch.float32, seed=4).expand(20, 7),
    ]
    found = inverse_norms([matrix.to(device) for matrix in matrices])
    for matrix, norms in zip(matrices, found, strict=True):
        close(norms.cpu(), 1 / matrix.double().norm(dim=1), torch.float32)


def test_double_precision(device: torch.device) -> None:
    x = random(5, 3, dtype=torch.float64, seed=0)
    (norms,) = inverse_norms([x.to(device)])
    close(norms.cpu(), 1 / x.norm(dim=1), torch.float64)


def test_a_zero_row_has_the_norm_1e_12(device: torch.device) -> None:
    (norms,) = inverse_norms([torch.zeros(2, 3, device=device)])
    close(norms.cpu(), torch.full((2,), 1e12), torch.float32)
