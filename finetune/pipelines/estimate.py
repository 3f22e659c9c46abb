"""`python -m finetune estimate EDPQ --from measured.json`: what a pipeline should give, from its operators alone.

Xin et al. (2022), equations 1 to 5, A quality, T time, R any pipeline:
A_(R+D) = A_D / A_O A_R, and likewise P; T_(E+P) = T_P / T_O T_E; T_(E+D) = t_E + (T_E - t_E) T_D / T_O, t_E the time
of leaving after one layer; T_(E+DP) = T_P / T_O T_(E+D). L, Q and S multiply; P and Q together were measured as one.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_model.folders import check_file, write_json
from finetune.evaluate import table
from finetune.pipelines.config import EstimateOptions
from finetune.pipelines.letters import NOTHING, name_of, parse
from finetune.pipelines.measure import Measurement
from finetune.pipelines.pipeline import read_measured

Curve = np.ndarray  # (points, 2): milliseconds and quality, from strict to loose
Measured = Mapping[str, Mapping[int, Measurement]]  # pipeline -> seed
LINES = 12  # of a curve that are printed


@dataclass(frozen=True)
class Part:
    """A measured operator: its curve, one point where it has no exits, and the time of leaving at the first exit."""

    curve: Curve
    first_exit: float

    @property
    def full(self) -> tuple[float, float]:
        """Milliseconds and quality at full depth."""
        return float(self.curve[0, 0]), float(self.curve[0, 1])


def part_of(measurements: Sequence[Measurement]) -> Part:
    """The mean of some measurements of one pipeline; ValueError where their curves have other settings."""
    thresholds = {tuple(point.threshold for point in one.curve) for one in measurements}
    if len(thresholds) > 1:
        raise ValueError(
            f"the curves of {measurements[0].pipeline} were measured at different thresholds over the seeds; "
            "measure them with one version"
        )
    curves = [[(point.ms, point.quality) for point in one.curve] for one in measurements]
    return Part(np.mean(curves, axis=0), float(np.mean([one.exit_ms[0] for one in measurements])))


def parts_needed(letters: str) -> list[str]:
    """The pipelines that an estimate is made of: O, each operator, but P and Q together as one."""
    together = "P" in letters and "Q" in letters
    alone = [letter for letter in letters if not (together and letter in "PQ")]
    return [NOTHING, *alone, *(["PQ"] if together else [])]


def combine(letters: str, parts: Mapping[str, Part]) -> Curve:
    """The estimated curve of a pipeline: of one point without E."""
    base_ms, base_quality = parts[NOTHING].full
    if base_quality <= 0:
        raise ValueError(f"the quality of O is {base_quality:g}: shares of what is not above 0 say nothing")
    curve = (parts["E"] if "E" in letters else parts[NOTHING]).curve.copy()
    for name in parts_needed(letters):
        if name in (NOTHING, "E"):
            continue
        ms, quality = parts[name].full
        fixed = parts["E"].first_exit if name == "D" and "E" in letters else 0.0
        curve[:, 0] = fixed + (curve[:, 0] - fixed) * ms / base_ms
        curve[:, 1] *= quality / base_quality
    return curve


@dataclass(frozen=True)
class Estimate:
    """The curve, and where there were several seeds its 95 % interval, low and high, each (points, 2)."""

    curve: Curve
    low: Curve | None
    high: Curve | None

    def as_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        points = []
        for place, (ms, quality) in enumerate(self.curve.tolist()):
            point = {"ms": ms, "quality": quality}
            if self.low is not None and self.high is not None:
                point |= {"ms_low": self.low[place, 0], "ms_high": self.high[place, 0]}
                point |= {"quality_low": self.low[place, 1], "quality_high": self.high[place, 1]}
            points.append(point)
        return {"curve": points}


def by_pipeline(measurements: Sequence[Measurement]) -> Measured:
    """{pipeline: {seed: measurement}}, of one measured twice the later; ValueError where their operators were given
    different options."""
    found: dict[str, dict[int, Measurement]] = {}
    options: dict[str, tuple[Any, str]] = {}
    for one in measurements:
        found.setdefault(one.pipeline, {})[one.seed] = one
        for name, value in one.settings.items():
            before, where = options.setdefault(name, (value, one.pipeline))
            if before != value:
                raise ValueError(
                    f"{where} was measured with {name} = {before!r}, {one.pipeline} with {value!r}: choose one of them"
                )
    return found


def estimate_of(letters: str, measured: Measured, draws: int = 0, seed: int = 0) -> Estimate:
    """The estimate from the means over seeds; its interval from seeds drawn anew, for all parts the same ones where
    all have the same. ValueError where a part was not measured."""
    needed = parts_needed(letters)
    missing = [name for name in needed if name not in measured]
    if missing:
        raise ValueError(
            f"an estimate of {name_of(letters)} needs measurements of {', '.join(needed)}; there are none of "
            f"{', '.join(missing)}: run `python -m finetune pipeline {missing[0]}` with the same options"
        )
    curve = combine(letters, {name: part_of(list(measured[name].values())) for name in needed})
    if draws < 1 or min(len(measured[name]) for name in needed) < 2:
        return Estimate(curve, None, None)
    draw, paired = random.Random(seed), len({frozenset(measured[name]) for name in needed}) == 1
    drawn = []
    for _ in range(draws):
        seeds = {name: draw.choices(sorted(measured[name]), k=len(measured[name])) for name in needed}
        if paired:
            seeds = dict.fromkeys(needed, seeds[needed[0]])
        parts = {name: part_of([measured[name][one] for one in seeds[name]]) for name in needed}
        drawn.append(combine(letters, parts))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    return Estimate(curve, low, high)


def curve_distance(first: Curve, second: Curve) -> float:
    """The largest difference of quality at equal time, over the range of time that both have, linear between points.

    NaN where they have no time in common.
    """
    low, high = max(first[:, 0].min(), second[:, 0].min()), min(first[:, 0].max(), second[:, 0].max())
    if low > high:
        return float("nan")
    knots = np.concatenate([first[:, 0], second[:, 0], [low, high]])
    knots = knots[(knots >= low) & (knots <= high)]
    return float(np.abs(_at(first, knots) - _at(second, knots)).max())


def _at(curve: Curve, times: np.ndarray) -> np.ndarray:
    """Quality at some times; of points at one time the best counts."""
    best: dict[float, float] = {}
    for ms, quality in curve.tolist():
        best[ms] = max(quality, best.get(ms, quality))
    known = sorted(best)
    return np.interp(times, known, [best[ms] for ms in known])


def errors(estimated: Curve, measured: Curve) -> dict[str, float]:
    """Medians over the points of two curves of the same settings: of the relative error of time, of quality's."""
    return {
        "time": float(np.median(np.abs(estimated[:, 0] / measured[:, 0] - 1))),
        "quality": float(np.median(np.abs(estimated[:, 1] - measured[:, 1]))),
    }


def _cell(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.4f}" if low is None or high is None else f"{value:.4f} ({low:.4f}-{high:.4f})"


def _lines(found: Estimate) -> list[list[str]]:
    """Points spread over the curve, milliseconds and quality with their intervals."""
    last = len(found.curve) - 1
    points = found.as_dict()["curve"]
    return [
        [_cell(points[place][name], points[place].get(f"{name}_low"), points[place].get(f"{name}_high"))
         for name in ("ms", "quality")]
        for place in np.unique(np.linspace(0, last, min(LINES, last + 1)).astype(int))
    ]  # fmt: skip


def read_parts(files: Sequence[str]) -> tuple[str, Measured]:
    """The metric, and the measurements of one or more files; ValueError where they do not combine."""
    if not files:
        raise ValueError("give the measurements: --from measured.json, which `pipeline` and `study` write")
    contents = [read_measured(Path(file)) for file in files]
    for name in ("metric", "dev", "settings", "machine"):
        if any(one[name] != contents[0][name] for one in contents):
            what = "data" if name == "dev" else name
            raise ValueError(f"{', '.join(files)} were measured on different {what}: they do not combine")
    where: dict[tuple[str, int], str] = {}
    for file, content in zip(files, contents, strict=True):
        for one in content["measurements"]:
            other = where.setdefault((one.pipeline, one.seed), file)
            if other != file:
                raise ValueError(
                    f"{other} and {file} both have {one.pipeline} of seed {one.seed}: give one of the files"
                )
    return contents[0]["metric"], by_pipeline([one for content in contents for one in content["measurements"]])


def estimate(options: EstimateOptions) -> None:
    """Print (with --output also write) the estimated curve, and how far off it is where the pipeline was measured."""
    letters = parse(options.pipeline)
    if options.draws < 0:
        raise ValueError(f"draws must be at least 0, got {options.draws}")
    if options.output:
        Path(options.output).parent.mkdir(parents=True, exist_ok=True)
        check_file(Path(options.output), *options.measured)
    metric, measured = read_parts(options.measured)
    name, parts = name_of(letters), parts_needed(letters)
    found = estimate_of(letters, measured, options.draws, options.seed)
    result: dict[str, Any] = {"pipeline": name, "metric": metric, "parts": parts, **found.as_dict()}
    print(f"{name}, from {', '.join(parts)}{'' if found.low is None else '; 95 % intervals over the seeds'}:")
    print(table(["ms a row", metric], _lines(found)))
    if found.low is None and options.draws:
        print("one seed has no spread: with measurements of several seeds there are intervals")
    if name in measured and name not in parts:
        actual = part_of(list(measured[name].values())).curve
        result["measured"] = [{"ms": ms, "quality": quality} for ms, quality in actual.tolist()]
        if len(actual) == len(found.curve):
            error = result["median_error"] = errors(found.curve, actual)
            points = f"{100 * error['quality']:.2f} points in {metric}"
            print(f"measured too: median error {error['time']:.1%} in time, {points}")
    if options.output:
        write_json(Path(options.output), result)
