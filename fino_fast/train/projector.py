"""The projector of the contrastive term."""

from torch import nn


def build_projector(dim: int, hidden: tuple[int, ...], width: int) -> nn.Sequential:
    """An MLP (Linear, GELU for each hidden width, then Linear) from embeddings to projections.

    It has no batch statistics, so what it computes for an image does not depend on the images
    beside it, nor on how a batch is divided among ranks.

    Args:
        dim: D, width of the embeddings.
        hidden: widths of the hidden layers.
        width: P, width of the projections.

    Returns:
        A module that maps [..., D] to [..., P].
    """
    layers: list[nn.Module] = []
    for size in hidden:
        layers += [nn.Linear(dim, size), nn.GELU()]
        dim = size
    return nn.Sequential(*layers, nn.Linear(dim, width))
