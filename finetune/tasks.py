"""Tasks as a table: where the rows of each split are, which columns they have, how they are scored."""

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from finetune.tables import Row, read_table

DATA_VARIABLE = "ELASTIC_MODEL_DATA"  # the environment variable that names the folder of local data sets
EMBEDDED = Path(__file__).parent / "data"
SPLITS = ("train", "dev", "test")
BETWEEN_LABELS = "|"  # of one cell that holds several labels

ProblemType = Literal["single_label_classification", "multi_label_classification", "regression"]
# what a task is scored by where nothing else is said; the first metric chooses the best checkpoint
DEFAULT_METRICS: dict[str, tuple[str, ...]] = {
    "single_label_classification": ("accuracy", "macro_f1"),
    "multi_label_classification": ("micro_f1", "accuracy"),
    "regression": ("pearson+spearman", "pearson", "spearman"),
}


@dataclass(frozen=True)
class Source:
    """The rows of one split: a file below the task's folder, and which of its rows (from `first` to before `end`)."""

    file: str
    first: int | None = None
    end: int | None = None
    form: str | None = None
    columns: tuple[str, ...] | None = None


@dataclass(frozen=True)
class Task:
    """One task. `labels`: what the file says -> the label's name, in the classes' order; None: read from train."""

    name: str
    splits: Mapping[str, Source]
    text: str
    label: str
    pair: str | None = None
    labels: Mapping[str, str] | None = None
    problem_type: ProblemType | None = "single_label_classification"
    metrics: tuple[str, ...] = ()
    folder: Callable[[], Path] = field(default=lambda: data_folder())


@dataclass(frozen=True)
class Examples:
    """The rows of a split: texts, their second texts if the task has pairs, labels as in the file, their places."""

    texts: list[str]
    pairs: list[str] | None
    labels: list[Any]
    places: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: list[int]) -> "Examples":
        """The examples at `rows`."""
        texts, labels, places = ([column[row] for row in rows] for column in (self.texts, self.labels, self.places))
        return Examples(texts, [self.pairs[row] for row in rows] if self.pairs else None, labels, places)


def data_folder() -> Path:
    """The folder of local data sets; ValueError where the environment does not name one."""
    folder = os.environ.get(DATA_VARIABLE)
    if not folder:
        raise ValueError(f"{DATA_VARIABLE} is not set; set it to the folder of local data sets that this task reads")
    return Path(folder)


def _no_yes(no: str, yes: str) -> dict[str, str]:
    return {"0": no, "1": yes}


STSB_COLUMNS = ("genre", "file", "year", "id", "score", "sentence1", "sentence2")
COLA_COLUMNS = ("source", "label", "mark", "sentence")

TASKS = {
    task.name: task
    for task in (
        Task(
            "era",
            {split: Source(f"era/{split}.tsv.xz") for split in SPLITS},
            text="text",
            label="label",
            folder=lambda: EMBEDDED,
        ),
        Task(
            "sst2",
            {"train": Source("sst2/train.tsv.gz"), "dev": Source("sst2/dev.tsv"), "test": Source("sst2/test.tsv")},
            text="sentence",
            label="label",
            labels=_no_yes("negative", "positive"),
            metrics=("accuracy", "f1"),
        ),
        Task(
            "imdb",  # it has no dev split: the last 1,000 train rows (the file is shuffled)
            {
                "train": Source("imdb/train.jsonl.xz", end=-1000),
                "dev": Source("imdb/train.jsonl.xz", first=-1000),
                "test": Source("imdb/test.jsonl.xz"),
            },
            text="text",
            label="label",
            labels=_no_yes("negative", "positive"),
            metrics=("accuracy", "f1"),
        ),
        Task(
            "mrpc",  # it has no dev split: the last 408 train rows, GLUE's number
            {
                "train": Source("mrpc/msr_paraphrase_train.txt", end=-408),
                "dev": Source("mrpc/msr_paraphrase_train.txt", first=-408),
                "test": Source("mrpc/msr_paraphrase_test.txt"),
            },
            text="#1 String",
            pair="#2 String",
            label="Quality",
            labels=_no_yes("not_equivalent", "equivalent"),
            metrics=("accuracy+f1", "accuracy", "f1"),
        ),
        Task(
            "stsb",
            {split: Source(f"stsb/sts-{split}.csv", form="tsv", columns=STSB_COLUMNS) for split in SPLITS},
            text="sentence1",
            pair="sentence2",
            label="score",
            problem_type="regression",
        ),
        Task(
            "rte",
            {split: Source(f"rte/{split}.tsv") for split in ("train", "dev")},
            text="sentence1",
            pair="sentence2",
            label="label",
            labels={"entailment": "entailment", "not_entailment": "not_entailment"},
        ),
        Task(
            "cola",
            {split: Source(f"cola/{split}.tsv", columns=COLA_COLUMNS) for split in ("train", "dev")},
            text="sentence",
            label="label",
            labels=_no_yes("unacceptable", "acceptable"),
            metrics=("matthews", "accuracy"),
        ),
        Task(
            "sick",
            {
                split: Source(f"sick/SICK_{name}.txt")
                for split, name in (("train", "train"), ("dev", "trial"), ("test", "test_annotated"))
            },
            text="sentence_A",
            pair="sentence_B",
            label="entailment_judgment",
            labels={"ENTAILMENT": "entailment", "NEUTRAL": "neutral", "CONTRADICTION": "contradiction"},
        ),
    )
}


def find_task(name: str) -> Task:
    """The task of the table; ValueError that lists the table for another name."""
    if name not in TASKS:
        raise ValueError(f"task {name!r} is unknown; allowed: {', '.join(TASKS)}, or --train, --dev, --text, --label")
    return TASKS[name]


def own_task(files: Mapping[str, str], columns: Mapping[str, str | None], problem_type: ProblemType | None) -> Task:
    """The task of the user's own files: {split: file}, {"text" | "pair" | "label": column}."""
    text, label = columns.get("text"), columns.get("label")
    if not text or not label:
        raise ValueError("your own files need --text and --label, the names of their columns (and --pair for pairs)")
    splits = {split: Source(file) for split, file in files.items()}
    return Task("own files", splits, text, label, columns.get("pair"), None, problem_type, folder=Path)


def _text(row: Row, column: str) -> str:
    text = row[column]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"{row.place}: column {column!r} has no text (its value: {text!r}); remove the row")
    return text


def read_examples(task: Task, split: str) -> Examples:
    """The rows of one split; ValueError where it does not exist, a column is missing or a text is empty."""
    if split not in task.splits:
        raise ValueError(f"task {task.name!r} has no {split} split; it has: {', '.join(task.splits)}")
    source = task.splits[split]
    rows = read_table(task.folder() / source.file, source.form, source.columns)[source.first : source.end]
    texts = [_text(row, task.text) for row in rows]
    pairs = [_text(row, task.pair) for row in rows] if task.pair else None
    return Examples(texts, pairs, [row[task.label] for row in rows], [row.place for row in rows])


def _number(label: Any) -> float | None:
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def find_problem_type(task: Task, labels: list[Any]) -> ProblemType:
    """The task's problem type; where it does not say one, the kind of its labels.

    Lists: multi-label; at least half the labels fractional numbers (3.8): regression; otherwise classes.
    """
    if task.problem_type is not None:
        return task.problem_type
    if all(isinstance(label, list) for label in labels):
        return "multi_label_classification"
    fractional = sum((number := _number(label)) is not None and not float(number).is_integer() for label in labels)
    return "regression" if 2 * fractional >= len(labels) else "single_label_classification"


def _several(label: Any) -> list[str]:
    if isinstance(label, list):
        return [str(name) for name in label]
    return [name for name in str(label).split(BETWEEN_LABELS) if name]


def _named(task: Task, label: Any) -> str:
    return (task.labels or {}).get(str(label), str(label))


def find_labels(task: Task, examples: Examples, problem_type: ProblemType) -> list[str]:
    """The names of the classes in order: the task's, else the sorted labels of these (training) examples."""
    if problem_type == "regression":
        return ["score"]
    if task.labels:
        return list(task.labels.values())
    several = _several if problem_type == "multi_label_classification" else lambda label: [str(label)]
    names = {name for label in examples.labels for name in several(label)}
    if all(_number(name) is not None for name in names):
        return sorted(names, key=lambda name: (float(name), name))
    return sorted(names)


def encode_labels(task: Task, examples: Examples, names: list[str], problem_type: ProblemType) -> np.ndarray:
    """Labels as the model reads them: class numbers (rows,), 0/1 (rows, labels), or numbers (rows,) for regression."""
    if problem_type == "regression":
        values = [_score(label, place) for label, place in zip(examples.labels, examples.places, strict=True)]
        return np.array(values, dtype=np.float32)
    numbers = {name: number for number, name in enumerate(names)}
    if problem_type == "multi_label_classification":
        encoded = np.zeros((len(examples), len(names)), dtype=np.float32)
        for row, (label, place) in enumerate(zip(examples.labels, examples.places, strict=True)):
            encoded[row, [_class(name, numbers, place) for name in _several(label)]] = 1.0
        return encoded
    classes = zip(examples.labels, examples.places, strict=True)
    return np.array([_class(_named(task, label), numbers, place) for label, place in classes], dtype=np.int64)


def _score(label: Any, place: str) -> float:
    number = _number(label)
    if number is None or not math.isfinite(number):
        raise ValueError(f"{place}: a regression label must be a finite number, got {label!r}")
    return number


def _class(name: str, numbers: Mapping[str, int], place: str) -> int:
    if name not in numbers:
        raise ValueError(f"{place}: label {name!r} is not among the labels of the model: {', '.join(numbers)}")
    return numbers[name]


def check_labels(encoded: np.ndarray, split: str, problem_type: ProblemType) -> None:
    """ValueError where the labels of a split are all the same: nothing can be learned from it or measured on it."""
    if problem_type != "multi_label_classification" and len(np.unique(encoded)) < 2:
        kind = "value" if problem_type == "regression" else "class"
        raise ValueError(f"the {split} split has one {kind} only ({len(encoded)} rows); it needs at least two")
