"""`fino-fast export`: the adapted backbone of a run for programs that know nothing of this one.

A folder as timm reads it, `timm.create_model("local-dir:<folder>", pretrained=True)`:

    model.safetensors    the backbone's weights under timm's names
    config.json          architecture, arguments, and how images are to be prepared
    export.json          where it comes from: run, step, hashes of set and schema, value of white
"""

from functools import partial
from pathlib import Path
from typing import Any

import safetensors.torch
from pydantic_settings import CliPositionalArg
from torch import nn

from fino_fast.config import CommandModel
from fino_fast.data import Schema, Views
from fino_fast.data.files import committed_folder, write_json
from fino_fast.data.stored import DTYPES

from .backbone import embedding_dim
from .checkpoint import State, latest, load_backbone, read_state, write_tensors

WEIGHTS, CONFIG, ORIGIN = "model.safetensors", "config.json", "export.json"


class Export(CommandModel):
    """Write the adapted backbone of a run as a folder that timm reads.

    `timm.create_model("local-dir:OUT", pretrained=True)` gives the model; other programs find plain
    weights in model.safetensors. The folder appears when it is complete.
    """

    run_path: CliPositionalArg[Path]
    """Folder of a training run (its newest checkpoint is taken), or of one checkpoint."""
    out: Path
    """Folder to write; it must not exist yet."""
    teacher: bool = False
    """The moving average instead of the backbone itself."""

    def run(self) -> int:
        state = export(self.run_path, self.out, teacher=self.teacher)
        print(f"{self.out}: the backbone after step {state.step}")
        return 0


def export(run: Path, out: Path, *, teacher: bool = False) -> State:
    """Write the backbone of a run's newest checkpoint; return that checkpoint's state.

    Raises:
        DataError: there is no checkpoint, or it is damaged.
        ConfigError: `out` exists, or the run had no teacher.
        DiskFullError: no room left; nothing is left of the folder.
    """
    checkpoint = latest(run)
    state = read_state(checkpoint)
    backbone, views = load_backbone(checkpoint, teacher=teacher)
    with committed_folder(out) as draft:
        write_tensors(draft / WEIGHTS, partial(safetensors.torch.save_model, backbone))
        write_json(draft / CONFIG, timm_config(backbone, views, state))
        write_json(draft / ORIGIN, origin(views, state, teacher))
    return state


def timm_config(backbone: nn.Module, views: Views, state: State) -> dict[str, Any]:
    """`config.json` as timm writes and reads it.

    Pixels are divided by white before mean and standard deviation are applied, as always in timm;
    what white is where images are not of 8 bits stands in `export.json`.
    """
    recipe = state.config["backbone"]
    mean, std = views.per_channel(state.channels)
    declared = getattr(backbone, "pretrained_cfg", {})
    fixed = bool(declared.get("fixed_input_size", False))
    arguments = {"num_classes": 0, "in_chans": state.channels}
    if fixed:
        arguments["img_size"] = views.size
    return {
        "architecture": recipe["name"],
        "num_classes": 0,
        "num_features": embedding_dim(backbone, state.channels, views.size),
        "model_args": arguments | recipe.get("options", {}),
        # Without `first_conv`: the weights have the right channels, and timm must not convert them.
        "pretrained_cfg": {
            "input_size": [state.channels, views.size, views.size],
            "fixed_input_size": fixed,
            "interpolation": "bilinear",
            "crop_pct": views.evaluation_crop,
            "crop_mode": "center",
            "mean": mean.tolist(),
            "std": std.tolist(),
            "num_classes": 0,
        },
    }


def origin(views: Views, state: State, teacher: bool) -> dict[str, Any]:
    """`export.json`: what these weights are, and what `config.json` has no words for."""
    declared = Schema.checked(state.data_schema, "the checkpoint's schema").declaration.images
    return {
        "format": "fino-fast export",
        "version": 1,
        "step": state.step,
        "teacher": teacher,
        "data_schema_hash": state.data_schema_hash,
        "manifest_hash": state.manifest_hash,
        "packages": state.packages,
        "views": views.model_dump(mode="json"),
        "white": {dtype: declared.white(dtype) for dtype in DTYPES},
    }
