"""The table of operating points: what a budget chooses, what a damaged file says."""

import json
from dataclasses import replace

import numpy as np
import pytest

from elastic_model.checks import check_exit_policy
from elastic_model.operating_points import FILE, OperatingPoint, OperatingPoints, checkpoint_hash


def point(name, layer, quality, latency=None):
    measured = {"metric": "accuracy", "value": quality, "split": "dev"}
    timed = None if latency is None else {"value": latency, "batch": 1, "threads": 1, "machine": "test"}
    return OperatingPoint(name, [0.1] * 4, layer, flops=layer * 1e6, quality=measured, latency_ms=timed)


@pytest.fixture
def points():
    table = [point("full", 4, 0.90, 8.0), point("half", 2, 0.896), point("fast", 1, 0.85, 2.0), point("bad", 2, 0.7)]
    return OperatingPoints("0" * 64, {"name": "entropy"}, table)


@pytest.mark.parametrize(
    ("budget", "name"),
    [
        ("half", "half"),
        ({"speedup": 1}, "full"),
        ({"speedup": 2}, "half"),
        ({"speedup": 4}, "fast"),
        ({"flops": 3e6}, "half"),
        ({"latency_ms": 5}, "fast"),
        ({"max_drop": 0}, "full"),
        ({"max_drop": 0.5}, "half"),
        ({"max_drop": 5}, "fast"),
    ],
)
def test_a_budget_chooses_the_best_that_fits(points, budget, name):
    assert points.at(budget).name == name


@pytest.mark.parametrize(
    ("budget", "says"),
    [
        ("slow", "no operating point named 'slow'; the names are: full, half, fast, bad"),
        ({"speedup": 10}, "no operating point within speedup 10"),
        ({"latency_ms": 1}, "measured are: full 8, fast 2"),
        ({"price": 1}, "one of speedup, latency_ms, flops, max_drop"),
        ({"speedup": 0}, "expected a positive number, got 0"),
        ({"flops": float("nan")}, "expected a positive number, got nan"),
        (4, "a budget is a point's name or a mapping"),
    ],
)
def test_a_budget_that_cannot_be_met_says_why(points, budget, says):
    with pytest.raises(ValueError, match=says):
        points.at(budget)


def test_a_drop_is_counted_on_the_rows_of_the_point(points):
    """A calibrated point is measured on other rows than the table: easier ones made a loss a gain."""
    harder = replace(point("calibrated", 1, 0.80), calibration={"full_quality": 0.804})
    easier = replace(point("calibrated", 1, 0.91), calibration={"full_quality": 0.95})
    with_harder, with_easier = (replace(points, points=[*points.points, one]) for one in (harder, easier))
    assert with_harder.at(max_drop=0.5).name == "calibrated" and with_easier.at(max_drop=0.5).name == "half"
    assert with_easier.at(max_drop=4.5).name == "calibrated" and with_easier.at(max_drop=0).name == "full"
    alone = OperatingPoints("", {"name": "entropy"}, [easier])
    assert alone.at(max_drop=0).name == "calibrated"
    with pytest.raises(ValueError, match="calibration.s full_quality must be finite"):
        replace(harder, calibration={"full_quality": "much"})


def test_a_point_unpacks_into_what_a_model_takes(points):
    policy, lengths = points.at(speedup=4)
    assert (policy, lengths) == ({"name": "entropy", "threshold": [0.1] * 4}, None)
    with pytest.raises(ValueError, match="give one budget"):
        points.at()
    with pytest.raises(ValueError, match="give one budget"):
        points.at("full", speedup=4)
    with pytest.raises(ValueError, match="one of speedup, latency_ms, flops, max_drop"):
        points.at(speedup=4, flops=1e9)


@pytest.mark.parametrize(
    ("policy", "thresholds", "expected"),
    [
        ({"name": "patience", "patience": 2}, [3.0] * 4, {"name": "patience", "patience": 3}),
        ({"name": "voting", "votes": 2}, [3.0] * 4, {"name": "voting", "votes": 3}),
        (
            {"name": "patience", "patience": 2, "threshold": 0.1},
            [0.5, 0.6, 0.7, 0.8],
            {"name": "patience", "patience": 2, "threshold": [0.5, 0.6, 0.7, 0.8]},
        ),
        ({"name": "confidence", "threshold": 0.9}, [0.7] * 4, {"name": "confidence", "threshold": [0.7] * 4}),
    ],
)
def test_a_points_policy_is_one_that_a_model_takes(policy, thresholds, expected):
    points = OperatingPoints("", policy, [OperatingPoint("a", thresholds, 1.0, [1.0, 0.5, 0.5, 0.5])])
    chosen, lengths = points.at("a")
    assert chosen == expected and check_exit_policy(chosen, 4) and lengths == [1.0, 0.5, 0.5, 0.5]


def test_points_of_another_checkpoint_are_refused(points, tiny_checkpoint, tiny_config):
    points.save(tiny_checkpoint)
    with pytest.raises(ValueError, match="operating_points.json belongs to another checkpoint"):
        OperatingPoints.load(tiny_checkpoint)
    replace(points, checkpoint=checkpoint_hash(tiny_checkpoint)).save(tiny_checkpoint)
    assert OperatingPoints.load(tiny_checkpoint).points == points.points


def test_budgets_count_against_full_depth_whatever_a_calibrated_point_costs(points):
    """One calibrated on longer texts without labels passed for full depth; a permitted loss chose the cheapest."""
    promised = OperatingPoint("calibrated", [0.1] * 4, 2.0, flops=9e6, calibration={"at_most": 0.05})
    more = replace(points, points=[*points.points, promised])
    assert more.full().name == "full" and more.at(max_drop=0.5).name == "half" and more.at(speedup=2).name == "half"
    unnamed = replace(more, points=[replace(one, name=f"{one.name}-1") for one in more.points])
    assert unnamed.full().name == "full-1" and replace(more, points=[promised]).full() == promised
    bare = replace(points.points[0], quality=None)
    with pytest.raises(ValueError, match="the quality of 'full', which a drop is counted from, was not measured"):
        replace(points, points=[bare, *points.points[1:]]).at(max_drop=1)


def test_a_cost_that_was_not_measured_is_not_the_lowest(points):
    unknown = replace(points.points[-1], name="unknown", flops=None, quality=points.points[0].quality)
    assert replace(points, points=[*points.points, unknown]).at(max_drop=0).name != "unknown"


def test_what_was_not_measured_cannot_be_asked(points):
    bare = OperatingPoints(points.checkpoint, points.policy, [OperatingPoint("full", [0.1], 4.0)])
    for budget in ({"latency_ms": 5}, {"max_drop": 1}, {"flops": 1e9}, {"speedup": 2}):
        with pytest.raises(ValueError, match="no operating point has a measured"):
            bare.at(budget)


def test_the_table_round_trips(points, tmp_path):
    points.save(tmp_path)
    assert OperatingPoints.load(tmp_path) == points
    assert json.loads((tmp_path / FILE).read_text())["format"] == 1


@pytest.mark.parametrize("content", ["{", "[]", '{"format": 2}', '{"format": 1}', '{"format": 1, "points": [{}]}'])
def test_a_damaged_file_is_named(tmp_path, content):
    (tmp_path / FILE).write_text(content)
    with pytest.raises(ValueError, match=f"{FILE}: not a table of operating points"):
        OperatingPoints.load(tmp_path)


def test_points_must_make_sense():
    with pytest.raises(ValueError, match="must be finite"):
        OperatingPoint("nan", [float("nan")], 1.0)
    with pytest.raises(ValueError, match="quality must be finite"):
        OperatingPoint("nan", [0.1], 1.0, quality={"metric": "accuracy", "value": float("nan"), "split": "dev"})
    with pytest.raises(ValueError, match="latency_ms must be finite, with a value"):
        OperatingPoint("empty", [0.5], 1.0, latency_ms={"batch": 1})
    with pytest.raises(ValueError, match="must not rise"):
        OperatingPoint("rising", [0.1], 1.0, length_config=[0.5, 0.6])
    with pytest.raises(ValueError, match="names of their own"):
        OperatingPoints("", {}, [OperatingPoint("same", [0.1], 1.0)] * 2)
    with pytest.raises(ValueError, match="one threshold per exit"):
        OperatingPoints("", {}, [OperatingPoint("a", [0.1], 1.0), OperatingPoint("b", [0.1, 0.2], 1.0)])


@pytest.mark.parametrize("lengths", [1.0, {"foo": [0.5]}, {"mass": 0.5}, {"mass": []}, [], "all"])
def test_lengths_of_another_form_are_refused(lengths):
    with pytest.raises(ValueError, match="operating point 'a': length_config must be a list with a share per layer"):
        OperatingPoint("a", [0.1], 1.0, length_config=lengths)


def test_a_budget_may_be_a_number_of_numpy(points):
    assert points.at(speedup=np.float32(2)) == points.at(speedup=2) == points.at(speedup=np.int64(2))


def test_equals_are_decided_by_the_other_measure(points):
    """Of one quality the cheaper point, of one cost the better."""
    full, half, fast, bad = points.points
    dear = replace(points, points=[point("dear", 3, 0.896), *points.points])
    assert dear.at(flops=3.5e6).name == "half"
    assert replace(points, points=[full, bad, half]).at(max_drop=50).name == "half"


def test_every_shard_belongs_to_the_weights(tmp_path):
    for name in ("model-00001-of-00002", "model-00002-of-00002"):
        (tmp_path / f"{name}.safetensors").write_bytes(name.encode())
    before = checkpoint_hash(tmp_path)
    (tmp_path / "model-00002-of-00002.safetensors").write_bytes(b"other")
    assert checkpoint_hash(tmp_path) != before


def test_points_without_weights_beside_them_are_found(points, tmp_path):
    """In the folder of an exported file there are none to compare with."""
    points.save(tmp_path)
    assert OperatingPoints.find(tmp_path) == points == OperatingPoints.load(tmp_path)


def test_what_a_later_version_adds_to_a_point_is_read_past(points, tmp_path):
    content = points.to_dict()
    content["points"][0]["energy_mj"] = 3.0
    assert OperatingPoints.from_dict(content) == points


@pytest.mark.parametrize("name", ["speedup", "latency_ms", "flops", "max_drop"])
def test_a_negative_budget_is_refused(points, name):
    with pytest.raises(ValueError, match=f"budget {name}: expected a positive number, got -1"):
        points.at({name: -1})


def test_full_depth_is_the_dearest_in_flops(points):
    """Among points without a name for it: all tokens through half the layers may cost less than few through all."""
    deep, dear = replace(points.points[0], name="deep", flops=1e6), replace(points.points[1], name="dear", flops=9e6)
    assert replace(points, points=[deep, dear]).full().name == "dear"


def test_a_cost_that_equals_its_budget_is_within(points):
    third = replace(points.points[1], flops=4e6 / 3)
    assert replace(points, points=[points.points[0], third]).at(speedup=3).name == "half"
    assert replace(points, points=[points.points[0], third]).at(flops=4e6 / 3 * (1 - 1e-12)).name == "half"


def test_a_point_without_a_quality_is_no_worse_than_known_to_be(points):
    """It is taken only where nothing measured fits, also beside a quality that is negative (a correlation)."""
    unknown = replace(points.points[1], name="unknown", quality=None)
    bad = replace(points.points[1], name="bad", quality={**points.points[1].quality, "value": -0.1})
    assert replace(points, points=[points.points[0], unknown, bad]).at(flops=3e6).name == "bad"


def test_an_interval_must_be_finite():
    with pytest.raises(ValueError, match="quality must be finite"):
        OperatingPoint("wide", [0.1], 1.0, quality={"metric": "accuracy", "value": 0.5, "low": float("-inf")})
