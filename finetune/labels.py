"""What the answers of a task mean: the names of its classes, and labels as the model reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from finetune.examples import Examples, names_in, number_of
from finetune.tasks import ProblemType, Task

LARGEST_NUMBER = float(np.finfo(np.float32).max)


@dataclass(frozen=True)
class Labels:
    """Problem type, names of the classes in order, metrics (the first one decides).

    no_answer_threshold: question answering; see `elastic_model.spans.best_answer`. text_pairs: whether the model is
    trained on pairs of texts, None where its checkpoint does not say.
    """

    problem_type: ProblemType
    names: list[str]
    metrics: tuple[str, ...]
    no_answer_threshold: float | None = None
    text_pairs: bool | None = None


def _named(task: Task, label: Any) -> str:
    name, names = str(label).strip(), task.labels or {}
    numbered = name.isdecimal() and int(name) < len(names) and not any(key.isdecimal() for key in names)
    return list(names.values())[int(name)] if numbered else names.get(name, name)  # a number: as files of SNLI have it


def find_labels(task: Task, examples: Examples, problem_type: ProblemType) -> list[str]:
    """The names of the classes in order: the task's, else the sorted labels of these (training) examples."""
    if problem_type == "regression":
        return ["score"]
    if task.labels:
        return list(task.labels.values())
    several = names_in if problem_type == "multi_label_classification" else lambda label: [str(label).strip()]
    names = {name for label in examples.labels for name in several(label)}
    if all(number_of(name) is not None for name in names):
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
            encoded[row, [_class(name, numbers, place) for name in names_in(label)]] = 1.0
        return encoded
    classes = zip(examples.labels, examples.places, strict=True)
    return np.array([_class(_named(task, label), numbers, place) for label, place in classes], dtype=np.int64)


def _score(label: Any, place: str) -> float:
    number = number_of(label)
    if number is None or not abs(number) <= LARGEST_NUMBER:  # which NaN is not either
        raise ValueError(
            f"{place}: a regression label must be a finite number (at most {LARGEST_NUMBER:.1e}), got {label!r}"
        )
    return number


def _class(name: str, numbers: Mapping[str, int], place: str) -> int:
    if name not in numbers:
        raise ValueError(f"{place}: label {name!r} is not among the labels of the model: {', '.join(numbers)}")
    return numbers[name]


def check_labels(encoded: np.ndarray, split: str, problem_type: ProblemType) -> None:
    """ValueError where the labels of a split are all the same: nothing can be learned from it or measured on it."""
    if problem_type == "multi_label_classification":
        if not encoded.any():
            raise ValueError(f"the {split} split has no label in any of its {len(encoded)} rows; it needs some")
        if (encoded == encoded[0]).all():
            raise ValueError(f"the {split} split has the same labels in all of its {len(encoded)} rows")
    elif len(np.unique(encoded)) < 2:
        kind = "value" if problem_type == "regression" else "class"
        raise ValueError(f"the {split} split has one {kind} only ({len(encoded)} rows); it needs at least two")
