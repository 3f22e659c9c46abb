"""`python -m finetune elue score`: from test files and module costs to points and a score."""

import math
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from elastic_model.folders import check_replaceable, new_folder
from elastic_model.tables import read_table
from finetune.elue.config import ScoreOptions
from finetune.elue.costs import Costs, load_costs
from finetune.elue.leaderboard import leaderboard_of, text, write_board
from finetune.elue.scoring import SCORES_FILE, Point, Result, TaskResult, read_reference, write_result
from finetune.elue.submission import MODULES_FILE, files_of, flops_of, read_predictions
from finetune.elue.tasks import Answers, answers_to, spelled
from finetune.examples import read_examples
from finetune.labels import encode_labels
from finetune.metrics import metric
from finetune.tasks import DATA_VARIABLE, find_task


def true_labels(task: str, given: Path | None) -> np.ndarray:
    """The labels of a task's test rows, in the order of the index: of a file, or of TASK.tsv in a folder, where one is
    given; else of the test split."""
    kind = answers_to(task)
    if given is None:
        found = find_task(task)
        if "test" not in found.splits:
            raise ValueError(f"the test labels of {task} are not public; set {DATA_VARIABLE}, or give --labels")
        return encode_labels(found, read_examples(found, "test"), list(kind.classes), kind.problem_type)
    return _read_labels(spelled(given, task, ".tsv") if given.is_dir() else given, kind)


def _read_labels(file: Path, kind: Answers) -> np.ndarray:
    rows = read_table(file)
    numbers = {name: number for number, name in enumerate(kind.classes)}
    numbers |= {str(number): number for number in range(len(kind.classes))}
    labels: dict[int, float] = {}
    for number, row in enumerate(rows):
        index, label = str(row.cells.get("index", number)), str(row["label"])
        if not index.isdecimal() or int(index) >= len(rows) or int(index) in labels:
            raise ValueError(f"{row.place}: index {index!r} must be one of 0 to {len(rows) - 1}, each once")
        try:
            labels[int(index)] = float(label) if kind.is_regression else numbers[label]
            if not math.isfinite(labels[int(index)]):
                raise ValueError
        except (ValueError, KeyError):
            allowed = "a finite number" if kind.is_regression else f"one of {', '.join(numbers)}"
            raise ValueError(f"{row.place}: label {label!r} must be {allowed}") from None
    return np.array([labels[index] for index in range(len(rows))])


def points_of(files: Mapping[str, Path], labels: np.ndarray, kind: Answers, costs: Costs) -> list[Point]:
    """The operating points of one task: mean FLOPs of the rows, the task's metric in percent."""
    points = []
    for name, file in files.items():
        predictions = read_predictions(file, len(labels), kind)
        flops, modules = flops_of(predictions, costs.flops)
        quality = 100 * metric(kind.metric)(predictions.answers, labels)
        points.append(Point(name, float(flops.mean()), quality, costs.parameters(modules)))
    return points


def _model_file(options: ScoreOptions, task: str) -> Path:
    if options.model_file is not None:
        return Path(options.model_file)
    folder = Path(options.submission)
    folder = folder if folder.is_dir() else folder.parent
    for file in (spelled(folder, task) / MODULES_FILE, folder / MODULES_FILE):
        if file.is_file():
            return file
    raise ValueError(f"submission {folder} has no {MODULES_FILE} for {task}; give --model-file, what its modules cost")


def score_submission(options: ScoreOptions) -> Result:
    """The points of a submission, every file read and checked."""
    folder = Path(options.submission)
    tasks = {}
    for task, files in files_of(folder).items():
        kind = answers_to(task)
        labels = true_labels(task, Path(options.labels) if options.labels else None)
        costs = load_costs(_model_file(options, task), kind, options.trust_model_code)
        tasks[task] = TaskResult(kind.metric, len(labels), [points_of(files, labels, kind, costs)])
    return Result(options.name or folder.resolve().name, tasks)


def score(options: ScoreOptions) -> None:
    """Print (with --output also write) the points of a submission and, with a reference, its scores."""
    if options.output:
        read = (options.submission, options.labels, options.reference, options.model_file)
        check_replaceable(Path(options.output), *read)
    result = score_submission(options)
    rows = {task: one.rows for task, one in result.tasks.items()}
    reference = read_reference(Path(options.reference), rows) if options.reference else {}
    board = leaderboard_of([result], reference, options.reference)
    if options.output:
        with new_folder(Path(options.output)) as folder:
            write_result(result, folder / SCORES_FILE)
            write_board(board, folder)
    print(text(board))
