"""Pareto fronts: against the definition, and the area that a budget buys."""

import numpy as np
import pytest

from elastic_model.front import area_under_front, pareto_front


def test_the_front_is_what_nothing_beats():
    draw = np.random.default_rng(0)
    for _ in range(200):
        cost, quality = draw.integers(0, 6, (2, draw.integers(1, 12)))
        front = pareto_front(cost, quality)
        beaten = [
            any((cost <= cost[one]) & (quality >= quality[one]) & ((cost < cost[one]) | (quality > quality[one])))
            for one in range(len(cost))
        ]
        points = {(cost[one], quality[one]) for one in range(len(cost)) if not beaten[one]}
        assert {(cost[one], quality[one]) for one in front} == points and len(front) == len(points)
        assert sorted(quality[front]) == list(quality[front]) and sorted(cost[front]) == list(cost[front])


def test_the_area_is_the_mean_quality_over_budgets():
    assert area_under_front([2.0, 4.0], [0.8, 0.9], full=4.0) == pytest.approx(0.4)  # nothing below 2, 0.8 up to 4
    assert area_under_front([0.0, 2.0], [0.5, 0.9], full=4.0) == pytest.approx(0.7)
    worse = area_under_front([2.0, 3.0, 4.0], [0.8, 0.7, 0.9], full=4.0)
    assert worse == pytest.approx(0.4)  # a point that is beaten adds nothing


@pytest.mark.parametrize(
    ("costs", "qualities", "says"),
    [([1.0, 2.0], [0.5, float("nan")], "quality of point 1 is NaN"), ([], [], "one cost"), ([1.0], [1.0, 2.0], "one")],
)
def test_what_has_no_front_is_named(costs, qualities, says):
    with pytest.raises(ValueError, match=says):
        pareto_front(costs, qualities)
