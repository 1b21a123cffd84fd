"""Backbones from timm: building, local weights with their report, any number of channels."""

import pickle
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fino_fast.errors import ConfigError
from fino_fast.train.backbone import (
    adapt_channels,
    build_backbone,
    embedding_dim,
    load_pretrained,
    load_weights,
)

VIT, CONV = "test_vit", "test_resnet"


def vit(channels: int = 3, seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return build_backbone(VIT, channels=channels, image_size=32)


@pytest.mark.parametrize(
    ("name", "dim"),
    [
        ("test_vit", 64),
        ("test_resnet", 96),
        ("test_efficientnet", 256),
        ("test_convnext", 64),
        ("mobilenetv3_small_050", 1024),  # its pooled width differs from `num_features`
        ("swin_tiny_patch4_window7_224", 768),
    ],
)
def test_families_give_one_vector_an_image(name: str, dim: int) -> None:
    backbone = build_backbone(name, channels=5, image_size=32)
    assert embedding_dim(backbone, 5, 32) == dim
    assert backbone.training


def test_unknown_model_is_named_with_its_neighbours() -> None:
    with pytest.raises(ConfigError, match=r"'resnet10'.*near it: .*resnet101"):
        build_backbone("resnet10")


def test_option_that_the_model_does_not_take() -> None:
    with pytest.raises(ConfigError, match=r"'test_resnet'.*no_such_option"):
        build_backbone(CONV, options={"no_such_option": 1})


def test_no_single_vector_an_image() -> None:
    backbone = build_backbone(VIT, image_size=32, options={"global_pool": ""})
    with pytest.raises(ConfigError, match=r"gives \(1, 5, 64\).*global_pool"):
        embedding_dim(backbone, 3, 32)


def test_image_size_that_the_model_cannot_take() -> None:
    backbone = build_backbone("vit_tiny_patch16_224", image_size=32)
    with pytest.raises(ConfigError, match="3×48×48"):
        embedding_dim(backbone, 3, 48)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt", ".bin"])
@pytest.mark.parametrize("name", [VIT, CONV])
def test_weights_round_trip(tmp_path: Path, suffix: str, name: str) -> None:
    torch.manual_seed(1)
    source = build_backbone(name, image_size=32)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(source.state_dict(), path)
    else:
        torch.save(source.state_dict(), path)
    target = build_backbone(name, image_size=32)
    report = load_weights(target, path)
    assert report.matched == sorted(source.state_dict())
    assert report.missing == report.unexpected == report.adapted == []
    for key, value in target.state_dict().items():
        assert torch.equal(value, source.state_dict()[key]), key


def test_report_names_missing_and_unexpected_keys(tmp_path: Path) -> None:
    state = vit().state_dict()
    del state["norm.bias"]
    state["head.weight"] = torch.zeros(10, 64)
    save_file(state, tmp_path / "w.safetensors")
    report = load_weights(vit(), tmp_path / "w.safetensors")
    assert report.missing == ["norm.bias"]
    assert report.unexpected == ["head.weight"]
    assert "1 MISSING in the file, left at random values: norm.bias" in str(report)
    assert "head.weight" in str(report)


@pytest.mark.parametrize("container", ["state_dict", "model", "teacher"])
def test_nested_and_prefixed_checkpoints(tmp_path: Path, container: str) -> None:
    source = vit(seed=1)
    nested = {f"module.backbone.{key}": value for key, value in source.state_dict().items()}
    nested["module.head.weight"] = torch.zeros(3)
    torch.save({container: nested, "epoch": 3}, tmp_path / "w.pth")
    target = vit(seed=2)
    report = load_weights(target, tmp_path / "w.pth", prefix="backbone.")
    assert not report.missing
    assert not report.unexpected
    assert torch.equal(target.patch_embed.proj.weight, source.patch_embed.proj.weight)
    with pytest.raises(ConfigError, match=r"w\.pth: no key starts with 'encoder\.'"):
        load_weights(target, tmp_path / "w.pth", prefix="encoder.")


def test_position_embedding_of_another_image_size_is_resampled(tmp_path: Path) -> None:
    save_file(build_backbone(VIT, image_size=64).state_dict(), tmp_path / "w.safetensors")
    target = vit()
    report = load_weights(target, tmp_path / "w.safetensors")
    assert "pos_embed" in report.matched
    assert embedding_dim(target, 3, 32) == 64


def test_mismatch_of_everything_is_an_error(tmp_path: Path) -> None:
    save_file(build_backbone(CONV).state_dict(), tmp_path / "w.safetensors")
    before = vit()
    after = vit()
    with pytest.raises(ConfigError, match=r"w\.safetensors.*no key matches.*blocks\.0"):
        load_weights(after, tmp_path / "w.safetensors")
    assert all(map(torch.equal, before.state_dict().values(), after.state_dict().values()))


def test_another_shape_is_an_error_that_names_the_key(tmp_path: Path) -> None:
    state = vit().state_dict()
    state["norm.weight"] = torch.zeros(65)
    save_file(state, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=r"norm\.weight has the shape \(65,\).*\(64,\)"):
        load_weights(vit(), tmp_path / "w.safetensors")


class Trap:
    """Runs code when unpickled without care."""

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return (Path.touch, (Path("sprung"),))


def test_files_that_hold_no_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "trap.pth").write_bytes(pickle.dumps(Trap(), protocol=2))
    torch.save({"optimizer": {"lr": 1.0}}, tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    torch.save({}, tmp_path / "empty.pth")
    save_file(vit().state_dict(), tmp_path / "whole.safetensors")
    whole = (tmp_path / "whole.safetensors").read_bytes()
    (tmp_path / "torn.safetensors").write_bytes(whole[: len(whole) // 2])
    torch.save(vit().state_dict(), tmp_path / "whole.pth")
    (tmp_path / "torn.pth").write_bytes((tmp_path / "whole.pth").read_bytes()[:1000])
    (tmp_path / "weights.h5").touch()
    for name, message in {
        "absent.pth": "no such file",
        "weights.h5": "expected .safetensors, .pth",
        "trap.pth": "not a file of plain tensors",
        "other.pth": "expected a state dict",
        "list.pth": "expected a mapping, found list",
        "empty.pth": "expected a state dict.*found nothing",
        "torn.safetensors": "cannot be read",
        "torn.pth": "cannot be read",
    }.items():
        with pytest.raises(ConfigError, match=f"{name}: {message}"):
            load_weights(vit(), tmp_path / name)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("channels", [1, 2, 4, 5, 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_channel_surgery(channels: int, dtype: torch.dtype) -> None:
    weight = torch.randn(8, 3, 4, 4).to(dtype)
    adapted = adapt_channels(weight, channels)
    assert adapted.shape == (8, channels, 4, 4)
    assert adapted.dtype == dtype
    scale = 3 / channels
    mean = weight.float().mean(1)
    added = adapted[:, 3:] if channels > 3 else adapted
    for index in range(added.shape[1]):
        torch.testing.assert_close(added[:, index], (mean * scale).to(dtype))
    if channels > 3:
        torch.testing.assert_close(adapted[:, :3], (weight.float() * scale).to(dtype))
    total = adapted.float().sum(1)
    torch.testing.assert_close(total, weight.float().sum(1), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("name", [VIT, CONV, "test_efficientnet", "test_convnext"])
@pytest.mark.parametrize("channels", [1, 6])
def test_grey_images_give_the_same_embedding_in_any_number_of_channels(
    tmp_path: Path, name: str, channels: int
) -> None:
    torch.manual_seed(3)
    source = build_backbone(name, image_size=32).eval()
    save_file(source.state_dict(), tmp_path / "w.safetensors")
    target = build_backbone(name, channels=channels, image_size=32).eval()
    report = load_weights(target, tmp_path / "w.safetensors")
    assert len(report.adapted) == 1
    assert not report.missing
    grey = torch.randn(2, 1, 32, 32)
    with torch.no_grad():
        expected = source(grey.expand(-1, 3, -1, -1))
        found = target(grey.expand(-1, channels, -1, -1))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_weights_that_timm_fetches_are_adapted_too(tmp_path: Path) -> None:
    source = vit(seed=4)
    save_file(source.state_dict(), tmp_path / "hub.safetensors")
    options = {"pretrained_cfg_overlay": {"file": str(tmp_path / "hub.safetensors")}}
    target = vit(channels=2, seed=5)
    report = load_pretrained(target, VIT, image_size=32, options=options)
    assert report.adapted == ["patch_embed.proj.weight"]
    assert not report.missing
    assert torch.equal(target.norm.weight, source.norm.weight)


def test_a_model_without_weights_to_fetch() -> None:
    with pytest.raises(ConfigError, match=r"'darknet17': timm cannot give pretrained weights"):
        load_pretrained(build_backbone("darknet17"), "darknet17", image_size=32, options={})


def test_foreign_names_go_through_timms_conversion(tmp_path: Path) -> None:
    """Registers as Meta's DINOv2 keeps them: other names, the class token in the embedding."""
    options = {"reg_tokens": 4, "no_embed_class": True}
    source = build_backbone(VIT, image_size=32, options=options)
    state = source.state_dict()
    state["register_tokens"] = state.pop("reg_token")
    state["mask_token"] = torch.zeros(1, 64)
    state["pos_embed"] = torch.cat([torch.ones(1, 1, 64), state["pos_embed"]], dim=1)
    torch.save(state, tmp_path / "dinov2.pth")
    target = build_backbone(VIT, image_size=32, options=options)
    report = load_weights(target, tmp_path / "dinov2.pth")
    assert not report.missing
    assert not report.unexpected
    assert torch.equal(target.reg_token, source.reg_token)
    assert torch.equal(target.pos_embed, source.pos_embed)
    assert torch.equal(target.cls_token, source.cls_token + 1)
