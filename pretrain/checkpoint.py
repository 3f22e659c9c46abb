"""Checkpoints of a run: a folder that `from_pretrained` reads, the optimizer's state, and the place in the data."""

import dataclasses
import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from elastic_model.folders import new_folder
from pretrain.config import FREE_ON_RESUME, PretrainConfig
from pretrain.prepare import Corpus

STATE = "trainer_state.json"
OPTIMIZER = "optimizer.safetensors"
WEIGHTS = "model.safetensors"
NAME = re.compile(r"checkpoint-\d+")
REMEDY = "pass --resume-previous to continue from the checkpoint before it"


def save_checkpoint(
    output: Path,
    step: int,
    model: PreTrainedModel,
    optimizer: torch.optim.Optimizer,
    tokenizer: PreTrainedTokenizerBase,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-STEP` in one piece (beside, fsynced, renamed), then remove all but the newest `keep`."""
    folder = output / f"checkpoint-{step}"
    with new_folder(folder) as temporary:
        save_model(temporary, model, tokenizer)
        save_file(optimizer_tensors(model, optimizer), temporary / OPTIMIZER)
        digests = {name: _digest(temporary / name) for name in (WEIGHTS, OPTIMIZER)}
        (temporary / STATE).write_text(json.dumps({"step": step, **state, "sha256": digests}, indent=2) + "\n")
    _remove_before(output, _step(find_checkpoints(output)[-keep:][0]))
    return folder


def _remove_before(output: Path, step: int) -> None:
    """Remove older checkpoints, also one whose removal was cut off before."""
    for path in output.glob("checkpoint-*"):
        if NAME.fullmatch(path.name) and _step(path) < step:
            shutil.rmtree(path)


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def save_model(folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The model and its tokenizer in Hugging Face's layout, the weights in one file."""
    model.save_pretrained(folder, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)


def optimizer_tensors(model: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """AdamW's state as named tensors: PARAMETER.exp_avg, PARAMETER.exp_avg_sq, PARAMETER.step."""
    names: dict[torch.Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    return {
        f"{names[parameter]}.{key}": value.contiguous()
        for parameter, values in optimizer.state.items()
        for key, value in values.items()
    }


def load_checkpoint(folder: Path, model: PreTrainedModel, optimizer: torch.optim.Optimizer) -> None:
    """Weights and optimizer state, exactly as they were saved."""
    weights = load_file(folder / WEIGHTS)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - set(getattr(model, "_tied_weights_keys", None) or ())
    if missing or unexpected:
        raise ValueError(f"{folder / WEIGHTS} does not fit the model: missing {sorted(missing)}, extra {unexpected}")
    tensors = load_file(folder / OPTIMIZER)
    for name, parameter in model.named_parameters():
        for key in ("exp_avg", "exp_avg_sq", "step"):
            if f"{name}.{key}" in tensors:
                optimizer.state[parameter][key] = tensors[f"{name}.{key}"].to(
                    "cpu" if key == "step" else parameter.device
                )


def find_checkpoints(output: Path) -> list[Path]:
    """The finished checkpoints of a run, oldest first."""
    found = [path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name)]
    return sorted((path for path in found if (path / STATE).is_file()), key=_step)


def checkpoint_to_resume(output: Path, previous: bool) -> tuple[Path, dict[str, Any]] | None:
    """The newest checkpoint, or the one before it, and its state; None without one; ValueError if it is damaged."""
    found = find_checkpoints(output)
    if previous:
        if len(found) < 2:
            raise ValueError(f"{output} holds {len(found)} checkpoint(s): there is none before the newest")
        found.pop()
    if not found:
        return None
    return found[-1], _read_state(found[-1])


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        state = json.loads((folder / STATE).read_text())
        damaged = [name for name, digest in state["sha256"].items() if _digest(folder / name) != digest]
    except (ValueError, KeyError, FileNotFoundError) as error:
        raise ValueError(f"{folder} is damaged ({error}); {REMEDY}") from None
    if damaged:
        raise ValueError(f"{folder} is damaged ({', '.join(damaged)}: wrong sha256); {REMEDY}")
    return state


def run_state(config: PretrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What a resumed run must find unchanged: the options that decide its numbers, the text and the tokenizer."""
    options = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    fixed = {name: value for name, value in options.items() if name not in FREE_ON_RESUME}
    return {"options": fixed, "text": corpus.digest, "tokenizer": corpus.tokenizer_digest}


def check_same_run(folder: Path, saved: dict[str, Any], now: dict[str, Any]) -> None:
    """ValueError that names what differs between the run that wrote `folder` and this one."""
    for name, value in now["options"].items():
        before = saved["options"].get(name)
        if before != value:
            raise ValueError(f"resume: {name} was {before} in {folder}, now {value}; use the same, or another output")
    for name in ("text", "tokenizer"):
        if saved[name] != now[name]:
            raise ValueError(
                f"resume: the {name} is not the one {folder} was trained on (sha256 {saved[name][:12]}, "
                f"now {now[name][:12]}); use the same, or another output"
            )


def _digest(file: Path) -> str:
    with open(file, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
