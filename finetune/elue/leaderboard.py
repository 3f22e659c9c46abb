"""Leaderboards: submissions on the same tasks against one reference; as text, as JSON and as a page for a browser."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from elastic_model.folders import check_replaceable, new_folder, write_text
from elastic_model.front import pareto_front
from finetune.elue.config import LeaderboardOptions
from finetune.elue.page import page
from finetune.elue.published import SOURCE, TABLES, published, split_warnings
from finetune.elue.scoring import (
    Curve,
    Point,
    Result,
    macro_average,
    outside,
    read_reference,
    read_result,
    seeds_deviation,
    size_class,
)
from finetune.elue.tasks import ELUE_TASKS
from finetune.evaluate import table

ENDS = "beyond the ends of the reference its quality is taken to stay as it is there"
SPREAD = "in brackets the standard deviation over seeds"


@dataclass(frozen=True)
class TaskScore:
    """A submission on one task: its points, which of them are on its Pareto front, and the score against the
    reference, if there is one for this task."""

    points: list[Point]
    front: list[str]
    score: float | None
    deviation: float | None
    seeds: int
    outside: int
    by_size: dict[int, float]


@dataclass(frozen=True)
class Entry:
    """A line of the leaderboard."""

    name: str
    note: str
    parameters: int | None
    tasks: dict[str, TaskScore]
    macro: float | None
    macro_by_size: dict[int, float]

    @property
    def size_class(self) -> int | None:
        """The smallest of ELUE's size classes that the submission fits in, in million parameters."""
        return size_class(self.parameters)


@dataclass(frozen=True)
class Leaderboard:
    """Entries, the best macro average first, and what they were scored against."""

    tasks: list[str]
    rows: dict[str, int]
    reference: str | None
    entries: list[Entry]
    notes: list[str]


def leaderboard_of(
    results: Sequence[Result],
    reference: dict[str, list[Point]],
    reference_name: str | None,
) -> Leaderboard:
    """Score the results against the reference; ValueError where they were not made on the same test rows."""
    rows: dict[str, int] = {}
    for result in results:
        for task, one in result.tasks.items():
            if rows.setdefault(task, one.rows) != one.rows:
                raise ValueError(
                    f"{result.name} has {one.rows} test rows of {task}, others have {rows[task]}: they do not compare"
                )
    tasks = [task for task in ELUE_TASKS if task in rows]
    if reference and tasks and not set(tasks) & set(reference):
        raise ValueError(f"the reference has none of the tasks {', '.join(tasks)}; it has {', '.join(reference)}")
    entries = [_entry(result, reference, tasks) for result in results]
    entries.sort(key=lambda entry: (entry.macro is None, -(entry.macro or 0.0), entry.name))
    return Leaderboard(tasks, {task: rows[task] for task in tasks}, reference_name, entries, _sizes(results, tasks))


def _sizes(results: Sequence[Result], tasks: list[str]) -> list[str]:
    """What stands beside the numbers of each task: the sizes of its runs, with names where they are not the same."""
    lines = []
    for task in tasks:
        of_size: dict[str, list[str]] = {}
        for result in results:
            if task in result.tasks and task in result.settings:
                of_size.setdefault(result.settings[task], []).append(result.name)
        differ = len(of_size) > 1
        lines += [f"{size} ({', '.join(names)})" if differ else size for size, names in of_size.items()]
    return lines


def _entry(result: Result, reference: dict[str, list[Point]], tasks: list[str]) -> Entry:
    scored = {task: _task_score(result, task, reference.get(task)) for task in tasks if task in result.tasks}
    scores = {task: one.score for task, one in scored.items() if one.score is not None}
    sizes = sorted({size for one in scored.values() for size in one.by_size})
    by_size = {
        size: {task: one.by_size[size] for task, one in scored.items() if size in one.by_size} for size in sizes
    }
    macros = {size: macro_average(per_task, tasks) for size, per_task in by_size.items()}
    return Entry(
        result.name,
        result.note,
        result.parameters,
        scored,
        macro_average(scores, tasks),
        {size: macro for size, macro in macros.items() if macro is not None},
    )


def _task_score(result: Result, task: str, reference: Curve | None) -> TaskScore:
    one = result.tasks[task]
    points = sorted(one.points, key=lambda point: point.flops)
    front = pareto_front([point.flops for point in points], [point.quality for point in points])
    names = [points[index].name for index in front]
    if not reference:
        return TaskScore(points, names, None, None, len(one.seeds), 0, {})
    return TaskScore(
        points,
        names,
        one.score(reference),
        seeds_deviation(one, reference),
        len(one.seeds),
        outside(points, reference),
        one.scores_by_size(reference),
    )


def _shown(score: float) -> str:
    return f"{round(score, 2) + 0.0:.2f}"  # no zero with a sign


def score_text(task: TaskScore | None) -> str:
    """A score as tables show it, with its deviation over seeds; a dash where there is none."""
    if task is None or task.score is None:
        return "-"
    deviation = "" if task.deviation is None else f" ({task.deviation:.2f})"
    return f"{_shown(task.score)}{deviation}"


def million(parameters: int | None) -> str:
    """Million parameters."""
    return "-" if parameters is None else f"{parameters / 1e6:.1f}"


def head_and_cells(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """The table of scores: its head and its rows as text."""
    sizes = sorted({size for entry in board.entries for size in entry.macro_by_size})
    head = ["submission", *(ELUE_TASKS[task] for task in board.tasks), "million parameters", "macro average"]
    rows = [
        [
            entry.name,
            *(score_text(entry.tasks.get(task)) for task in board.tasks),
            million(entry.parameters),
            *(
                "-" if value is None else _shown(value)
                for value in (entry.macro, *(entry.macro_by_size.get(size) for size in sizes))
            ),
        ]
        for entry in board.entries
    ]
    return [*head, *(f"ELUE-{size}M" for size in sizes)], rows


def methods_table(board: Leaderboard) -> tuple[list[str], list[list[str]]]:
    """What each submission is."""
    return ["submission", "paper; training; policy; note"], [[entry.name, entry.note] for entry in board.entries]


def points_text(board: Leaderboard) -> str:
    """Every point of every submission: cost, quality, whether it is on its Pareto front."""
    rows = [
        [ELUE_TASKS[task], entry.name, point.name, f"{point.flops / 1e6:.4g}", f"{point.quality:.2f}", front]
        for task in board.tasks
        for entry in board.entries
        if task in entry.tasks
        for point in entry.tasks[task].points
        for front in ["front" if point.name in entry.tasks[task].front else ""]
    ]
    return table(["task", "submission", "point", "MFLOPs a row", "quality", ""], rows)


def text(board: Leaderboard) -> str:
    """The leaderboard as text: scores, points, the slides' own tables below them, warnings."""
    parts = []
    if board.reference is None:
        parts.append("no reference was given (--reference): points, but no scores")
    else:
        entries = sum(one.outside for entry in board.entries for one in entry.tasks.values())
        beyond = f" ({entries} points lie beyond)" if entries else ""
        parts.append(f"ELUE scores, percent points against {board.reference}; {ENDS}{beyond}; {SPREAD}")
    parts.append(table(*head_and_cells(board)))
    parts += ["\n".join(board.notes)] if board.notes else []
    parts += [table(*methods_table(board))] if any(entry.note for entry in board.entries) else []
    parts.append(points_text(board))
    parts += [f"{title}, {SOURCE}:\n{table(*published(name))}" for name, title in TABLES.items()]
    return "\n\n".join([*parts, *split_warnings(board.rows)])


def as_json(board: Leaderboard) -> dict[str, Any]:
    """The leaderboard as JSON holds it."""
    entries = [{**asdict(entry), "size_class": entry.size_class} for entry in board.entries]
    return {
        "tasks": board.tasks,
        "test_rows": board.rows,
        "reference": board.reference,
        "ends": ENDS,
        "notes": board.notes,
        "entries": entries,
        "warnings": split_warnings(board.rows),
        "published": {name: {"source": SOURCE, "rows": published(name)} for name in TABLES},
    }


def write_board(board: Leaderboard, folder: Path) -> None:
    """leaderboard.txt, leaderboard.json and leaderboard.html, which needs nothing beside it."""
    files = {
        "leaderboard.txt": text(board) + "\n",
        "leaderboard.json": json.dumps(as_json(board), indent=1) + "\n",
        "leaderboard.html": as_page(board),
    }
    for name, content in files.items():
        write_text(folder / name, content)


def as_page(board: Leaderboard) -> str:
    """The leaderboard as one HTML file."""
    methods = [("Submissions", *methods_table(board))] if any(entry.note for entry in board.entries) else []
    tables = [(f"{title}, {SOURCE}", *published(name)) for name, title in TABLES.items()]
    curves = {
        ELUE_TASKS[task]: {entry.name: _series(entry.tasks[task]) for entry in board.entries if task in entry.tasks}
        for task in board.tasks
    }
    scored = "no reference: no scores" if board.reference is None else f"percent points against {board.reference}"
    notes = [f"ELUE scores: {scored}; {ENDS}; {SPREAD}.", *board.notes, *split_warnings(board.rows)]
    return page(*head_and_cells(board), [*methods, *tables], curves, notes)


def _series(task: TaskScore) -> list[tuple[str, float, float, bool]]:
    return [(point.name, point.flops, point.quality, point.name in task.front) for point in task.points]


def leaderboard(options: LeaderboardOptions) -> None:
    """Put scored submissions side by side, against one reference."""
    if options.output:
        check_replaceable(Path(options.output), options.reference, *options.results)
    results = [read_result(Path(path)) for path in options.results]
    names = [result.name for result in results]
    doubled = next((name for name in names if names.count(name) > 1), None)
    if doubled is not None:
        raise ValueError(f"two of the results are called {doubled!r}; give them names of their own (score --name)")
    if not results:
        raise ValueError("--results is empty; give the scores.json of one submission or more")
    rows = {task: one.rows for result in results for task, one in result.tasks.items()}
    reference = read_reference(Path(options.reference), rows) if options.reference else {}
    board = leaderboard_of(results, reference, options.reference)
    if options.output:
        with new_folder(Path(options.output)) as folder:
            write_board(board, folder)
    print(text(board))
