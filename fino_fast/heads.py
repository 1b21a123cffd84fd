"""The metadata heads: parameters, buffers, and the update of the prototype banks."""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from . import cuda
from .distributed import gather_views
from .factors import Categorical, Continuous, Factor
from .groups import group_slots, group_sums
from .reference import accumulation_dtype, normalize


class LinearHead(nn.Linear):
    """The last layer of a linear or continuous head, behind an optional MLP.

    Args:
        dim: width D of the embedding.
        out: number of classes, or of values.
        hidden: widths of the MLP's layers (Linear, GELU, Dropout each).
        dropout: dropout probability.
    """

    def __init__(self, dim: int, out: int, hidden: tuple[int, ...], dropout: float) -> None:
        super().__init__((dim, *hidden)[-1], out)
        layers: list[nn.Module] = []
        for before, width in zip((dim, *hidden), hidden, strict=False):
            layers += [nn.Linear(before, width), nn.GELU(), nn.Dropout(dropout)]
        self.hidden = nn.Sequential(*layers)

    def named_modules(
        self,
        memo: set[nn.Module] | None = None,
        prefix: str = "",
        remove_duplicate: bool = True,
    ) -> Iterator[tuple[str, nn.Module]]:
        # The MLP runs before `weight` and `bias`; DDP wants parameters in the order of the forward
        # pass, which is the order of this listing.
        memo = set() if memo is None else memo
        own = prefix + ("." if prefix else "") + "hidden"
        yield from self.hidden.named_modules(memo, own, remove_duplicate)
        if self not in memo or not remove_duplicate:
            memo.add(self)
            yield prefix, self

    def features(self, z: Tensor) -> Tensor:
        """The rows that the last layer sees: z itself, or the MLP's output. [N, D] → [N, H]."""
        if not len(self.hidden):
            return z
        # Autocast casts by itself, but leaves fp64 alone.
        if z.dtype == torch.float64 or not torch.is_autocast_enabled(z.device.type):
            z = z.to(self.weight.dtype)
        features: Tensor = self.hidden(z)
        return features

    def forward(self, z: Tensor) -> Tensor:
        """What the head says of z: logits, or values before the activation. [N, D] → [N, out]."""
        return super().forward(self.features(z))


class PrototypeHead(nn.Module):
    """A bank of K class centroids; no parameters.

    Buffers:
        centroids: [K, D], unit vectors (`concentration="ema"`: unnormalised).
        temperatures: [K], φ_k.
        counts: [K] int64, rows of the class seen so far; 0 = class not yet seen.
    """

    centroids: Tensor
    temperatures: Tensor
    counts: Tensor

    def __init__(self, factor: Categorical, dim: int) -> None:
        super().__init__()
        self.factor = factor
        self.register_buffer("centroids", torch.zeros(factor.num_classes, dim))
        self.register_buffer(
            "temperatures", torch.full((factor.num_classes,), float(factor.temperature))
        )
        self.register_buffer("counts", torch.zeros(factor.num_classes, dtype=torch.int64))

    def extra_repr(self) -> str:
        return f"{self.factor.num_classes}, dim={self.centroids.shape[1]}"

    @torch.no_grad()
    def update(self, teacher: Tensor, labels: Tensor) -> None:
        """Move the bank towards the teacher's embeddings, view by view in order.

        With t̂ the n unit rows of class k in a view: c_k ← mean t̂ where the class is new, else
        m·c_k + (1 − m)·mean t̂; then c_k ← c_k/‖c_k‖ (`fixed`) and count_k ← count_k + n. Rows of
        all ranks count. Rows that are missing or not finite are left out: one overflow must not
        destroy a bank for ever. The cost depends on the rows, not on the size of the bank.

        Args:
            teacher: [V', B, D].
            labels: [B] int64; −1 is missing.
        """
        update_banks([self], teacher, [labels])


# An operator, for Inductor to leave alone: until PyTorch 2.11 it fuses the read of a bank with the
# write back to it, so that of several rows of one class each moves what the last one has moved
# (pytorch/pytorch#174074).
@torch.library.custom_op("fino::update_bank", mutates_args=("centroids", "temperatures", "counts"))
def _update_bank(
    centroids: Tensor,
    temperatures: Tensor,
    counts: Tensor,
    rows: Tensor,
    labels: Tensor,
    momentum: float,
    unit_norm: bool,
) -> None:
    """Move one bank towards the rows of all views of all ranks, view by view.

    Args:
        centroids, temperatures, counts: as in `PrototypeHead`.
        rows: [V, N, D].
        labels: [N].
        momentum: m.
        unit_norm: `concentration="fixed"`.
    """
    for view in rows.unbind(0):
        unit = normalize(view.to(accumulation_dtype(view.dtype)))
        valid = (labels >= 0) & unit.isfinite().all(1)
        # Fixed shapes: every row writes the new state of its class; rows of one class write the
        # same. A row that takes no part writes that of the largest label present, or, where none
        # is, the unchanged state of class 0.
        present = torch.where(valid, labels, -1)
        classes = torch.where(valid, labels, present.max().clamp_min(0))
        slots = group_slots(classes)
        mask = valid.to(unit.dtype)
        size = group_sums(mask, slots)[slots]
        unit = torch.where(valid[:, None], unit, 0.0)
        mean = group_sums(unit, slots)[slots] / size.clamp_min(1)[:, None]

        seen, old = counts[classes], centroids[classes].to(unit.dtype)
        known = seen > 0
        new = torch.where(known[:, None], momentum * old + (1 - momentum) * mean, mean)
        if unit_norm:
            new = normalize(new)
        else:
            phi = temperatures[classes].to(unit.dtype)
            distance = (unit - normalize(old)).square().sum(1) * mask
            spread = (group_sums(distance, slots)[slots] / size.clamp_min(1)).sqrt()
            moved = torch.where(known & (size >= 2), momentum * phi + (1 - momentum) * spread, phi)
            temperatures[classes] = moved.to(temperatures.dtype)
        new = torch.where((size > 0)[:, None], new, old)
        centroids[classes] = new.to(centroids.dtype)
        counts[classes] = seen + size.to(torch.int64)


@_update_bank.register_fake
def _(*arguments: Any) -> None:
    return None


@torch.no_grad()
def update_banks(heads: list[PrototypeHead], teacher: Tensor, labels: list[Tensor]) -> None:
    """`PrototypeHead.update` of several heads; on a GPU in one launch for all of them.

    Args:
        heads: at least one.
        teacher: [V', B, D].
        labels: [B] int64 for every head.
    """
    views = teacher.shape[0]
    rows = gather_views(teacher.detach().flatten(0, 1), views).view(views, -1, teacher.shape[-1])
    of_head = gather_views(torch.stack(labels, 1), 1).unbind(1)
    fused = [f for f, head in enumerate(heads) if cuda.serves(head.centroids, rows)]
    if fused:
        ordered, order = torch.sort(torch.stack([of_head[f] for f in fused]), stable=True)
        cuda.bank_update(
            [heads[f].centroids for f in fused],
            [heads[f].temperatures for f in fused],
            [heads[f].counts for f in fused],
            rows.float(),
            order,
            ordered,
            [heads[f].factor.momentum for f in fused],
            [heads[f].factor.concentration == "fixed" for f in fused],
        )
    for f, head in enumerate(heads):
        if f not in fused:
            _update_bank(
                head.centroids, head.temperatures, head.counts, rows, of_head[f],
                head.factor.momentum, head.factor.concentration == "fixed",
            )  # fmt: skip


Head = LinearHead | PrototypeHead


def build_head(factor: Factor, dim: int) -> Head:
    """The head of one factor for embeddings of width `dim`."""
    if isinstance(factor, Continuous):
        return LinearHead(dim, factor.dim, factor.hidden, factor.dropout)
    if factor.head == "linear":
        return LinearHead(dim, factor.num_classes, factor.hidden, factor.dropout)
    return PrototypeHead(factor, dim)


class Heads(nn.ModuleDict):
    """Heads by factor name. Any name will do, `type` and `keys` too."""

    def add_module(self, name: str, module: nn.Module | None) -> None:
        # nn.Module.add_module refuses the names of its own attributes; reached by [name] only,
        # these do not collide.
        assert module is not None
        self._modules[name] = module
