"""A fine-tuning run: what it works on, read and checked before training, and the order of its rows."""

import json
import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from elastic_model import ElasticBertForSequenceClassification
from elastic_model.folders import check_output
from finetune.calibrate import policy_name
from finetune.config import TrainOptions
from finetune.data import Encoded, shuffled_batches
from finetune.prepare import (
    Labels,
    chosen_task,
    encode_split,
    labels_of_training,
    load_for_training,
    load_tokenizer,
    settings_of,
    some_rows,
)
from finetune.recipe import Phase, find_recipe
from finetune.tasks import Task, read_examples

METRICS = "metrics.jsonl"


@dataclass(frozen=True)
class Plan:
    """Which rows each update sees: a function of (seed, update) alone, so that a run can be resumed anywhere."""

    lengths: tuple[int, ...]
    batch_size: int
    epochs: int
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller."""
        return math.ceil(len(self.lengths) / self.batch_size)

    @property
    def updates_per_phase(self) -> int:
        """Every phase of a recipe has as many epochs."""
        return self.epochs * self.updates_per_epoch

    def rows(self, update: int) -> list[int]:
        """The rows of an update; updates are counted over the whole run."""
        epoch, batch = divmod(update, self.updates_per_epoch)
        return _epoch(self, epoch)[batch]


@lru_cache(maxsize=1)
def _epoch(plan: Plan, epoch: int) -> list[list[int]]:
    return shuffled_batches(list(plan.lengths), plan.batch_size, plan.seed, epoch)


@dataclass(frozen=True)
class Run:
    """What a run works on; `folder` holds its log and state until the checkpoint is written."""

    options: TrainOptions
    task: Task
    accelerator: Accelerator
    model: ElasticBertForSequenceClassification
    tokenizer: PreTrainedTokenizerBase
    labels: Labels
    splits: dict[str, Encoded]
    phases: tuple[Phase, ...]
    settings: dict[str, Any]
    folder: Path

    @property
    def plan(self) -> Plan:
        """The order of the rows."""
        options = self.options
        return Plan(tuple(self.splits["train"].lengths), options.batch_size, options.epochs, options.seed)

    @property
    def exit_layers(self) -> list[int]:
        """The layers with an exit, from 1."""
        return list(self.model.config.exit_layers or ())

    @property
    def state(self) -> Path:
        """Where an interrupted run continues from."""
        return self.folder / "state"

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the run's metrics."""
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("a") as lines:
                lines.write(json.dumps(record) + "\n")


def _check_numbers(options: TrainOptions) -> None:
    for name in ("epochs", "batch_size", "save_steps", "log_steps", "eval_batch_size"):
        if getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(options, name)}")
    for name in ("micro_batch_size", "eval_steps", "train_rows"):
        if getattr(options, name) is not None and getattr(options, name) < 1:
            raise ValueError(f"{name} must be at least 1 or none, got {getattr(options, name)}")
    if not 0 <= options.warmup <= 1:
        raise ValueError(f"warmup is a share of the updates, from 0 to 1, got {options.warmup}")
    if not options.learning_rate > 0:
        raise ValueError(f"learning_rate must be above 0, got {options.learning_rate}")


def prepare(options: TrainOptions, accelerator: Accelerator) -> Run:
    """Everything read and checked; nothing is written yet."""
    _check_numbers(options)
    phases = find_recipe(options.recipe)
    check_output(Path(options.output))
    task, tokenizer = chosen_task(options), load_tokenizer(Path(options.model))
    train = some_rows(read_examples(task, "train"), options.train_rows, options.seed)
    if len(train) < options.batch_size:
        raise ValueError(f"the train split has {len(train)} rows, fewer than a batch ({options.batch_size})")
    labels = labels_of_training(options, task, train)
    policy_name(options.exit_policy, labels.problem_type)
    others = [split for split in ("dev", "test") if split == "dev" or options.test]
    examples = {"train": train, **{split: read_examples(task, split) for split in others}}
    model = load_for_training(options, labels)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.model} has {len(tokenizer)} tokens, its model {model.config.vocab_size}"
        )
    splits = {
        split: encode_split(rows, split, task, labels, tokenizer, options.max_length)
        for split, rows in examples.items()
    }
    folder = Path(options.output).with_name(f"{Path(options.output).name}.run")
    settings = settings_of(options, splits)
    return Run(options, task, accelerator, model, tokenizer, labels, splits, phases, settings, folder)
