"""Checkpoints: safetensors for tensors, JSON for the rest, whole or absent.

A checkpoint is a folder `step-<8 digits>` with

    model.safetensors       student.backbone.*, student.projector.*, student.criterion.*, teacher.*
    optimizer.safetensors   <parameter>#<entry> of AdamW
    state.json              step, position in the data, configuration, schema with vocabularies

It is written under another name, synchronised to the disk, and renamed last.
"""

import os
import re
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, Literal

import safetensors.torch
import torch
from pydantic import Field
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from fino_fast.config import StrictModel
from fino_fast.data import Views
from fino_fast.data.files import TEMPORARY, committed, read_json, sync_folder, write_json
from fino_fast.errors import ConfigError, DataError

from .backbone import build_backbone
from .config import TrainConfig

MODEL, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"


class State(StrictModel):
    """`state.json`: what a checkpoint holds besides tensors."""

    format: Literal["fino-fast checkpoint"] = "fino-fast checkpoint"
    version: Literal[1] = 1
    step: Annotated[int, Field(ge=0)]
    """Number of steps done."""
    config: dict[str, Any]
    """The run's `TrainConfig`."""
    loader: dict[str, Any]
    """Position in the data, as `Loader.state` gives it."""
    channels: Annotated[int, Field(ge=1)]
    """Channels of the views."""
    data_schema: dict[str, Any]
    """The shards' `schema.json`, vocabularies included."""
    data_schema_hash: str
    manifest_hash: str
    packages: dict[str, str]
    """Versions of the packages that wrote it."""


def save(
    run: Path,
    models: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: State,
    *,
    keep: int,
) -> Path:
    """Write a checkpoint, then drop all but the newest `keep`.

    Args:
        run: the run's folder.
        models: all parameters and buffers, including the teacher's.
        optimizer: over parameters of `models`.
        state: what else a continuation needs.

    Returns:
        The checkpoint's folder.

    Raises:
        DiskFullError: it does not fit; earlier checkpoints are intact.
    """
    final = path_of(run, state.step)
    for leftover in final.parent.glob(f"{TEMPORARY}*"):
        shutil.rmtree(leftover)
    draft = final.with_name(f"{TEMPORARY}{final.name}")
    draft.mkdir(parents=True)
    entries = optimizer_tensors(models, optimizer)
    try:
        write_tensors(draft / MODEL, partial(safetensors.torch.save_model, models))
        write_tensors(draft / OPTIMIZER, partial(safetensors.torch.save_file, entries))
        write_json(draft / STATE, state.model_dump(mode="json"))
    except BaseException:
        shutil.rmtree(draft)
        raise
    draft.rename(final)
    sync_folder(final.parent)
    for old in checkpoints(run)[:-keep]:
        shutil.rmtree(old.rename(old.with_name(f"{TEMPORARY}{old.name}")))
    return final


def path_of(run: Path, step: int) -> Path:
    """Folder of the checkpoint after `step` steps."""
    return run / "checkpoints" / f"step-{step:08d}"


def write_tensors(path: Path, write: Callable[[str], None]) -> None:
    """Commit a safetensors file; what its writer meets on the disk is an error of `committed`."""
    with committed(path) as file:
        try:
            write(file.name)
        except SafetensorError as error:
            number = re.search(r"os error (\d+)", str(error))
            if number is None:
                raise
            raise OSError(int(number[1]), os.strerror(int(number[1]))) from error


def checkpoints(run: Path) -> list[Path]:
    """The whole checkpoints of a run, oldest first."""
    return sorted((run / "checkpoints").glob("step-*"))


def latest(run: Path) -> Path:
    """The newest checkpoint of a run folder, or the folder itself where it is a checkpoint.

    Raises:
        DataError: there is none.
    """
    if (run / STATE).is_file():
        return run
    found = checkpoints(run)
    if not found:
        raise DataError(f"{run}: has no checkpoint" if run.is_dir() else f"{run}: no such folder")
    return found[-1]


def read_state(checkpoint: Path) -> State:
    """The JSON part of a checkpoint.

    Raises:
        DataError: it is missing, damaged or of another format.
    """
    path = checkpoint / STATE
    try:
        return State.checked(read_json(path), str(path))
    except ConfigError as error:
        raise DataError(f"{error}; it is damaged or of another version") from error


def restore(checkpoint: Path, models: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Put a checkpoint's tensors into models and optimizer of the same configuration.

    Raises:
        DataError: a file is damaged, or its tensors are not those of the models.
    """
    parameters = dict(models.named_parameters())
    try:
        safetensors.torch.load_model(models, checkpoint / MODEL)
        entries = safetensors.torch.load_file(checkpoint / OPTIMIZER)
        for key, value in entries.items():
            name, entry = key.rsplit("#", 1)
            parameter = parameters[name]
            # AdamW counts its steps on the host, whatever device the parameters are on.
            place = "cpu" if entry == "step" else parameter.device
            optimizer.state[parameter][entry] = value.to(place)
    except (OSError, SafetensorError, RuntimeError, KeyError) as error:
        raise DataError(f"checkpoint {checkpoint}: cannot be restored: {error}") from error


def optimizer_tensors(models: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state, each tensor under its parameter's name and its own."""
    names: dict[Tensor, str] = {parameter: name for name, parameter in models.named_parameters()}
    return {
        f"{names[parameter]}#{entry}": value
        for parameter, entries in optimizer.state.items()
        for entry, value in entries.items()
    }


def load_backbone(run: Path, *, teacher: bool = False) -> tuple[nn.Module, Views]:
    """The adapted backbone of a run, ready to embed images.

    Args:
        run: the run's folder (its newest checkpoint is taken), or one checkpoint's.
        teacher: take the teacher, the moving average, instead of the student.

    Returns:
        The backbone in evaluation mode on the CPU, and the recipe of the images that it expects.

    Raises:
        DataError: there is no checkpoint, or it is damaged.
        ConfigError: the run had no teacher.
    """
    checkpoint = latest(run)
    state = read_state(checkpoint)
    config = TrainConfig.checked(state.config, str(checkpoint / STATE))
    if teacher and config.teacher is None:
        raise ConfigError(f"{checkpoint}: the run had no teacher")
    backbone = build_backbone(
        config.backbone.name,
        channels=state.channels,
        image_size=config.views.size,
        options=config.backbone.options,
    )
    prefix = "teacher." if teacher else "student.backbone."
    try:
        with safe_open(checkpoint / MODEL, framework="pt") as file:
            tensors = {
                key.removeprefix(prefix): file.get_tensor(key)
                for key in file.keys()  # noqa: SIM118 - not a mapping
                if key.startswith(prefix)
            }
        backbone.load_state_dict(tensors)
    except (OSError, SafetensorError, RuntimeError) as error:
        raise DataError(f"{checkpoint / MODEL}: cannot be loaded: {error}") from error
    return backbone.requires_grad_(False).eval(), config.views
