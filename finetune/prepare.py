"""From options to what a run works on: task, labels, tokenizer, model, tokenised splits; checked before training."""

import hashlib
import random
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase, set_seed

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification
from elastic_model.checks import check_exit_layers, warn_of_other_texts
from elastic_model.configuration_elasticbert import pooling_with_new_exits
from elastic_model.losses import exit_weights
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.pretrained import elastic_config
from elastic_model.provenance import file_hash
from finetune import questions
from finetune.config import LabelledOptions, LoopOptions, TaskOptions, TrainOptions, trained_length
from finetune.data import Encoded
from finetune.examples import Examples, check_shape, find_problem_type
from finetune.kinds import KINDS, kind_of, problem_type_of
from finetune.labels import Labels
from finetune.metrics import metric
from finetune.recipe import find_recipe
from finetune.tasks import SPLITS, ProblemType, Task, dataset_task, find_task, own_task

WEIGHT_FILES = ("*.safetensors", "pytorch_model*.bin")
FAMILIES = ("bert", "roberta", "distilbert", "elasticbert")  # model types that can be elastic models


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
    read = [[row["input_ids"] for row in encoded.rows], {name: list(one) for name, one in encoded.targets.items()}]
    return hashlib.sha256(repr([*read, encoded.labels.tolist()]).encode()).hexdigest()


def chosen_task(options: TaskOptions) -> Task:
    """The task of the table, the user's own files or data set; ValueError for several of them, or for none."""
    files = {split: file for split in SPLITS if (file := getattr(options, split)) is not None}
    columns = {name: getattr(options, name) for name in ("text", "pair", "label")}
    own = {**files, **columns, "problem-type": options.problem_type}
    given = [f"--{name}" for name, value in own.items() if value]
    if options.task is not None:
        if given:
            raise ValueError(f"--task {options.task} has its own files and columns; {given[0]} is for your own data")
        return find_task(options.task, options.dataset)
    if options.dataset is not None:
        return dataset_task(options.dataset, options.dataset_config, files, columns, options.problem_type)
    if not files:
        raise ValueError(
            "give --task NAME, or your own files with --train, --dev, --text and --label, or --dataset with these two"
        )
    return own_task(files, columns, options.problem_type)


def _fitting(problem_type: ProblemType, names: list[str]) -> tuple[str, ...]:
    """The metrics of a task: plain tags have no entities, F1 is of the second of two classes."""
    if problem_type == "token_classification" and not any(name.startswith("B-") for name in names):
        return ("token_accuracy",)
    two = problem_type != "single_label_classification" or len(names) == 2
    return tuple(name for name in KINDS[problem_type].metrics if name != "f1" or two)


def check_metric(name: str, problem_type: ProblemType, names: list[str]) -> None:
    """ValueError for a metric that is unknown or does not fit a task with these labels."""
    metric(name)
    fitting = _fitting(problem_type, names)
    if not set(name.split("+")) <= set(fitting):
        raise ValueError(
            f"metric {name!r} does not fit a task of the type {problem_type} with {len(names)} labels; those that do: "
            f"{', '.join(fitting)}"
        )


def _metrics(given: list[str], task: Task, problem_type: ProblemType, names: list[str]) -> tuple[str, ...]:
    usual = [name for name in KINDS[problem_type].default if name in _fitting(problem_type, names)]
    chosen = tuple(given) or task.metrics or tuple(usual) or _fitting(problem_type, names)
    for name in chosen:
        check_metric(name, problem_type, names)
    return chosen


def _names_of(config: Any) -> list[str]:
    return [config.id2label[number] for number in range(config.num_labels)]


def labels_of_training(options: LabelledOptions, task: Task, train: Examples) -> Labels:
    """The labels as the train split has them, in the order of the starting checkpoint's head where that has the same.

    ValueError where the checkpoint has a head of another kind or of other labels: it would be lost without a word.
    """
    problem_type = find_problem_type(task, train)
    check_shape(train, problem_type)
    names = KINDS[problem_type].names(task, train, problem_type)
    config = AutoConfig.from_pretrained(options.model, local_files_only=True)
    warn_of_other_texts(getattr(config, "text_pairs", None), train.pairs is not None)
    found = problem_type_of(config)
    if found is not None:
        remedy = options.remedy
        if found != problem_type:
            raise ValueError(
                f"model folder {options.model} has a head for {found}, the task is {problem_type}; {remedy}"
            )
        if problem_type in ("single_label_classification", "multi_label_classification", "token_classification"):
            if sorted(names) != sorted(_names_of(config)):
                raise ValueError(
                    f"model folder {options.model} is a classifier of other labels: {', '.join(_names_of(config))}; "
                    f"the task has {', '.join(names)}; {remedy}, or rename its id2label"
                )
            names = _names_of(config)
    metrics = _metrics(options.metrics, task, problem_type, names)
    labels = Labels(problem_type, names, metrics, text_pairs=train.pairs is not None)
    if problem_type == "question_answering" and questions.has_unanswerable(train):
        return replace(labels, no_answer_threshold=0.0)
    return labels


def labels_of_model(options: TaskOptions, task: Task, config: Any) -> Labels:
    """The labels as a task checkpoint has them."""
    problem_type = problem_type_of(config)
    assert problem_type is not None  # `load_classifier` has seen to it
    names = _names_of(config)
    metrics = _metrics(options.metrics, task, problem_type, names)
    return Labels(problem_type, names, metrics, config.no_answer_threshold, config.text_pairs)


def draw_rows(count: int, rows: int | None, seed: int) -> list[int]:
    """A random subset of the places of `count` rows, in their order; None: all. ValueError for none at all."""
    if rows is not None and rows < 1:
        raise ValueError(f"rows to draw (--train_rows, --rows) must be at least 1, got {rows}")
    if rows is None or rows >= count:
        return list(range(count))
    return sorted(random.Random(seed).sample(range(count), rows))


def some_rows(examples: Examples, rows: int | None, seed: int) -> Examples:
    """A random subset of that many rows, in the order of the file; None: all."""
    return examples.select(draw_rows(len(examples), rows, seed))


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
    check_shape(examples, labels.problem_type)
    warn_of_other_texts(labels.text_pairs, examples.pairs is not None)
    return kind_of(labels).encode(task, examples, split, labels, tokenizer, max_length)


def check_fills_a_batch(rows: int, batch_size: int, what: str) -> None:
    """ValueError for fewer rows to train on than a batch has; what: how the message calls them."""
    if rows < batch_size:
        raise ValueError(f"there are {rows} {what}, fewer than a batch ({batch_size}); lower batch_size")


def check_length(config: Any, max_length: int) -> None:
    """ValueError where rows of `max_length` tokens exceed the model's positions, or are too short for any text."""
    longest = longest_input(config)
    if not 3 <= max_length <= longest:
        raise ValueError(f"max_length must be 3 to {longest} (the positions of the model), got {max_length}")


def length_for(config: Any, tokenizer: PreTrainedTokenizerBase, max_length: int) -> int:
    """At most `max_length`: what another model, of any family, reads of a text in its own tokens."""
    known = config.model_type in FAMILIES
    positions = longest_input(config) if known else getattr(config, "max_position_embeddings", None) or 0
    return min(max_length, tokenizer.model_max_length, positions if positions > 0 else max_length)


def longest_input(config: Any) -> int:
    """Tokens of the longest row that a model reads; ValueError for one of no family that we know."""
    if config.model_type not in FAMILIES:
        raise ValueError(f"model_type must be one of {', '.join(FAMILIES)}, got {config.model_type!r}")
    return int(config.max_position_embeddings - elastic_config(config.to_dict()).get("position_offset", 0))


def exit_pooling_of(config: Any, exit_layers: list[int] | None, options: LoopOptions) -> list[str]:
    """What the exits of a starting checkpoint read. The last one of a stock body has no trained head: it is new like
    those below it; where it is the only one, it is BERT's own, unless it is asked for otherwise."""
    alone = options.exit_pooling is None and exit_layers is not None and len(exit_layers) == 1
    return pooling_with_new_exits(config, options.exit_pooling or "mean", alone or problem_type_of(config) is not None)


def configured(options: LoopOptions, layers: int) -> dict[str, Any]:
    """The fields that the options of a run set in the configuration of its model, which has so many layers.

    Policy and lengths are left behind: both were chosen for the weights as they were.
    """
    exit_weights(options.exit_loss, [1])
    fields: dict[str, Any] = {"exit_policy": None, "length_config": None, "exit_loss": options.exit_loss}
    fields |= {"gradient_equilibrium": options.gradient_equilibrium, "exit_groups": options.exit_groups}
    if options.learned_exit_head:
        fields |= {"learned_exit_head": True}
    if options.exit_layers is not None:
        check_exit_layers(options.exit_layers, layers)
        fields |= {"exit_layers": options.exit_layers, "num_output_layers": None}
    if options.dropout is not None:
        fields |= {"hidden_dropout_prob": options.dropout, "attention_probs_dropout_prob": options.dropout}
    return fields


def load_for_training(options: TrainOptions, labels: Labels) -> ElasticBertExitModel:
    """The starting checkpoint with an exit head per exit layer; what it lacks is drawn from the seed."""
    folder = Path(options.model)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    check_length(config, options.max_length)
    settings = {**find_recipe(options.recipe).config, **configured(options, config.num_hidden_layers)}
    settings |= {"exit_pooling": exit_pooling_of(config, options.exit_layers, options)}
    set_seed(options.seed)
    sequences = kind_of(labels).model is ElasticBertForSequenceClassification
    model: ElasticBertExitModel = kind_of(labels).model.from_pretrained(
        folder,
        local_files_only=True,
        id2label=dict(enumerate(labels.names)),
        label2id={name: number for number, name in enumerate(labels.names)},
        problem_type=labels.problem_type if sequences else None,  # transformers knows it of sequences alone
        no_answer_threshold=labels.no_answer_threshold,
        text_pairs=labels.text_pairs,
        dtype=torch.float32,
        **settings,
    )
    return model


def load_classifier(folder: Path, max_length: int) -> ElasticBertExitModel:
    """A task checkpoint of ours (classifier, tagger or span model) for evaluation; ValueError where it is none."""
    weight_files(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    problem_type = problem_type_of(config)
    if config.model_type != ElasticBertConfig.model_type or problem_type is None:
        found = ", ".join(config.architectures or []) or config.model_type
        raise ValueError(f"model folder {folder} holds {found}, not a classifier made by `python -m finetune train`")
    trained = trained_length(folder)
    try:
        check_length(config, max_length)
    except ValueError as error:
        raise ValueError(f"{error}; {folder} was trained at {trained}" if trained else str(error)) from None
    if trained not in (None, max_length):
        print(f"note: {folder} was trained at --max_length {trained}, it is read at {max_length}")
    model: ElasticBertExitModel = KINDS[problem_type].model.from_pretrained(folder, local_files_only=True)
    return model.eval()


def pooling_setting(options: LoopOptions) -> str:
    """What --exit_pooling asks for, in the words of runs that were begun when it was "mean" by default."""
    of_one_exit = options.exit_pooling == "mean" and len(options.exit_layers or ()) == 1
    return "mean, of one exit too" if of_one_exit else options.exit_pooling or "mean"


def settings_of(options: LabelledOptions, splits: Mapping[str, Encoded]) -> dict[str, Any]:
    """What makes two runs the same: the options, the starting weights and the rows."""
    free = {"output", "resume", "model", "student", "teacher", "save_steps", "log_steps", "tracker", "eval_batch_size"}
    free |= {"train", "dev", "test"}  # wherever they lie: their rows are told by their hashes
    settings = {name: value for name, value in vars(options).items() if name not in free}
    if "exit_pooling" in settings:
        settings["exit_pooling"] = pooling_setting(options)
    for name in ("model", "student", "teacher"):
        given = getattr(options, name, None)
        if given and Path(given).is_dir():  # wherever it lies
            settings[f"{name} weights"] = [file_hash(file) for file in weight_files(Path(given))]
        elif given:
            settings[name] = given
    return settings | {f"{split} rows": rows_hash(encoded) for split, encoded in splits.items()}
