"""The ELUE score: how far the points of a submission lie above a reference's curve of quality over FLOPs."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean, stdev

import numpy as np

from elastic_model.folders import write_json
from finetune.elue.tasks import answers_to, task_called

FORMAT = 1
SCORES_FILE = "scores.json"
SIZE_CLASSES = (40, 55, 70, 110)  # million parameters: the four tracks of the paper, section 3.3


@dataclass(frozen=True)
class Point:
    """An operating point on a task: mean FLOPs of a row, quality in percent, parameters of the modules it uses."""

    name: str
    flops: float
    quality: float
    parameters: int | None = None

    def __post_init__(self) -> None:
        if self.parameters is not None and not (isinstance(self.parameters, int) and self.parameters >= 0):
            raise ValueError(f"point {self.name!r}: parameters must be a whole number from 0, got {self.parameters!r}")
        if not (math.isfinite(self.flops) and math.isfinite(self.quality) and self.flops >= 0):
            raise ValueError(
                f"point {self.name!r}: flops must be finite and at least 0, quality finite, got {self.flops} and "
                f"{self.quality}"
            )


Curve = Sequence[Point]


@dataclass(frozen=True)
class TaskResult:
    """What a submission did on a task, on that many test rows; one list of points a seed, or a single one."""

    metric: str
    rows: int
    seeds: list[list[Point]]

    def __post_init__(self) -> None:
        if not (isinstance(self.rows, int) and self.rows > 0):
            raise ValueError(f"rows must be a whole number above 0, got {self.rows!r}")
        if not self.seeds or not all(self.seeds):
            raise ValueError("seeds must be lists of points, at least one of each")
        for points in self.seeds:
            names = [point.name for point in points]
            if len(set(names)) != len(names):
                raise ValueError(f"the points of a seed must have names of their own, got {', '.join(names)}")

    @property
    def curves(self) -> list[list[Point]]:
        """What is scored: one curve, the mean over seeds, where all have the same points at the same cost, as exits in
        static use; else the curve of each seed. A policy's points are chosen on dev: of two seeds they are different
        settings, however they are called."""
        first, *others = ({point.name: point for point in points} for points in self.seeds)
        same = all(one.keys() == first.keys() for one in others) and all(
            math.isclose(one[name].flops, first[name].flops, rel_tol=1e-9) for one in others for name in first
        )
        if not same:
            return self.seeds
        return [[_mean([first[name], *(one[name] for one in others)]) for name in first]]

    @property
    def points(self) -> list[Point]:
        """Those of all curves; where they are several, `#2` stands behind the names of the second seed's."""
        if len(self.curves) == 1:
            return self.curves[0]
        return [
            replace(point, name=f"{point.name} #{number}")
            for number, points in enumerate(self.seeds, start=1)
            for point in points
        ]

    @property
    def reference(self) -> list[Point]:
        """The curve that others are scored against. Where seeds have points of their own it runs through all of them,
        of those of one cost, as a policy's cheapest are in every seed, through the mean, every seed with the same
        weight: against it, the seeds' own scores have the mean 0."""
        if len(self.curves) == 1:
            return self.curves[0]
        of_cost: dict[str, list[tuple[Point, float]]] = {}
        for points in self.seeds:
            for point in points:
                of_cost.setdefault(f"{point.flops:.9e}", []).append((point, 1 / len(points)))
        curve = []
        for same in of_cost.values():
            of_seeds, weights = zip(*same, strict=True)
            quality = np.average([point.quality for point in of_seeds], weights=weights)
            curve.append(replace(of_seeds[0], quality=float(quality)))
        return curve

    def score(self, reference: Curve) -> float:
        """The ELUE score; where seeds have points of their own, the mean of theirs."""
        if list(reference) == self.reference:
            return 0.0  # which the rounding of means over seeds would miss by 1e-15
        return fmean(elue_score(points, reference) for points in self.curves)

    def scores_by_size(self, reference: Curve) -> dict[int, float]:
        """As `score`, of the points of each size class that some curve has."""
        found = [scores_by_size(points, reference) for points in self.curves]
        return {
            size: fmean(one[size] for one in found if size in one)
            for size in SIZE_CLASSES
            if any(size in one for one in found)
        }


@dataclass(frozen=True)
class Result:
    """A submission: its name, what it did on each task of ELUE, a note, and of each task the sizes it was run at, in
    words."""

    name: str
    tasks: dict[str, TaskResult]
    note: str = ""
    settings: dict[str, str] = field(default_factory=dict)

    @property
    def parameters(self) -> int | None:
        """How many its largest point has; None where those of some point are not known."""
        sizes = [point.parameters for task in self.tasks.values() for point in task.points]
        return None if None in sizes else max((size for size in sizes if size is not None), default=None)


def _mean(points: list[Point]) -> Point:
    if len(points) == 1:
        return points[0]
    return Point(
        points[0].name,
        fmean(point.flops for point in points),
        fmean(point.quality for point in points),
        points[0].parameters,
    )


def check_reference(curves: Mapping[str, Curve], path: Path) -> None:
    """ValueError with file and task where a curve is no function of FLOPs."""
    for task, curve in curves.items():
        try:
            _knots(curve)
        except ValueError as error:
            raise ValueError(f"reference {path}, {task}: {error}") from None


def _knots(reference: Curve) -> tuple[list[float], list[float]]:
    """The reference curve as rising FLOPs and the quality at each; ValueError where it is no function of FLOPs."""
    knots: dict[float, float] = {}
    for point in sorted(reference, key=lambda one: one.flops):
        if knots.setdefault(point.flops, point.quality) != point.quality:
            raise ValueError(
                f"the reference has two qualities at {point.flops:.6g} FLOPs ({knots[point.flops]} and "
                f"{point.quality}); leave one of the points out"
            )
    if not knots:
        raise ValueError("the reference has no points")
    return list(knots), list(knots.values())


def reference_quality(reference: Curve, flops: float) -> float:
    """The reference's quality at these FLOPs, linear between its points.

    Below its cheapest and above its dearest point it stays as it is there: what costs less than any exit of the
    reference is compared with the cheapest one, what costs more is not credited with what the reference might gain.
    """
    return float(np.interp(flops, *_knots(reference)))


def elue_score(points: Curve, reference: Curve) -> float:
    """Mean over points of p_i - p_reference(f_i), in percent points (Liu et al. 2022, section 3.3)."""
    if not points:
        raise ValueError("a submission without points has no score")
    return math.fsum(point.quality - reference_quality(reference, point.flops) for point in points) / len(points)


def outside(points: Curve, reference: Curve) -> int:
    """Points beyond either end of the reference, where it is continued flat."""
    costs, _ = _knots(reference)
    return sum(not costs[0] <= point.flops <= costs[-1] for point in points)


def size_class(parameters: int | None) -> int | None:
    """The smallest of ELUE's size classes, in million parameters, that a model of this size fits in, if any."""
    if parameters is None:
        return None
    return next((size for size in SIZE_CLASSES if parameters <= size * 1_000_000), None)


def scores_by_size(points: Curve, reference: Curve) -> dict[int, float]:
    """ELUE by size class: the score of the points whose model fits in it; classes without points are left out."""
    scored = {}
    for size in SIZE_CLASSES:
        fitting = [one for one in points if one.parameters is not None and one.parameters <= size * 1_000_000]
        if fitting:
            scored[size] = elue_score(fitting, reference)
    return scored


def macro_average(scores: Mapping[str, float], tasks: Sequence[str]) -> float | None:
    """The mean over tasks, every one with the same weight; None where one of them has no score."""
    return fmean(scores[task] for task in tasks) if tasks and all(task in scores for task in tasks) else None


def seeds_deviation(task: TaskResult, reference: Curve) -> float | None:
    """Standard deviation over seeds of the score against one and the same reference curve; None for a single seed,
    and for the reference itself where it runs through the points of every seed."""
    if len(task.curves) > 1 and task.reference == list(reference):
        return None
    return stdev(elue_score(points, reference) for points in task.seeds) if len(task.seeds) > 1 else None


def write_result(result: Result, file: Path) -> None:
    """The result as JSON, which `read_result` and `--reference` read back."""
    tasks = {
        name: {
            "metric": task.metric,
            "rows": task.rows,
            "seeds": [[asdict(point) for point in points] for points in task.seeds],
        }
        for name, task in result.tasks.items()
    }
    content = {"format": FORMAT, "name": result.name, "note": result.note, "settings": result.settings, "tasks": tasks}
    write_json(file, content)


def read_result(path: Path) -> Result:
    """A result that was written, from its file or folder; ValueError where it is damaged or of another format."""
    file = path / SCORES_FILE if path.is_dir() else path
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"its format is {content['format']!r}, this version reads {FORMAT}")
        tasks: dict[str, TaskResult] = {}
        for name, task in content["tasks"].items():
            if task_called(name) in tasks:
                raise ValueError(f"task {task_called(name)} is there twice")
            if task["metric"] != answers_to(name).metric:
                raise ValueError(f"the metric of {name} is {answers_to(name).metric}, not {task['metric']!r}")
            seeds = [[Point(**point) for point in points] for points in task["seeds"]]
            tasks[task_called(name)] = TaskResult(task["metric"], task["rows"], seeds)
        note, settings = content.get("note", ""), content.get("settings", {})
        if not all(isinstance(text, str) for text in (content["name"], note, *settings.values())):
            raise ValueError("its name, its note and the settings of each task must be text")
        return Result(content["name"], tasks, note, settings)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not the {SCORES_FILE} of a submission ({type(error).__name__}: {error})") from error


def read_reference(path: Path, rows: Mapping[str, int]) -> dict[str, list[Point]]:
    """{task: curve}: the scores.json of any submission, its folder, or a TSV with the columns task, flops, quality
    (in percent).

    rows: the test rows of each task that is scored against it; ValueError where a scores.json has others.
    """
    if path.suffix != ".tsv":
        tasks = read_result(path).tasks
        for name in tasks.keys() & rows.keys():
            if tasks[name].rows != rows[name]:
                raise ValueError(
                    f"reference {path} has {tasks[name].rows} test rows of {name}, not {rows[name]}: "
                    "they do not compare"
                )
        curves = {name: task.reference for name, task in tasks.items()}
        check_reference(curves, path)
        return curves
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"reference {path}: not a readable tsv file in UTF-8 ({error})") from error
    if not lines or lines[0].split("\t") != ["task", "flops", "quality"]:
        raise ValueError(f"reference {path}, line 1: its columns must be task, flops, quality, tab-separated")
    curves = {}
    for number, line in enumerate(lines[1:], start=2):
        if not line.strip():
            continue
        try:
            task, flops, quality = line.split("\t")
            point = Point(f"line {number}", float(flops), float(quality))
            curves.setdefault(task_called(task.strip()), []).append(point)
        except ValueError as error:
            raise ValueError(f"reference {path}, line {number}: expected task, flops, quality ({error})") from None
    if not curves:
        raise ValueError(f"reference {path} has no rows")
    check_reference(curves, path)
    return curves
