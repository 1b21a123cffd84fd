"""Adaptation of a backbone: `train(TrainConfig(...))`, or `fino-fast train config.yaml`."""

from fino_fast.errors import MissingExtraError

try:
    from .config import TrainConfig
    from .interrupt import TrainingInterrupted
    from .trainer import TrainResult, train
except ModuleNotFoundError as error:
    if (error.name or "").startswith("fino_fast"):
        raise
    raise MissingExtraError(error.name or str(error), "train") from error

__all__ = ["TrainConfig", "TrainResult", "TrainingInterrupted", "train"]
