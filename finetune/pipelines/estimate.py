"""`python -m finetune estimate EDPQ --from measured.json`: what a pipeline should give, from its operators alone.

Xin et al. (2022), equations 1 to 5, A quality, T time, R any pipeline:
A_(R+D) = A_D / A_O A_R, and likewise P; T_(E+P) = T_P / T_O T_E; T_(E+D) = t_E + (T_E - t_E) T_D / T_O, t_E the time
of leaving after one layer; T_(E+DP) = T_P / T_O T_(E+D). L, Q and S multiply; P and Q together were measured as one.
"""

import json
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from elastic_model.folders import new_file
from finetune.evaluate import table
from finetune.pipelines.config import EstimateOptions
from finetune.pipelines.letters import NOTHING, name_of, parse
from finetune.pipelines.measure import Measurement
from finetune.pipelines.pipeline import read_measured

Curve = np.ndarray  # (points, 2): milliseconds and quality, from strict to loose
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


def by_pipeline(measurements: Sequence[Measurement]) -> dict[str, dict[int, Measurement]]:
    """{pipeline: {seed: measurement}}; of one measured twice the later."""
    found: dict[str, dict[int, Measurement]] = {}
    for one in measurements:
        found.setdefault(one.pipeline, {})[one.seed] = one
    return found


def estimate_of(
    letters: str, measured: Mapping[str, Mapping[int, Measurement]], draws: int = 0, seed: int = 0
) -> Estimate:
    """The estimate from the means over seeds; its interval from seeds drawn anew, for all parts the same ones where
    all have the same. ValueError where a part was not measured."""
    needed = parts_needed(letters)
    missing = [name for name in needed if name not in measured]
    if missing:
        raise ValueError(
            f"an estimate of {name_of(letters)} needs measurements of {', '.join(needed)}; there are none of "
            f"{', '.join(missing)}: run `python -m finetune pipeline {missing[0]}`"
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


def estimate(options: EstimateOptions) -> None:
    """Print (with --output also write) the estimated curve, and how far off it is where the pipeline was measured."""
    letters = parse(options.pipeline)
    if not options.measured:
        raise ValueError("give the measurements: --from measured.json, which `pipeline` and `study` write")
    if options.draws < 0:
        raise ValueError(f"draws must be at least 0, got {options.draws}")
    contents = [read_measured(Path(file)) for file in options.measured]
    for name in ("data", "settings"):
        if any(one.get(name) != contents[0].get(name) for one in contents):
            raise ValueError(f"{', '.join(options.measured)} were measured on different {name}: they do not combine")
    measured = by_pipeline([one for content in contents for one in content["measurements"]])
    found = estimate_of(letters, measured, options.draws, options.seed)
    low, high = found.low, found.high
    shown = np.unique(np.linspace(0, len(found.curve) - 1, min(LINES, len(found.curve))).astype(int))
    rows = [
        [_cell(*(None if one is None else float(one[place, axis]) for one in (found.curve, low, high)))  # type: ignore[arg-type]
         for axis in (0, 1)]
        for place in shown
    ]  # fmt: skip
    result: dict[str, Any] = {"pipeline": name_of(letters), "metric": contents[0]["metric"]}
    result |= {"parts": parts_needed(letters), **found.as_dict()}
    print(f"{name_of(letters)}, from {', '.join(parts_needed(letters))}:")
    print(table(["ms a row", contents[0]["metric"]], rows))
    if name_of(letters) in measured and name_of(letters) not in parts_needed(letters):
        actual = part_of(list(measured[name_of(letters)].values())).curve
        result["measured"] = [{"ms": ms, "quality": quality} for ms, quality in actual.tolist()]
        if len(actual) == len(found.curve):
            result["median_error"] = errors(found.curve, actual)
            print(
                f"measured too: median error {result['median_error']['time']:.1%} in time, "
                f"{100 * result['median_error']['quality']:.2f} points in {contents[0]['metric']}"
            )
    if options.output:
        with new_file(Path(options.output)) as file:
            file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
