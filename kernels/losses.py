"""The losses of all banks from the sums of their rows, which `sweep` leaves.

They do not fit tiles, so they are CUDA C++ where it was built (`fino_fast.cuda`), one launch for
all banks, and otherwise plain PyTorch, with launches for every bank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from fino_fast import cuda

from .bank import Bank
from .epilogues import PAIRS, PROTOTYPE
from .operands import starts


@dataclass
class Sums:
    """Of every bank, one after the other, the sums of N rows over each of its parts.

    Attributes:
        partial: [4, P], P = N · Σ splits: log-sum-exps; largest logits; logits of the targets (of a
            contrastive term the mean over the positives), or squared errors; sums of all logits.
        best: [P] int32, classes of the largest logits.
        lse: [E, N], a result: the log-sum-exps over all parts.
        splits: into how many parts every bank is split.
    """

    partial: Tensor
    best: Tensor
    lse: Tensor
    splits: list[int]


def reduce_sums(banks: list[Bank], sums: Sums) -> tuple[Tensor, Tensor, Tensor]:
    """Losses, metrics, and losses times weights of all banks, [E] each; fills `sums.lse`.

    The loss of a row is its cross entropy with smoothed labels,
    lse − (1 − ε)·s_target − ε/K·Σ_k s_k, or its squared error; without a target it is 0, whatever
    the row holds. The metric is the share of right predictions, or the squared error, or for a
    contrastive term 0.
    """
    if cuda.serves_sums(sums.partial):
        none = sums.best.new_empty(0, dtype=torch.int64)
        results: tuple[Tensor, Tensor, Tensor] = cuda.term_losses(
            sums.partial,
            sums.best,
            [bank.target if bank.kind <= PROTOTYPE.value else none for bank in banks],
            [bank.inv_count for bank in banks],
            sums.splits,
            [bank.vectors.shape[0] for bank in banks],
            [float(bank.smoothing) for bank in banks],
            [float(bank.weight) for bank in banks],
            [_is_error(bank) for bank in banks],
            sums.lse,
        )
        return results
    n = sums.lse.shape[1]
    losses, metrics = [], []
    for e, (bank, first) in enumerate(zip(banks, starts(sums.splits), strict=True)):
        splits = sums.splits[e]
        part = slice(n * first, n * (first + splits))
        partial, peaks, at_target, all_logits = sums.partial[:, part].view(4, splits, n)
        lse = sums.lse[e].copy_(partial.logsumexp(0))
        at_target = at_target.sum(0)
        if _is_error(bank):
            losses.append(at_target.sum() * bank.inv_count)
            metrics.append(losses[-1])
            continue
        epsilon = bank.smoothing
        loss = lse - (1 - epsilon) * at_target
        if epsilon:
            loss = loss - epsilon / bank.vectors.shape[0] * all_logits.sum(0)
        if bank.kind == PAIRS.value:
            hits = torch.zeros_like(loss)
        else:
            valid = bank.target >= 0
            loss = torch.where(valid, loss, 0)
            # The first of equal ones, as within a part.
            best = sums.best[part].view(splits, n).gather(0, peaks.argmax(0, keepdim=True))
            hits = (valid & (best[0] == bank.target)).to(loss.dtype)
        losses.append(loss.sum() * bank.inv_count)
        metrics.append(hits.sum() * bank.inv_count)
    weighted = torch.stack([bank.weight * loss for bank, loss in zip(banks, losses, strict=True)])
    return torch.stack(losses), torch.stack(metrics), weighted


def _is_error(bank: Bank) -> bool:
    return bool(bank.kind > PROTOTYPE.value and bank.kind != PAIRS.value)
