"""The moving average of the backbone."""

import torch

from fino_fast.train.backbone import build_backbone
from fino_fast.train.teacher import build_teacher, update_teacher


def test_parameters_average_and_batch_statistics_are_copied() -> None:
    backbone = build_backbone("test_resnet")
    teacher = build_teacher(backbone)
    assert not teacher.training
    assert not any(parameter.requires_grad for parameter in teacher.parameters())
    before = {name: value.clone() for name, value in teacher.state_dict().items()}
    with torch.no_grad():
        for parameter in backbone.parameters():
            parameter.add_(1.0)
        backbone(torch.randn(4, 3, 32, 32))
    update_teacher(teacher, backbone, 0.9)
    parameters = dict(teacher.named_parameters())
    student = backbone.state_dict()
    moved = 0
    for name, value in teacher.state_dict().items():
        if name in parameters:
            torch.testing.assert_close(value, before[name] + 0.1)
        else:
            assert torch.equal(value, student[name]), name
            moved += not torch.equal(value, before[name])
    assert moved
