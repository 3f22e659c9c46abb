"""What the stages of a pipeline share: the options, the rows, and where each stage is kept."""

from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from elastic_model import ElasticBertConfig
from elastic_model.arguments import check_at_least
from elastic_model.pretrained import elastic_config
from finetune.config import PruneOptions, TaskOptions, TrainOptions
from finetune.data import Encoded
from finetune.distill import layer_map
from finetune.examples import read_examples
from finetune.labels import Labels
from finetune.pipelines.config import OperatorOptions, StudyOptions
from finetune.pipelines.letters import name_of
from finetune.prepare import (
    check_fills_a_batch,
    check_length,
    chosen_task,
    encode_split,
    labels_of_training,
    load_tokenizer,
    rows_hash,
    some_rows,
    weight_files,
)
from finetune.prune import Widths, target
from finetune.recipe import find_recipe
from finetune.run import check_numbers
from finetune.teacher import check_tokenizer

OF_TRAINING = ("epochs", "batch_size", "learning_rate", "train_rows")
PRUNING = ("rounds", "importance_rows", "uneven", "label_free")  # options of `prune` that P hands on as they are
NUMBERS = ("rounds", "importance_rows", "multiple_of", "timed_rows", "search_iterations")


@dataclass(frozen=True)
class Work:
    """What all stages of one seed share: options (its seed among them), the folder of the stages, the rows.

    data: split -> hash of its tokenised rows.
    """

    options: OperatorOptions
    root: Path
    labels: Labels
    dev: Encoded
    train_rows: int
    data: dict[str, str]

    def folder(self, stage: str) -> Path:
        """Where a stage is kept."""
        return self.root / name_of(stage)

    def labels_of(self, no_answer_threshold: float | None) -> Labels:
        """The labels with the threshold that a stage has tuned."""
        return replace(self.labels, no_answer_threshold=no_answer_threshold)

    @property
    def policy(self) -> str:
        """The exit policy of E: the paper's confidence; a regression has none, it leaves by patience."""
        return "patience" if self.labels.problem_type == "regression" else "confidence"


def training_options(kind: type[Any], options: OperatorOptions, model: Path | str, output: Path, **more: Any) -> Any:
    """The options of a training job on the same rows: resumed, the exits' losses summed as they are."""
    shared = {name: getattr(options, name) for name in (*(one.name for one in fields(TaskOptions)), *OF_TRAINING)}
    own = {"model": str(model), "output": str(output), "resume": True, "gradient_equilibrium": False}
    return kind(**{**shared, **own, **more})


def begin(options: OperatorOptions, root: Path, letters: str) -> Work:
    """The rows read, all checked that can be before training; ValueError for what cannot be carried out."""
    check_at_least(1, options, *NUMBERS)
    if not 0 <= options.permitted_loss < 1:
        raise ValueError(f"permitted_loss must be from 0 to 1 (1 % is 0.01), got {options.permitted_loss}")
    training = training_options(TrainOptions, options, options.model, root, temperature=options.temperature)
    check_numbers(training, find_recipe(training.recipe).phases)
    folder = Path(options.model)
    weight_files(folder)
    _check_targets(options, letters)
    task, tokenizer = chosen_task(options), load_tokenizer(folder)
    every = read_examples(task, "train")
    labels = labels_of_training(training, task, every)
    train = some_rows(every, options.train_rows, options.seed)
    check_fills_a_batch(len(train), options.batch_size, "rows in the train split")
    examples = {"train": train, "dev": read_examples(task, "dev")}
    encoded = {
        split: encode_split(rows, split, task, labels, tokenizer, options.max_length)
        for split, rows in examples.items()
    }
    data = {split: rows_hash(rows) for split, rows in encoded.items()}
    return Work(options, root, labels, encoded["dev"], len(train), data)


def student_layers(options: OperatorOptions, layers: int) -> int:
    """D: the layers of the student of a model with so many."""
    return max(1, layers // 2) if options.layers is None else options.layers


def pruned_widths(options: OperatorOptions, before: Widths) -> dict[str, int]:
    """P: heads and FFN neurons kept of what a layer has on average, and what the neurons are a multiple of."""
    heads, neurons = (sum(one) // len(one) for one in (before.heads, before.neurons))
    multiple = options.multiple_of
    if multiple == OperatorOptions.multiple_of:  # which a small model may not have
        multiple = min(multiple, max(1, min(before.neurons) // 2))
    half = neurons // 2 // multiple * multiple or multiple
    return {
        "heads": max(1, round(heads * 2 / 3)) if options.heads is None else options.heads,
        "intermediate": half if options.intermediate is None else options.intermediate,
        "multiple_of": multiple,
    }


def _elastic(folder: str, max_length: int) -> ElasticBertConfig:
    """The configuration of a checkpoint as one of ours; ValueError where rows would be longer than it reads."""
    given = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_length(given, max_length)
    elastic = given.model_type == ElasticBertConfig.model_type
    return given if elastic else ElasticBertConfig(**elastic_config(given.to_dict()))


def _check_targets(options: OperatorOptions, letters: str) -> None:
    """ValueError where D or P would not make the model smaller, or rows would be longer than it reads."""
    config = _elastic(options.model, options.max_length)
    layers, whole = config.num_hidden_layers, Widths.of(config)
    student = whole
    if "D" in letters and options.student is not None and options.layers is not None:
        raise ValueError(f"D: give layers or student, not both, got {options.layers} and {options.student}")
    if "D" in letters and options.student is not None:
        weight_files(Path(options.student))
        check_tokenizer(options.student, load_tokenizer(Path(options.model)))
        other = _elastic(options.student, options.max_length)
        layer_map(other.num_hidden_layers, layers)
        student = Widths.of(other)
    elif "D" in letters:
        kept = student_layers(options, layers)
        if not 1 <= kept < layers:
            if layers == 1:
                raise ValueError("D: a model of one layer has none to lose; leave D out")
            raise ValueError(f"layers must be 1 to {layers - 1}, fewer than the model's, got {options.layers}")
        source = layer_map(kept, layers).values()
        student = Widths(*(tuple(one[layer - 1] for layer in source) for one in (whole.heads, whole.neurons)))
    pruned = {student, whole} if isinstance(options, StudyOptions) else {student}  # in a study P stands alone, too
    for before in pruned if "P" in letters else ():
        more = {name: getattr(options, name) for name in (*PRUNING, "temperature")} | pruned_widths(options, before)
        target(training_options(PruneOptions, options, options.model, Path(options.model), **more), before)
