"""Checkpoints under faults: no room left, and optimizers half begun."""

import resource
from pathlib import Path

import pytest
import torch
from torch import nn

from fino_fast.errors import DataError, DiskFullError
from fino_fast.train.checkpoint import (
    State,
    checkpoints,
    latest,
    path_of,
    read_state,
    restore,
    save,
)


@pytest.fixture
def models() -> nn.ModuleDict:
    torch.manual_seed(0)
    tied = nn.Linear(64, 64)
    return nn.ModuleDict({"student": nn.Sequential(tied, tied, nn.BatchNorm1d(64))})


def state(step: int) -> State:
    return State(
        step=step,
        config={"output": "µ"},
        loader={},
        channels=3,
        data_schema={},
        data_schema_hash="",
        manifest_hash="",
        packages={},
    )


def optimizer_of(models: nn.Module) -> torch.optim.AdamW:
    return torch.optim.AdamW(models.parameters(), lr=0.1)


def learn(models: nn.ModuleDict, optimizer: torch.optim.AdamW) -> None:
    optimizer.zero_grad()
    models["student"](torch.randn(4, 64)).square().sum().backward()
    optimizer.step()


def test_tied_weights_and_optimizer_state_come_back(tmp_path: Path, models: nn.ModuleDict) -> None:
    optimizer = optimizer_of(models)
    models["student"][2].requires_grad_(False)  # has no optimizer state yet
    learn(models, optimizer)
    path = save(tmp_path, models, optimizer, state(7), keep=1)
    assert read_state(path) == state(7)

    kept = {name: value.clone() for name, value in models.state_dict().items()}
    moments = {p: dict(entries) for p, entries in optimizer.state.items()}
    moments = {p: {k: v.clone() for k, v in entries.items()} for p, entries in moments.items()}
    learn(models, optimizer)
    fresh = optimizer_of(models)
    restore(path, models, fresh)
    for name, value in models.state_dict().items():
        assert torch.equal(value, kept[name]), name
    assert fresh.state.keys() == moments.keys()
    for parameter, entries in moments.items():
        for entry, value in entries.items():
            assert torch.equal(fresh.state[parameter][entry], value)


def test_no_room_keeps_the_earlier_checkpoint(tmp_path: Path, models: nn.ModuleDict) -> None:
    optimizer = optimizer_of(models)
    save(tmp_path, models, optimizer, state(1), keep=1)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(DiskFullError, match=r"model\.safetensors: no room"):
            save(tmp_path, models, optimizer, state(2), keep=1)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert list((tmp_path / "checkpoints").iterdir()) == [path_of(tmp_path, 1)]
    assert latest(tmp_path) == path_of(tmp_path, 1)
    save(tmp_path, models, optimizer, state(2), keep=1)
    assert checkpoints(tmp_path) == [path_of(tmp_path, 2)]


def test_tensors_of_another_model(tmp_path: Path, models: nn.ModuleDict) -> None:
    path = save(tmp_path, models, optimizer_of(models), state(1), keep=1)
    other = nn.ModuleDict({"student": nn.Linear(64, 64)})
    with pytest.raises(DataError, match=r"step-00000001: cannot be restored"):
        restore(path, other, optimizer_of(other))


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('"version": 1', '"version": 99', r"version: .*found 99.*another version"),
        ('"step": 1', '"step": -1', r"step: .*found -1"),
        ('"packages"', '"pakages"', r"unknown key 'pakages'|missing key 'packages'"),
        ("{", "", "not valid JSON"),
    ],
)
def test_a_state_of_another_version_or_damaged(
    tmp_path: Path, models: nn.ModuleDict, old: str, new: str, message: str
) -> None:
    path = save(tmp_path, models, optimizer_of(models), state(1), keep=1)
    file = path / "state.json"
    file.write_text(file.read_text().replace(old, new, 1))
    with pytest.raises(DataError, match=r"state\.json.*" + message):
        read_state(path)
