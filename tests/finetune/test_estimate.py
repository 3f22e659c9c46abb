"""Estimates: the paper's equations by hand, intervals from the spread of seeds, the distance of curves."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from finetune.__main__ import _command
from finetune.pipelines.estimate import curve_distance, errors, estimate_of, parts_needed, read_parts
from finetune.pipelines.measure import Measurement, Point
from finetune.pipelines.study import answers, interval


def measurement(pipeline, *points, seed=0, first_exit=None, **settings):
    """A pipeline measured as (milliseconds, quality) points."""
    curve = [
        Point(None if not place else 1 - place / 10, quality, ms, ms, 1) for place, (ms, quality) in enumerate(points)
    ]
    ms, quality = points[0]
    return Measurement(
        pipeline,
        seed,
        "0" * 64,
        "accuracy",
        quality,
        quality,
        ms,
        ms,
        1,
        1,
        1,
        [first_exit or min(ms for ms, _ in points)],
        None,
        curve,
        settings,
    )


PARTS = [
    measurement("O", (100.0, 0.9)),
    measurement("D", (50.0, 0.8)),
    measurement("P", (70.0, 0.85)),
    measurement("L", (30.0, 0.9)),
    measurement("Q", (40.0, 0.88)),
    measurement("PQ", (20.0, 0.84)),
    measurement("S", (60.0, 0.89)),
    measurement("E", (105.0, 0.9), (60.0, 0.88), (20.0, 0.7), first_exit=18.0),
]


def measured(*measurements):
    found = {}
    for one in measurements:
        found.setdefault(one.pipeline, {})[one.seed] = one
    return found


@pytest.mark.parametrize(
    ("letters", "points"),
    [
        ("", [(100, 0.9)]),
        ("D", [(50, 0.8)]),
        ("DP", [(100 * 0.5 * 0.7, 0.9 * 0.8 / 0.9 * 0.85 / 0.9)]),
        ("DLQ", [(100 * 0.5 * 0.3 * 0.4, 0.8 * 0.88 / 0.9)]),
        ("PLQ", [(100 * 0.3 * 0.2, 0.84)]),  # P and Q as one
        ("DS", [(100 * 0.5 * 0.6, 0.8 * 0.89 / 0.9)]),
        ("EP", [(105 * 0.7, 0.85), (60 * 0.7, 0.88 * 0.85 / 0.9), (20 * 0.7, 0.7 * 0.85 / 0.9)]),
        ("ED", [(18 + 87 * 0.5, 0.8), (18 + 42 * 0.5, 0.88 * 0.8 / 0.9), (18 + 2 * 0.5, 0.7 * 0.8 / 0.9)]),
        (
            "DEPQ",  # first D, which leaves the first layer as it is, then P and Q on all of it
            [
                ((18 + (ms - 18) * 0.5) * 0.2, a * 0.8 / 0.9 * 0.84 / 0.9)
                for ms, a in ((105, 0.9), (60, 0.88), (20, 0.7))
            ],
        ),
    ],
)
def test_the_equations(letters, points):
    np.testing.assert_allclose(estimate_of(letters, measured(*PARTS)).curve, points)


def test_shares_of_a_quality_that_is_not_above_zero_are_refused():
    """Two negative shares made a quality of -8."""
    parts = measured(measurement("O", (100.0, -0.07)), measurement("D", (50.0, 0.8)), measurement("P", (70.0, 0.7)))
    with pytest.raises(ValueError, match="the quality of O is -0.07: shares of what is not above 0"):
        estimate_of("DP", parts)


def test_l_adds_nothing_to_the_error_of_quality():
    """Pipelines with L answer as those without: errors of 0 by construction stood in the median."""
    qualities = {
        "O": 0.9,
        "E": 0.88,
        "D": 0.8,
        "P": 0.85,
        "Q": 0.9,
        "L": 0.9,
        "PQ": 0.84,
        "DE": 0.7,
        "DP": 0.7,
        "DQ": 0.78,
    }
    qualities |= {f"{name}L": quality for name, quality in qualities.items() if name != "O" and "L" not in name}
    found = answers(measured(*(measurement(name, (50.0, quality)) for name, quality in qualities.items())))[
        "cumulative"
    ]
    off = {"DE": 0.7 - 0.8 * 0.88 / 0.9, "DP": 0.7 - 0.8 * 0.85 / 0.9, "DQ": 0.78 - 0.8}
    assert found["quality"] == pytest.approx(np.median(np.abs(list(off.values()))))
    assert found["quality_with_E"] == pytest.approx(abs(off["DE"]))


def test_the_order_of_operators_does_not_change_an_estimate():
    first, second = (estimate_of(letters, measured(*PARTS)).curve for letters in ("DEP", "EDP"))
    np.testing.assert_allclose(first, second)


def test_p_and_q_together_are_one_part():
    assert parts_needed("EDPLQ") == ["O", "E", "D", "L", "PQ"]
    with pytest.raises(ValueError, match="there are none of PQ: run `python -m finetune pipeline PQ`"):
        estimate_of("DPQ", measured(*(one for one in PARTS if one.pipeline != "PQ")))


def test_the_interval_comes_from_the_spread_over_seeds():
    seeds = [measurement("O", (100.0, 0.9), seed=seed) for seed in range(3)]
    seeds += [measurement("D", (ms, 0.8), seed=seed) for seed, ms in enumerate((40.0, 50.0, 60.0))]
    found = estimate_of("D", measured(*seeds), draws=500)
    assert found.low is not None and found.high is not None
    assert found.curve[0, 0] == pytest.approx(50) and 40 <= found.low[0, 0] < 50 < found.high[0, 0] <= 60
    assert found.low[0, 1] == pytest.approx(0.8)
    assert estimate_of("D", measured(*PARTS), draws=500).low is None  # one seed has no spread


def test_a_ratio_of_seeds_that_move_together_has_no_spread():
    seeds = [
        measurement(name, (ms * (1 + seed), 0.9), seed=seed)
        for name, ms in (("O", 100.0), ("D", 50.0), ("P", 70.0))
        for seed in range(3)
    ]
    found = estimate_of("DP", measured(*seeds), draws=200)
    np.testing.assert_allclose(found.curve[0, 0] / 200, 0.35)
    np.testing.assert_allclose((found.high - found.low)[0, 1], 0, atol=1e-12)


def test_the_distance_of_curves():
    first, second = np.array([[0.0, 0.0], [10.0, 1.0]]), np.array([[5.0, 0.3], [15.0, 0.9]])
    assert curve_distance(first, second) == pytest.approx(0.4)  # at 10: 1 against 0.6; beyond it there is one curve
    assert curve_distance(first, first) == 0 and curve_distance(second, first) == pytest.approx(0.4)
    assert np.isnan(curve_distance(first, first + [20, 0]))
    steps = np.array([[0.0, 0.0], [5.0, 0.2], [5.0, 0.5], [10.0, 1.0]])
    assert curve_distance(first, steps) == pytest.approx(0.0)


def test_errors_are_medians_over_the_curve():
    assert errors(np.array([[11.0, 0.9], [22.0, 0.8]]), np.array([[10.0, 0.92], [20.0, 0.8]])) == pytest.approx(
        {"time": 0.1, "quality": 0.01}
    )


def written(file, *measurements, **more):
    """The measurements as `pipeline` writes them."""
    content = {"format": 1, "task": "t", "metric": "accuracy", "dev": "0", "settings": {}, "machine": "m", **more}
    file.write_text(json.dumps({**content, "measurements": [one.to_dict() for one in measurements]}))
    return str(file)


def test_the_command_reads_measured_json(tmp_path, capsys):
    file = written(tmp_path / "measured.json", *PARTS, measurement("DE", (60.0, 0.8), (40.0, 0.8), (19.0, 0.6)))
    _command(["estimate", "DE", "--from", file, "--output", str(tmp_path / "new" / "e.json")])
    shown = capsys.readouterr().out
    assert "61.5000" in shown and "measured too: median error 2.5% in time" in shown and "one seed has no" in shown
    assert json.loads((tmp_path / "new" / "e.json").read_text())["curve"][0]["ms"] == pytest.approx(61.5)


def test_files_of_several_seeds_combine_where_they_fit(tmp_path, capsys):
    seeds = [written(tmp_path / f"{seed}.json", measurement("O", (100.0, 0.9), seed=seed, epochs=2),
                     measurement("D", (50.0 + seed, 0.8), seed=seed, epochs=2)) for seed in range(2)]  # fmt: skip
    _command(["estimate", "D", "--from", *seeds])
    assert "50.5000 (50.0000-51.0000)" in capsys.readouterr().out
    _command(["estimate", "D", "--from", *seeds, "--draws", "0"])
    assert "one seed" not in capsys.readouterr().out  # there are two: no intervals were asked for
    again = written(tmp_path / "again.json", measurement("D", (99.0, 0.8), seed=1, epochs=2))  # the later one counted
    with pytest.raises(ValueError, match="1.json and .*again.json both have D of seed 1: give one of the files"):
        _command(["estimate", "D", "--from", *seeds, again])
    other = written(tmp_path / "data.json", *PARTS, dev="1")
    with pytest.raises(ValueError, match="were measured on different data: they do not combine"):
        _command(["estimate", "D", "--from", seeds[0], other])
    longer = written(tmp_path / "longer.json", measurement("D", (50.0, 0.8), seed=2, epochs=9))
    with pytest.raises(ValueError, match="O was measured with epochs = 2, D with 9"):
        _command(["estimate", "D", "--from", seeds[0], longer])


@pytest.mark.parametrize(
    "fields",
    [
        {"curve": []},
        {"exit_ms": []},
        {"exit_ms": [1e6]},
        {"ms": "5"},
        {"ms": -5.0},
        {"ms": 0.0},
        {"quality": 85.0},
        {"quality": float("nan")},
        {"settings": None},
        {"seed": [1]},
        {"metric": "f1"},
        {"pipeline": "XYZ"},
        {"pipeline": "D"},
    ],
)
def test_a_measurement_that_is_none_is_named(tmp_path, fields):
    file = tmp_path / "measured.json"
    content = json.loads(Path(written(file, *PARTS)).read_text())
    content["measurements"][0] |= fields
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match="measured.json: not measurements of pipelines"):
        _command(["estimate", "D", "--from", str(file)])


@pytest.mark.parametrize(
    "content", ["[]", '{"format": 2}', '{"format": 1}', "no JSON", '{"format": 1, "measurements": [{}]}']
)
def test_a_file_that_holds_no_measurements_is_named(tmp_path, content):
    (tmp_path / "measured.json").write_text(content)
    with pytest.raises(ValueError, match="not measurements of pipelines"):
        _command(["estimate", "D", "--from", str(tmp_path / "measured.json")])
    with pytest.raises(ValueError, match="give the measurements: --from"):
        _command(["estimate", "D"])


def test_the_interval_is_that_of_a_mean_over_seeds():
    times = (30.0, 40.0, 50.0, 60.0, 70.0)
    seeds = [measurement("O", (100.0, 0.9), seed=seed) for seed in range(5)]
    seeds += [measurement("D", (ms, 0.8), seed=seed) for seed, ms in enumerate(times)]
    found = estimate_of("D", measured(*seeds), draws=2000)
    means = np.mean(np.random.default_rng(0).choice(times, (100_000, 5)), axis=1)
    expected = tuple(np.percentile(means, [2.5, 97.5]))
    assert 32 < expected[0] < 40 and (found.low[0, 0], found.high[0, 0]) == pytest.approx(expected, abs=2)


def test_under_d_the_time_of_the_first_exit_stays():
    parts = [
        measurement("O", (100.0, 0.9)),
        measurement("D", (50.0, 0.9)),
        replace(measurement("E", (100.0, 0.9)), exit_ms=[18.0, 100.0]),
    ]
    assert estimate_of("DE", measured(*parts)).curve[0, 0] == pytest.approx(18 + 82 * 0.5)


def test_one_point_that_is_far_off_does_not_move_a_median():
    first, second = (np.array([[10.0, a], [10.0, b], [10.0, 0.8]]) for a, b in ((0.9, 0.85), (0.6, 0.84)))
    assert errors(first, second)["quality"] == pytest.approx(0.01)


def test_the_tables_of_a_study():
    """Distances of one order's seeds and of two orders, without those of curves that have no time in common."""
    off = {("DE", 0): 0.0, ("DE", 1): 0.01, ("ED", 0): 0.03, ("ED", 1): 0.05}
    curves = [measurement(name, (100.0, 0.9 - by), (50.0, 0.8 - by), seed=seed) for (name, seed), by in off.items()]
    curves += [measurement("DE", (9000.0, 0.9), (8000.0, 0.8), seed=2), measurement("DES", (100.0, 0.5))]
    found = answers(measured(*curves))
    assert list(found["table_1"]) == ["D+E"] and found["table_1"]["D+E"]["orders"] == ["DE", "ED"]
    same, different = (found["table_1"]["D+E"][name] for name in ("same", "different"))
    assert same == {"mean": pytest.approx(1.5), "std": pytest.approx(0.5), "pairs": 2}
    assert different["mean"] == pytest.approx((3 + 5 + 2 + 4) / 4) and different["pairs"] == 4
    assert found["commutative"]["different_to_same"] == pytest.approx(3.5 / 1.5)


def test_what_l_and_q_save():
    """Of the time of the pipeline that they are put on; the difference of quality is paired over seeds."""
    times = {"O": 100.0, "D": 50.0, "L": 40.0, "Q": 60.0, "LQ": 20.0, "DL": 25.0, "DQ": 30.0, "DLQ": 10.0}
    quality = {"O": 0.8, "D": 0.7, "Q": 0.78, "DQ": 0.63}
    parts = [
        replace(measurement(name, (ms, quality.get(name, 0.75) + 0.1 * seed), seed=seed), doubled_ms=200.0)
        for name, ms in times.items()
        for seed in range(2)
    ]
    parts.append(measurement("Q", (60.0, 0.1), seed=2))  # a seed that O has not
    found = answers(measured(*parts))
    with_d, against = found["table_2"]["D"], found["against_O"]["LQ"]
    assert [with_d[f"saved_{top}"] for top in ("Q", "L", "LQ")] == pytest.approx([0.4, 0.5, 0.8])
    assert with_d["estimated_LQ"] == pytest.approx(1 - 0.4 * 0.6)
    assert with_d["relative_change_with_Q"] == pytest.approx(-0.07 / 0.75)
    assert with_d["difference_to_O"]["mean"] == pytest.approx(-0.1)
    assert with_d["difference_with_Q"]["mean"] == pytest.approx(-0.07)
    assert found["table_2"]["O"]["difference_with_Q"] == pytest.approx(
        {"mean": -0.02, "seeds": 2, "low": -0.02, "high": -0.02}
    )
    assert (against["saved"], against["saved_of_doubled"]) == (pytest.approx(0.8), pytest.approx(0.9))
    assert "L" not in found["figure_4"] and "DL" in found["figure_4"]


def test_an_interval_over_seeds_is_students():
    found = interval([1.0, 2.0, 3.0])
    assert (found["mean"], found["seeds"]) == (2.0, 3)
    assert (found["low"], found["high"]) == pytest.approx((2 - 4.3027 / 3**0.5, 2 + 4.3027 / 3**0.5), abs=1e-3)
    assert interval([1.0]) == {"mean": 1.0, "seeds": 1}


def test_of_points_at_one_time_the_best_counts():
    steps = np.array([[0.0, 0.0], [5.0, 0.5], [5.0, 0.2], [10.0, 1.0]])
    line = np.array([[0.0, 0.0], [10.0, 1.0]])
    assert curve_distance(line, steps) == pytest.approx(0.0)


def test_what_does_not_combine_is_named(tmp_path):
    """Curves of other thresholds over the seeds; files of other settings, machines or metrics."""
    first = measurement("E", (100.0, 0.9), (50.0, 0.8))
    other = replace(first, seed=1, curve=[first.curve[0], replace(first.curve[1], threshold=0.5)])
    with pytest.raises(ValueError, match="curves of E were measured at different thresholds"):
        estimate_of("E", measured(measurement("O", (100.0, 0.9)), first, other))
    one = written(tmp_path / "one.json", measurement("O", (100.0, 0.9)))
    for name, value in (("settings", {"max_length": 9}), ("machine", "another"), ("metric", "f1")):
        more = replace(measurement("D", (50.0, 0.8)), metric="f1" if name == "metric" else "accuracy")
        with pytest.raises(ValueError, match=f"were measured on different {name}"):
            read_parts([one, written(tmp_path / "more.json", more, **{name: value})])


def test_the_seed_of_the_resampling_counts():
    seeds = [measurement("O", (100.0, 0.9), seed=seed) for seed in range(4)]
    seeds += [measurement("D", (40.0 + seed**2, 0.8), seed=seed) for seed in range(4)]
    first, again, other = (estimate_of("D", measured(*seeds), draws=9, seed=seed) for seed in (0, 0, 1))
    assert first.low[0, 0] == again.low[0, 0] != other.low[0, 0]
    assert estimate_of("DP", measured(*seeds, PARTS[2]), draws=9).low is None  # P has one seed


def test_an_estimate_keeps_what_was_measured_too(tmp_path):
    file = written(tmp_path / "measured.json", *PARTS, measurement("DP", (40.0, 0.7)))
    _command(["estimate", "DP", "--from", file, "--output", str(tmp_path / "e.json")])
    found = json.loads((tmp_path / "e.json").read_text())
    assert found["measured"] == [{"ms": 40.0, "quality": 0.7}]
    with pytest.raises(ValueError, match="measured.json would replace that file, which is read"):
        _command(["estimate", "DP", "--from", file, "--output", file])


def test_a_figure_tells_distances_in_points():
    parts = [*PARTS, measurement("DE", (61.5, 0.8), (39.0, 0.88 * 0.8 / 0.9 - 0.02), (19.0, 0.7 * 0.8 / 0.9))]
    assert answers(measured(*parts))["figure_4"]["DE"]["distance"] == pytest.approx(2.0)
