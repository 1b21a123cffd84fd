"""FinoLoss: the only place that puts the terms together."""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal, cast, overload

import torch
from torch import Tensor, nn

from . import checks
from .backends import BackendName, prepare, resolve
from .distributed import after, same_images, sum_over_ranks, whole
from .factors import Categorical, Continuous, Factor, InfoNCE, LambdaSchedule
from .frozen import frozen
from .heads import Heads, LinearHead, PrototypeHead, build_head, update_banks
from .reference import (
    accumulation_dtype,
    balance_scales,
    constants,
    rows_of,
    scale_gradient,
    scaled_target,
    trainable_target,
)
from .terms import (
    ContrastiveCall,
    HeadCall,
    HeadResult,
    Kind,
    OrthogonalCall,
    Step,
    StepResult,
)

Terms = dict[str, Tensor]
# From a gradient at a head's hidden features to the gradient at the embedding; None without MLP.
Pullback = Callable[[Tensor], tuple[Tensor]] | None
_numbers = itertools.count()  # of the losses of this process
BALANCE_MOMENTUM = 0.99  # μ of the running gradient norms


class FinoLoss(nn.Module):
    """The FINO objective: a contrastive loss with metadata guidance (arXiv 2606.05107).

    L = w · L_contrastive + Σ_f weight_f · L_f + Σ_f orthogonal_f · R_f

    The gradient of L_f to the embedding is multiplied by +λ (`preserve`) or −λ (`suppress`), that
    of R_f by λ; the heads' own parameters see neither. Over `torch.distributed` all ranks form one
    batch: the value is that of the whole batch, and so are the gradients once they are averaged
    over ranks, as DDP does. Every rank must have the same number of images.

    Args:
        dim: width D of the embeddings.
        factors: the metadata factors.
        contrastive: the contrastive term; None leaves it out.
        contrastive_weight: w.
        schedule: λ as a function of the progress given to `set_progress`.
        balance: scale the guides to a common gradient norm; needs two of them.
        backend: `auto`, `native` (C++, CPU), `triton` (GPU) or `eager` (plain PyTorch).
        validate: check the values of the metadata on a GPU too, where the host has to wait for the
            answer. On a CPU they are always checked; while torch.compile traces, never.
        deterministic: the same bits from any number of CPU threads (of the fused backends; from run
            to run they are the same anyhow). docs/kernels.md says what it costs.

    Attributes:
        heads: factor name → head (`weight`, `bias`; or `centroids`, `temperatures`, `counts` and
            `update(teacher, labels)`).

    Raises:
        ValueError: senseless arguments.
    """

    guidance: Tensor
    balance_norms: Tensor

    def __init__(
        self,
        dim: int,
        factors: Sequence[Factor] = (),
        contrastive: InfoNCE | None = InfoNCE(),  # noqa: B008  (a frozen description)
        contrastive_weight: float = 1.0,
        schedule: LambdaSchedule = LambdaSchedule(),  # noqa: B008
        balance: bool = False,
        backend: BackendName = "auto",
        validate: bool = False,
        deterministic: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(dim, int) or isinstance(dim, bool) or dim < 1:
            raise ValueError(f"dim must be an integer ≥ 1, found {dim!r}")
        if not math.isfinite(contrastive_weight) or contrastive_weight < 0:
            raise ValueError(
                f"contrastive_weight must be a finite number ≥ 0, found {contrastive_weight!r}"
            )
        prepare(backend)
        self.factors = tuple(factors)
        self.dim, self.contrastive, self.contrastive_weight = dim, contrastive, contrastive_weight
        self.schedule, self.balance, self.backend = schedule, balance, backend
        self.validate, self.deterministic = validate, deterministic
        self._number = next(_numbers)
        self._check_factors()

        if contrastive is not None:
            # [1], not 0-d: FSDP2 cannot shard a scalar.
            log_temperature = torch.tensor([math.log(contrastive.temperature)])
            if contrastive.learnable:
                self.log_temperature = nn.Parameter(log_temperature)
        self.heads = Heads({factor.name: build_head(factor, dim) for factor in self.factors})
        self.register_buffer("guidance", torch.ones(()))  # λ
        if balance:
            self.register_buffer("balance_norms", torch.zeros(len(self.factors)))

    def _check_factors(self) -> None:
        taken = {"contrastive": "the contrastive term", "lambda": "λ"}
        for factor in self.factors:
            if not isinstance(factor, (Categorical, Continuous)):
                raise ValueError(
                    f"factors: expected Categorical or Continuous, found {type(factor).__name__}"
                )
            metric = "accuracy" if isinstance(factor, Categorical) else "mse"
            for term in (factor.name, f"{factor.name}/orthogonal", f"{factor.name}/{metric}"):
                if term in taken:
                    raise ValueError(
                        f"factor {factor.name!r}: the name {term!r} is taken by {taken[term]}"
                    )
                taken[term] = f"factor {factor.name!r}"
        if self.contrastive is None and not self.factors:
            raise ValueError("there is nothing to compute: no factors and contrastive=None")
        if self.balance and len(self.factors) < 2:
            raise ValueError(f"balance=True needs two factors, found {len(self.factors)}")

    def extra_repr(self) -> str:
        return (
            f"dim={self.dim}, contrastive={self.contrastive}, schedule={self.schedule}, "
            f"balance={self.balance}, backend={self.backend!r}, "
            f"deterministic={self.deterministic}"
        )

    def set_progress(self, progress: float) -> None:
        """Set λ from the share of the training done, step / total steps.

        Until it is first called λ = 1. Where the backbone is frozen at first, progress counts from
        the unfreezing.

        Raises:
            ValueError: `progress` is not finite.
        """
        self.guidance.fill_(self.schedule(progress))

    @overload
    def forward(
        self,
        embeddings: Tensor | Sequence[Tensor],
        metadata: Mapping[str, Tensor],
        projections: Tensor | Sequence[Tensor] | None = ...,
        teacher: Tensor | Sequence[Tensor] | None = ...,
        return_terms: Literal[False] = ...,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        embeddings: Tensor | Sequence[Tensor],
        metadata: Mapping[str, Tensor],
        projections: Tensor | Sequence[Tensor] | None = ...,
        teacher: Tensor | Sequence[Tensor] | None = ...,
        *,
        return_terms: Literal[True],
    ) -> tuple[Tensor, Terms]: ...

    def forward(
        self,
        embeddings: Tensor | Sequence[Tensor],
        metadata: Mapping[str, Tensor],
        projections: Tensor | Sequence[Tensor] | None = None,
        teacher: Tensor | Sequence[Tensor] | None = None,
        return_terms: bool = False,
    ) -> Tensor | tuple[Tensor, Terms]:
        """The loss of one batch; in training mode the prototype banks are updated after it.

        Args:
            embeddings: [V, B, D], or a sequence of V tensors [B, D].
            metadata: factor name → [B] int64 (−1 missing), or [B] / [B, d] float (NaN missing).
                Where a continuous value differs from view to view (what a crop changes), [V, B] /
                [V, B, d]. Extra keys are ignored.
            projections: [V, B, P], rows of the contrastive term; None takes the embeddings.
            teacher: [V', B, D], rows of the bank updates; None takes the embeddings.
            return_terms: return the terms too.

        Returns:
            The 0-d loss, fp32 (fp64 for fp64 embeddings); with `return_terms` also a dict of
            detached 0-d tensors: `contrastive`, `<name>` (L_f), `<name>/orthogonal` (R_f),
            `<name>/accuracy` or `<name>/mse`, `lambda`.

        Raises:
            ValueError: a wrong shape or dtype, a missing key, a category out of range, an infinite
                value, or one view with a contrastive term; the message names the factor. Ranks with
                different numbers of images, on all of them (on a GPU in the first step, or with
                `validate=True`).
            BackendUnavailableError: the backend asked for by name cannot serve these tensors.
        """
        stacked = checks.stacked("embeddings", embeddings, dim=self.dim)
        views, images, _ = stacked.shape
        device, dtype = stacked.device, accumulation_dtype(stacked.dtype)
        # Where the host would have to wait for the device, it does in the first step only.
        always = self.validate or device.type == "cpu"
        checked = same_images(images, device, self._number, always)
        stacked = after(checked, stacked)
        values = {
            name: after(checked, value)
            for name, value in self._checked_metadata(metadata, views, images, device).items()
        }
        p = z = stacked.flatten(0, 1)
        if projections is not None:
            p = checks.stacked("projections", projections, views, images).flatten(0, 1)
            p = after(checked, p)
        if teacher is not None:
            teacher = after(checked, checks.stacked("teacher", teacher, None, images, self.dim))
        self._check_views(views)

        # The backward pass may come after the next set_progress.
        guidance = frozen(self.guidance.clone())
        heads, pullbacks = self._head_calls(z, values, dtype, guidance)
        step = Step(
            None if self.contrastive is None else self._contrastive_call(p, views, dtype),
            heads,
            self._orthogonal_calls(z, values, dtype, guidance),
            self.balance,
            self.deterministic,
        )
        with torch.autocast(z.device.type, enabled=False):
            result = resolve(self.backend, z.device).step(step)
        terms: Terms = {}
        total = z.new_zeros((), dtype=dtype)
        if result.contrastive is not None:
            contrastive = whole(result.contrastive)
            terms["contrastive"] = contrastive.detach()
            total = total + self.contrastive_weight * contrastive
        if self.factors:
            total = total + self._guides(result, pullbacks, dtype, terms)
        if result.orthogonal is not None:
            total = total + result.orthogonal
            for factor, overlap in zip(self._with_orthogonal(), result.overlaps, strict=True):
                terms[f"{factor.name}/orthogonal"] = overlap
        terms["lambda"] = self.guidance.detach().clone()
        if self.training:
            self._update_banks(stacked.detach() if teacher is None else teacher, values)
        return (total, terms) if return_terms else total

    def _checked_metadata(
        self, metadata: Mapping[str, Tensor], views: int, images: int, device: torch.device
    ) -> dict[str, Tensor]:
        values = {
            factor.name: checks.metadata_of(factor, metadata, views, images, device)
            for factor in self.factors
        }
        if not torch.compiler.is_compiling() and (device.type == "cpu" or self.validate):
            for factor in self.factors:
                checks.values_of(factor, values[factor.name])
        return values

    def _check_views(self, views: int) -> None:
        if self.contrastive is None:
            return
        if views < 2:
            raise ValueError(
                "the contrastive term needs two or more views of every image, found V=1; give "
                "[V, B, D] with V ≥ 2, or contrastive=None for guides only"
            )
        if self.contrastive.two_tower and views != 2:
            raise ValueError(f"InfoNCE(two_tower=True) needs exactly 2 views, found V={views}")

    def _contrastive_call(self, p: Tensor, views: int, dtype: torch.dtype) -> ContrastiveCall:
        assert self.contrastive is not None
        if self.contrastive.learnable:
            logit_scale = (-self.log_temperature.to(dtype)).exp().squeeze(0)
        else:
            logit_scale = p.new_full((), 1 / self.contrastive.temperature, dtype=dtype)
        return ContrastiveCall(p, logit_scale, views, self.contrastive.two_tower)

    def _with_orthogonal(self) -> list[Factor]:
        return [factor for factor in self.factors if factor.orthogonal]

    def _orthogonal_calls(
        self, z: Tensor, values: dict[str, Tensor], dtype: torch.dtype, guidance: Tensor
    ) -> list[OrthogonalCall]:
        calls = []
        for factor in self._with_orthogonal():
            value = values[factor.name]
            classes = 0
            if isinstance(factor, Continuous):
                value = scaled_target(factor, value, dtype)
            else:
                classes = factor.num_classes
            design, weight = rows_of(value, z), factor.orthogonal
            calls.append(OrthogonalCall(z, design, factor.role, guidance, weight, classes))
        return calls

    def _head_calls(
        self, z: Tensor, values: dict[str, Tensor], dtype: torch.dtype, guidance: Tensor
    ) -> tuple[list[HeadCall], list[Pullback]]:
        signed = {"preserve": guidance, "suppress": -guidance}
        targets = [self._target(factor, z, values[factor.name], dtype) for factor in self.factors]
        calls, pullbacks = [], []
        for factor, target, inv_count in zip(
            self.factors, targets, _inverse_counts(targets, dtype), strict=True
        ):
            call, pullback = self._head_call(factor, z, target, inv_count, signed[factor.role])
            calls.append(call)
            pullbacks.append(pullback)
        return calls, pullbacks

    def _target(self, factor: Factor, z: Tensor, value: Tensor, dtype: torch.dtype) -> Tensor:
        """What the head of a factor is to say of every row; see `HeadCall.target`."""
        head = self.heads[factor.name]
        if isinstance(head, PrototypeHead):
            value = trainable_target(value, head.counts)
        elif isinstance(factor, Continuous):
            value = scaled_target(factor, value, dtype)
        return rows_of(value, z)

    def _head_call(
        self, factor: Factor, z: Tensor, target: Tensor, inv_count: Tensor, guidance: Tensor
    ) -> tuple[HeadCall, Pullback]:
        head = self.heads[factor.name]
        if isinstance(head, PrototypeHead):
            call = HeadCall(
                "prototype", z, head.centroids, head.temperatures, target, inv_count, 0,
                head.counts, guidance, factor.weight,
            )  # fmt: skip
            return call, None
        assert isinstance(head, LinearHead)
        pullback: Pullback = None
        guided = None if len(head.hidden) else guidance
        if len(head.hidden):
            # The layers' own parameters see no guidance: it acts in front of them.
            z = scale_gradient(z, guidance)
        if self.balance and len(head.hidden):
            # In quotes, here and elsewhere: PyTorch 2.9 does not compile the subscript.
            x, pullback = cast("tuple[Tensor, Pullback]", torch.func.vjp(head.features, z))
        else:
            x = head.features(z)
        kind: Kind
        if isinstance(factor, Continuous):
            kind, smoothing = factor.activation, 0.0
        else:
            kind, smoothing = "linear", factor.label_smoothing
        call = HeadCall(
            kind, x, head.weight, head.bias, target, inv_count, smoothing, None, guided,
            factor.weight,
        )  # fmt: skip
        return call, pullback

    def _guides(
        self, result: StepResult, pullbacks: list[Pullback], dtype: torch.dtype, terms: Terms
    ) -> Tensor:
        """Σ_f s_f · weight_f · L_f; enters L_f and its metric into `terms`."""
        losses = whole(torch.stack([head.loss for head in result.heads])).to(dtype)
        metrics = sum_over_ranks(torch.stack([head.metric for head in result.heads]))
        for index, factor in enumerate(self.factors):
            terms[factor.name] = losses[index].detach()
            metric = "accuracy" if isinstance(factor, Categorical) else "mse"
            terms[f"{factor.name}/{metric}"] = metrics[index]
        if result.guides is not None:
            return whole(result.guides).to(dtype)
        weights = constants([factor.weight for factor in self.factors], losses).to(dtype)
        return (weights * self._balance(result.heads, pullbacks).to(dtype) * losses).sum()

    @torch.no_grad()
    def _balance(self, results: list[HeadResult], pullbacks: list[Pullback]) -> Tensor:
        """s_f of the gradient balance, after this step's norms entered the running ones. [F].

        A guide whose gradient has always been zero (a bank that is still empty) has no norm yet:
        it is left out of the mean and keeps s_f = 1.
        """
        if self.training:
            squares = []
            for result, pullback in zip(results, pullbacks, strict=True):
                assert result.gradient is not None
                gradient = result.gradient if pullback is None else pullback(result.gradient)[0]
                norm = torch.linalg.vector_norm(gradient.detach(), dtype=self.balance_norms.dtype)
                squares.append(norm.square())
            now = sum_over_ranks(torch.stack(squares)).sqrt()
            before = self.balance_norms
            moved = BALANCE_MOMENTUM * before + (1 - BALANCE_MOMENTUM) * now
            self.balance_norms.copy_(torch.where(before > 0, moved, now))
        return balance_scales(self.balance_norms)

    def _update_banks(self, teacher: Tensor, values: dict[str, Tensor]) -> None:
        banks = {name: head for name, head in self.heads.items() if isinstance(head, PrototypeHead)}
        if banks:
            update_banks(list(banks.values()), teacher, [values[name] for name in banks])


def _inverse_counts(targets: list[Tensor], dtype: torch.dtype) -> Sequence[Tensor]:
    """1 / number of valid rows or entries on all ranks, 1 where there is none; 0-d each."""
    if not targets:
        return ()
    valid = [~y.isnan() if y.is_floating_point() else y >= 0 for y in targets]
    counts = sum_over_ranks(torch.stack([entries.sum() for entries in valid]))
    return counts.clamp_min(1).to(dtype).reciprocal().unbind(0)
