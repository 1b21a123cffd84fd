"""The pretrained weights of the demo, judged by what the network says about real photographs."""

from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from fino_fast.errors import DataError
from fino_fast.evaluate.pretrained import (
    BACKBONE,
    MEAN,
    STD,
    convert,
    weights_file,
    write_weights,
)

PALACE, DAISY = 698, 985  # ImageNet's indices of the classes nearest to the two photographs


@pytest.fixture(scope="module")
def original() -> dict[str, Tensor]:
    return dict(torch.load(weights_file(), weights_only=True))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> nn.Module:
    model: nn.Module = timm.create_model(BACKBONE)
    target = write_weights(tmp_path_factory.mktemp("weights") / "lite0.safetensors")
    model.load_state_dict(load_file(target))  # strict: no key missing, none left over
    return model.eval()


@pytest.fixture(scope="module")
def photographs() -> Tensor:
    """A palace in China and a flower, [2, 3, 224, 224]."""
    crops = [
        Image.fromarray(image).crop((107, 0, 533, 427)).resize((224, 224), Image.Resampling.BICUBIC)
        for image in load_sample_images().images
    ]
    pixels = torch.stack(
        [torch.frombuffer(bytearray(c.tobytes()), dtype=torch.uint8) for c in crops]
    )
    images = pixels.view(2, 224, 224, 3).permute(0, 3, 1, 2) / 255
    return (images - MEAN) / STD


def test_every_tensor_is_carried_over_once(original: dict[str, Tensor]) -> None:
    converted = convert(original)
    assert len(converted) == len(original) == len(timm.create_model(BACKBONE).state_dict())
    assert {id(value) for value in converted.values()} == {id(v) for v in original.values()}


def test_the_network_recognises_real_photographs(model: nn.Module, photographs: Tensor) -> None:
    with torch.no_grad():
        top = model(photographs).argmax(dim=1).tolist()
    assert top == [PALACE, DAISY]


def test_activations_match_the_stored_batch_statistics(
    model: nn.Module, photographs: Tensor
) -> None:
    """A layer under another layer's name, or another input range, would be far off here."""
    distances = []

    def measure(layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        assert layer.running_var is not None
        shift = inputs[0].mean(dim=(0, 2, 3)) - layer.running_mean
        distances.append(float((shift.square() / (layer.running_var + layer.eps)).mean()))

    hooks = [
        layer.register_forward_pre_hook(measure)
        for layer in model.modules()
        if isinstance(layer, nn.BatchNorm2d)
    ]
    with torch.no_grad():
        model(photographs)
    for hook in hooks:
        hook.remove()
    assert len(distances) == 49
    assert max(distances) < 1.0  # in squared standard deviations; a wrong input range gives 0.5 at
    assert sum(distances[:10]) / 10 < 0.1  # the first layers, the right one 0.02


def test_a_foreign_key_is_named(original: dict[str, Tensor]) -> None:
    with pytest.raises(DataError, match=r"_blocks\.16\._bn1\.weight"):
        convert({**original, "_blocks.16._bn1.weight": torch.ones(1)})
    with pytest.raises(DataError, match="_se_reduce"):
        convert({**original, "_blocks.3._se_reduce.weight": torch.ones(1)})


@pytest.mark.parametrize("fault", ["missing", "shape"])
def test_weights_of_another_network_are_refused(
    original: dict[str, Tensor], tmp_path: Path, fault: str
) -> None:
    state = dict(original)
    if fault == "missing":
        del state["_conv_head.weight"]
    else:
        state["_conv_head.weight"] = state["_conv_head.weight"][:8].clone()
    torch.save(state, tmp_path / "other.pth")
    with pytest.raises(DataError, match=r"conv_head\.weight"):
        write_weights(tmp_path / "out.safetensors", source=tmp_path / "other.pth")
    assert not (tmp_path / "out.safetensors").exists()
