"""The banks of a step, as the two passes are told of them."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .epilogues import IDENTITY, OVERLAP, PAIRS, PROTOTYPE, TANH
from .operands import Operands, Request, sum_dtype
from .table import Descriptor


@dataclass(frozen=True)
class Batch:
    """The batch of a contrastive term; see `ops.contrastive`.

    Attributes:
        views: V.
        first: index of the first local image.
        two_tower: CLIP's form.
    """

    views: int
    first: int
    two_tower: bool


@dataclass
class Bank:
    """One term of the step. All x of a step have one dtype and one number of rows.

    Attributes:
        kind: number in `fino_fast.ops.KINDS`, or PAIRS or OVERLAP of `epilogues`.
        space: number of x among the different ones of the step.
        x: [N, D] rows.
        vectors: [K, D] class weights, centroids, output vectors, the rows of all ranks, or what a
            factor explains.
        offset: [K] bias or φ; of a contrastive term 1/τ, 0-d; of an overlap by what its rows are
            multiplied, 0-d.
        target, inv_count, counts, smoothing, guidance: as in `terms.HeadCall`; targets and counts
            are empty where there are none. The target of an overlap is a row of zeros, [K].
        weight: by which the loss counts.
        batch: of a contrastive term.
        is_ready: of prototypes: the vectors are as the forward pass made them ready, of unit length
            over φ; the offset is of no use.
    """

    kind: int
    space: int
    x: Tensor
    vectors: Tensor
    offset: Tensor
    target: Tensor
    inv_count: Tensor
    counts: Tensor
    smoothing: float
    weight: float
    guidance: Tensor
    batch: Batch | None = None
    is_ready: bool = False
    offset_dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        sums, self.offset_dtype = self.sums, self.offset.dtype
        self.offset = self.offset.detach().to(sums).contiguous().view(-1)
        self.inv_count, self.guidance = self.inv_count.to(sums), self.guidance.to(sums)
        if self.target.is_floating_point():
            self.target = self.target.to(sums)
        self.target = self.target.contiguous()

    @property
    def sums(self) -> torch.dtype:
        return sum_dtype(self.x.dtype)

    @property
    def is_trained(self) -> bool:
        """Whether the bank's vectors may get a gradient."""
        return self.kind not in (PROTOTYPE.value, PAIRS.value)


def is_head(kind: int) -> bool:
    """Whether a bank of this kind is a head's."""
    return bool(kind <= TANH.value)


def prepare(banks: list[Bank], like: Tensor) -> tuple[Operands, list[Descriptor]]:
    """The matrices that the sweeps read, and the part of the table that both passes share.

    Args:
        banks: of one step.
        like: any tensor of the rows' dtype and device.
    """
    spaces = {bank.space: bank.x for bank in banks}
    cosine = {bank.space for bank in banks if bank.kind in (PROTOTYPE.value, PAIRS.value)}
    scale = {bank.space: bank.offset for bank in banks if bank.kind == OVERLAP.value}
    requests = [Request(x, norms=i in cosine, factor=scale.get(i)) for i, x in spaces.items()]
    for bank in banks:
        if bank.kind == PROTOTYPE.value and not bank.is_ready:
            requests.append(Request(bank.vectors, unit=True, divisor=bank.offset))
        elif bank.kind == PAIRS.value:
            requests.append(Request(bank.vectors, unit=True, factor=bank.offset))
        else:
            requests.append(Request(bank.vectors))
    operands = Operands(requests, like)
    rows_of = dict(zip(spaces, operands.ready[: len(spaces)], strict=True))
    descriptors: list[Descriptor] = []
    for bank, ready in zip(banks, operands.ready[len(spaces) :], strict=True):
        rows = rows_of[bank.space]
        descriptor = Descriptor(
            space=bank.space,
            kind=IDENTITY.value if bank.kind == OVERLAP.value else bank.kind,
            x=rows.matrix,
            x_stride=rows.matrix.stride(0),
            depth=rows.matrix.shape[1],
            norms=rows.inverse_norms,
            bank=ready.matrix,
            bank_stride=ready.matrix.stride(0),
            classes=bank.vectors.shape[0],
            offset=bank.target if bank.kind == OVERLAP.value else bank.offset,
            target=bank.target,
            target_stride=0 if bank.kind == OVERLAP.value else bank.vectors.shape[0],
            counts=bank.counts,
            smoothing=float(bank.smoothing),
            inv_count=bank.inv_count,
        )
        if bank.batch is not None:
            descriptor.local = bank.x.shape[0] // bank.batch.views
            descriptor.images = bank.vectors.shape[0] // bank.batch.views
            descriptor.first = bank.batch.first
            descriptor.two_tower = int(bank.batch.two_tower)
        descriptors.append(descriptor)
    return operands, descriptors
