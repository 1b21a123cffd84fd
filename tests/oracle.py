"""The objective once more, written from its definition with loops, in fp64, and from nothing else.

It shares no code with `fino_fast`, the reference included. Everything is differentiable by autograd
with respect to its floating-point arguments; signs, λ and weights are left to the caller.
"""

import math

import torch
from torch import Tensor


def unit(x: Tensor) -> Tensor:
    return x / torch.clamp(torch.sqrt((x * x).sum()), min=1e-12)


def info_nce(p: Tensor, tau: Tensor | float, two_tower: bool = False) -> Tensor:
    """p: [V, B, P]."""
    views, images, _ = p.shape
    rows = {(v, b): unit(p[v, b]) for v in range(views) for b in range(images)}
    losses = []
    for v, b in rows:
        others = [key for key in rows if (key[0] != v if two_tower else key != (v, b))]
        logits = {key: rows[v, b] @ rows[key] / tau for key in others}
        positives = [logits[key] for key in others if key[1] == b and key[0] != v]
        lse = torch.logsumexp(torch.stack(list(logits.values())), 0)
        losses.append(lse - sum(positives) / len(positives))
    return sum(losses) / len(losses)


def _mean(losses: list[Tensor], like: Tensor) -> Tensor:
    return sum(losses) / len(losses) if losses else 0 * like.sum()


def linear(z: Tensor, w: Tensor, b: Tensor, labels: list[int], smoothing: float = 0.0) -> Tensor:
    losses = []
    for row, k in zip(z, labels, strict=True):
        if k < 0:
            continue
        logits = torch.stack([w[c] @ row + b[c] for c in range(len(w))])
        log_p = logits - torch.logsumexp(logits, 0)
        losses.append(-(1 - smoothing) * log_p[k] - smoothing * log_p.sum() / len(w))
    return _mean(losses, z)


def prototype(z: Tensor, bank: "Bank", labels: list[int]) -> Tensor:
    seen = [k for k in range(len(bank.counts)) if bank.counts[k] > 0]
    losses = []
    for row, k in zip(z, labels, strict=True):
        if k not in seen:
            continue
        logits = {c: unit(row) @ unit(bank.centroids[c]) / bank.temperatures[c] for c in seen}
        losses.append(torch.logsumexp(torch.stack(list(logits.values())), 0) - logits[k])
    return _mean(losses, z)


def continuous(z: Tensor, w: Tensor, b: Tensor, target: Tensor, activation: str) -> Tensor:
    act = {
        "identity": lambda a: a,
        "sigmoid": lambda a: 1 / (1 + torch.exp(-a)),
        "tanh": lambda a: (torch.exp(a) - torch.exp(-a)) / (torch.exp(a) + torch.exp(-a)),
    }[activation]
    losses = []
    for row, y in zip(z, target, strict=True):
        losses += [
            (act(w[j] @ row + b[j]) - y[j]) ** 2 for j in range(len(w)) if not math.isnan(y[j])
        ]
    return _mean(losses, z)


def design(labels: list[int]) -> tuple[Tensor, list[int]]:
    """(one indicator column per category present, the valid rows)."""
    valid = [i for i, k in enumerate(labels) if k >= 0]
    classes = sorted({labels[i] for i in valid})
    x = torch.zeros(len(valid), len(classes), dtype=torch.float64)
    for row, i in enumerate(valid):
        x[row, classes.index(labels[i])] = 1
    return x, valid


def orthogonal(z: Tensor, x: Tensor, valid: list[int], role: str) -> Tensor:
    """x: [valid rows, columns], not centred. The projector comes from least squares."""
    if not valid:
        return 0 * z.sum()
    z = z[valid]
    z = z - z.mean(0)
    x = x - x.mean(0)
    # Π e_i is the fit of the i-th unit vector; gelsd takes a deficient rank.
    fit = torch.linalg.lstsq(x, torch.eye(len(x), dtype=x.dtype), driver="gelsd").solution
    s = x @ fit @ z
    u = z - s
    if role == "suppress":
        top, bottom = (s**2).sum(), (z**2).sum()
    else:
        top, bottom = ((s @ u.T) ** 2).sum(), (s**2).sum() * (u**2).sum()
    return top / bottom if bottom >= 1e-12 else 0 * z.sum()


def schedule(kind: str, warmup: float, progress: float) -> float:
    if progress < warmup:
        return 0.0
    q = (progress - warmup) / (1 - warmup)
    return {"sigmoid": 2 / (1 + math.exp(-10 * q)) - 1, "linear": q, "constant": 1.0}[kind]


def balance(running: list[float] | None, now: list[float]) -> tuple[list[float], list[float]]:
    """(n_f after this step, s_f)."""
    mu = 0.99
    n = now
    if running is not None:
        n = [mu * old + (1 - mu) * new for old, new in zip(running, now, strict=True)]
    geometric = math.prod(n) ** (1 / len(n))
    return n, [geometric / value for value in n]


class Bank:
    """A prototype bank: Python lists, one row at a time."""

    def __init__(self, classes: int, dim: int, temperature: float, momentum: float, ema: bool):
        self.centroids = [torch.zeros(dim, dtype=torch.float64) for _ in range(classes)]
        self.temperatures = [temperature] * classes
        self.counts = [0] * classes
        self.momentum, self.ema = momentum, ema

    def update(self, teacher: Tensor, labels: list[int]) -> None:
        """teacher: [V, B, D]."""
        m = self.momentum
        for view in teacher.detach().double():
            for k in range(len(self.counts)):
                rows = [unit(row) for row, label in zip(view, labels, strict=True) if label == k]
                if not rows:
                    continue
                mean, n, old = sum(rows) / len(rows), len(rows), self.centroids[k]
                if self.ema and n >= 2 and self.counts[k] > 0:
                    spread = sum(float(((row - unit(old)) ** 2).sum()) for row in rows) / n
                    phi = self.temperatures[k]
                    self.temperatures[k] = m * phi + (1 - m) * math.sqrt(spread)
                new = mean if self.counts[k] == 0 else m * old + (1 - m) * mean
                self.centroids[k] = new if self.ema else unit(new)
                self.counts[k] += n
