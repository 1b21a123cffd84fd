"""Any timm model as a backbone: local weights, and inputs with any number of channels."""

import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import safetensors.torch
import timm
import torch
from safetensors import SafetensorError
from timm.models import clean_state_dict
from torch import Tensor, nn

from fino_fast.errors import ConfigError

# Where training codes keep the weights inside a .pth file that holds more than weights.
CONTAINERS = ("state_dict", "model", "teacher", "student")
SHOWN = 5  # keys quoted in a message


@dataclass(frozen=True)
class WeightsReport:
    """What a checkpoint file gave a backbone, key by key.

    `adapted` are those of `matched` whose input channels were changed; `missing` are the model's
    keys that the file lacks (they keep their random values); `unexpected` are the file's keys that
    the model lacks (a classifier, for example).
    """

    source: str
    matched: list[str]
    adapted: list[str]
    missing: list[str]
    unexpected: list[str]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"weights from {self.source}: {len(self.matched)} keys matched"]
        for title, keys in (
            ("with adapted input channels", self.adapted),
            ("MISSING in the file, left at random values", self.missing),
            ("unexpected in the file, not used", self.unexpected),
        ):
            if keys:
                lines.append(f"  {len(keys)} {title}: {quote(keys)}")
        return "\n".join(lines)


def build_backbone(
    name: str,
    *,
    channels: int = 3,
    image_size: int | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A timm model with random weights that maps images [n, channels, H, W] to embeddings [n, D].

    Args:
        name: a name of `timm.list_models()`.
        channels: input channels.
        image_size: side of the square input in pixels, for models that fix it (ViT, Swin, …).
        options: further arguments of `timm.create_model`, such as `drop_path_rate`.

    Raises:
        ConfigError: timm has no such model, or it does not take these arguments.
    """
    return create(name, channels, image_size, options or {}, pretrained=False)


def create(
    name: str, channels: int, image_size: int | None, options: Mapping[str, Any], pretrained: bool
) -> nn.Module:
    if not timm.is_model(name):
        near = timm.list_models(f"*{name}*")[:SHOWN]
        hint = f"; near it: {', '.join(near)}" if near else ""
        raise ConfigError(f"backbone {name!r}: timm {timm.__version__} has no such model{hint}")
    arguments = dict(options)
    declared = timm.get_pretrained_cfg(name)
    if image_size is not None and declared is not None and declared.fixed_input_size:
        arguments.setdefault("img_size", image_size)
    try:
        return timm.create_model(
            name, pretrained=pretrained, num_classes=0, in_chans=channels, **arguments
        )
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"backbone {name!r} cannot be built with {arguments or 'no options'} and "
            f"{channels} channels: {error}"
        ) from error


def embedding_dim(backbone: nn.Module, channels: int, image_size: int) -> int:
    """D, found by embedding one blank image.

    Raises:
        ConfigError: the model does not take such an image, or gives no single vector an image.
    """
    device = next(backbone.parameters()).device
    training = backbone.training
    backbone.eval()
    try:
        with torch.no_grad():
            output = backbone(torch.zeros(1, channels, image_size, image_size, device=device))
    except (RuntimeError, ValueError, AssertionError) as error:
        raise ConfigError(
            f"the backbone does not take images of {channels}×{image_size}×{image_size}: {error}"
        ) from error
    finally:
        backbone.train(training)
    if not isinstance(output, Tensor) or output.ndim != 2:
        shape = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
        raise ConfigError(
            f"the backbone gives {shape} for one image; expected a pooled vector [1, D] "
            "(see the option global_pool of timm)"
        )
    return output.shape[1]


def load_weights(
    backbone: nn.Module, path: Path, *, name: str | None = None, prefix: str = ""
) -> WeightsReport:
    """Load a local checkpoint into a timm model, in place.

    Args:
        backbone: a model of `build_backbone`, with any number of input channels.
        path: `.safetensors`, or `.pth`, `.pt`, `.bin` (read with `weights_only=True`), holding a
            state dict or a mapping with one under `state_dict`, `model`, `teacher` or `student`.
        name: the model's timm name, for timm's own conversion of foreign key names; by default
            the name that the model was created with.
        prefix: only the keys that start with it are used, without it (`backbone.`, for example).

    Returns:
        The keys that matched, that are missing and that were not expected.

    Raises:
        ConfigError: the file is missing, damaged or holds other objects than tensors; a tensor has
            another shape than the model's; no key matches at all.
    """
    state = clean_state_dict(unwrap(read_file(path), path))
    if prefix:
        state = {key.removeprefix(prefix): v for key, v in state.items() if key.startswith(prefix)}
        if not state:
            raise ConfigError(f"{path}: no key starts with {prefix!r}")
    return fill(backbone, state, source=str(path), name=name)


def load_pretrained(
    backbone: nn.Module, name: str, *, image_size: int | None, options: Mapping[str, Any]
) -> WeightsReport:
    """Load timm's own pretrained weights of a model, fetched by timm, in place.

    Raises:
        ConfigError: timm has no weights for the model or cannot fetch them.
    """
    try:
        source = create(name, 3, image_size, options, pretrained=True)
    except ConfigError:
        raise
    except Exception as error:  # whatever the hub's client of the day raises
        raise ConfigError(
            f"backbone {name!r}: timm cannot give pretrained weights: {error}; download them and "
            "name the file as backbone.weights"
        ) from error
    return fill(backbone, source.state_dict(), source=f"timm ({name})", name=name)


def adapt_channels(weight: Tensor, channels: int) -> Tensor:
    """The weight of a first layer for another number of input channels.

    Added channels get the mean of the old ones; where there are fewer channels than before, all
    get it. Everything is scaled by old/new, so that the sum over the channels, and with it the
    size of the activations of similar channels, stays what it was.

    Args:
        weight: [out, old, *kernel].
        channels: new number of input channels.

    Returns:
        [out, channels, *kernel], of the weight's dtype.
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    values = weight.float()
    kept = values if channels > old else values[:, :0]
    mean = values.mean(dim=1, keepdim=True)
    added = mean.expand(-1, channels - kept.shape[1], *mean.shape[2:])
    return (torch.cat([kept, added], dim=1) * (old / channels)).to(weight.dtype)


def fill(
    backbone: nn.Module, state: dict[str, Tensor], *, source: str, name: str | None
) -> WeightsReport:
    """Load `state` into `backbone` and say what matched; see `load_weights`."""
    state = translate(backbone, state, source, name)
    target = backbone.state_dict()
    adapted = []
    for key in stem_keys(backbone):
        if key in state and key in target and same_but_channels(state[key], target[key]):
            state[key] = adapt_channels(state[key], target[key].shape[1])
            adapted.append(key)
    matched = sorted(state.keys() & target.keys())
    if not matched:
        raise ConfigError(
            f"{source}: no key matches the backbone: it has {quote(state)} where the model has "
            f"{quote(target)}. Is it the right model? See backbone.prefix for nested weights"
        )
    for key in matched:
        if state[key].shape != target[key].shape:
            raise ConfigError(
                f"{source}: {key} has the shape {tuple(state[key].shape)}, "
                f"the backbone expects {tuple(target[key].shape)}"
            )
    backbone.load_state_dict({key: state[key] for key in matched}, strict=False)
    return WeightsReport(
        source,
        matched,
        adapted,
        missing=sorted(target.keys() - state.keys()),
        unexpected=sorted(state.keys() - target.keys()),
    )


def read_file(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ConfigError(f"weights {path}: no such file")
    try:
        if path.suffix == ".safetensors":
            return dict(safetensors.torch.load_file(path))
        if path.suffix not in (".pth", ".pt", ".bin"):
            raise ConfigError(f"weights {path}: expected .safetensors, .pth, .pt or .bin")
        content = torch.load(path, map_location="cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConfigError(
            f"weights {path}: not a file of plain tensors ({str(error).splitlines()[0]}); "
            "convert it to .safetensors where you trust it"
        ) from error
    except (SafetensorError, RuntimeError, EOFError, OSError, ValueError) as error:
        raise ConfigError(f"weights {path}: cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise ConfigError(f"weights {path}: expected a mapping, found {type(content).__name__}")
    return content


def unwrap(content: dict[str, Any], path: Path) -> dict[str, Tensor]:
    """The state dict of a file's content."""
    for container in CONTAINERS:
        if isinstance(content.get(container), dict):
            return unwrap(content[container], path)
    others = [str(key) for key, value in content.items() if not isinstance(value, Tensor)]
    if others or not content:
        raise ConfigError(
            f"weights {path}: expected a state dict of tensors, or one under "
            f"{', '.join(CONTAINERS)}; found {quote(others) if others else 'nothing'}"
        )
    return content


def translate(
    backbone: nn.Module, state: dict[str, Tensor], source: str, name: str | None
) -> dict[str, Tensor]:
    """The state in the model's own key names and sizes, by timm's filter of that model family.

    timm's filters rename foreign checkpoints (DINOv2, CLIP, …) and resample position embeddings.
    """
    architecture = name or getattr(backbone, "pretrained_cfg", {}).get("architecture")
    if architecture is None or is_native(backbone, state):
        return dict(state)
    module = sys.modules[timm.model_entrypoint(architecture).__module__]
    convert: Callable[..., dict[str, Tensor]] | None = getattr(module, "checkpoint_filter_fn", None)
    if convert is None:
        return dict(state)
    try:
        return dict(convert(dict(state), backbone))
    except Exception as error:  # a filter indexes into what it takes for a known checkpoint
        raise ConfigError(
            f"{source}: timm cannot convert it to {architecture}: {type(error).__name__}: {error}; "
            f"the file has {quote(state)}. Is it the right model?"
        ) from error


def is_native(backbone: nn.Module, state: dict[str, Tensor]) -> bool:
    stems = stem_keys(backbone)
    return all(
        key in state
        and (
            state[key].shape == value.shape
            or (key in stems and same_but_channels(state[key], value))
        )
        for key, value in backbone.state_dict().items()
    )


def stem_keys(backbone: nn.Module) -> list[str]:
    first = getattr(backbone, "pretrained_cfg", {}).get("first_conv") or ()
    return [f"{module}.weight" for module in ((first,) if isinstance(first, str) else first)]


def same_but_channels(weight: Tensor, target: Tensor) -> bool:
    return (
        weight.ndim == target.ndim > 1
        and weight.shape[1] != target.shape[1]
        and weight.shape[:1] + weight.shape[2:] == target.shape[:1] + target.shape[2:]
    )


def quote(keys: Any) -> str:
    names = sorted(keys)
    return ", ".join(names[:SHOWN]) + (f" … ({len(names)} in all)" if len(names) > SHOWN else "")
