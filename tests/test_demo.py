"""The demo's own parts: stages that are not run twice and go on where they stopped, and the numbers it states."""

import json
import sys

import pytest

from benchmarks import demo, systems
from elastic_model.arguments import run

STAGE = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(exist_ok=True)
with (folder / "log").open("a") as log:
    log.write(sys.argv[2])
sys.exit(3 if (folder.parent / "broken").exists() else 0)
"""


@pytest.fixture
def stage(tmp_path):
    """Runs a stage that adds a letter to its log, and fails while there is a file `broken`; gives the log."""

    def run(letter: str) -> str:
        command = [sys.executable, "-c", STAGE, str(tmp_path / "made"), letter]
        demo.run_stage(tmp_path, "stage", "made", command, before="")
        return (tmp_path / "made/log").read_text()

    return run


def test_a_finished_stage_is_not_run_again(stage):
    assert stage("a") == "a"
    assert stage("a") == "a"


def test_a_stage_with_another_command_starts_from_nothing(stage):
    assert stage("a") == "a"
    assert stage("b") == "b"


def test_a_stage_that_failed_goes_on_in_its_folder(stage, tmp_path):
    (tmp_path / "broken").touch()
    with pytest.raises(demo.StageError, match="exit code 3"):
        stage("a")
    assert json.loads((tmp_path / "stage.json").read_text())["seconds"] is None
    (tmp_path / "broken").unlink()
    assert stage("a") == "aa"


def test_a_stage_depends_on_the_recipes_it_names_and_the_stages_before(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    recipe = tmp_path / "pretrain/recipe.yaml"
    recipe.parent.mkdir()
    recipe.write_text("steps: 1\n")
    command = ["python", "--config", "pretrain/recipe.yaml"]
    first = demo.fingerprint(command, "")
    assert first == demo.fingerprint(command, "")
    assert first != demo.fingerprint(command, "another")
    recipe.write_text("steps: 2\n")
    assert first != demo.fingerprint(command, "")


def test_a_folder_of_someone_else_is_left_alone(tmp_path, monkeypatch, capsys):
    (tmp_path / "thesis.tex").touch()
    monkeypatch.setattr(sys, "argv", ["demo", "--folder", str(tmp_path)])
    assert run(demo.main) == 2
    assert capsys.readouterr().err.startswith("error: output folder ")
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.tex"]


def test_wilson_interval_has_its_known_ends():
    """81 of 263: the worked example of Newcombe 1998, table I, method 3."""
    assert demo.wilson(81, 263) == pytest.approx((0.2553, 0.3662), abs=5e-5)
    assert demo.wilson(0, 20)[0] == pytest.approx(0, abs=1e-12)


def test_the_bag_of_words_is_served_from_a_process_of_its_own(tmp_path):
    system = systems.Served("bag", ["benchmarks.systems", "bag of words, logistic regression", str(tmp_path), "1"], 1)
    answer = system.ask(10, 74, batch_size=32)
    system.close()
    labels = systems.era_rows("test")[1][10:74]
    assert demo.scored(answer["labels"], labels)["accuracy"] > 0.5
    assert len(answer["ms"]) == 64 and min(answer["ms"]) > 0
    assert 20 < answer["peak_mib"] < 2000
    assert system.process.returncode == 0


def test_the_plot_and_the_table_show_what_was_measured(tmp_path):
    row = {"accuracy": 0.75, "low": 0.7, "high": 0.8, "mean_exit_layer": 1.5, "p50_ms": 1.0, "p95_ms": 2.0}
    row |= {"batch_ms": 0.5, "peak_mib": 99.0, "left_at": {"1": 60, "2": 40}}
    results = {
        "machine": {"cpu": "a CPU", "threads": 2},
        "pretraining": {"mlm_loss": {"1": 5.5, "2": 5.25}, "unigram_loss": 6.5},
        "passages": 100,
        "majority": {"accuracy": 0.25, "low": 0.2, "high": 0.3},
        "systems": [{**row, "name": name} for name in systems.SYSTEMS],
        "exits": [{**row, "layer": layer} for layer in (1, 2)],
        "seconds": {"pretrain": 1.0},
        "checkpoint_sha256": "abc",
    }
    text = "\n".join(demo.table(results))
    assert "1.25 better" in text and "75.0 % (70.0-80.0)" in text and "60 leave" in text
    demo.plot(results, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
