"""The configuration of a training run: one strict model, read from YAML or written in Python."""

from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import Field, JsonValue, model_validator

from fino_fast.config import StrictModel
from fino_fast.data import Views
from fino_fast.data.files import LocationField
from fino_fast.data.loader import Backend, OnError
from fino_fast.data.sampling import Groups
from fino_fast.errors import ConfigError

Share = Annotated[float, Field(ge=0, lt=1)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Width = Annotated[int, Field(ge=1)]

# What may differ between a run and its continuation: it does not touch what is computed.
HARMLESS = frozenset(
    {"data", "output", "device", "on_error", "log_every", "checkpoint_every", "keep_checkpoints"}
)


class BackboneConfig(StrictModel):
    """Which model is adapted, and the weights that it starts from."""

    name: str
    """A timm model name, such as vit_small_patch14_dinov2."""
    weights: Path | None = None
    """Local checkpoint file: .safetensors, .pth, .pt or .bin."""
    prefix: str = ""
    """Use only the file's keys that start with this, without it."""
    pretrained: bool = False
    """Let timm fetch its own weights instead."""
    options: dict[str, JsonValue] = Field(default_factory=dict)
    """Further arguments of timm.create_model, such as drop_path_rate: 0.1."""
    freeze: Share = 0.0
    """Share of the steps in which the backbone does not move yet; λ counts from its end."""
    batch_statistics: Literal["learned", "kept"] = "learned"
    """Batch norms: normalise by the batch and learn its statistics, or keep the weights' own
    (their scales and shifts still learn): for short runs, small batches, or narrow data."""

    @model_validator(mode="after")
    def one_source(self) -> Self:
        if self.weights is not None and self.pretrained:
            raise ValueError("give weights (a file) or pretrained: true, not both")
        if self.prefix and self.weights is None:
            raise ValueError("prefix selects keys of the file in weights, but there is none")
        return self


class ProjectorConfig(StrictModel):
    """The MLP before the contrastive term."""

    hidden: tuple[Width, ...] = (2048,)
    """Widths of the hidden layers."""
    width: Width = 256
    """P, width of the projections."""


class FactorOverride(StrictModel):
    """How one metadata factor guides; what is left out comes from the schema or the loss's default.

    See `fino_fast.Categorical` and `fino_fast.Continuous` for the fields.
    """

    role: Literal["preserve", "suppress", "ignore"] | None = None
    weight: NonNegative | None = None
    orthogonal: NonNegative | None = None
    head: Literal["linear", "prototype"] | None = None
    label_smoothing: Annotated[float, Field(ge=0, le=1)] | None = None
    temperature: Positive | None = None
    momentum: Annotated[float, Field(ge=0, le=1)] | None = None
    concentration: Literal["fixed", "ema"] | None = None
    activation: Literal["identity", "sigmoid", "tanh"] | None = None
    hidden: tuple[Width, ...] | None = None
    dropout: Share | None = None


class ContrastiveConfig(StrictModel):
    """`fino_fast.InfoNCE`."""

    temperature: Positive = 0.1
    learnable: bool = False
    two_tower: bool = False
    weight: NonNegative = 1.0
    """w, the weight of the term."""


class RampConfig(StrictModel):
    """`fino_fast.LambdaSchedule`: the strength λ of the guidance over the run."""

    kind: Literal["sigmoid", "linear", "constant"] = "sigmoid"
    warmup: Share = 0.0


class OptimizerConfig(StrictModel):
    """AdamW, linear warm-up and a cosine to zero."""

    lr: Positive = 1e-4
    """Full learning rate, of the projector, the heads and the backbone's last layer."""
    weight_decay: NonNegative = 0.05
    layer_decay: Annotated[float, Field(gt=0, le=1)] = 0.75
    """Each layer of the backbone learns this many times as fast as the one above it."""
    betas: tuple[Share, Share] = (0.9, 0.999)
    warmup: Share = 0.05
    """Share of the steps in which the learning rate rises."""
    clip: Positive | None = 1.0
    """Largest norm of the gradient over all modules together; none: no clipping."""


class TeacherConfig(StrictModel):
    """The moving average of the backbone, whose embeddings fill the prototype banks."""

    momentum: Annotated[float, Field(ge=0, le=1)] = 0.996
    """At the first step; it rises to 1 by a cosine."""


class TrainConfig(StrictModel):
    """Everything that a run depends on."""

    data: LocationField
    """Folder of sealed shards, the output of `fino-fast ingest`: a path or an fsspec URL."""
    output: Path
    """Folder of the run; it must not exist yet."""
    backbone: BackboneConfig
    views: Views = Views()
    """Augmentation of the views, and the images' size and normalisation."""
    split: str | None = None
    """The split that is trained on; none: the one that the schema adapts on."""
    projector: ProjectorConfig | None = ProjectorConfig()
    """None: the contrastive term sees the embeddings themselves."""
    contrastive: ContrastiveConfig | None = ContrastiveConfig()
    """None: the guides only."""
    factors: dict[str, FactorOverride] = Field(default_factory=dict)
    """Factor name → what to change of its guide."""
    ramp: RampConfig = RampConfig()
    balance: bool = False
    """Let every guide send gradients of equal norm, before its weight."""
    backend: Literal["auto", "native", "triton", "eager"] = "auto"
    """Implementation of the loss."""
    optimizer: OptimizerConfig = OptimizerConfig()
    teacher: TeacherConfig | None = TeacherConfig()
    """None: the banks follow the backbone itself."""
    epochs: Width = 10
    batch_size: Width = 64
    """Images a step, over all ranks together."""
    seed: Annotated[int, Field(ge=0)] = 0
    precision: Literal["fp32", "bf16"] = "fp32"
    """bf16: autocast of the forward pass; weights and optimizer stay fp32."""
    device: str = "auto"
    """auto (a GPU where there is one), cpu, cuda, cuda:1, …"""
    loader: Backend = "auto"
    """What decodes and augments: auto, dali or torch."""
    on_error: OnError = "raise"
    """What a damaged sample does: end the run, or be skipped, counted and listed."""
    groups: Groups | None = None
    """Batches of k images of each value of a factor: `{factor: plate, size: 4}`."""
    log_every: Width = 10
    """Steps between two rows of metrics."""
    checkpoint_every: Width = 1000
    """Steps between two checkpoints; the last step always writes one."""
    keep_checkpoints: Width = 2
    """How many of the newest checkpoints stay on disk."""


def check_same(saved: dict[str, Any], config: TrainConfig) -> None:
    """A continued run must be configured as it was begun.

    Args:
        saved: the JSON form of the configuration the run was begun with.
        config: the one it is to continue with.

    Raises:
        ConfigError: a setting that changes what is computed differs; the message names each.
    """
    # A setting that came later than the run has the default that keeps to what was done before it.
    before = flatten(
        TrainConfig.checked(saved, "the configuration of the run").model_dump(mode="json")
    )
    now = flatten(config.model_dump(mode="json"))
    changed = [
        f"{key}: {before.get(key, 'absent')} → {now.get(key, 'absent')}"
        for key in sorted(before.keys() | now.keys())
        if key.split(".")[0] not in HARMLESS
        and (key in before, before.get(key)) != (key in now, now.get(key))
    ]
    if changed:
        raise ConfigError(
            "a resumed run must keep its configuration; changed: "
            + "; ".join(changed)
            + ". Restore the old values, or start a new run in another output folder"
        )


def flatten(content: dict[str, Any], parent: str = "") -> dict[str, Any]:
    """Nested mappings as one, keys joined by dots."""
    flat: dict[str, Any] = {}
    for key, value in content.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{parent}{key}.")
        else:
            flat[f"{parent}{key}"] = value
    return flat
