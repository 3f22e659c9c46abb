"""Figures of a study: trade-off curves of every order, and estimated against measured ones."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from finetune.figures import drawn


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
    from matplotlib import pyplot

    shown = {name: one for name, one in figure_4.items() if len(one["estimated"]) > 1}
    columns = min(4, len(shown))
    lines = -(-len(shown) // columns)
    figure, panels = pyplot.subplots(lines, columns, figsize=(3.2 * columns, 2.8 * lines), squeeze=False)
    for axes in panels.flat[len(shown) :]:
        axes.set_visible(False)
    for axes, (name, one) in zip(panels.flat, shown.items(), strict=False):
        for kind, style in (("measured", "o-"), ("estimated", "s--")):
            curve = np.array(one[kind])
            axes.plot(curve[:, 0], curve[:, 1], style, markersize=2, linewidth=1, label=kind)
        axes.set(title=name, xlabel="ms a row", ylabel=metric)
        axes.grid(alpha=0.3)
    panels.flat[0].legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(image, dpi=120)
    pyplot.close(figure)
