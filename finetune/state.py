"""What an interrupted run continues from: weights, optimizer, progress; tensors in safetensors, the rest in JSON."""

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from elastic_model.distributed import Tensors
from elastic_model.folders import new_folder
from elastic_model.sealed import read_sealed, write_sealed

WEIGHTS, OPTIMIZER, BEST = (f"{name}.safetensors" for name in ("weights", "optimizer", "best"))
PROGRESS = "progress.json"


@dataclass
class Progress:
    """Where a run is: updates done, the best evaluation of the phase so far, evaluations since, and its weights."""

    update: int = 0
    stale: int = 0
    best_update: int = 0
    best_quality: float | None = None
    best_weights: Tensors = field(default_factory=dict)


def copy_weights(model: torch.nn.Module) -> Tensors:
    """The model's weights as they are now, on the CPU."""
    return {name: tensor.detach().to("cpu", copy=True).contiguous() for name, tensor in model.state_dict().items()}


def save_state(
    folder: Path, weights: Tensors, optimizer: Tensors, progress: Progress, settings: Mapping[str, Any]
) -> None:
    """Write the state of a run that `settings` describe, in the place of the one before.

    optimizer: AdamW's state by the names of the parameters; empty where a phase is over, the next has its own.
    OSError where it cannot be written, a full disk say: the state before is as it was.
    """
    plain = {name: value for name, value in vars(progress).items() if name != "best_weights"}
    try:
        with new_folder(folder) as new:
            save_file(weights, new / WEIGHTS)
            save_file(optimizer, new / OPTIMIZER)
            save_file(progress.best_weights, new / BEST)
            write_sealed(new / PROGRESS, {"progress": plain, "settings": dict(settings)}, (WEIGHTS, OPTIMIZER, BEST))
    except Exception as error:  # safetensors has an error of its own for a full disk
        raise OSError(f"{folder} could not be written: {error}; the state before it is intact") from error


def agrees(found: Mapping[str, Any], name: str, value: Any) -> bool:
    """Whether a saved run has a setting so; the names of its labels are noted only since."""
    return bool(found.get(name, value if name == "labels" else None) == value)


def check_settings(folder: Path, found: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    """ValueError that names the first setting in which a saved run differs from the one asked for."""
    for name, value in settings.items():
        if not agrees(found, name, value):
            raise ValueError(
                f"{folder} holds a run with {name} = {found.get(name)!r}, not {value!r}; "
                "resume it with its own settings, or start anew: without --resume, or with the folder removed"
            )


def load_progress(folder: Path, settings: Mapping[str, Any]) -> Progress:
    """How far the run saved in `folder` is; ValueError where it is damaged or had other settings."""
    try:
        saved = read_sealed(folder / PROGRESS, (WEIGHTS, OPTIMIZER, BEST))
    except ValueError as error:
        raise ValueError(f"{error}; start anew without --resume") from None
    check_settings(folder, saved["settings"], settings)
    names = {one.name for one in dataclasses.fields(Progress)}
    plain = {name: value for name, value in saved["progress"].items() if name in names}
    return Progress(**plain, best_weights=load_file(folder / BEST))


def load_weights(folder: Path, model: torch.nn.Module) -> None:
    """Put the saved weights into the model."""
    model.load_state_dict(load_file(folder / WEIGHTS))


def load_optimizer_tensors(folder: Path) -> Tensors:
    """AdamW's state by the names of the parameters."""
    return load_file(folder / OPTIMIZER)
