"""Training and evaluation: the task, the loop, its folder, and the processes that share it."""

from capszoo.errors import Stopped, TrainingError
from capszoo.files import write_csv, write_json
from capszoo.precision import autocast, resolve_amp

from .evaluate import Evaluation, evaluate, until_stopped
from .lr_finder import find_lr
from .run_folder import STATE_FILES, SUMMARY_COLUMNS, drop_state
from .task import CapsuleTask, Normalization, class_to_reconstruct
from .trainer import Trainer

__all__ = [
    "STATE_FILES",
    "SUMMARY_COLUMNS",
    "CapsuleTask",
    "Evaluation",
    "Normalization",
    "Stopped",
    "Trainer",
    "TrainingError",
    "autocast",
    "class_to_reconstruct",
    "drop_state",
    "evaluate",
    "find_lr",
    "resolve_amp",
    "until_stopped",
    "write_csv",
    "write_json",
]
