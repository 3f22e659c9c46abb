"""A fine-tuning run: what it works on, read and checked before training, and the order of its rows."""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from elastic_model import distributed
from elastic_model.arguments import check_at_least
from elastic_model.folders import check_replaceable
from elastic_model.jobs import flat
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.config import LabelledOptions, LoopOptions, SubnetworkOptions, TrainOptions
from finetune.data import Encoded, encode, shuffled_batches
from finetune.evaluate import observe, quality
from finetune.examples import Examples, read_examples
from finetune.kinds import answers_of
from finetune.labels import Labels
from finetune.policies import policy_name
from finetune.prepare import (
    check_fills_a_batch,
    check_metric,
    chosen_task,
    encode_split,
    labels_of_training,
    length_for,
    load_for_training,
    load_tokenizer,
    settings_of,
    some_rows,
)
from finetune.recipe import OF_DISTILLATION, OF_SUBNETWORKS, OF_TEACHER, Phase, find_recipe, inner_exits
from finetune.tasks import Task
from finetune.teacher import ask, check_tokenizer, final_logits, label_order, load_stock

METRICS = "metrics.jsonl"
TRACKED = "finetune"  # the project's name to a tracker, and the folder of one that writes files


def run_folder(output: str) -> Path:
    """Where a run keeps its log and state: beside the output, which appears whole at the end."""
    return Path(output).with_name(f"{Path(output).name}.run")


def start_accelerator(options: LoopOptions) -> Accelerator:
    """The accelerator of a run; ValueError where processes would hold parts of the model, which could not evaluate."""
    accelerator = distributed.start_accelerator(options.precision, options.tracker, run_folder(options.output))
    if distributed.holds_parts(accelerator):
        raise ValueError(
            "fine-tuning runs under DDP, DeepSpeed ZeRO-1 and ZeRO-2, not under ZeRO-3 or FSDP: every process "
            "evaluates with the whole model; launch it with pretrain/accelerate/zero2.yaml"
        )
    return accelerator


@dataclass(frozen=True)
class Plan:
    """Which rows each update sees: a function of (seed, update) alone, so that a run can be resumed anywhere."""

    lengths: tuple[int, ...]
    batch_size: int
    epochs: tuple[int, ...]  # of each phase
    seed: int

    @property
    def updates_per_epoch(self) -> int:
        """The last batch of an epoch may be smaller."""
        return math.ceil(len(self.lengths) / self.batch_size)

    @property
    def ends(self) -> list[int]:
        """The updates after which each phase is over."""
        return [epochs * self.updates_per_epoch for epochs in accumulate(self.epochs)]

    def rows(self, update: int) -> list[int]:
        """The rows of an update; updates are counted over the whole run."""
        epoch, batch = divmod(update, self.updates_per_epoch)
        return _epoch(self, epoch)[batch]


@lru_cache(maxsize=1)
def _epoch(plan: Plan, epoch: int) -> list[list[int]]:
    return shuffled_batches(list(plan.lengths), plan.batch_size, plan.seed, epoch)


@dataclass(frozen=True)
class Run:
    """What a training run works on; `folder` holds its log and state until the checkpoint is written.

    splits: train, and what `measure` looks at; metric: which of its values decides; teacher: its logits (...) for each
    row of train, where there is one; notes: files of `folder` that the checkpoint gets, beside the metrics.
    """

    options: LoopOptions
    accelerator: Accelerator
    model: Any
    tokenizer: PreTrainedTokenizerBase
    splits: dict[str, Encoded]
    phases: tuple[Phase, ...]
    settings: dict[str, Any]
    metric: str
    measure: Callable[[Any], dict[int, dict[str, float]]]  # run -> exit layer -> metric -> value on held-out rows
    teacher: list[np.ndarray] | None = None
    notes: tuple[str, ...] = ()

    @property
    def plan(self) -> Plan:
        """The order of the rows."""
        options = self.options
        epochs = tuple(options.phase_epochs) or (options.epochs,) * len(self.phases)
        return Plan(tuple(self.splits["train"].lengths), options.batch_size, epochs, options.seed)

    @property
    def folder(self) -> Path:
        """Of this run's output."""
        return run_folder(self.options.output)

    @property
    def exit_layers(self) -> list[int]:
        """The layers with an exit, from 1."""
        return list(self.model.config.exit_layers or ())

    @property
    def state(self) -> Path:
        """Where an interrupted run continues from."""
        return self.folder / "state"

    def log(self, record: dict[str, Any]) -> None:
        """Add a line to the run's metrics; a tracker gets the same numbers."""
        if self.accelerator.is_main_process:
            with (self.folder / METRICS).open("a") as lines:
                lines.write(json.dumps(record) + "\n")
        if self.options.tracker:
            self.accelerator.log(flat(record), step=record["update"])

    def copy_logs(self, folder: Path) -> None:
        """The metrics, what else the run has noted, and the files of a tracker that has finished, into the folder of a
        checkpoint."""
        for name in (METRICS, *self.notes):
            shutil.copy(self.folder / name, folder)
        if (self.folder / TRACKED).is_dir():
            shutil.copytree(self.folder / TRACKED, folder / TRACKED)


@dataclass(frozen=True)
class TaskRun(Run):
    """A run on the labels of a task."""

    options: LabelledOptions
    task: Task = field(kw_only=True)
    labels: Labels = field(kw_only=True)

    @property
    def policy(self) -> str:
        """The exit policy to calibrate."""
        return chosen_policy(self.options, self.labels)


def chosen_policy(options: LabelledOptions, labels: Labels) -> str:
    """The exit policy to calibrate; ValueError for one that does not fit the task."""
    return policy_name(options.exit_policy or find_recipe(options.recipe).exit_policy, labels.problem_type)


def check_policy(options: LabelledOptions, labels: Labels) -> None:
    """ValueError for an exit policy that does not fit the task, or asks a head that is not there."""
    head = options.learned_exit_head or find_recipe(options.recipe).config.get("learned_exit_head")
    if chosen_policy(options, labels) != "learned" or head:
        return
    start = AutoConfig.from_pretrained(options.model, local_files_only=True)
    if not isinstance(options, TrainOptions):
        raise ValueError("exit policy 'learned': distill and prune keep no learned exit head; train one afterwards")
    if not getattr(start, "learned_exit_head", False):
        raise ValueError(
            "exit policy 'learned' asks a head that is not there: add --learned_exit_head, or --recipe learned"
        )


AT_LEAST_ONE = (
    *("epochs", "batch_size", "save_steps", "log_steps", "eval_batch_size", "exit_groups"),
    *("micro_batch_size", "eval_steps", "patience"),
)
SHARES = ("warmup", "dropout", "length_drop", "layer_drop", "hard_weight")


def check_numbers(options: LoopOptions, phases: tuple[Phase, ...]) -> None:
    """ValueError that names the first option of the loop that is out of range."""
    check_at_least(1, options, *AT_LEAST_ONE)
    for name in SHARES:
        if (value := getattr(options, name)) is not None and not 0 <= value <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {value}")
    if not 0 <= options.weight_decay < math.inf:
        raise ValueError(f"weight_decay must be at least 0, got {options.weight_decay:g}")
    for name in ("learning_rate", "temperature", "max_grad_norm"):
        if not 0 < getattr(options, name) < math.inf:
            raise ValueError(f"{name} must be above 0, got {getattr(options, name)}")
    if options.length_drop == 1:
        raise ValueError("length_drop must be below 1: at 1 no token is left")
    if not 0 <= options.seed < 2**32:
        raise ValueError(f"seed must be 0 to {2**32 - 1}, got {options.seed}")
    check_at_least(0, options, "sampled")
    given = options.phase_epochs
    if given and (len(given) != len(phases) or min(given) < 0 or not sum(given)):
        raise ValueError(
            f"phase_epochs must have a number of at least 0 for each phase ({len(phases)} here), not all 0, "
            f"got {given}"
        )


def phases_that_run(options: LoopOptions, phases: Sequence[Phase]) -> list[Phase]:
    """Those with an epoch at least."""
    epochs = options.phase_epochs or [options.epochs] * len(phases)
    return [phase for phase, some in zip(phases, epochs, strict=True) if some]


def check_read(options: SubnetworkOptions, phases: Sequence[Phase]) -> None:
    """ValueError for an option that was given though none of the phases that run reads it."""
    if options.exit_loss == "last" and any(phase.trains is inner_exits for phase in phases):
        raise ValueError(
            "exit_loss last gives no weight to the exits below the last, which this run trains apart: choose another"
        )
    read = {name for phase in phases for name in phase.reads}
    taught = "teacher" in read and getattr(options, "teacher", None)
    read = read | set(OF_DISTILLATION) if taught else read - {"hard_weight"}
    if options.distillation == "none":  # of sub-networks, which then learn from labels
        read -= set() if read.issuperset(OF_SUBNETWORKS) else {"distillation"}
        read -= set() if taught else {"temperature"}
    for one in fields(options):
        given = getattr(options, one.name)
        if one.name in (*OF_SUBNETWORKS, *OF_TEACHER, *OF_DISTILLATION) and one.name not in read:
            if given != one.default:
                subnetworks = one.name in OF_SUBNETWORKS
                needs = "sub-networks" if subnetworks else "what learns from another's answers"
                ways = "--recipe sandwich" if subnetworks else "--recipe sandwich, --teacher"
                raise ValueError(
                    f"{one.name} {given} would do nothing: it is for {needs}, and this run has none (train: {ways}; "
                    "elastify: --train_backbone)"
                )


def _quality_on_dev(run: TaskRun) -> dict[int, dict[str, float]]:
    dev = run.splits["dev"]
    logits = observe(run.model, dev, run.tokenizer, run.options.eval_batch_size, run.accelerator).logits
    answers = [answers_of(one, run.splits["dev"], run.labels) for one in logits]
    return {layer: quality(one, dev, run.labels) for layer, one in zip(run.exit_layers, answers, strict=True)}


def _check_of_numbers(options: LoopOptions, labels: Labels) -> None:
    given = f"temperature {options.temperature:g}" if options.temperature != 1 else "distillation reverse"
    if labels.problem_type == "regression" and (options.temperature != 1 or options.distillation == "reverse"):
        raise ValueError(f"{given} would do nothing: numbers are compared by their squared distance")


def _decided_by(name: str, labels: Labels) -> Labels:
    """The labels with `name` as their first metric, which decides."""
    check_metric(name, labels.problem_type, labels.names)
    return replace(labels, metrics=(name, *(one for one in labels.metrics if one != name)))


def _taught(
    options: LabelledOptions,
    labels: Labels,
    train: Examples,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    order: list[int] | None,
    accelerator: Accelerator,
) -> list[np.ndarray]:
    """The teacher's logits (...) for each row of train, its labels in our order; of whole texts in its own tokens."""
    name, size = str(options.teacher), options.eval_batch_size
    if labels.problem_type in ("token_classification", "question_answering"):
        check_tokenizer(name, tokenizer)
        longest = length_for(AutoConfig.from_pretrained(name), tokenizer, options.max_length)
        if longest < options.max_length:
            raise ValueError(f"teacher {name} reads {longest} tokens at most, max_length is {options.max_length}")
    else:
        tokenizer = AutoTokenizer.from_pretrained(name)
        length = length_for(AutoConfig.from_pretrained(name), tokenizer, options.max_length)
        encoded = encode(train, tokenizer, length, encoded.labels)
    logits = ask(load_stock(name, labels.problem_type), encoded, tokenizer, size, accelerator, final_logits)
    return logits if order is None else [one[..., order] for one in logits]


def start_at_mean(model: ElasticBertExitModel, labels: np.ndarray) -> None:
    """Set the biases of new regression heads, which are 0, to the mean of the labels (rows,).

    From 0 a whole epoch of STS-B (labels up to 5) goes into the mean: after it the correlation on dev is 0.07, from
    the mean 0.84.
    """
    mean = float(labels.mean())
    for name, parameter in model.named_parameters():
        if name.startswith((model.head_name, model.static_head_name)) and name.endswith("bias"):
            if not parameter.any():
                torch.nn.init.constant_(parameter, mean)


def prepare(
    options: LabelledOptions,
    accelerator: Accelerator,
    load: Callable[[Any, Labels], ElasticBertExitModel] = load_for_training,
) -> TaskRun:
    """Everything read and checked, the model as `load` has it; nothing is written yet."""
    phases = find_recipe(options.recipe).phases
    check_numbers(options, phases)
    if not 0 <= options.permitted_loss <= 1:
        raise ValueError(f"permitted_loss must be from 0 to 1 (1 % is 0.01), got {options.permitted_loss}")
    models = (options.teacher, getattr(options, "student", None))
    check_replaceable(Path(options.output), *options.sources, *models)
    task, tokenizer = chosen_task(options), load_tokenizer(Path(options.model))
    every = read_examples(task, "train")
    labels = labels_of_training(options, task, every)
    train = some_rows(every, options.train_rows, options.seed)
    check_fills_a_batch(len(train), options.batch_size, "rows in the train split")
    check_policy(options, labels)
    _check_of_numbers(options, labels)
    if options.metric:
        labels = _decided_by(options.metric, labels)
    order = label_order(options.teacher, labels.names, labels.problem_type) if options.teacher else None
    others = [split for split in ("dev", "test") if split == "dev" or options.test]
    examples = {"train": train, **{split: read_examples(task, split) for split in others}}
    model = load(options, labels)
    names = [name for name, _ in model.named_parameters()]
    run = phases_that_run(options, phases)
    if not all(any(phase.trains(name, model.config) for name in names) for phase in run):
        raise ValueError(
            f"recipe {options.recipe!r} has a phase for the exits below the last, of which this model has none (exits "
            f"{model.config.exit_layers}): choose recipe joint"
        )
    if isinstance(options, SubnetworkOptions):
        check_read(options, run)
    if len(tokenizer) > model.config.vocab_size:
        raise ValueError(
            f"the tokenizer of {options.model} has {len(tokenizer)} tokens, its model {model.config.vocab_size}"
        )
    splits = {
        split: encode_split(rows, split, task, labels, tokenizer, options.max_length)
        for split, rows in examples.items()
    }
    if labels.problem_type == "regression":
        start_at_mean(model, splits["train"].labels)
    return TaskRun(
        options,
        accelerator,
        model,
        tokenizer,
        splits,
        phases,
        {**settings_of(options, splits), "labels": list(labels.names)},
        labels.metrics[0],
        _quality_on_dev,
        _taught(options, labels, train, splits["train"], tokenizer, order, accelerator) if options.teacher else None,
        task=task,
        labels=labels,
    )
