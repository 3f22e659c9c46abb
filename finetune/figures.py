"""Figures of runs, searches and calibrations."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from elastic_model.operating_points import OperatingPoint, OperatingPoints

LONGEST_NAME = 40  # characters of a class's name that a figure shows


@contextmanager
def panels(image: Path, columns: int, rows: int = 1, size: tuple[float, float] = (6, 4)) -> Iterator[Any]:
    """The axes (rows, columns) of a figure that is saved when the block ends, each of this size with a legend of what
    has a label, and a grid."""
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(rows, columns, figsize=(size[0] * columns, size[1] * rows), squeeze=False)
    try:
        yield axes
        for one in axes.flat:
            if one.get_legend_handles_labels()[0] and one.get_legend() is None:
                one.legend(fontsize="small")
            if not one.images:
                one.grid(alpha=0.3)
        figure.tight_layout()
        figure.savefig(image, dpi=120, bbox_inches="tight")
    finally:
        pyplot.close(figure)


@contextmanager
def drawn(image: Path, size: tuple[float, float] = (6, 4)) -> Iterator[Any]:
    """As `panels`, of a single one."""
    with panels(image, 1, size=size) as axes:
        yield axes[0, 0]


def plot_exits(image: Path, splits: Mapping[str, Mapping[int, Mapping[str, float]]], metric: str) -> None:
    """One metric against the exit layer, a line a split; {split: {exit layer: {metric, low, high}}} with intervals."""
    with drawn(image) as axes:
        for split, exits in splits.items():
            values = np.array([[exits[layer][name] for name in (metric, "low", "high")] for layer in exits])
            axes.plot(list(exits), values[:, 0], "o-", label=split)
            axes.fill_between(list(exits), values[:, 1], values[:, 2], alpha=0.2)
        axes.set(
            xlabel="exit after layer",
            ylabel=metric,
            title="95 % intervals shaded",
            xticks=list(next(iter(splits.values()))),
        )


def confusion(answers: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """How many rows of each class (row) were answered as each class (column); (classes, classes)."""
    return np.bincount(labels.astype(int) * classes + answers.astype(int), minlength=classes**2).reshape(
        classes, classes
    )


def plot_confusion(image: Path, counts: np.ndarray, names: list[str], title: str) -> None:
    """A confusion matrix, shaded by the share of the true class; counts are written in where they fit."""
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    names = [name if len(name) <= LONGEST_NAME else f"{name[: LONGEST_NAME - 1]}…" for name in names]
    size = min(12.0, 2.5 + 0.6 * len(names))
    with drawn(image, (size + 1, size)) as axes:
        shown = axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
        ticks = range(len(names))
        axes.set(xticks=ticks, yticks=ticks, yticklabels=names, xlabel="answer", ylabel="label", title=title)
        axes.set_xticklabels(names, rotation=45, ha="right")
        for label in (*axes.get_xticklabels(), *axes.get_yticklabels()):
            label.set_parse_math(False)  # a name may have dollar signs
        if len(names) <= 20:
            for row, column in np.ndindex(counts.shape):
                colour = "white" if shares[row, column] > 0.5 else "black"
                axes.text(column, row, str(counts[row, column]), ha="center", va="center", color=colour)
        axes.figure.colorbar(shown, label="share of the label's rows")


def plot_areas(image: Path, areas: Sequence[float]) -> None:
    """The area under the front by iteration of a search: figure 4 of Kim and Cho (2021)."""
    with drawn(image) as axes:
        axes.plot(areas, "o-", markersize=3)
        axes.set(xlabel="iteration", ylabel="area under the front")


def plot_points(image: Path, points: OperatingPoints) -> None:
    """Quality, with its interval, of operating points against their share of the FLOPs of the full one; those whose
    quality and cost are known."""
    with drawn(image) as axes:
        kinds: dict[str, list[OperatingPoint]] = {"searched": [], "lengths by row": [], "calibrated": []}
        for one in points.points:
            if one.quality is not None and one.flops is not None:
                own = "lengths by row" if isinstance(one.length_config, dict) else "searched"
                kinds["calibrated" if one.calibration else own].append(one)
        full = max((one.flops or 0.0 for group in kinds.values() for one in group), default=1.0)
        for kind, group in kinds.items():
            if group:
                quality = np.array([[(one.quality or {})[name] for name in ("value", "low", "high")] for one in group])
                errors = np.abs(quality[:, 1:] - quality[:, :1]).T
                costs = [(one.flops or 0.0) / full for one in group]
                axes.errorbar(costs, quality[:, 0], errors, fmt="o", markersize=4, capsize=2, alpha=0.7, label=kind)
        axes.set(xlabel="FLOPs, as a share of the full point", ylabel="quality, 95 % intervals")


def plot_front(image: Path, lines: Mapping[str, Sequence[tuple[float, float]]], full: float, metric: str) -> None:
    """Quality against cost as a share of the full one; {name: [(cost, quality), ...]}."""
    with drawn(image) as axes:
        for name, points in lines.items():
            ordered = sorted(points)
            axes.plot([cost / full for cost, _ in ordered], [quality for _, quality in ordered], "o-", markersize=3,
                      label=name.replace("_", " "))  # fmt: skip
        axes.set(xlabel="cost, as a share of full depth and length", ylabel=metric)


def plot_curves(image: Path, curves: Mapping[str, Sequence[np.ndarray]], metric: str) -> None:
    """Quality against milliseconds of a row: {pipeline: a curve (points, 2) a seed}; one colour a pipeline."""
    with drawn(image, (7, 5)) as axes:
        for number, (name, seeds) in enumerate(curves.items()):
            for place, curve in enumerate(seeds):
                axes.plot(curve[:, 0], curve[:, 1], color=f"C{number % 10}", alpha=0.8, linewidth=1,
                          linestyle=["-", "--", ":"][number // 10 % 3], label=None if place else name)  # fmt: skip
        axes.set(xlabel="milliseconds a row", ylabel=metric, title="one line a seed")


def plot_estimates(image: Path, figure_4: Mapping[str, Mapping[str, Any]], metric: str) -> None:
    """A panel a pipeline with exits, measured and estimated: {pipeline: {"estimated", "measured": (points, 2)}}."""
    shown = {name: one for name, one in figure_4.items() if len(one["estimated"]) > 1}
    columns = min(4, len(shown))
    with panels(image, columns, -(-len(shown) // columns), (3.2, 2.8)) as axes:
        for one in axes.flat[len(shown) :]:
            one.set_visible(False)
        for axis, (name, found) in zip(axes.flat, shown.items(), strict=False):
            for kind, style in (("measured", "o-"), ("estimated", "s--")):
                curve = np.array(found[kind])
                axis.plot(curve[:, 0], curve[:, 1], style, markersize=2, linewidth=1, label=kind)
            axis.set(title=name, xlabel="ms a row", ylabel=metric)
