"""The benchmark of serving: systems answer the same rows in turn, and a run that was cut off goes on."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from export.config import ExportOptions
from export.write import export_checkpoint

ROOT = Path(__file__).parent.parent
TEXTS = ["A treaty of commerce was signed in the spring.", "Our people are strong.", "The debt has been reduced."]


@pytest.mark.slow
def test_a_run_that_was_cut_off_goes_on(tiny_checkpoint, tmp_path):
    export_checkpoint(ExportOptions(tiny_checkpoint, tmp_path / "exported"))
    rows = "".join(f"{text}\t{label}\n" for text, label in zip(TEXTS * 2, ["early", "late"] * 3, strict=True))
    (tmp_path / "rows.tsv").write_text(f"text\tlabel\n{rows}")
    command = [sys.executable, "-m", "benchmarks.inference", str(tmp_path / "results"), "--max_length", "40"]
    for name, value in [("checkpoint", tiny_checkpoint), ("exported", tmp_path / "exported")]:
        command += [f"--{name}", str(value)]
    for name in ("train", "test"):
        command += [f"--{name}", str(tmp_path / "rows.tsv")]
    command += ["--threads", "1", "--batch_sizes", "2", "--systems", "ours-int8", "tfidf", "cascade"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    summary = json.loads((tmp_path / "results/summary.json").read_text())
    assert [one["system"] for one in summary] == ["ours-int8", "tfidf", "cascade"]
    assert all(0 <= one["low"] <= one["accuracy"] <= one["high"] <= 1 for one in summary)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "results").rglob("0.json")}
    gone = next(path for path in kept if "tfidf" in str(path))
    gone.unlink()
    assert subprocess.run(command, capture_output=True, cwd=ROOT).returncode == 0
    assert gone.exists() and (tmp_path / "results/summary.png").exists()
    assert all(path.stat().st_mtime_ns == kept[path] for path in kept if path != gone)
