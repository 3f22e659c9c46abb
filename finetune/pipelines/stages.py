"""The stages of a pipeline: each a job of its own on the checkpoint of the one before, carried out once, kept."""

import importlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from elastic_model.folders import new_file, new_folder
from elastic_model.operating_points import OperatingPoints, checkpoint_hash
from elastic_model.provenance import append_stage, versions
from export.config import ExportOptions
from export.write import export_checkpoint, patch_config
from finetune.config import DistillOptions, LabelledOptions, PruneOptions, SearchOptions, TaskOptions, TrainOptions
from finetune.data import Encoded
from finetune.distill import load_teacher, settings_of_student, shallower
from finetune.examples import read_examples
from finetune.kinds import problem_type_of
from finetune.labels import Labels
from finetune.pipelines.config import OperatorOptions
from finetune.pipelines.letters import OPERATORS, name_of
from finetune.prepare import (
    chosen_task,
    encode_split,
    labels_of_training,
    load_tokenizer,
    rows_hash,
    some_rows,
    weight_files,
)
from finetune.state import check_settings

RECORD = "stage.json"
SHARED = ("epochs", "batch_size", "learning_rate", "train_rows", "max_length", "seed")
OF_OPERATOR: dict[str, tuple[str, ...]] = {  # what else a stage depends on
    "": SHARED,
    "D": (*SHARED, "layers", "temperature"),
    "P": (*SHARED, "heads", "intermediate", "rounds", "multiple_of", "uneven", "label_free", "temperature"),
    "E": SHARED,
    "S": (*SHARED, "search_iterations", "permitted_loss"),
    "Q": (),
}
Job = Callable[["Work", str, Path, Path], int]  # work, stage, parent folder, folder -> exit code


@dataclass(frozen=True)
class Work:
    """What all stages of one seed share: options (its seed among them), the folder of the stages, the rows."""

    options: OperatorOptions
    root: Path
    labels: Labels
    dev: Encoded
    train_rows: int
    data: dict[str, str]  # split -> hash of its tokenised rows

    def folder(self, stage: str) -> Path:
        """Where a stage is kept."""
        return self.root / name_of(stage)

    @property
    def policy(self) -> str:
        """The exit policy of E: the paper's confidence; a regression has none, it leaves by patience."""
        return "patience" if self.labels.problem_type == "regression" else "confidence"


def _labelled(kind: type[Any], options: OperatorOptions, model: Path | str, output: Path, **more: Any) -> Any:
    """The options of a training job that reads the same task."""
    names = [one.name for one in fields(TaskOptions)]
    names += ["epochs", "batch_size", "learning_rate", "train_rows"]
    shared = {name: getattr(options, name) for name in names}
    # the plain sum of the exits' losses, as the paper trains them
    own = {"model": str(model), "output": str(output), "resume": True, "gradient_equilibrium": False}
    return kind(**{**shared, **own, **more})


def begin(options: OperatorOptions, root: Path) -> Work:
    """The rows read and checked; ValueError for what cannot be trained on."""
    for name in ("epochs", "batch_size", "rounds", "multiple_of", "timed_rows", "search_iterations"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    if not 0 <= options.permitted_loss < 1:
        raise ValueError(f"permitted_loss must be from 0 to 1 (1 % is 0.01), got {options.permitted_loss}")
    folder = Path(options.model)
    weight_files(folder)
    task, tokenizer = chosen_task(options), load_tokenizer(folder)
    train = some_rows(read_examples(task, "train"), options.train_rows, options.seed)
    if len(train) < options.batch_size:
        raise ValueError(f"the train split has {len(train)} rows, fewer than a batch ({options.batch_size})")
    labels = labels_of_training(_labelled(TrainOptions, options, folder, root), task, train)
    examples = {"train": train, "dev": read_examples(task, "dev")}
    encoded = {
        split: encode_split(rows, split, task, labels, tokenizer, options.max_length)
        for split, rows in examples.items()
    }
    return Work(
        options, root, labels, encoded["dev"], len(train), {split: rows_hash(rows) for split, rows in encoded.items()}
    )


def check_targets(options: OperatorOptions, letters: str) -> None:
    """ValueError where D or P would not make the model smaller."""
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    if "D" in letters and not 1 <= (options.layers or max(1, layers // 2)) < layers:
        raise ValueError(f"layers must be 1 to {layers - 1}, fewer than the model's, got {options.layers}")
    if "P" in letters:
        neurons = getattr(config, "intermediate_size", None) or config.hidden_dim
        for name, most in (("heads", heads), ("intermediate", neurons)):
            value = getattr(options, name)
            if value is not None and not 1 <= value <= most:
                raise ValueError(f"{name} must be 1 to {most}, what a layer of the model has, got {value}")


def _nothing(work: Work, stage: str, parent: Path, folder: Path) -> int:
    """O: the model given if it is fine-tuned, else fine-tuned with its last exit alone."""
    config = AutoConfig.from_pretrained(parent, local_files_only=True)
    if problem_type_of(config) is None:
        options = _labelled(TrainOptions, work.options, parent, folder, exit_layers=[config.num_hidden_layers])
        return _run("train", options)
    options = _labelled(LabelledOptions, work.options, parent, folder, exit_layers=[config.num_hidden_layers])
    given = load_teacher(options)
    settings = settings_of_student(options, work.labels, given.exit_layers)
    with new_folder(folder) as new:
        shallower(given, config.num_hidden_layers, settings).save_pretrained(new)
        load_tokenizer(parent).save_pretrained(new)
        append_stage(new, "last exit", parent=parent)
    return 0


def _run(job: str, options: Any) -> int:
    """A command of `finetune`, in this process."""
    module = importlib.import_module(f"finetune.{job}")
    return int(getattr(module, job)(options) or 0)


def _distilled(work: Work, stage: str, parent: Path, folder: Path) -> int:
    options = work.options
    layers = AutoConfig.from_pretrained(parent, local_files_only=True).num_hidden_layers
    more = {"layers": options.layers or max(1, layers // 2), "temperature": options.temperature}
    return _run("distill", _labelled(DistillOptions, options, parent, folder, exit_policy=work.policy, **more))


def _pruned(work: Work, stage: str, parent: Path, folder: Path) -> int:
    options = work.options
    config = AutoConfig.from_pretrained(parent, local_files_only=True)
    half = config.intermediate_size // 2
    more = {name: getattr(options, name) for name in ("rounds", "uneven", "label_free", "temperature")}
    more["multiple_of"] = min(options.multiple_of, half)
    more["heads"] = options.heads or max(1, round(config.num_attention_heads * 2 / 3))
    more["intermediate"] = options.intermediate or max(1, half // more["multiple_of"] * more["multiple_of"])
    return _run("prune", _labelled(PruneOptions, options, parent, folder, exit_policy=work.policy, **more))


def _with_exits(work: Work, stage: str, parent: Path, folder: Path) -> int:
    layers = AutoConfig.from_pretrained(parent, local_files_only=True).num_hidden_layers
    every = list(range(1, layers + 1))
    return _run("train", _labelled(TrainOptions, work.options, parent, folder, exit_layers=every,
                                   exit_policy=work.policy))  # fmt: skip


def _shorter(work: Work, stage: str, parent: Path, folder: Path) -> int:
    """LengthDrop, then the cheapest lengths within the permitted loss (half of it where exits may lose too)."""
    options = work.options
    trained = {"recipe": "sandwich", "phase_epochs": [0, options.epochs], "layer_drop": 0.0}
    code = _run("train", _labelled(TrainOptions, options, parent, folder, exit_policy=work.policy, **trained))
    if code:
        return code
    given: dict[str, Any] = {one.name: getattr(options, one.name) for one in fields(TaskOptions)}
    given |= {"exit_policy": work.policy, "axes": "lengths", "iterations": options.search_iterations}
    _run("search", SearchOptions(**{**given, "model": str(folder), "points": 24}))
    points = OperatingPoints.load(folder)
    full = (points.at("full").quality or {})["value"]
    loss = 100 * full * options.permitted_loss / (2 if "E" in stage else 1)
    patch_config(folder, {"length_config": points.at(max_drop=loss).length_config})
    return 0


def _quantized(work: Work, stage: str, parent: Path, folder: Path) -> int:
    export_checkpoint(ExportOptions(parent, folder))
    return 0


JOBS: dict[str, Job] = {
    "": _nothing,
    "D": _distilled,
    "P": _pruned,
    "E": _with_exits,
    "S": _shorter,
    "Q": _quantized,
}


def _settings(work: Work, stage: str) -> dict[str, Any]:
    """What a stage was made of, beside its parent."""
    own = OF_OPERATOR[stage[-1:]]
    return {"stage": name_of(stage), **{name: getattr(work.options, name) for name in own}}


def read_record(work: Work, stage: str) -> dict[str, Any] | None:
    """The record of a stage that was carried out; None where it was not.

    ValueError where its folder is of other data, other settings or another parent.
    """
    folder = work.folder(stage)
    file = folder / RECORD
    if not file.is_file():
        return None
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found, data = record["settings"], record["data"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the record of a stage ({error}); remove the folder to make it anew") from error
    if data != work.data:
        split = next(split for split in work.data if data.get(split) != work.data[split])
        raise ValueError(
            f"stage {folder} was made from other data: its {split} rows differ from those given now; choose another "
            "--output, or remove the folder"
        )
    check_settings(folder, found, _settings(work, stage))
    given = checkpoint_hash(work.folder(stage[:-1]) if stage else work.options.model)
    if record["parent"]["sha256"] != given:
        raise ValueError(
            f"stage {folder} was made from other weights than {record['parent']['name']} has now; remove the folder "
            "to make it anew"
        )
    return record


def carry_out(work: Work, stage: str) -> int:
    """Make one stage if it is missing; exit code 0, or 143 where it was interrupted and may be resumed."""
    folder = work.folder(stage)
    parent = work.folder(stage[:-1]) if stage else Path(work.options.model)
    if read_record(work, stage) is not None:
        print(f"stage {name_of(stage)}: there already ({folder})")
        return 0
    print(f"stage {name_of(stage)}: {OPERATORS.get(stage[-1:], 'fine-tuned')}", flush=True)
    began = time.monotonic()
    if code := JOBS[stage[-1:]](work, stage, parent, folder):
        return code
    record = {
        "stage": name_of(stage),
        "parent": {"name": name_of(stage[:-1]) if stage else parent.name, "sha256": checkpoint_hash(parent)},
        "checkpoint": checkpoint_hash(folder),
        "data": work.data,
        "task": work.options.task,
        "seed": work.options.seed,
        "seconds": time.monotonic() - began,
        "settings": _settings(work, stage),
        "versions": versions(),
    }
    with new_file(folder / RECORD) as file:
        file.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    shutil.rmtree(folder.with_name(f"{folder.name}.run"), ignore_errors=True)
    return 0
