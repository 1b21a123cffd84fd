"""What is wrong with a call of the loss, said in the words of its caller."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from .factors import Categorical, Continuous, Factor


def stacked(
    name: str,
    value: Tensor | Sequence[Tensor],
    views: int | None = None,
    images: int | None = None,
    dim: int | None = None,
) -> Tensor:
    """`value` as one tensor, where it is a floating-point [V, B, D] of the given sizes.

    Args:
        name: of the argument, for the message.
        value: [V, B, D], or a sequence of V tensors [B, D].
        views, images, dim: V, B, D; None is any.

    Raises:
        ValueError: a wrong shape or dtype, or views of different shapes or dtypes.
    """
    expected = [
        letter if size is None else f"{letter}={size}"
        for letter, size in (("V", views), ("B", images), ("D", dim))
    ]
    if not isinstance(value, Tensor):
        rows = list(value) if isinstance(value, Sequence) else []
        if not rows or not all(isinstance(view, Tensor) for view in rows):
            raise ValueError(
                f"{name}: expected a tensor [{', '.join(expected)}] or a sequence of tensors "
                f"[{', '.join(expected[1:])}], found {type(value).__name__}"
            )
        kinds = [(list(view.shape), view.dtype) for view in rows]
        if any(kind != kinds[0] for kind in kinds):
            raise ValueError(f"{name}: the views differ in shape or dtype: {kinds}")
        value = torch.stack(rows)
    fits = value.dim() == 3 and all(
        want is None or have == want
        for have, want in zip(value.shape, (views, images, dim), strict=True)
    )
    if not fits or value.numel() == 0:
        raise ValueError(
            f"{name}: expected the shape [{', '.join(expected)}] with at least one row, "
            f"found {list(value.shape)}"
        )
    if not value.is_floating_point():
        raise ValueError(f"{name}: expected a floating-point dtype, found {value.dtype}")
    return value


def metadata_of(
    factor: Factor, metadata: Mapping[str, Tensor], views: int, images: int, device: torch.device
) -> Tensor:
    """The metadata of one factor, where key, length, dtype and device are right.

    Raises:
        ValueError: they are not; the message names the factor and the fault.
    """
    who = f"metadata of factor {factor.name!r}"
    if factor.name not in metadata:
        raise ValueError(f"{who}: the key is missing; there are {sorted(map(str, metadata))}")
    value = metadata[factor.name]
    if not isinstance(value, Tensor):
        raise ValueError(f"{who}: expected a tensor, found {type(value).__name__}")
    if isinstance(factor, Categorical):
        if value.dtype != torch.int64:
            raise ValueError(f"{who}: categories are int64, found {value.dtype}")
        shapes = [[images]]
    else:
        if not value.is_floating_point():
            raise ValueError(f"{who}: continuous values are floating-point, found {value.dtype}")
        shapes = [[images, factor.dim], [views, images, factor.dim]]
        if factor.dim == 1:
            shapes += [[images], [views, images]]
    if list(value.shape) not in shapes:
        raise ValueError(
            f"{who}: expected the shape {' or '.join(map(str, shapes))} for {images} images in "
            f"{views} views, found {list(value.shape)}"
        )
    if value.device != device:
        raise ValueError(f"{who}: it is on {value.device}, the embeddings are on {device}")
    return value


def values_of(factor: Factor, value: Tensor) -> None:
    """Check the values themselves. On a GPU the host waits for the answer.

    Raises:
        ValueError: a category outside −1…K−1, or an infinite value; the message names the factor,
            the first bad row and what stands there.
    """
    if isinstance(factor, Categorical):
        bad = (value < -1) | (value >= factor.num_classes)
        expected = f"categories are −1 (missing) to {factor.num_classes - 1}"
    else:
        bad = value.isinf()
        expected = "values are finite, or NaN (missing)"
    if bad.any():
        if isinstance(factor, Continuous) and value.shape[1:] != (factor.dim,) and value.dim() > 1:
            bad, value = (x.reshape(-1, factor.dim) for x in (bad, value))  # one entry a row
        row = int(bad.reshape(value.shape[0], -1).any(1).nonzero()[0])
        found = value[row].tolist()
        raise ValueError(f"metadata of factor {factor.name!r}: {expected}; row {row} has {found}")
