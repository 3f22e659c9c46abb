"""The experiments on real data: what they compute from answers, and that their jobs are kept."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from benchmarks import pipelines
from benchmarks.exits import common_range, curve_area
from benchmarks.experiment import Job, run_chains
from benchmarks.non_inferiority import lower_bound_over_seeds
from finetune.metrics import paired_bootstrap
from finetune.pipelines.measure import Measurement, Point

ROOT = Path(__file__).parent.parent


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


def test_jobs_end_with_the_experiment_that_is_ended(tmp_path):
    job = "Job('endless', ('http.server', '0', '--bind', '127.0.0.1'), (Path('never'),), 0.0)"
    program = f"from pathlib import Path; from benchmarks.experiment import *; run_chains([[{job}]], Path('.'), 1)"
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", program]
    own = {"cwd": tmp_path, "env": environment, "start_new_session": True, "stdout": subprocess.PIPE, "text": True}
    running = subprocess.Popen(command, **own)
    assert "endless: begins" in running.stdout.readline()
    time.sleep(1)  # the job is there
    running.terminate()
    assert running.wait(30) == 143
    with pytest.raises(ProcessLookupError):
        os.killpg(running.pid, 0)


def _measured(pipeline: str, seed: int, ms: float, quality: float) -> dict:
    """As a seed of the study measures a pipeline; with E it has a curve of two points."""
    points = [Point(None, quality, ms, 1e6, 6.0)]
    if "E" in pipeline:
        points.append(Point(0.9, quality - 0.01, ms / 2, 5e5, 3.0))
    own = {"quality": quality, "full_quality": quality, "ms": ms, "flops": 1e6, "mean_exit_layer": 6.0}
    own |= {"parameters": 1, "bytes": 1, "exit_ms": [ms / 6], "doubled_ms": None, "curve": points, "settings": {}}
    return Measurement(pipeline, seed, "hash", "accuracy", **own).to_dict()


def test_seeds_of_pipelines_measured_before_are_taken_as_they_are(tmp_path, monkeypatch, capsys):
    """No stage of theirs is there any more: nothing is trained, and the tables are of both seeds."""
    times = {"O": 8.0, "D": 4.0, "E": 9.0, "DE": 5.0, "L": 2.0, "Q": 4.0, "LQ": 0.4, "ESLQ": 0.2}
    one = pipelines.Experiment("sst2", pipelines.SIZES["sst2"], tmp_path)
    pruned = {"not trained": {"at_once": 60.0, "in_rounds": 62.0}, "trained": {"at_once": 80.0, "in_rounds": 81.0}}
    for seed in (0, 1):
        found = [_measured(name, seed, ms, 0.8 + 0.01 * seed) for name, ms in times.items()]
        content = {"format": 1, "task": "sst2", "metric": "accuracy", "dev": "hash", "settings": {}, "machine": "x"}
        content |= {"measurements": found, "rows": {"train": 5, "dev": 5}, "pruning": pruned}
        content |= {"run": {"load_before": 0.0}}
        file = one.measured(tmp_path / "results.json", seed)
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(content))
    monkeypatch.setenv("ELASTIC_MODEL_DATA", str(tmp_path))
    command = ["pipelines", "--tasks", "sst2", "--seeds", "0", "1", "--folder", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", [*command, "--output", str(tmp_path / "results.json")])
    pipelines.experiment()
    found = json.loads((tmp_path / "results.json").read_text())["tasks"]["sst2"]
    assert found["seeds"] == [0, 1]
    assert found["bars"]["LQ saves of O's time"] == {"found": pytest.approx(0.95), "at_least": 0.94, "met": True}
    assert found["pruning"]["trained"]["difference"]["mean"] == pytest.approx(1)
    assert (tmp_path / "results-sst2-curves.png").exists() and "seeds 0, 1" in capsys.readouterr().out
