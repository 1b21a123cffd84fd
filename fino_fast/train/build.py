"""From a configuration to the parts of a run: loader, backbone, student."""

from collections.abc import Sequence

import timm
from torch import nn

from fino_fast.backends import BackendUnavailableError, resolve
from fino_fast.data import Loader, ShardSet
from fino_fast.data.pipeline import pixel_form
from fino_fast.errors import ConfigError
from fino_fast.factors import Factor, InfoNCE, LambdaSchedule
from fino_fast.loss import FinoLoss

from .backbone import WeightsReport, build_backbone, embedding_dim, load_pretrained, load_weights
from .config import TrainConfig
from .model import Student
from .projector import build_projector
from .world import World


def settle_normalisation(config: TrainConfig, shards: ShardSet) -> TrainConfig:
    """Where the configuration has neither mean nor std of the views, those of the backbone."""
    declared = timm.get_pretrained_cfg(config.backbone.name)
    if declared is None or {"mean", "std"} & config.views.model_fields_set:
        return config
    mean, std = list(declared.mean), list(declared.std)
    if pixel_form(shards, split_of(config, shards), config.views).channels != len(mean):
        # Added channels see the mean of the old ones' weights, so they get the mean of these too.
        mean, std = [sum(mean) / len(mean)], [sum(std) / len(std)]
    views = config.views.model_copy(update={"mean": mean, "std": std})
    return config.model_copy(update={"views": views})


def split_of(config: TrainConfig, shards: ShardSet) -> str:
    return config.split or shards.schema.declaration.adaptation_split


def build_loader(
    config: TrainConfig, shards: ShardSet, factors: Sequence[str], world: World
) -> Loader:
    if config.batch_size % world.size:
        raise ConfigError(
            f"batch_size {config.batch_size} cannot be divided among {world.size} ranks"
        )
    try:
        return Loader(
            shards,
            config.views,
            batch_size=config.batch_size // world.size,
            seed=config.seed,
            split=split_of(config, shards),
            rank=world.rank,
            world_size=world.size,
            backend=config.loader,
            device="cpu" if config.loader == "torch" else world.device,
            drop_last=True,  # the loss wants the same number of images on every rank
            factors=factors,
            on_error=config.on_error,
            groups=config.groups,
        )
    except ValueError as error:
        raise ConfigError(str(error)) from error


def build_start(
    config: TrainConfig, channels: int, *, load: bool
) -> tuple[nn.Module, WeightsReport | None]:
    """The backbone, with its starting weights if `load`, and what was found in their file."""
    wanted, size = config.backbone, config.views.size
    backbone = build_backbone(
        wanted.name, channels=channels, image_size=size, options=wanted.options
    )
    report = None
    if load and wanted.weights:
        report = load_weights(backbone, wanted.weights, name=wanted.name, prefix=wanted.prefix)
    elif load and wanted.pretrained:
        report = load_pretrained(backbone, wanted.name, image_size=size, options=wanted.options)
    return backbone, report


def build_student(
    config: TrainConfig, backbone: nn.Module, factors: Sequence[Factor], channels: int, world: World
) -> Student:
    """Backbone, projector and criterion together."""
    views, term = config.views, config.contrastive
    dim = embedding_dim(backbone, channels, views.size)
    if views.local_count:
        embedding_dim(backbone, channels, views.local_size)
    if term and views.count + views.local_count < 2:
        raise ConfigError("the contrastive term needs views.count ≥ 2; or set contrastive: null")
    projector = None
    if config.projector and term:
        projector = build_projector(dim, config.projector.hidden, config.projector.width)
    try:
        resolve(config.backend, world.device)
        criterion = FinoLoss(
            dim,
            factors,
            contrastive=InfoNCE(term.temperature, term.learnable, term.two_tower) if term else None,
            contrastive_weight=term.weight if term else 0.0,
            schedule=LambdaSchedule(config.ramp.kind, config.ramp.warmup),
            balance=config.balance,
            backend=config.backend,
        )
    except (ValueError, BackendUnavailableError) as error:
        raise ConfigError(f"the loss cannot be built: {error}") from error
    return Student(backbone, projector, criterion)
