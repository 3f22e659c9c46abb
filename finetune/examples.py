"""The rows of a split as examples: texts, second texts, labels as the source has them, and their places."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

from elastic_model.tables import Row
from finetune.sources import DatasetSource
from finetune.tasks import DATA_VARIABLE, ProblemType, Task

BETWEEN_LABELS = "|"  # of one cell that holds several labels


@dataclass(frozen=True)
class Examples:
    """The rows of a split. texts: strings, or lists of words; pairs: their second texts, if the task has any."""

    texts: list[Any]
    pairs: list[str] | None
    labels: list[Any]
    places: list[str]

    def __len__(self) -> int:
        return len(self.texts)

    def select(self, rows: list[int]) -> "Examples":
        """The examples at `rows`."""
        texts, labels, places = ([column[row] for row in rows] for column in (self.texts, self.labels, self.places))
        return Examples(texts, [self.pairs[row] for row in rows] if self.pairs else None, labels, places)


def read_examples(task: Task, split: str) -> Examples:
    """The rows of one split; ValueError where it does not exist, a column is missing or a text is empty."""
    if split not in task.splits:
        raise ValueError(f"task {task.name!r} has no {split} split; it has: {', '.join(task.splits)}")
    rows = _rows(task, split)
    texts = [row.text(task.text) for row in rows]
    pairs = [row.text(task.pair) for row in rows] if task.pair else None
    labels = [row[task.label if task.label else list(row.cells)[-1]] for row in rows]
    return Examples(texts, pairs, labels, [row.place for row in rows])


def _rows(task: Task, split: str) -> list[Row]:
    source = task.splits[split]
    try:
        rows = source.rows(task.folder())
    except ValueError as error:
        if task.hub is None or not isinstance(source, DatasetSource):
            raise
        raise ValueError(f"{error}; task {task.name} is read below ${DATA_VARIABLE}, else from the hub") from error
    if not rows:
        raise ValueError(f"task {task.name!r}: the {split} split has no rows")
    return rows


def find_problem_type(task: Task, examples: Examples) -> ProblemType:
    """The task's problem type; where it does not say one, the kind of its texts and labels.

    Lists of words: tags; answers with their places: question answering; lists of labels, or labels joined by `|`, of
    which most stand in other rows too, alone or joined to others: multi-label; at least half the labels fractional
    numbers (3.8): regression; otherwise classes.
    """
    if task.problem_type is not None:
        return task.problem_type
    if isinstance(examples.texts[0], list):
        return "token_classification"
    if isinstance(examples.labels[0], dict):
        return "question_answering"
    if any(isinstance(label, list) for label in examples.labels):
        return "multi_label_classification"
    if _joined([str(label) for label in examples.labels]):
        return "multi_label_classification"
    numbers = [number_of(label) for label in examples.labels]
    fractional = sum(number is not None and not number.is_integer() for number in numbers)
    return "regression" if 2 * fractional >= len(numbers) else "single_label_classification"


def names_in(label: Any) -> list[str]:
    """The names of the labels in a cell: a list, or text in which they are joined."""
    names = label if isinstance(label, list) else str(label).split(BETWEEN_LABELS)
    return [name for name in (str(one).strip() for one in names) if name]


def _joined(labels: list[str]) -> bool:
    """Whether some cells hold several labels: most of them such as stand in other cells too."""
    cells = [names_in(label) for label in set(labels)]
    seen = Counter(name for names in cells for name in names)
    several = [names for names in cells if len(names) > 1]
    known = [names for names in several if all(seen[name] > 1 for name in names)]
    return bool(several) and 2 * len(known) >= len(several)


def number_of(label: Any) -> float | None:
    """The number that a label is, or None."""
    try:
        return float(label)
    except (TypeError, ValueError):
        return None


def check_shape(examples: Examples, problem_type: ProblemType) -> None:
    """ValueError where texts or labels are not of the form that the problem type has, or a class is missing."""
    tags, questions = problem_type == "token_classification", problem_type == "question_answering"
    for text, place in zip(examples.texts, examples.places, strict=True):
        if isinstance(text, list) != tags:
            found = "texts" if tags else "lists of words"
            raise ValueError(f"{place}: {problem_type} needs {'lists of words' if tags else 'texts'}, got {found}")
    for pair, place in zip(examples.pairs or (), examples.places, strict=False):
        if isinstance(pair, list):
            raise ValueError(f"{place}: the second text must be a text, got a list: {pair!r:.80}")
    for label, place in zip(examples.labels, examples.places, strict=True):
        cells = label if isinstance(label, list) else [label]
        if any(isinstance(cell, dict) for cell in cells) != questions or isinstance(label, list) and questions:
            expected = "answers as SQuAD has them" if questions else "labels"
            raise ValueError(f"{place}: {problem_type} needs {expected}, got {label!r:.80}")
        one = problem_type in ("single_label_classification", "regression")  # label a row
        if isinstance(label, list) and (
            one or any(cell is None or cell != cell or isinstance(cell, list) for cell in cells)
        ):
            raise ValueError(
                f"{place}: {'a row has one label' if one else 'the labels of a row must be names'}, got {label!r:.80}"
            )
    if problem_type in ("single_label_classification", "multi_label_classification"):
        several = problem_type == "multi_label_classification"  # of which a row may have none
        for label, place in zip(examples.labels, examples.places, strict=True):
            nothing = label is None or label != label or str(label).strip().lower() == "nan"
            if nothing or not (str(label).strip() or several):
                raise ValueError(f"{place}: the row has no label (its value: {label!r}); remove it")
            twice = [name for name, times in Counter(names_in(label)).items() if times > 1] if several else []
            if twice:
                raise ValueError(
                    f"{place}: label {twice[0]!r} stands twice in a row: {label!r:.80}; a row has the names of its "
                    "labels, not a 0 or 1 for each"
                )
