"""The jobs of an ELUE run: tasks with their sizes and rows, how a checkpoint is made, what is then measured."""

import hashlib
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from transformers import AutoConfig

from elastic_model import ElasticBertConfig, ElasticBertModel
from elastic_model.configuration_elasticbert import pooling_with_new_exits
from elastic_model.folders import check_no_checkpoint, check_output, new_folder, write_text
from elastic_model.provenance import file_hash
from finetune.checkpoint import FinishedOtherwiseError
from finetune.config import TaskOptions, TrainOptions
from finetune.data import Encoded
from finetune.elue.config import LAST_EXIT, SIZES, SizeOptions
from finetune.elue.points import Subject
from finetune.elue.tasks import ELUE_TASKS, Answers, answers_to, task_called
from finetune.examples import Examples, read_examples
from finetune.labels import encode_labels
from finetune.prepare import (
    check_fills_a_batch,
    check_length,
    chosen_task,
    encode_split,
    labels_of_model,
    labels_of_training,
    load_classifier,
    load_tokenizer,
    some_rows,
    weight_files,
)
from finetune.recipe import find_recipe
from finetune.sources import DatasetSource
from finetune.tasks import SPLIT_NAMES, Task
from finetune.train import train


@dataclass(frozen=True)
class Job:
    """One task of a run: its sizes, its rows, and the checkpoint that is taken instead of fine-tuning, if any.

    start: what training begins with, or the checkpoint; trains: whether anything is trained, from either.
    """

    name: str
    task: Task
    kind: Answers
    test: Examples
    dataset: str | None
    checkpoint: str | None
    start: Path
    trains: bool
    epochs: int
    train_rows: int | None
    max_length: int
    learning_rate: float
    batch_size: int
    seeds: list[int]

    def rows_hash(self, split: str) -> str:
        """sha256 of the rows of a split; of test those that are answered."""
        rows = self.test if split == "test" else read_examples(self.task, split)
        return hashlib.sha256(repr((rows.texts, rows.pairs, rows.labels)).encode()).hexdigest()

    @cached_property
    def start_hash(self) -> str:
        """Of the weights that all begins with."""
        return weights_hash(self.start)

    @property
    def sizes(self) -> str:
        """The sizes that stand beside its numbers, and whose weights they began with."""
        trained = "all" if self.train_rows is None else f"at most {self.train_rows:,}"
        epochs = f"{self.epochs} epoch{'s' if self.epochs > 1 else ''} a phase"
        fitted = f"{trained} train rows, {epochs}, batches of {self.batch_size}, learning rate {self.learning_rate:g}"
        made = f"{fitted}, from weights" if self.trains else "checkpoint"
        seeds = f"{len(self.seeds)} seed{'s' if len(self.seeds) > 1 else ''}"
        rows = f"{self.max_length} tokens, {len(self.test):,} test rows, {seeds}"
        return f"{ELUE_TASKS[self.name]}: {made} {self.start_hash}, {rows}"


def weights_hash(folder: Path) -> str:
    """The first 12 digits of sha256 over the files of a checkpoint's weights."""
    return hashlib.sha256("".join(file_hash(file) for file in weight_files(folder)).encode()).hexdigest()[:12]


def words(given: list[str]) -> list[str]:
    """The words of an option that takes several, apart or joined by commas."""
    return [word for one in given for word in one.split(",") if word]


def _named(given: list[str], flag: str, what: str) -> dict[str, str]:
    """{task: value} of TASK=VALUE words; what: the word for the value."""
    named: dict[str, str] = {}
    for word in given:
        task, equals, value = word.partition("=")
        if not equals or not value:
            raise ValueError(f"--{flag}: expected TASK={what}, got {word!r}")
        if named.setdefault(task_called(task), value) != value:
            raise ValueError(f"--{flag}: {task} is there twice, with {named[task_called(task)]} and {value}")
    return named


def _sizes(options: SizeOptions, name: str) -> dict[str, str]:
    """{task: value}, from the defaults, a value for all tasks, and TASK=VALUE words."""
    given = getattr(options, name)
    for_all = [word for word in given if "=" not in word]
    if name == "seeds" and for_all:
        for_all = [",".join(for_all)]
    if len(for_all) > 1:
        raise ValueError(f"--{name.replace('_', '-')}: expected one value for all tasks, got {' '.join(for_all)}")
    default = dict.fromkeys(ELUE_TASKS, for_all[0]) if for_all else SIZES[name]
    named = _named([word for word in given if "=" in word], name.replace("_", "-"), "VALUE")
    return {**default, **named}


def _count(sizes: Mapping[str, str], task: str, name: str) -> int | None:
    """A whole number from 1, or None for all."""
    value = sizes.get(task, "all")
    if value == "all" and name in ("train-rows", "test-rows"):
        return None
    if not value.isdecimal() or int(value) < 1:
        raise ValueError(f"--{name}: expected a whole number from 1 for {task}, got {value!r}")
    return int(value)


def _rate(sizes: Mapping[str, str], task: str) -> float:
    try:
        rate = float(sizes[task])
    except ValueError:
        rate = math.nan
    if not 0 < rate < math.inf:
        raise ValueError(f"--learning-rate: expected a number above 0 for {task}, got {sizes[task]!r}")
    return rate


def _seeds(sizes: Mapping[str, str], task: str) -> list[int]:
    words = sizes[task].split(",")
    if not all(word.isdecimal() for word in words) or len(set(words)) != len(words):
        raise ValueError(f"--seeds: expected whole numbers, each once, for {task}, got {sizes[task]!r}")
    return [int(word) for word in words]


def jobs_of(options: SizeOptions, trains: bool = False) -> list[Job]:
    """The tasks with their rows and sizes; ValueError where something cannot be had.

    trains: a checkpoint, too, is only where training starts, with every seed.
    """
    checkpoints, data = (_named(getattr(options, name), name, "FOLDER") for name in ("checkpoints", "data"))
    sizes = {name: _sizes(options, name) for name in SIZES}
    jobs = []
    for name in dict.fromkeys(map(task_called, words(options.tasks))):
        checkpoint = checkpoints.get(name)
        if checkpoint is None and options.model is None:
            raise ValueError(f"--model is required: --checkpoints has none for {name}")
        task = chosen_task(TaskOptions(model="", task=name, dataset=data.get(name)))
        own = task.splits.get("dev")
        if name in data and "test" not in task.splits and isinstance(own, DatasetSource):  # of GLUE's tasks on the hub
            task = replace(task, splits={**task.splits, "test": replace(own, splits=SPLIT_NAMES["test"])})
        test_rows = _count(sizes["test_rows"], name, "test-rows")
        jobs.append(
            Job(
                name,
                task,
                answers_to(name),
                _test_rows(task, test_rows),
                data.get(name),
                checkpoint,
                Path(checkpoint or options.model or ""),
                trains or checkpoint is None,
                _count(sizes["epochs"], name, "epochs") or 0,
                _count(sizes["train_rows"], name, "train-rows"),
                _count(sizes["max_length"], name, "max-length") or 0,
                _rate(sizes["learning_rate"], name),
                options.batch_size,
                _seeds(sizes["seeds"], name) if trains or checkpoint is None else [0],
            )
        )
    if not jobs:
        raise ValueError(f"--tasks is empty; allowed: {', '.join(ELUE_TASKS)}")
    return jobs


def _test_rows(task: Task, count: int | None) -> Examples:
    """Rows of the test split; ValueError where labels are hidden, all of them the same, as GLUE publishes it."""
    rows = read_examples(task, "test")
    if len(rows) > 1 and len(set(map(str, rows.labels))) == 1:
        raise ValueError(
            f"{task.name}: all {len(rows)} test rows have the label {rows.labels[0]!r}, as where labels are hidden; "
            "give a folder with labels (--data)"
        )
    drawn = some_rows(rows, count, seed=0)
    if len(set(map(str, drawn.labels))) == 1:
        raise ValueError(f"{task.name}: the {len(drawn)} test rows drawn have one label only; give more --test-rows")
    return drawn


def layers_of(folder: str) -> int:
    """The layers of a checkpoint."""
    return AutoConfig.from_pretrained(folder, local_files_only=True).num_hidden_layers


def _cut(options: SizeOptions, depth: int) -> str:
    """The starting checkpoint cut to its first layers."""
    whole = Path(options.model or "")
    folder = Path(options.output) / "starts" / f"{weights_hash(whole)}-layers-{depth}"
    if not folder.exists():
        with new_folder(folder) as new:
            pooling = pooling_with_new_exits(AutoConfig.from_pretrained(whole, local_files_only=True))
            model = ElasticBertModel.from_pretrained(
                whole, num_hidden_layers=depth, exit_pooling=pooling[:depth], local_files_only=True
            )
            model.save_pretrained(new)
            load_tokenizer(whole).save_pretrained(new)
    return str(folder)


def training_of(
    options: SizeOptions,
    job: Job,
    training: Mapping[str, Any],
    owner: str,
    seed: int,
    depth: int | None = None,
    before: Path | None = None,
) -> TrainOptions:
    """How a checkpoint is made, in checkpoints/OWNER/TASK/seed-N: from the whole starting checkpoint, from its first
    `depth` layers, or in the last phase of a recipe from the checkpoint `before`, which teaches. training: changes of
    `TrainOptions`."""
    start = str(before or options.model) if depth is None else _cut(options, depth)
    changes = dict(training)
    if before is not None:
        skipped = [0] * (len(find_recipe(changes["recipe"]).phases) - 1)
        changes |= {"teacher": str(before), "phase_epochs": [*skipped, job.epochs]}
    if changes.get("exit_layers") == LAST_EXIT:
        changes["exit_layers"] = [layers_of(start)]
    folder = Path(options.output) / "checkpoints" / owner / job.name / f"seed-{seed}"
    return TrainOptions(
        model=start,
        task=job.name,
        dataset=job.dataset,
        output=str(folder if depth is None else folder / f"layers-{depth}"),
        epochs=job.epochs,
        train_rows=job.train_rows,
        max_length=job.max_length,
        seed=seed,
        batch_size=job.batch_size,
        learning_rate=job.learning_rate,
        eval_batch_size=options.eval_batch_size,
        resume=True,
        **changes,
    )


def train_checkpoint(training: TrainOptions) -> int:
    """The exit code of a training of `training_of`; a finished checkpoint of other sizes is replaced, as what ELUE
    made of it will be."""
    try:
        return train(training)
    except FinishedOtherwiseError:
        return train(replace(training, resume=False))


def check_jobs(options: SizeOptions, jobs: list[Job]) -> None:
    """ValueError for what would only fail after an hour."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("ELUE is run by one process, stage by stage; start it without accelerate launch")
    check_output(Path(options.output))
    check_no_checkpoint(Path(options.output))
    for job in jobs:
        if job.checkpoint is not None:  # which checks the length
            check_answers(job, load_classifier(job.start, job.max_length).config, job.start)
        else:
            weight_files(job.start)
            try:
                check_length(AutoConfig.from_pretrained(job.start, local_files_only=True), job.max_length)
            except ValueError as error:
                raise ValueError(f"{job.name}: {error}") from None
        if job.trains:
            train = read_examples(job.task, "train")
            labels_of_training(TrainOptions(model=str(job.start), output="", task=job.name), job.task, train)
            rows = some_rows(train, job.train_rows, seed=0)
            check_fills_a_batch(len(rows), options.batch_size, f"train rows of {job.name}")


def check_answers(job: Job, config: ElasticBertConfig, checkpoint: Path) -> None:
    """ValueError where a task checkpoint answers something else than the task asks."""
    names = () if config.num_labels == 1 else tuple(config.id2label.values())
    if set(names) != set(job.kind.classes):
        asked = ", ".join(job.kind.classes) or "a number"
        raise ValueError(f"checkpoint {checkpoint} answers {', '.join(names) or 'a number'}; {job.name} asks {asked}")


def subject_of(options: SizeOptions, job: Job, checkpoint: Path) -> tuple[Subject, dict[str, Encoded]]:
    """A checkpoint with the tokenised dev and test splits of its task."""
    model = load_classifier(checkpoint, job.max_length).to(Accelerator().device)
    check_answers(job, model.config, checkpoint)
    tokenizer = load_tokenizer(checkpoint)
    labels = labels_of_model(TaskOptions(model=str(checkpoint), task=job.name), job.task, model.config)
    examples = {"dev": read_examples(job.task, "dev"), "test": job.test}
    splits = {
        split: encode_split(rows, split, job.task, labels, tokenizer, job.max_length)
        for split, rows in examples.items()
    }
    return Subject(model, tokenizer, labels, options.eval_batch_size), splits


def encoded_train(job: Job, subject: Subject, seed: int) -> Encoded:
    """The tokenised train split of a job, with the rows that fine-tuning draws by this seed."""
    rows = some_rows(read_examples(job.task, "train"), job.train_rows, seed)
    return encode_split(rows, "train", job.task, subject.labels, subject.tokenizer, job.max_length)


def write_labels(jobs: list[Job], folder: Path) -> None:
    """The true labels of the test rows, as `score --labels` reads them; ValueError where those of other rows are
    there: submissions beside them could be scored no more."""
    folder.mkdir(exist_ok=True)
    for job in jobs:
        labels = encode_labels(job.task, job.test, list(job.kind.classes), job.kind.problem_type)
        lines = [f"{index}\t{label:.6g}" for index, label in enumerate(labels.tolist())]
        kept, text = folder / f"{job.name}.tsv", "\n".join(["index\tlabel", *lines]) + "\n"
        if kept.is_file() and kept.read_text() != text:
            raise ValueError(
                f"{kept} has the labels of other test rows of {job.name}, which what lies in {folder.parent} was made "
                "on; give the same --test-rows, or choose another --output"
            )
        write_text(kept, text)
