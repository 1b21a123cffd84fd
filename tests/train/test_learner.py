"""One optimisation step: what moves, what stays, and what stops it."""

import re
from typing import Any

import pytest
import torch
from torch import Tensor

from fino_fast import Categorical, FinoLoss, InfoNCE
from fino_fast.train import TrainConfig
from fino_fast.train.backbone import build_backbone
from fino_fast.train.learner import DivergedError, Learner
from fino_fast.train.model import Student, embed
from fino_fast.train.projector import build_projector
from fino_fast.train.schedule import Schedule
from fino_fast.train.world import World

CPU = World(0, 1, torch.device("cpu"))


def learner(schedule: Schedule = Schedule(10, 0, 0), **changes: Any) -> Learner:  # noqa: B008
    content = {
        "data": "unused",
        "output": "unused",
        "backbone": {"name": "test_resnet", "options": {"drop_rate": 0.3}},
        "optimizer": {"lr": 1e-3},
        "teacher": {"momentum": 0.5},
    }
    config = TrainConfig.checked(content | changes, "test")
    torch.manual_seed(0)
    backbone = build_backbone("test_resnet", options=config.backbone.options)
    criterion = FinoLoss(96, [Categorical("plate", 3)], contrastive=InfoNCE())
    return Learner(config, schedule, CPU, Student(backbone, build_projector(96, (), 8), criterion))


def batch(seed: int = 0) -> tuple[list[Tensor], dict[str, Tensor]]:
    torch.manual_seed(seed)
    return [torch.randn(2, 4, 3, 32, 32)], {"plate": torch.tensor([0, 1, 2, -1])}


def state(model: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(before: dict[str, Tensor], model: torch.nn.Module) -> list[bool]:
    return [torch.equal(value, before[name]) for name, value in model.state_dict().items()]


def test_embed_keeps_the_order_of_views_and_images() -> None:
    backbone = build_backbone("test_resnet").eval()
    large, small = torch.randn(2, 3, 3, 64, 64), torch.randn(4, 3, 3, 32, 32)
    with torch.no_grad():
        embeddings = embed(backbone, [large, small])
        assert embeddings.shape == (6, 3, 96)
        torch.testing.assert_close(embeddings[1], backbone(large[1]))
        torch.testing.assert_close(embeddings[4], backbone(small[2]))


def test_everything_moves_when_nothing_is_frozen() -> None:
    job = learner()
    parts = (job.student.backbone, job.student.projector, job.teacher, job.student.criterion)
    before = [state(part) for part in parts]
    terms = job.step(0, *batch())
    assert not any(all(same(b, part)) for b, part in zip(before, parts, strict=True))
    assert terms["lr"] == 1e-3
    assert {"loss", "contrastive", "plate", "lambda", "grad_norm"} <= terms.keys()


def test_the_bank_is_filled_by_the_teacher() -> None:
    job = learner(backbone={"name": "test_resnet", "freeze": 0.5}, teacher={"momentum": 1.0})
    views, metadata = batch()
    with torch.no_grad():
        for parameter in job.teacher.parameters():
            parameter.mul_(1.5)
        rows = torch.nn.functional.normalize(embed(job.teacher, views)[1, 1], dim=0)
        first = torch.nn.functional.normalize(embed(job.teacher, views)[0, 1], dim=0)
    job.step(0, views, metadata)
    mixed = torch.nn.functional.normalize(0.99 * first + 0.01 * rows, dim=0)
    torch.testing.assert_close(job.student.criterion.heads["plate"].centroids[1], mixed)


def test_a_frozen_backbone_stays_bit_for_bit_until_it_is_freed() -> None:
    job = learner(Schedule(10, 0, 2))
    backbone, projector = state(job.student.backbone), state(job.student.projector)
    guidance = [float(job.step(step, *batch(step))["lambda"]) for step in range(2)]
    assert all(same(backbone, job.student.backbone))  # batch statistics too
    assert not any(same(projector, job.student.projector))
    job.step(2, *batch(2))
    assert not all(same(backbone, job.student.backbone))
    guidance += [float(job.step(step, *batch(step))["lambda"]) for step in (3, 9)]
    assert guidance[:2] == [0, 0]
    assert guidance[2] == pytest.approx(2 / (1 + 2.718281828 ** (-10 / 8)) - 1)
    assert guidance[3] > 0.99


def test_kept_statistics_stay_while_the_weights_learn() -> None:
    job = learner(backbone={"name": "test_resnet", "batch_statistics": "kept"})
    before = state(job.student.backbone)
    job.step(0, *batch())
    moved = {k for k, v in job.student.backbone.state_dict().items() if not v.equal(before[k])}
    statistics = {key for key in before if "running" in key or "num_batches" in key}
    assert statistics
    assert not moved & statistics
    assert any(key.endswith("bn1.weight") for key in moved)  # scales and shifts learn
    learned = learner()
    learned.step(0, *batch())
    after = learned.student.backbone.state_dict()
    assert not any(after[key].equal(before[key]) for key in statistics)


def test_a_step_depends_on_its_number_not_on_what_was_drawn_before() -> None:
    losses = []
    for noise in (0, 3):
        job = learner()
        torch.manual_seed(noise)
        losses.append(job.step(4, *batch())["loss"])
    assert torch.equal(*losses)
    assert not torch.equal(losses[0], learner().step(5, *batch())["loss"])


def test_gradients_are_clipped_over_all_modules_together() -> None:
    job = learner(optimizer={"lr": 1e-3, "clip": 0.05})
    terms = job.step(0, *batch())
    norms = [p.grad.norm() for p in job.student.parameters()]
    assert float(terms["grad_norm"]) > 0.05
    assert float(torch.stack(norms).norm()) == pytest.approx(0.05, rel=1e-3)


def test_bf16_keeps_fp32_weights_and_a_close_loss() -> None:
    full, half = learner(), learner(precision="bf16")
    expected, found = full.step(0, *batch())["loss"], half.step(0, *batch())["loss"]
    assert found.dtype == torch.float32
    assert not torch.equal(found, expected)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05)
    assert {p.dtype for p in half.student.parameters()} == {torch.float32}


def test_a_loss_that_is_not_finite_stops_before_the_weights_change() -> None:
    job = learner()
    job.step(0, *batch())
    with torch.no_grad():
        job.student.projector[0].weight[0, 0] = torch.nan
    parameters = [p.clone() for p in job.student.backbone.parameters()]
    message = r"step 2: not finite: loss is nan, contrastive is nan, grad_norm is nan; "
    with pytest.raises(DivergedError, match=message + r"first.*: backbone\."):
        job.step(1, *batch())
    assert all(map(torch.equal, parameters, job.student.backbone.parameters()))


def test_an_infinite_gradient_of_a_finite_loss_stops_too() -> None:
    job = learner()
    handle = job.student.projector[0].weight.register_hook(lambda grad: grad * torch.inf)
    with pytest.raises(DivergedError, match=r"grad_norm is (inf|nan).*projector\.0\.weight"):
        job.step(0, *batch())
    handle.remove()


def test_message_says_what_to_do() -> None:
    job = learner()
    with torch.no_grad():
        job.student.projector[0].bias[0] = torch.inf
    with pytest.raises(DivergedError) as caught:
        job.step(0, *batch())
    assert re.search(r"smaller optimizer\.lr", str(caught.value))
