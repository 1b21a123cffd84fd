"""Calls of the kernels, and what plain PyTorch in fp64 says of them."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace

import torch
from fino_fast.kernels.bank import Bank, Batch
from fino_fast.kernels.epilogues import PAIRS
from fino_fast.kernels.launch import Launch, intercepted, run
from fino_fast.kernels.table import Descriptor
from torch import Tensor

from fino_fast.eager import head_loss
from fino_fast.reference import accumulation_dtype, contrastive_rows, trainable_target
from fino_fast.terms import HeadCall, Kind, Step
from fino_fast.triton import Triton

# Largest error relative to the largest entry.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 3e-3,
    torch.bfloat16: 2e-2,
}


def close(found: Tensor, expected: Tensor, dtype: torch.dtype, size: float | None = None) -> None:
    """Assert that `found` is `expected` up to the precision of `dtype`."""
    found, expected = found.detach().double(), expected.detach().double()
    assert found.shape == expected.shape
    assert found.isfinite().all(), found
    largest = max(expected.abs().max().item() if size is None else size, 1e-6)
    assert (found - expected).abs().max().item() <= TOLERANCE[dtype] * largest


def random(*shape: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def head_call(
    kind: Kind,
    n: int,
    depth: int,
    classes: int,
    dtype: torch.dtype,
    seed: int = 0,
    **changes: object,
) -> HeadCall:
    """A head with missing entries, and unseen classes where it is a prototype head.

    Bank and offsets hold numbers of `dtype`, so that converting them to it loses nothing.
    """
    sums = accumulation_dtype(dtype)
    generator = torch.Generator().manual_seed(seed + 1)
    x = random(n, depth, dtype=dtype, seed=seed)
    bank = (random(classes, depth, dtype=dtype, seed=seed + 2) / 4).to(sums)
    offset = random(classes, dtype=dtype, seed=seed + 3).to(sums)
    counts = None
    if kind in ("linear", "prototype"):
        target = torch.randint(-1, classes, (n,), generator=generator)
        if kind == "prototype":
            offset = offset.abs() / 4 + 0.125
            counts = torch.randint(0, 3, (classes,), generator=generator)
            target = trainable_target(target, counts)
        valid = target >= 0
    else:
        target = torch.rand(n, classes, generator=generator, dtype=torch.float64).to(sums)
        target[torch.rand(n, classes, generator=generator) < 0.3] = torch.nan
        valid = ~target.isnan()
    call = HeadCall(kind, x, bank, offset, target, inverse(valid, sums), counts=counts)
    return replace(call, **changes)


def inverse(valid: Tensor, dtype: torch.dtype) -> Tensor:
    return 1 / valid.sum().clamp_min(1).to(dtype)


@dataclass
class Run:
    """What a step gave of some heads.

    Attributes:
        losses, metrics: [F].
        rows: ∂L/∂x of every different x; L is the sum of (f + 1) · upstream · loss f.
        bank, offset: ∂L/∂bank and ∂L/∂offset of every head; None for prototypes.
        kept: ∂loss/∂x of every head where the step is balanced.
    """

    losses: Tensor
    metrics: Tensor
    rows: list[Tensor]
    bank: list[Tensor | None]
    offset: list[Tensor | None]
    kept: list[Tensor | None]


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor there with the strides that it has here; `to` closes gaps."""
    size = tensor.untyped_storage().nbytes() // tensor.element_size()
    memory = tensor.detach().as_strided((size,), (1,), 0).to(device)
    return memory.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())


def run_heads(
    calls: list[HeadCall],
    device: torch.device,
    balanced: bool = False,
    guidance: float = 1.0,
    upstream: float = 1.0,
) -> Run:
    """A step of the backend, forward and backward; heads on one tensor stay on one tensor."""
    leaves: dict[int, Tensor] = {}

    def leaf(tensor: Tensor) -> Tensor:
        return leaves.setdefault(id(tensor), on_device(tensor, device).detach().requires_grad_())

    sums = accumulation_dtype(calls[0].x.dtype)
    moved = []
    for f, call in enumerate(calls):
        trained = call.kind != "prototype"
        bank, offset = (
            leaf(tensor) if trained else tensor.to(device) for tensor in (call.bank, call.offset)
        )
        moved.append(
            replace(
                call, x=leaf(call.x), bank=bank, offset=offset, target=call.target.to(device),
                inv_count=call.inv_count.to(device),
                counts=None if call.counts is None else call.counts.to(device),
                guidance=torch.tensor(guidance, dtype=sums, device=device), weight=f + 1.0,
            )
        )  # fmt: skip
    result = Triton().step(Step(heads=moved, balanced=balanced))
    losses = torch.stack([head.loss for head in result.heads])
    total = result.guides
    if total is None:
        total = (losses * torch.arange(1, len(calls) + 1, dtype=sums, device=device)).sum()
    gradients = dict(
        zip(
            leaves,
            torch.autograd.grad(total, list(leaves.values()), torch.full_like(total, upstream)),
            strict=True,
        )
    )
    return Run(
        losses.detach(),
        torch.stack([head.metric for head in result.heads]),
        [gradients[key] for key in {id(call.x): None for call in calls}],
        [gradients.get(id(call.bank)) for call in calls],
        [gradients.get(id(call.offset)) for call in calls],
        [head.gradient for head in result.heads],
    )


@contextmanager
def launched() -> Iterator[list[Launch]]:
    """Inside, launches are run and noted."""
    seen: list[Launch] = []

    def note(launch: Launch) -> None:
        seen.append(launch)
        run(launch)

    with intercepted(note):
        yield seen


def names(launches: list[Launch]) -> list[str]:
    return [launch.kernel.__name__.removesuffix("_kernel") for launch in launches]


def words_of(words: tuple[int, ...], record: type, name: str) -> list[int]:
    """A field of all records."""
    columns = [field.name for field in fields(record)]
    return [word >> 1 & (1 << 62) - 1 for word in words[columns.index(name) :: len(columns)]]


def described(operands: Launch, banks: int, name: str) -> list[int]:
    """A field of the descriptors that a launch of `operands` writes, of all banks."""
    words = operands.arguments["words"][: banks * len(fields(Descriptor))]
    return words_of(words, Descriptor, name)


def expected_head(call: HeadCall) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:
    """(loss, metric, ∂loss/∂x, ∂loss/∂bank, ∂loss/∂offset) in fp64; rows of no use count as 0."""
    used = call.target >= 0 if call.target.dim() == 1 else ~call.target.isnan().all(1)
    x = torch.where(used[:, None], call.x.double(), 0.0).requires_grad_()
    bank, offset = (t.double().requires_grad_() for t in (call.bank, call.offset))
    target = call.target if call.target.dim() == 1 else call.target.double()
    exact = replace(
        call, bank=bank, offset=offset, target=target, inv_count=call.inv_count.double()
    )
    loss, metric = head_loss(exact, x)
    gradients = torch.autograd.grad(loss, [x, bank, offset], allow_unused=True)
    return loss.detach(), metric, *gradients


def check_heads(calls: list[HeadCall], device: torch.device, balanced: bool = False) -> None:
    """Assert that one step gives every head's value and gradients, summed where rows are shared."""
    found = run_heads(calls, device, balanced, guidance=-0.5, upstream=3.0)
    spaces: dict[int, Tensor] = {}
    for f, call in enumerate(calls):
        loss, metric, by_x, *expected = expected_head(call)
        close(found.losses[f].cpu(), loss, call.x.dtype, size=max(1.0, loss.item()))
        close(found.metrics[f].cpu(), metric, call.x.dtype, size=max(1.0, loss.item()))
        factor = 3.0 * (f + 1)
        spaces[id(call.x)] = spaces.get(id(call.x), 0) - 0.5 * factor * by_x
        kept = found.kept[f]
        assert (kept is not None) == balanced
        if kept is not None:
            close(kept.cpu(), by_x, call.x.dtype)
        if call.kind == "prototype":
            continue
        of = (call.bank, call.offset)
        trained = (found.bank[f], found.offset[f])
        for gradient, wanted, like in zip(trained, expected, of, strict=True):
            assert gradient is not None
            assert wanted is not None
            assert gradient.dtype == like.dtype
            close(gradient.cpu(), factor * wanted, call.x.dtype)
    for gradient, wanted, call in zip(found.rows, spaces.values(), calls, strict=False):
        assert gradient.dtype == call.x.dtype
        close(gradient.cpu(), wanted, call.x.dtype)


def contrastive_bank(
    rows: Tensor, columns: Tensor, scale: Tensor, views: int, first: int, two_tower: bool
) -> Bank:
    """A contrastive term, its loss over M as `ops.contrastive` has it."""
    sums = accumulation_dtype(rows.dtype)
    one = torch.ones((), dtype=sums, device=rows.device)
    none = torch.empty(0, dtype=torch.int64, device=rows.device)
    return Bank(
        PAIRS.value, 0, rows, columns, scale.to(rows.device), none, one / len(columns), none, 0.0,
        1.0, one, Batch(views, first, two_tower),
    )  # fmt: skip


def expected_contrastive(
    p: Tensor, scale: Tensor, views: int, two_tower: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(loss, gradient at p, gradient at the scale) of a whole batch in fp64."""
    p, scale = p.double().requires_grad_(), scale.double().requires_grad_()
    loss = contrastive_rows(p, p, scale, views, 0, two_tower).mean()
    return loss.detach(), *torch.autograd.grad(loss, [p, scale])
