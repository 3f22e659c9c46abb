"""Checkpoints of a run: a folder that `from_pretrained` reads, the optimizer's state, and the place in the data."""

import dataclasses
import json
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from elastic_model.distributed import Tensors
from elastic_model.folders import TRAINER_STATE, new_folder
from elastic_model.sealed import read_sealed, write_sealed
from pretrain.config import FREE_ON_RESUME, PretrainConfig
from pretrain.prepare import Corpus

OPTIMIZER = "optimizer.safetensors"
WEIGHTS = "model.safetensors"
NAME = re.compile(r"checkpoint-\d+")
REMEDY = "pass --resume-previous to continue from the checkpoint before it"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint whose hashes are right, and what it says of the run."""

    folder: Path
    state: dict[str, Any]


def save_checkpoint(
    output: Path,
    step: int,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    weights: Tensors,
    optimizer: Tensors,
    state: dict[str, Any],
    keep: int,
) -> Path:
    """Write `checkpoint-STEP` in one piece (beside, fsynced, renamed), then remove all but the newest `keep` up to it:
    beyond it may lie one that a run has resumed before.

    OSError where that fails, a full disk say: the checkpoints before are as they were.
    """
    folder = output / f"checkpoint-{step}"
    try:
        with new_folder(folder) as temporary:
            save_model(temporary, model, tokenizer, weights)
            save_file(optimizer, temporary / OPTIMIZER)
            write_sealed(temporary / TRAINER_STATE, {"step": step, **state}, (WEIGHTS, OPTIMIZER))
    except Exception as error:  # the libraries that write here each have an error of their own for a full disk
        raise OSError(
            f"{folder} could not be written: {error}; earlier checkpoints are intact, --resume continues"
        ) from error
    _remove_before(output, [one for one in map(_step, find_checkpoints(output)) if one <= step][-keep:][0])
    return folder


def _remove_before(output: Path, step: int) -> None:
    """Remove older checkpoints, also one whose removal was cut off before."""
    for path in output.glob("checkpoint-*"):
        if NAME.fullmatch(path.name) and _step(path) < step:
            shutil.rmtree(path)


def _step(folder: Path) -> int:
    return int(folder.name.split("-")[1])


def save_model(
    folder: Path, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, weights: Tensors | None = None
) -> None:
    """The model and its tokenizer in Hugging Face's layout; `weights`, float32, are whole where `model` holds parts of
    them."""
    model.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")
    tokenizer.save_pretrained(folder)
    if weights is not None:  # transformers notes the model's type: what a pass computes in, under DeepSpeed
        file = folder / "config.json"
        content = {**json.loads(file.read_text(encoding="utf-8")), "dtype": "float32"}
        file.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def check_same_model(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """ValueError that names the first setting in which the checkpoint's model differs from `model`, which may have its
    shape from another warm start."""
    saved, now = (
        _settings(config) for config in (type(model.config).from_pretrained(checkpoint.folder), model.config)
    )
    for name in sorted(now):
        if saved.get(name) != now[name]:
            raise ValueError(
                f"resume: the model's {name} was {saved.get(name)} in {checkpoint.folder}, now {now[name]}; use the "
                "same init_from, or another output"
            )


def _settings(config: PretrainedConfig) -> dict[str, Any]:
    """What shapes a model and its training; not how it was saved."""
    of_saving = ("architectures", "auto_map", "dtype", "transformers_version", "_name_or_path")
    plain = json.loads(json.dumps(config.to_dict()))
    return {name: value for name, value in plain.items() if name not in of_saving}


def load_weights(checkpoint: Checkpoint, model: PreTrainedModel) -> None:
    """The weights exactly as they were saved."""
    weights = load_file(checkpoint.folder / WEIGHTS)
    missing, unexpected = model.load_state_dict(weights, strict=False)
    missing = set(missing) - set(getattr(model, "_tied_weights_keys", None) or ())
    if missing or unexpected:
        raise ValueError(
            f"{checkpoint.folder / WEIGHTS} does not fit the model: missing {sorted(missing)}, extra {unexpected}"
        )


def load_optimizer_tensors(checkpoint: Checkpoint) -> Tensors:
    """AdamW's state by name."""
    return load_file(checkpoint.folder / OPTIMIZER)


def find_checkpoints(output: Path) -> list[Path]:
    """The checkpoints of a run, oldest first, but for the rest of one whose removal was cut off.

    A folder newer than all that have a state is no such rest, for it came whole into its place: it is damaged.
    """
    found = sorted((path for path in output.glob("checkpoint-*") if NAME.fullmatch(path.name)), key=_step)
    last = max((number for number, path in enumerate(found) if (path / TRAINER_STATE).is_file()), default=-1)
    return [path for number, path in enumerate(found) if number > last or (path / TRAINER_STATE).is_file()]


def checkpoint_to_resume(output: Path, previous: bool) -> Checkpoint | None:
    """The newest checkpoint, or the one before it; None without one; ValueError if it is damaged."""
    found = find_checkpoints(output)
    if previous:
        if len(found) < 2:
            raise ValueError(f"{output} holds {len(found)} checkpoint(s): there is none before the newest")
        found.pop()
    if not found:
        return None
    return Checkpoint(found[-1], _read_state(found[-1]))


def _read_state(folder: Path) -> dict[str, Any]:
    try:
        return read_sealed(folder / TRAINER_STATE, (WEIGHTS, OPTIMIZER))
    except ValueError as error:
        raise ValueError(f"{error}; {REMEDY}") from None


def run_state(config: PretrainConfig, corpus: Corpus) -> dict[str, Any]:
    """What a resumed run must find unchanged: the options that decide its numbers, the text and the tokenizer."""
    options = json.loads(json.dumps(dataclasses.asdict(config), default=str))
    fixed = {name: value for name, value in options.items() if name not in FREE_ON_RESUME}
    sources = {source.name: {"text": source.digest, "weight": source.weight} for source in corpus.sources}
    return {"options": fixed, "sources": sources, "tokenizer": corpus.tokenizer_digest}


def check_same_run(checkpoint: Checkpoint, now: dict[str, Any]) -> None:
    """ValueError that names what differs between the run that wrote the checkpoint and this one."""
    folder, saved = checkpoint.folder, checkpoint.state["run"]
    for name, value in now["options"].items():
        before = saved["options"].get(name)
        if before != value:
            raise ValueError(f"resume: {name} was {before} in {folder}, now {value}; use the same, or another output")
    before, after = saved["sources"], now["sources"]
    if before.keys() != after.keys():
        raise ValueError(
            f"resume: the sources were {', '.join(before)} in {folder}, now {', '.join(after)}; use the same, or "
            "another output"
        )
    for name, source in after.items():
        _check_digest(f"text of source {name!r}", folder, before[name]["text"], source["text"])
        if before[name]["weight"] != source["weight"]:
            raise ValueError(
                f"resume: the weight of source {name!r} was {before[name]['weight']} in {folder}, now "
                f"{source['weight']}; use the same, or another output"
            )
    _check_digest("tokenizer", folder, saved["tokenizer"], now["tokenizer"])


def _check_digest(what: str, folder: Path, saved: str, now: str) -> None:
    if saved != now:
        raise ValueError(
            f"resume: the {what} is not the one {folder} was trained on (sha256 {saved[:12]}, now {now[:12]}); use "
            "the same (another version of this package may read a text otherwise), or another output"
        )
