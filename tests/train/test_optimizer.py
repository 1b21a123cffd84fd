"""Parameter groups: layer decay, weight decay, and what they leave out."""

import pytest
import torch

from fino_fast import Categorical, FinoLoss, InfoNCE
from fino_fast.train.backbone import build_backbone
from fino_fast.train.config import OptimizerConfig
from fino_fast.train.model import Student
from fino_fast.train.optimizer import build_optimizer, set_learning_rates
from fino_fast.train.projector import build_projector
from fino_fast.train.schedule import Schedule


def student(name: str = "test_vit") -> Student:
    backbone = build_backbone(name, image_size=32)
    criterion = FinoLoss(
        64, [Categorical("plate", 3, head="linear")], contrastive=InfoNCE(learnable=True)
    )
    return Student(backbone, build_projector(64, (16,), 8), criterion)


@pytest.fixture
def config() -> OptimizerConfig:
    return OptimizerConfig(lr=1e-3, layer_decay=0.5, weight_decay=0.1)


@pytest.mark.parametrize("name", ["test_vit", "test_convnext"])
def test_every_parameter_is_in_one_group(name: str, config: OptimizerConfig) -> None:
    model = student(name)
    grouped = [p for group in build_optimizer(model, config).param_groups for p in group["params"]]
    assert len(grouped) == len(set(grouped))
    assert set(grouped) == set(model.parameters())


def test_deeper_layers_learn_faster_and_vectors_do_not_decay(config: OptimizerConfig) -> None:
    model = student()
    optimizer = build_optimizer(model, config)
    set_learning_rates(optimizer, Schedule(10, 0, 0), 0, config.lr)
    group_of = {p: group for group in optimizer.param_groups for p in group["params"]}
    named = dict(model.named_parameters())
    rate = {name: group_of[p]["lr"] / config.lr for name, p in named.items()}
    decay = {name: group_of[p]["weight_decay"] for name, p in named.items()}
    depth = len(model.backbone.blocks)
    for block in range(depth - 1):
        assert rate[f"backbone.blocks.{block + 1}.mlp.fc1.weight"] == pytest.approx(
            2 * rate[f"backbone.blocks.{block}.mlp.fc1.weight"]
        )
    assert rate["backbone.patch_embed.proj.weight"] == pytest.approx(
        rate["backbone.blocks.0.mlp.fc1.weight"] / 2
    )
    for name in ("backbone.norm.weight", "projector.0.weight", "criterion.heads.plate.weight"):
        assert rate[name] == 1, name
    assert {name for name, value in decay.items() if value == 0} == {
        name
        for name, p in named.items()
        if p.ndim <= 1 or name in ("backbone.pos_embed", "backbone.cls_token")
    }
    assert set(decay.values()) == {0, config.weight_decay}


def test_only_a_frozen_backbone_waits(config: OptimizerConfig) -> None:
    optimizer = build_optimizer(student(), config)
    set_learning_rates(optimizer, Schedule(100, 0, 20), 10, config.lr)
    for group in optimizer.param_groups:
        assert (group["lr"] == 0) == group["backbone"]


def test_learnable_temperature_moves() -> None:
    model = student()
    optimizer = build_optimizer(model, OptimizerConfig(lr=0.1))
    before = model.criterion.log_temperature.detach().clone()
    loss = model([torch.randn(2, 4, 3, 32, 32)], {"plate": torch.tensor([0, 1, 2, -1])}, None)[0]
    loss.backward()
    optimizer.step()
    assert not torch.equal(model.criterion.log_temperature, before)
