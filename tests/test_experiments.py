"""The experiments on real data: what they compute from answers, and that their jobs are kept."""

import numpy as np
import pytest

from benchmarks.exits import common_range, curve_area
from benchmarks.experiment import Job, run_chains
from benchmarks.non_inferiority import lower_bound_over_seeds
from finetune.metrics import paired_bootstrap


def test_area_under_a_curve_is_its_mean_quality():
    assert curve_area([(1, 0.5), (3, 0.9)], 1, 3) == pytest.approx(0.7)
    assert curve_area([(3, 0.9), (1, 0.5), (2, 0.9)], 1.5, 3) == pytest.approx((0.25 * 1.6 + 0.9) / 1.5)
    assert curve_area([(1, 0.8), (6, 0.8)], 2, 4) == pytest.approx(0.8)


def test_curves_are_compared_where_all_of_them_are():
    assert common_range([[(1, 0.5), (6, 0.9)], [(2.5, 0.6), (5, 0.8)]]) == (2.5, 5)


def test_equal_answers_never_differ_and_a_better_model_is_bounded_from_below():
    labels = np.array([0, 1] * 200)
    worse = labels.copy()
    worse[:40] = 1 - worse[:40]
    assert not paired_bootstrap("accuracy", [worse, worse], [worse, worse], labels, 1000).any()
    drawn = paired_bootstrap("accuracy", [labels, labels], [worse, worse], labels, 1000)
    assert 0.05 < np.quantile(drawn, 0.05) < drawn.mean() == pytest.approx(0.1, abs=0.005)


def test_pairing_narrows_the_interval():
    """Rows that both get wrong cancel: two models of 70 % that differ on 2 rows of 400 are known to be alike."""
    labels = np.zeros(400, dtype=int)
    ours = (np.arange(400) < 120).astype(int)
    theirs = ours.copy()
    theirs[118:120] = 0
    drawn = paired_bootstrap("accuracy", [ours], [theirs], labels, 1000)
    assert drawn.mean() == pytest.approx(-0.005, abs=0.001)
    assert np.quantile(drawn, 0.05) > -0.02


def test_the_bound_over_seeds_is_students():
    assert lower_bound_over_seeds([1.0, 2.0, 3.0]) == pytest.approx(2 - 2.920 / 3**0.5, abs=1e-3)
    assert lower_bound_over_seeds([1.0]) is None


def test_a_job_that_is_done_is_kept_and_one_that_fails_ends_the_run_with_its_log(tmp_path, capfd):
    source, target, never = tmp_path / "source.json", tmp_path / "target.json", tmp_path / "never"
    source.write_text("{}")
    copying = Job("copying", ("json.tool", str(source), str(target)), (target,), 0.0)
    run_chains([[copying]], tmp_path, workers=2)
    source.write_text("[]")
    run_chains([[copying]], tmp_path, workers=2)
    assert target.read_text() == "{}\n"
    failing = Job("failing", ("json.tool", str(never)), (never,), 0.0)
    after = Job("after", ("json.tool", str(source), str(tmp_path / "after")), (tmp_path / "after",), 0.0)
    with pytest.raises(ValueError, match="failing ended with exit code"):
        run_chains([[failing, after]], tmp_path, workers=1)
    assert not (tmp_path / "after").exists()


def test_jobs_are_ended_when_the_time_is_over(tmp_path, capfd):
    endless = Job("endless", ("http.server", "0", "--bind", "127.0.0.1"), (tmp_path / "never",), 0.0)
    assert not run_chains([[endless]], tmp_path, workers=1, minutes=0.02)
    assert "0.02 minutes are over; the same command goes on" in capfd.readouterr().out
