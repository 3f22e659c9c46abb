"""`elue run` from a starting checkpoint to the leaderboard, on two small tasks with a signal."""

import gzip
import json
import random
import re

import numpy as np
import pytest

from elastic_model.arguments import run
from finetune.__main__ import _command
from finetune.elue.methods import METHODS
from finetune.elue.scoring import elue_score, read_result
from finetune.tasks import DATA_VARIABLE

WORDS = {"0": "treaty harvest revenue", "1": "energy Congress medicine"}
NOISE = "the of and to every country people this year our".split()


def _sentence(draw, label):
    words = draw.choices(WORDS[label].split(), k=3) + draw.choices(NOISE, k=draw.randint(2, 9))
    return " ".join(draw.sample(words, len(words)))


def _sentiment(rows, seed):
    draw = random.Random(seed)
    lines = [f"{_sentence(draw, label)}\t{label}" for label in draw.choices("01", k=rows)]
    return "\n".join(["sentence\tlabel", *lines, "the treaty\t0", "this medicine\t1"]) + "\n"


def _similarity(rows, seed):
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        first, second = draw.choice("01"), draw.choice("01")
        score = 5.0 * (first == second) + draw.uniform(-0.1, 0.1)
        lines.append(f"g\tf\ty\ti\t{score:.2f}\t{_sentence(draw, first)}\t{_sentence(draw, second)}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def data(tmp_path, monkeypatch):
    """A folder of local data sets with small splits of SST-2 and STS-B."""
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "stsb").mkdir()
    for seed, (split, rows) in enumerate({"train": 90, "dev": 30, "test": 40}.items()):
        (tmp_path / "data" / "sst2" / f"{split}.tsv").write_text(_sentiment(rows, seed))
        (tmp_path / "data" / "stsb" / f"sts-{split}.csv").write_text(_similarity(rows, seed))
    train = tmp_path / "data" / "sst2" / "train.tsv"
    (tmp_path / "data" / "sst2" / "train.tsv.gz").write_bytes(gzip.compress(train.read_bytes()))
    monkeypatch.setenv(DATA_VARIABLE, str(tmp_path / "data"))
    return tmp_path


@pytest.fixture(scope="session")
def start(tmp_path_factory, tiny_tokenizer):
    """A checkpoint without a head, from random weights."""
    import torch

    from elastic_model import ElasticBertConfig, ElasticBertModel

    folder = tmp_path_factory.mktemp("elue") / "start"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ElasticBertModel(ElasticBertConfig(vocab_size=200, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


SHORT = ["--epochs", "1", "--max-length", "32", "--batch_size", "16", "--learning-rate", "3e-3", "--points", "4"]


def elue(folder, model, *flags):
    """The exit code of `elue run`; a flag that is given twice counts the last time."""
    own = ["--model", str(model), "--output", str(folder / "run"), *SHORT]
    return run(lambda: _command(["elue", "run", *own, *flags]))


def test_from_checkpoint_to_leaderboard(data, start, capsys):
    flags = ["--tasks", "sst2", "STS-B", "--methods", "elasticbert", "elasticbert-entropy", "elastic"]
    sizes = ["--test-rows", "20", "--seeds", "0", "stsb=0,1", "--shares", "1.0", "0.7"]
    assert elue(data, start, *flags, *sizes) == 0
    printed = capsys.readouterr().out
    board = json.loads((data / "run" / "leaderboard.json").read_text())
    entries = {entry["name"]: entry for entry in board["entries"]}
    assert board["test_rows"] == {"sst2": 20, "stsb": 20} and board["reference"] == "elasticbert"
    assert entries["elasticbert"]["macro"] == 0.0
    assert entries["elasticbert-entropy"]["macro"] is None and "stsb" not in entries["elasticbert-entropy"]["tasks"]
    assert entries["elastic"]["tasks"]["stsb"]["seeds"] == 2
    assert "warning: SST-2 is scored on 20 test rows" in printed and "2 seeds" in printed

    reference = read_result(data / "run" / "results" / "elasticbert.json").tasks["sst2"].points
    assert [point.name for point in reference] == ["exit_1", "exit_2", "exit_3"]
    for name in ("elasticbert-entropy", "elastic"):
        points = read_result(data / "run" / "results" / f"{name}.json").tasks["sst2"].points
        assert entries[name]["tasks"]["sst2"]["score"] == pytest.approx(elue_score(points, reference))
        assert [point.name for point in points] == ["point_1", "point_2", "point_3", "point_4"]
        assert np.all(np.diff([point.flops for point in points]) >= 0)

    # a second call makes nothing again; the test files are a submission that `score` reads like any other
    files = {path: path.stat().st_mtime_ns for path in (data / "run" / "checkpoints").rglob("*") if path.is_file()}
    assert elue(data, start, *flags, *sizes) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    capsys.readouterr()
    own = ["--submission", str(data / "run/submissions/elastic/seed-0"), "--labels", str(data / "run" / "labels")]
    out = ["--output", str(data / "scored")]
    assert run(lambda: _command(["elue", "score", *own, *out])) == 0
    first = read_result(data / "run" / "results" / "elastic.json").tasks["sst2"].points
    assert read_result(data / "scored").tasks["sst2"].points == first

    # a checkpoint instead of fine-tuning, under any policy
    taken = str(data / "run/checkpoints/elasticbert/sst2/seed-0")
    flags = ["--tasks", "sst2", "--test-rows", "20", "--checkpoints", f"sst2={taken}", "--methods", "elasticbert"]
    assert run(lambda: _command(["elue", "--output", str(data / "taken"), "--max-length", "32", *flags])) == 0
    again = read_result(data / "taken" / "results" / "elasticbert.json").tasks["sst2"].points
    assert again == reference


@pytest.mark.slow
def test_every_method(data, start):
    """Each on the tasks it is made for."""
    assert elue(data, start, "--tasks", "sst2", "stsb", "--methods", "all", "--seeds", "0") == 0
    board = json.loads((data / "run" / "leaderboard.json").read_text())
    tasks = {entry["name"]: set(entry["tasks"]) for entry in board["entries"]}
    assert set(tasks) == set(METHODS)
    classes_only = {"elasticbert-entropy", "deebert", "fastbert", "voting"}
    assert {name for name, found in tasks.items() if found == {"sst2"}} == classes_only
    depths = next(entry for entry in board["entries"] if entry["name"] == "static")["tasks"]["sst2"]["points"]
    assert [point["name"] for point in depths] == ["layers_1", "layers_2", "layers_3"]
    assert len({point["parameters"] for point in depths}) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "deebrt"], "method 'deebrt' is unknown; allowed: elasticbert, "),
        (["--tasks", "cola"], "'cola' is not a task of ELUE; its tasks: sst2, imdb"),
        (["--tasks", "mrpc"], "msr_paraphrase_test.txt: No such file"),
        (["--train-rows", "sst2=many"], "--train-rows: expected a whole number from 1 for sst2, got 'many'"),
        (["--seeds", "0", "0"], "--seeds: expected whole numbers, each once, for sst2, got '0,0'"),
        (["--epochs", "1", "2"], "--epochs: expected one value for all tasks, got 1 2"),
        (["--shares", "1.5"], r"shares must lie in \(0, 1\], got \[1.5\]"),
        (["--depths", "9", "--methods", "static"], "depths must be 1 to 3, the layers of"),
        (["--data", "sst2"], "--data: expected TASK=FOLDER, got 'sst2'"),
        (["--reference", "nowhere.json"], "nowhere.json: No such file"),
        (["--points", "0"], "points must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named_before_any_work(data, start, capsys, flags, message):
    tasks = [] if "--tasks" in flags else ["--tasks", "sst2"]
    assert elue(data, start, *tasks, *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (data / "run").exists()


def test_a_model_is_needed_where_no_checkpoint_is_given(data, capsys):
    assert run(lambda: _command(["elue", "run", "--tasks", "sst2", "--output", str(data / "run")])) == 2
    assert "--model is required: --checkpoints has none for sst2" in capsys.readouterr().err
