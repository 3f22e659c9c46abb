"""ELUE's six tasks, and what their predictions look like."""

from dataclasses import dataclass
from pathlib import Path

from finetune.tasks import TASKS, ProblemType

# task of finetune's table -> its name in the paper
ELUE_TASKS = {
    "sst2": "SST-2",
    "imdb": "IMDb",
    "snli": "SNLI",
    "scitail": "SciTail",
    "mrpc": "MRPC",
    "stsb": "STS-B",
}


@dataclass(frozen=True)
class Answers:
    """What a prediction of a task may be: classes in the order of their numbers (none: numbers), and the metric."""

    task: str
    problem_type: ProblemType
    classes: tuple[str, ...]
    metric: str

    @property
    def is_regression(self) -> bool:
        """Whether predictions are numbers."""
        return not self.classes

    @property
    def outputs(self) -> int:
        """Logits of an exit."""
        return len(self.classes) or 1


def task_called(name: str) -> str:
    """The task's name in the table, from either spelling (sst2, SST-2); ValueError for one that ELUE has not."""
    plain = _plain(name)
    if plain not in ELUE_TASKS:
        raise ValueError(f"{name!r} is not a task of ELUE; its tasks: {', '.join(ELUE_TASKS)}")
    return plain


def spelled(folder: Path, task: str, suffix: str = "") -> Path:
    """What lies in a folder under the task's name with that suffix, in either spelling; else where it would lie.
    ValueError for both spellings."""
    found = [path for path in sorted(folder.iterdir()) if path.suffix == suffix and _plain(path.stem) == task]
    if len(found) > 1:
        raise ValueError(f"{found[0]} and {found[1]} are of the same task; leave one of them")
    return found[0] if found else folder / f"{task}{suffix}"


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def answers_to(task: str) -> Answers:
    """What predictions of a task of the table look like; ELUE scores MRPC and STS-B by the mean of two metrics."""
    row = TASKS[task]
    if row.problem_type == "regression":
        return Answers(task, "regression", (), "pearson+spearman")
    return Answers(task, "single_label_classification", tuple((row.labels or {}).values()), row.metrics[0])
