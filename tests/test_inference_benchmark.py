"""The benchmark of serving: systems answer the same rows in turn, and a run that was cut off goes on."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from benchmarks.load import threads_alike
from benchmarks.systems import era_rows
from elastic_model import ElasticBertForSequenceClassification
from export.config import ExportOptions
from export.write import export_checkpoint

ROOT = Path(__file__).parent.parent


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tiny_config, tiny_tokenizer, tmp_path):
    checkpoint = tmp_path / "era"
    tiny_config.id2label = dict(enumerate(sorted(set(era_rows("train")[1]))))
    ElasticBertForSequenceClassification(tiny_config).save_pretrained(checkpoint)
    tiny_tokenizer.save_pretrained(checkpoint)
    export_checkpoint(ExportOptions(checkpoint, tmp_path / "exported"))
    command = [sys.executable, "-m", "benchmarks.inference", str(tmp_path / "results"), "--max_length", "40"]
    command += ["--task", "era", "--max_rows", "6", "--train_rows", "60"]
    for name, value in [("checkpoint", checkpoint), ("exported", tmp_path / "exported")]:
        command += [f"--{name}", str(value)]
    command += ["--threads", "1", "--batch_sizes", "2", "--systems", "ours-int8", "words=tfidf", "cascade"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "results/summary.json").read_text())["systems"]
    assert [one["system"] for one in summary] == ["ours-int8", "words", "cascade"]
    assert summary[0]["difference"] == {"value": 0, "low": 0, "high": 0} and summary[0]["file_mib"] > 0
    assert all(0 <= one["low"] <= one["quality"] <= one["high"] <= 1 for one in summary)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("0.json")}
    gone = next(path for path in kept if "words" in str(path))
    gone.unlink()
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    assert gone.exists() and (tmp_path / "results/summary.png").exists()
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept if path != gone)
    other = subprocess.run([*command, "--max_rows", "5"], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode == 2 and "holds answers to other test rows" in other.stderr
    other = subprocess.run([*command, "--max_length", "30"], capture_output=True, text=True, cwd=ROOT)
    assert other.returncode == 2 and "holds answers of another max_length" in other.stderr


def test_a_thread_that_fails_is_no_good_answer():
    """What it raised was lost with it."""

    class Failing:
        layers = 4

        def __call__(self, texts, **options):
            if threading.current_thread() is not threading.main_thread():
                raise RuntimeError("lost")
            return [{"label": "a", "exit_layer": 4}] * len(texts)

    with pytest.raises(RuntimeError, match="lost"):
        threads_alike(Failing(), ["a"] * 200, minutes=0.001)


@pytest.mark.slow
def test_answers_under_load_are_those_of_one_row(tiny_checkpoint, tmp_path):
    export_checkpoint(ExportOptions(tiny_checkpoint, tmp_path / "exported"))
    (tmp_path / "rows.txt").write_text("\n".join(era_rows("dev")[0][:70]) + "\n")
    command = [sys.executable, "-m", "benchmarks.load", str(tmp_path / "exported"), "--input", tmp_path / "rows.txt"]
    command += ["--minutes", "0.05", "--thread_minutes", "0.05", "--output", tmp_path / "load.json"]
    done = subprocess.run(command, cwd=ROOT)
    assert done.returncode == 0
    found = json.loads((tmp_path / "load.json").read_text())
    assert found["threads"]["rows"] > 0 == found["threads"]["wrong"] and found["mixed_load"]["batches"] > 0
    float32 = [found[f"batches, model, {tokens} tokens"] for tokens in ("all", "fewer")]
    assert [one["same_label_and_exit_layer"] for one in float32] == [1.0, 1.0]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0 and not done.stdout and json.loads((tmp_path / "load.json").read_text()) == found
