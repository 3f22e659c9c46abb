"""From options to what a run works on: task, labels, tokenizer, model, tokenised splits; checked before training."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification
from elastic_model.losses import exit_weights
from elastic_model.provenance import file_hash
from finetune.config import TaskOptions, TrainOptions
from finetune.data import Encoded, encode
from finetune.metrics import metric
from finetune.tasks import (
    DEFAULT_METRICS,
    SPLITS,
    Examples,
    ProblemType,
    Task,
    check_labels,
    encode_labels,
    find_labels,
    find_problem_type,
    find_task,
    own_task,
)

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")


@dataclass(frozen=True)
class Labels:
    """What the answers mean: problem type, names of the classes in order, metrics (the first one decides)."""

    problem_type: ProblemType
    names: list[str]
    metrics: tuple[str, ...]


def weight_files(folder: Path) -> list[Path]:
    """The weights of a checkpoint folder; ValueError where it is not a checkpoint."""
    if not folder.is_dir():
        raise ValueError(f"model {folder} is not a folder; give the folder of a checkpoint")
    if not (folder / "config.json").is_file():
        raise ValueError(f"model folder {folder} has no config.json: it is not a checkpoint")
    files = sorted(file for pattern in WEIGHT_FILES for file in folder.glob(pattern))
    if not files:
        raise ValueError(f"model folder {folder} has no weights ({' or '.join(WEIGHT_FILES)})")
    return files


def rows_hash(encoded: Encoded) -> str:
    """SHA-256 of a tokenised split, in hexadecimal."""
    ids = repr([row["input_ids"] for row in encoded.rows]).encode()
    return hashlib.sha256(ids + encoded.labels.tobytes()).hexdigest()


def chosen_task(options: TaskOptions) -> Task:
    """The task of the table, or the user's own files; ValueError for both, for neither, and for half of either."""
    files = {split: file for split in SPLITS if (file := getattr(options, split)) is not None}
    columns = {name: getattr(options, name) for name in ("text", "pair", "label")}
    own = [f"--{name}" for name, value in {**files, **columns, "problem-type": options.problem_type}.items() if value]
    if options.task is not None:
        if own:
            raise ValueError(f"--task {options.task} has its own files and columns; {own[0]} is for your own files")
        return find_task(options.task)
    if not files:
        raise ValueError("give --task NAME, or your own files with --train, --dev, --text and --label")
    return own_task(files, columns, options.problem_type)


def _metrics(given: list[str], task: Task, problem_type: ProblemType) -> tuple[str, ...]:
    names = tuple(given) or task.metrics or DEFAULT_METRICS[problem_type]
    for name in names:
        metric(name)
        if (set(name.split("+")) <= {"pearson", "spearman"}) != (problem_type == "regression"):
            raise ValueError(f"metric {name!r} does not fit a task of the type {problem_type}")
    return names


def _names_of(config: Any) -> list[str]:
    return [config.id2label[number] for number in range(config.num_labels)]


def labels_of_training(options: TaskOptions, task: Task, train: Examples) -> Labels:
    """The labels as the train split has them, in the order of the starting checkpoint's head where that has the same.

    ValueError where the checkpoint is a classifier of other labels: its head would be lost without a word.
    """
    problem_type = find_problem_type(task, train.labels)
    names = find_labels(task, train, problem_type)
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    if any("ForSequenceClassification" in name for name in config.architectures or []):
        if sorted(names) != sorted(_names_of(config)):
            raise ValueError(
                f"model folder {options.model} is a classifier of other labels: {', '.join(_names_of(config))}; "
                f"the task has {', '.join(names)}; start from a checkpoint without a head, or rename its id2label"
            )
        names = _names_of(config)
    return Labels(problem_type, names, _metrics(options.metrics, task, problem_type))


def labels_of_model(options: TaskOptions, task: Task, config: ElasticBertConfig) -> Labels:
    """The labels as a task checkpoint has them."""
    default: ProblemType = "regression" if config.num_labels == 1 else "single_label_classification"
    problem_type = config.problem_type or default
    return Labels(problem_type, _names_of(config), _metrics(options.metrics, task, problem_type))


def some_rows(examples: Examples, rows: int | None, seed: int) -> Examples:
    """A random subset of that many rows, in the order of the file; None: all."""
    if rows is None or rows >= len(examples):
        return examples
    return examples.select(sorted(random.Random(seed).sample(range(len(examples)), rows)))


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a checkpoint; ValueError where it has none."""
    weight_files(folder)
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"model folder {folder} has no tokenizer that loads ({str(error).splitlines()[0]})"
        ) from error


def encode_split(
    examples: Examples, split: str, task: Task, labels: Labels, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> Encoded:
    """The examples of a split tokenised, their labels encoded and checked."""
    encoded = encode_labels(task, examples, labels.names, labels.problem_type)
    check_labels(encoded, split, labels.problem_type)
    return encode(examples, encoded, tokenizer, max_length)


def check_length(config: Any, max_length: int) -> None:
    """ValueError where rows of `max_length` tokens exceed the model's positions, or are too short for any text."""
    longest = config.max_position_embeddings - (getattr(config, "position_offset", 0) or 0)
    if not 3 <= max_length <= longest:
        raise ValueError(f"max_length must be 3 to {longest} (the positions of the model), got {max_length}")


def load_for_training(options: TrainOptions, labels: Labels) -> ElasticBertForSequenceClassification:
    """The starting checkpoint with an exit head per exit layer; what it lacks is drawn from the seed."""
    folder = Path(options.model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_length(config, options.max_length)
    exit_weights(options.exit_loss, [1])
    settings: dict[str, Any] = {"exit_loss": options.exit_loss, "gradient_equilibrium": options.gradient_equilibrium}
    settings |= {"exit_groups": options.exit_groups, "exit_policy": None}
    if options.exit_layers is not None:
        settings |= {"exit_layers": options.exit_layers}
    if options.dropout is not None:
        settings |= {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.dropout}
    set_seed(options.seed)
    return ElasticBertForSequenceClassification.from_pretrained(
        folder,
        local_files_only=True,
        id2label=dict(enumerate(labels.names)),
        label2id={name: number for number, name in enumerate(labels.names)},
        problem_type=labels.problem_type,
        dtype=torch.float32,
        **settings,
    )


def load_classifier(folder: Path, max_length: int) -> ElasticBertForSequenceClassification:
    """A task checkpoint of ours, in evaluation mode; ValueError where the folder holds something else."""
    weight_files(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    if "ElasticBertForSequenceClassification" not in (config.architectures or []):
        found = ", ".join(config.architectures or []) or config.model_type
        raise ValueError(f"model folder {folder} holds {found}, not a classifier made by `python -m finetune train`")
    check_length(config, max_length)
    return ElasticBertForSequenceClassification.from_pretrained(folder, local_files_only=True).eval()


def settings_of(options: TrainOptions, splits: Mapping[str, Encoded]) -> dict[str, Any]:
    """What makes two runs the same: the options, the starting weights and the rows."""
    free = ("output", "resume", "model", "save_steps", "log_steps")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    settings["model weights"] = [file_hash(file) for file in weight_files(Path(options.model))]
    return settings | {f"{split} rows": rows_hash(encoded) for split, encoded in splits.items()}
