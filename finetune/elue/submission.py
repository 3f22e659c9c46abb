"""ELUE's test files: a row a line, `index pred modules`, and a file for every operating point.

The modules say what the row ran through and on what shape: `(10),emb; (10,768),layer_1; (768),exit_1`. Under a length
configuration a layer has two: `(10,768),attention_1; (7,768),ffn_1`.
"""

import math
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from elastic_model import ElasticBertConfig, cost
from elastic_model.checks import check_length_config
from finetune.elue.tasks import ELUE_TASKS, Answers, task_called

HEADER = ["index", "pred", "modules"]
MODULES_FILE = "modules.tsv"  # what the modules cost, beside the test files of a task
STEP = re.compile(r"\((\d+(?:\s*,\s*\d+)*)\s*,?\s*\)\s*,\s*([^\s,;()]+)")
SHOWN = 60  # characters of a bad cell in an error


@dataclass(frozen=True)
class Step:
    """One module that a row ran through: its name and the shape of its input, without the batch."""

    name: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"({','.join(map(str, self.shape))}),{self.name}"


@dataclass(frozen=True)
class Predictions:
    """One test file: in the order of the index, class numbers or numbers (rows,), and each row's modules."""

    file: Path
    answers: np.ndarray
    paths: list[str]
    lines: list[int]


def parse_modules(text: str) -> list[Step]:
    """The modules of a row; ValueError that shows the part that is not `(shape),name`."""
    parts = [part.strip() for part in text.strip().rstrip(";").split(";")]
    return [_step(part) for part in parts]


def _step(part: str) -> Step:
    found = STEP.fullmatch(part)
    if not found:
        raise ValueError(f"module {part[:SHOWN]!r} is not of the form (10,768),layer_1")
    shape = tuple(int(size) for size in found[1].split(","))
    if min(shape) < 1:
        raise ValueError(f"module {part[:SHOWN]!r}: sizes of a shape must be at least 1")
    return Step(found[2], shape)


def modules_text(steps: Iterable[Step]) -> str:
    """The modules as a row of a test file has them."""
    return "; ".join(map(str, steps))


def steps_of(config: ElasticBertConfig, tokens: int, **sub_network) -> list[Step]:
    """The modules that a row of `tokens` tokens runs through; sub_network: the arguments of `cost.modules`."""
    given = sub_network.get("length_config")
    dropping = check_length_config(config.length_config if given is None else given, config.num_hidden_layers)
    steps = []
    for module in cost.modules(config, tokens, **sub_network):
        kind, _, layer = module.name.partition("_")
        if kind == "emb":
            steps.append(Step("emb", (tokens,)))
        elif kind == "exit":
            steps.append(Step(module.name, (config.hidden_size,)))
        elif dropping is not None:
            steps.append(Step(module.name, (module.tokens, config.hidden_size)))
        elif kind == "attention":  # and the feed-forward part, on the same tokens
            steps.append(Step(f"layer_{layer}", (module.tokens, config.hidden_size)))
    return steps


def write_predictions(file: Path, answers: Sequence[int | float], paths: Sequence[str]) -> None:
    """A test file, in the order of the index."""
    with file.open("w", encoding="utf-8") as lines:
        lines.write("\t".join(HEADER) + "\n")
        for index, (answer, path) in enumerate(zip(answers, paths, strict=True)):
            lines.write(f"{index}\t{answer:.6g}\t{path}\n")


def files_of(folder: Path) -> dict[str, dict[str, Path]]:
    """{task: {operating point: file}} of a submission: TASK.tsv, or TASK/POINT.tsv for several points; or one file."""
    if folder.is_file():
        return {_task_of(folder): {folder.stem: folder}}
    if not folder.is_dir():
        raise ValueError(f"submission {folder} does not exist; give the folder of the test files (TASK/POINT.tsv)")
    found: dict[str, dict[str, Path]] = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files = {file.stem: file for file in sorted(path.glob("*.tsv")) if file.name != MODULES_FILE}
        elif path.suffix == ".tsv" and path.name != MODULES_FILE:
            files = {path.stem: path}
        else:
            continue
        there = found.setdefault(_task_of(path), {}) if files else {}
        for point in there.keys() & files.keys():
            raise ValueError(f"{files[point]}: the point {point} of this task is also in {there[point]}")
        there |= files
    if not found:
        raise ValueError(f"submission {folder} has no test files; expected TASK.tsv or TASK/POINT.tsv")
    _check_all_read(folder, {file for points in found.values() for file in points.values()})
    return {task: found[task] for task in ELUE_TASKS if task in found}


def _check_all_read(folder: Path, read: set[Path]) -> None:
    """ValueError for a test file in another place, or whose name ends otherwise: it would be left out of the score."""
    for file in sorted(folder.rglob("*")):
        hidden = any(part.startswith(".") for part in file.relative_to(folder).parts)
        if file.suffix.lower() == ".tsv" and file.name != MODULES_FILE and not hidden and file not in read:
            raise ValueError(f"{file}: would not be read; test files are TASK.tsv or TASK/POINT.tsv, in {folder}")


def _task_of(path: Path) -> str:
    try:
        return task_called(path.stem if path.suffix == ".tsv" else path.name)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _cells(file: Path) -> Iterator[tuple[int, list[str]]]:
    """Line numbers, from 1, and the three cells of every row."""
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"{file}: not UTF-8 text ({error.reason} at byte {error.start})") from error
    for number, line in enumerate(lines, start=1):
        cells = [cell.strip() for cell in (line.split("\t") if "\t" in line else line.split(maxsplit=2))]
        if not any(cells) or (number == 1 and cells == HEADER):
            continue
        if len(cells) != len(HEADER):
            raise ValueError(f"{file}, line {number}: {len(cells)} cells, expected 3: {', '.join(HEADER)}")
        yield number, cells


def read_predictions(file: Path, rows: int, kind: Answers) -> Predictions:
    """A test file of a task with that many rows, indices 0 to rows - 1 in any order; ValueError names the line."""
    lines: dict[int, int] = {}
    answers = np.zeros(rows, dtype=np.float64 if kind.is_regression else np.int64)
    paths = [""] * rows
    read = _number if kind.is_regression else _class
    for line, (index, answer, path) in _cells(file):
        try:
            at = _index(index, rows, lines)
            answers[at] = read(answer, kind)
        except ValueError as error:
            raise ValueError(f"{file}, line {line}: {error}") from None
        lines[at], paths[at] = line, path
    _check_complete(file, rows, lines)
    return Predictions(file, answers, paths, [lines[index] for index in range(rows)])


def _index(text: str, rows: int, lines: dict[int, int]) -> int:
    if not text.isdecimal():
        raise ValueError(f"index {text[:SHOWN]!r} is not a whole number from 0")
    index = int(text)
    if index >= rows:
        raise ValueError(f"index {index} is beyond the test split, whose {rows} rows are 0 to {rows - 1}")
    if index in lines:
        raise ValueError(f"index {index} is a duplicate, it was given in line {lines[index]}")
    return index


def _class(text: str, kind: Answers) -> int:
    if text in kind.classes:
        return kind.classes.index(text)
    if text.isdecimal() and int(text) < len(kind.classes):
        return int(text)
    numbers = f"0 to {len(kind.classes) - 1}"
    raise ValueError(f"pred {text[:SHOWN]!r} is not a class of {kind.task}: {numbers} or {', '.join(kind.classes)}")


def _number(text: str, kind: Answers) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"pred {text[:SHOWN]!r} is not a finite number, as {kind.task} needs")
    return value


def _check_complete(file: Path, rows: int, lines: dict[int, int]) -> None:
    missing = [index for index in range(rows) if index not in lines]
    if missing:
        after = min((index for index in lines if index > missing[0]), default=None)
        line = lines[after] if after is not None else max(lines.values(), default=0) + 1
        others = f" ({len(missing)} are)" if len(missing) > 1 else ""
        raise ValueError(
            f"{file}, line {line}: index {missing[0]} is missing before it{others}; the test split has {rows} rows"
        )


def flops_of(predictions: Predictions, flops: Callable[[Step], int]) -> tuple[np.ndarray, list[str]]:
    """FLOPs of each row (rows,), and the names of all modules that some row ran through; ValueError names the line."""
    known: dict[str, int] = {}
    names: dict[str, None] = {}
    for path, line in zip(predictions.paths, predictions.lines, strict=True):
        if path in known:
            continue
        try:
            steps = parse_modules(path)
            known[path] = sum(flops(step) for step in steps)
            float(known[path])
        except (ValueError, OverflowError) as error:
            raise ValueError(f"{predictions.file}, line {line}: {error}") from None
        names |= dict.fromkeys(step.name for step in steps)
    return np.array([known[path] for path in predictions.paths], dtype=np.float64), list(names)
