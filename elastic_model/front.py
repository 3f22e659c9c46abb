"""Pareto fronts of quality against cost, on arrays."""

from collections.abc import Sequence

import numpy as np

Numbers = Sequence[float] | np.ndarray


def pareto_front(costs: Numbers, qualities: Numbers) -> list[int]:
    """Which points no other point beats: indices, the cheapest first, so that quality rises along them.

    Of equal points the first counts. ValueError for a NaN, which would compare as neither better nor worse.
    """
    cost, quality = checked(costs, qualities)
    best, front = -np.inf, []
    for index in np.lexsort((np.arange(len(cost)), -quality, cost)):
        if quality[index] > best:
            best = quality[index]
            front.append(int(index))
    return front


def area_under_front(costs: Numbers, qualities: Numbers, full: float) -> float:
    """The mean over budgets, from 0 to the cost `full`, of the best quality that a budget buys; 0 where it buys none.

    The area under the front in steps, as in figure 4 of Kim and Cho (2021), with the cost as a share of the full one.
    """
    cost, quality = checked(costs, qualities)
    front = [index for index in pareto_front(cost, quality) if cost[index] < full]
    edges = np.append(cost[front], full)
    return float((np.diff(edges) * quality[front]).sum() / full)


def checked(costs: Numbers, qualities: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """The two as float64 arrays of one length; ValueError where they are not, are empty, or hold a NaN."""
    cost, quality = np.asarray(costs, float), np.asarray(qualities, float)
    if cost.shape != quality.shape or cost.ndim != 1 or not len(cost):
        raise ValueError(f"a front needs one cost and one quality a point, got {cost.shape} and {quality.shape}")
    for name, values in (("cost", cost), ("quality", quality)):
        if np.isnan(values).any():
            raise ValueError(
                f"the {name} of point {int(np.isnan(values).argmax())} is NaN; every point needs a number"
            )
    return cost, quality
