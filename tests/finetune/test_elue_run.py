"""`elue run` from a starting checkpoint to the leaderboard, on two small tasks with a signal."""

import json
import re
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
from transformers import AutoTokenizer

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification, ElasticBertModel
from elastic_model.arguments import run
from elastic_model.folders import MARKER
from elastic_model.provenance import read_provenance
from finetune.__main__ import _command
from finetune.data import Encoded
from finetune.elue import points
from finetune.elue import run as elue_run
from finetune.elue.config import RunOptions
from finetune.elue.jobs import jobs_of
from finetune.elue.methods import METHODS, Setting
from finetune.elue.points import Subject, write_point
from finetune.elue.scoring import Point, Result, TaskResult, elue_score, read_result, write_result
from finetune.explore import Observed
from finetune.labels import Labels, encode_labels

SHORT = ["--epochs", "1", "--max-length", "32", "--batch_size", "16", "--learning-rate", "3e-3", "--points", "4"]


def elue(folder, model, *flags):
    """The exit code of `elue run`; a flag that is given twice counts the last time."""
    own = ["--model", str(model), "--output", str(folder / "run"), *SHORT]
    return run(lambda: _command(["elue", "run", *own, *flags]))


def test_from_checkpoint_to_leaderboard(elue_data, elue_start, capsys):
    flags = ["--tasks", "SST-2", "--methods", "elasticbert,elasticbert-entropy", "elastic"]
    sizes = ["--test-rows", "20", "--seeds", "0", "--shares", "1.0", "0.7"]
    assert elue(elue_data, elue_start, *flags, *sizes) == 0
    printed = capsys.readouterr().out
    board = json.loads((elue_data / "run" / "leaderboard.json").read_text())
    entries = {entry["name"]: entry for entry in board["entries"]}
    assert board["test_rows"] == {"sst2": 20} and board["reference"] == "elasticbert"
    assert re.search("1 epoch a phase, .* learning rate 0.003, from weights [0-9a-f]{12}, 32 tokens", printed)
    assert entries["elasticbert"]["macro"] == 0.0
    assert "warning: SST-2 is scored on 20 test rows" in printed and "20 test rows, 1 seed" in printed

    reference = read_result(elue_data / "run" / "results" / "elasticbert.json").tasks["sst2"].points
    assert [point.name for point in reference] == ["exit_1", "exit_2", "exit_3"]
    for name in ("elasticbert-entropy", "elastic"):
        points = read_result(elue_data / "run" / "results" / f"{name}.json").tasks["sst2"].points
        assert entries[name]["tasks"]["sst2"]["score"] == pytest.approx(elue_score(points, reference))
        assert 1 <= len({point.name for point in points}) == len(points) <= 4
        assert np.all(np.diff([point.flops for point in points]) >= 0)

    # ours goes on where the reference ended, and learns from it
    first, last = read_provenance(elue_data / "run" / "checkpoints" / "elastic" / "sst2" / "seed-0")[-2:]
    assert (first.settings["recipe"], last.settings["recipe"]) == ("joint", "sandwich")
    assert last.settings["phase_epochs"][0] == 0 and last.settings["teacher"] is not None

    # a second call makes nothing again; the test files are a submission that `score` reads like any other
    files = {
        path: path.stat().st_mtime_ns for path in (elue_data / "run" / "checkpoints").rglob("*") if path.is_file()
    }
    assert elue(elue_data, elue_start, *flags, *sizes) == 0
    assert {path: path.stat().st_mtime_ns for path in files} == files
    capsys.readouterr()
    own = [
        "--submission",
        str(elue_data / "run/submissions/elastic/seed-0"),
        "--labels",
        str(elue_data / "run" / "labels"),
    ]
    out = ["--output", str(elue_data / "scored")]
    assert run(lambda: _command(["elue", "score", *own, *out])) == 0
    first = read_result(elue_data / "run" / "results" / "elastic.json").tasks["sst2"].points
    assert read_result(elue_data / "scored").tasks["sst2"].points == first

    # a checkpoint instead of fine-tuning, under any policy
    taken = str(elue_data / "run/checkpoints/elasticbert/sst2/seed-0")
    flags = [
        "--tasks",
        "sst2",
        "--test-rows",
        "20",
        "--checkpoints",
        f"sst2={taken}",
        "--methods",
        "elasticbert",
        "deebert",
        "layerdrop",
    ]
    assert run(lambda: _command(["elue", "--output", str(elue_data / "taken"), "--max-length", "32", *flags])) == 0
    again = read_result(elue_data / "taken" / "results" / "elasticbert.json").tasks["sst2"].points
    assert again == reference
    note = read_result(elue_data / "taken" / "results" / "deebert.json").note
    assert note == "Xin et al. 2020; a checkpoint as it was given; entropy"  # it was said to be trained in two stages
    assert len(read_result(elue_data / "taken" / "results" / "layerdrop.json").tasks["sst2"].points) == 3

    # another task, later, into the same folder: the leaderboard has both; at other sizes the earlier ones are left out
    other = elue_data / "run" / "results" / "elastic.json"
    written = other.stat().st_mtime_ns
    assert elue(elue_data, elue_start, "--tasks", "stsb", "--seeds", "0", "--methods", "elasticbert") == 0
    assert other.stat().st_mtime_ns == written
    board = json.loads((elue_data / "run" / "leaderboard.json").read_text())
    assert board["tasks"] == ["sst2", "stsb"] and len(board["entries"]) == 3 and len(board["notes"]) == 2
    assert {entry["name"] for entry in board["entries"] if "sst2" in entry["tasks"]} == set(entries)
    results = [str(file) for file in sorted((elue_data / "run" / "results").glob("*.json"))]
    capsys.readouterr()
    flags = ["--reference", str(elue_data / "run/results/elasticbert.json"), "--results", *results]
    assert run(lambda: _command(["elue", "leaderboard", *flags])) == 0
    assert "\n".join(board["notes"]) in capsys.readouterr().out
    capsys.readouterr()
    flags = ["--tasks", "sst2", "--checkpoints", f"sst2={taken}", "--methods", "elasticbert"]
    # on other test rows the submissions that lie there could be scored no more: their labels would be gone
    labels = (elue_data / "run" / "labels" / "sst2.tsv").read_text()
    assert elue(elue_data, elue_start, *flags, "--test-rows", "10") == 2
    assert "has the labels of other test rows of sst2" in capsys.readouterr().err
    assert (elue_data / "run" / "labels" / "sst2.tsv").read_text() == labels
    assert elue(elue_data, elue_start, *flags, "--test-rows", "20") == 0
    board = json.loads((elue_data / "run" / "leaderboard.json").read_text())
    assert board["test_rows"] == {"sst2": 20, "stsb": 40} and [one["name"] for one in board["entries"]] == [
        "elasticbert"
    ]
    assert "elastic.json: SST-2 was run at other sizes (SST-2: " in capsys.readouterr().out

    flags = ["--tasks", "stsb", "--checkpoints", f"stsb={taken}", "--output", str(elue_data / "other")]
    capsys.readouterr()
    assert run(lambda: _command(["elue", "run", "--max-length", "32", *flags])) == 2
    assert "answers negative, positive; stsb asks a number" in capsys.readouterr().err


@pytest.mark.slow
def test_every_method(elue_data, elue_start):
    """Each on the tasks it is made for."""
    assert elue(elue_data, elue_start, "--tasks", "sst2,stsb", "--methods", "all", "--seeds", "0") == 0
    board = json.loads((elue_data / "run" / "leaderboard.json").read_text())
    tasks = {entry["name"]: set(entry["tasks"]) for entry in board["entries"]}
    assert set(tasks) == set(METHODS)
    classes_only = {"elasticbert-entropy", "deebert", "fastbert", "voting"}
    assert {name for name, found in tasks.items() if found == {"sst2"}} == classes_only
    macros = {entry["name"]: entry["macro"] for entry in board["entries"]}
    assert macros["elasticbert"] == 0.0 and {name for name, macro in macros.items() if macro is None} == classes_only
    depths = next(entry for entry in board["entries"] if entry["name"] == "static")["tasks"]["sst2"]["points"]
    assert [point["name"] for point in depths] == ["layers_1", "layers_2", "layers_3"]
    assert len({point["parameters"] for point in depths}) == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--methods", "deebrt"], "method 'deebrt' is unknown; allowed: elasticbert, "),
        (["--tasks", "cola"], "'cola' is not a task of ELUE; its tasks: sst2, imdb"),
        (["--tasks", "mrpc"], "task 'mrpc' has no test split"),
        (["--learning-rate", "sst2=fast"], "--learning-rate: expected a number above 0 for sst2, got 'fast'"),
        (["--learning-rate", "inf"], "--learning-rate: expected a number above 0 for sst2, got 'inf'"),
        (["--train-rows", "sst2=many"], "--train-rows: expected a whole number from 1 for sst2, got 'many'"),
        (["--seeds", "0", "0"], "--seeds: expected whole numbers, each once, for sst2, got '0,0'"),
        (["--epochs", "1", "2"], "--epochs: expected one value for all tasks, got 1 2"),
        (["--shares", "1.5"], r"shares must lie in \(0, 1\], got \[1.5\]"),
        (["--depths", "9", "--methods", "static"], "depths must be 1 to 3, the layers of"),
        (["--data", "sst2"], "--data: expected TASK=FOLDER, got 'sst2'"),
        (["--reference", "nowhere.json"], "nowhere.json: No such file"),
        (["--points", "0"], "points must be at least 1, got 0"),
        (["--max-length", "sst2=9999"], "sst2: max_length must be 3 to "),
        (["--train-rows", "sst2=5"], r"5 train rows of sst2, fewer than a batch"),
        (["--test-rows", "1"], "sst2: the 1 test rows drawn have one label only; give more --test-rows"),
    ],
)
def test_bad_input_is_named_before_any_work(elue_data, elue_start, capsys, flags, message):
    tasks = [] if "--tasks" in flags else ["--tasks", "sst2"]
    assert elue(elue_data, elue_start, *tasks, *flags) == 2
    assert re.search(message, capsys.readouterr().err)
    assert not (elue_data / "run").exists()


def test_a_run_is_not_put_into_a_checkpoint(elue_data, elue_start, tmp_path, capsys):
    folder = shutil.copytree(elue_start, tmp_path / "ours")
    (folder / MARKER).write_text("")
    assert elue(elue_data, elue_start, "--tasks", "sst2", "--output", str(folder)) == 2
    assert f"output {folder} is a checkpoint; choose another output" in capsys.readouterr().err


def test_a_reference_of_other_tasks_is_named_before_any_work(elue_data, elue_start, tmp_path, capsys):
    """It was read when everything had been trained."""
    curve = [Point("exit_1", 1e6, 50.0), Point("exit_2", 2e6, 60.0)]
    write_result(Result("theirs", {"stsb": TaskResult("pearson+spearman", 40, [curve])}), tmp_path / "theirs.json")
    flags = ["--tasks", "sst2", "--reference", str(tmp_path / "theirs.json")]
    assert elue(elue_data, elue_start, *flags) == 2
    assert re.search("reference .*theirs.json has stsb, none of sst2", capsys.readouterr().err)
    assert not (elue_data / "run").exists()
    (elue_data / "run" / "results").mkdir(parents=True)  # an earlier task of the folder does not let it pass
    (elue_data / "run" / MARKER).write_text("")
    shutil.copy(tmp_path / "theirs.json", elue_data / "run" / "results")
    assert elue(elue_data, elue_start, *flags) == 2
    assert re.search("reference .*theirs.json has stsb, none of sst2", capsys.readouterr().err)


def test_one_exit_leaves_nothing_to_choose(elue_data, elue_start, tmp_path, capsys):
    labels = {"id2label": {0: "negative", 1: "positive"}, "label2id": {"negative": 0, "positive": 1}}
    single = ElasticBertForSequenceClassification.from_pretrained(elue_start, exit_layers=[3], **labels)
    single.save_pretrained(tmp_path / "single")
    AutoTokenizer.from_pretrained(elue_start).save_pretrained(tmp_path / "single")
    assert elue(elue_data, tmp_path / "single", "--tasks", "stsb", "--methods", "elasticbert") == 2
    assert "has a head for single_label_classification, the task is regression" in capsys.readouterr().err
    flags = ["--tasks", "sst2", "--checkpoints", f"sst2={tmp_path / 'single'}", "--methods", "elasticbert-entropy"]
    assert elue(elue_data, elue_start, *flags) == 2
    assert "method elasticbert-entropy: the checkpoint of sst2 has one exit" in capsys.readouterr().err
    shallow = ElasticBertModel.from_pretrained(elue_start, num_hidden_layers=1)
    shallow.save_pretrained(tmp_path / "shallow")
    AutoTokenizer.from_pretrained(elue_start).save_pretrained(tmp_path / "shallow")
    assert elue(elue_data, tmp_path / "shallow", "--tasks", "sst2", "--methods", "elastic") == 2
    assert "shallow has one exit: a method with an exit policy has nothing to choose" in capsys.readouterr().err
    assert elue(elue_data, tmp_path / "single", "--tasks", "sst2", "--methods", "deebert") == 2
    assert "single has one exit" in capsys.readouterr().err
    assert not (elue_data / "run").exists()


def test_points_are_chosen_on_dev(monkeypatch):
    chosen = []
    monkeypatch.setattr(elue_run, "choose_settings", lambda *given: chosen.append(given) or [])
    splits = {"dev": object(), "test": object()}
    subject = SimpleNamespace(config=SimpleNamespace(num_hidden_layers=3))
    job = SimpleNamespace(kind=SimpleNamespace(problem_type="single_label_classification"))
    options = RunOptions(model="m", output="o")
    assert not list(elue_run._points(options, job, METHODS["elastic"], subject, splits))
    ((_, _, lengths, rows, *_),) = chosen
    assert rows is splits["dev"] and len(lengths) == len(options.shares)


def test_a_model_is_needed_where_no_checkpoint_is_given(elue_data, capsys):
    assert run(lambda: _command(["elue", "run", "--tasks", "sst2", "--output", str(elue_data / "run")])) == 2
    assert "--model is required: --checkpoints has none for sst2" in capsys.readouterr().err


def test_hidden_labels_are_no_truth(tmp_path):
    """GLUE's test splits have one label everywhere; a folder's own test split was never read."""
    for split, labels in (("train", "01"), ("validation", "01"), ("test", "11")):
        rows = "".join(f"a{number},b,{label}\n" for number, label in enumerate(labels))
        (tmp_path / f"{split}.csv").write_text("sentence1,sentence2,label\n" + rows)
    given = {"model": "m", "output": "o", "tasks": ["mrpc"], "data": [f"mrpc={tmp_path}"]}
    with pytest.raises(ValueError, match="mrpc: all 2 test rows have the label .*1.*as where labels are hidden"):
        jobs_of(RunOptions(**given))
    (tmp_path / "test.csv").write_text("sentence1,sentence2,label\na,b,1\na,c,0\n")
    (job,) = jobs_of(RunOptions(**given))
    assert len(job.test) == 2


def test_snli_is_read_from_files_with_numbers(tmp_path):
    for split in ("train", "validation", "test"):
        (tmp_path / f"{split}.csv").write_text("premise,hypothesis,label\na,b,0\na,c,-1\na,d,2\n")
    (job,) = jobs_of(RunOptions(model="m", output="o", tasks=["snli"], data=[f"snli={tmp_path}"]))
    assert job.kind.classes == ("entailment", "neutral", "contradiction") and len(job.test) == 2
    assert encode_labels(job.task, job.test, list(job.kind.classes), "single_label_classification").tolist() == [0, 2]


def test_a_task_is_read_from_a_folder(tmp_path):
    """Rows on which the annotators did not agree are left out, as in the data set of the hub."""
    from datasets import ClassLabel, Dataset, DatasetDict, Features, Value

    from finetune.elue.config import SizeOptions
    from finetune.elue.jobs import jobs_of

    names = ["entailment", "neutral", "contradiction"]
    features = Features({"premise": Value("string"), "hypothesis": Value("string"), "label": ClassLabel(names=names)})
    rows = {"premise": ["a", "b", "c"], "hypothesis": ["d", "e", "f"], "label": [2, -1, 0]}
    split = Dataset.from_dict(rows, features=features)
    DatasetDict(dict.fromkeys(("train", "validation", "test"), split)).save_to_disk(tmp_path / "snli")
    flags = {"model": "unused", "output": "unused", "tasks": ["snli"], "data": [f"snli={tmp_path / 'snli'}"]}
    (job,) = jobs_of(SizeOptions(**flags))
    assert (job.test.texts, job.test.pairs, job.test.labels) == (
        ["a", "c"],
        ["d", "f"],
        ["contradiction", "entailment"],
    )
    assert (job.max_length, job.train_rows, job.seeds) == (128, 10_000, [0])
    with pytest.raises(ValueError, match="task imdb is no data set of the hub"):
        jobs_of(SizeOptions(**flags | {"tasks": ["imdb"], "data": ["imdb=somewhere"]}))


def subject_with(names, layers=3):
    """What a method's points are made of, without a model."""
    config = ElasticBertConfig(hidden_size=24, num_hidden_layers=layers, num_attention_heads=4)
    labels = Labels("single_label_classification", names, ("accuracy",))
    return Subject(SimpleNamespace(config=config), None, labels, 8)


def encoded_rows(lengths, labels):
    return Encoded([{"input_ids": [5] * length} for length in lengths], {}, np.array(labels), 0)


def test_a_test_file_has_elues_classes_and_what_a_row_ran_through(tmp_path):
    """A checkpoint may have the labels in another order; a static exit asks no exit before it."""
    logits = np.array([[[0, 1], [0, 1]], [[1, 0], [0, 1]], [[0, 1], [0, 1]]], np.float32)
    outputs, subject = Observed(logits, np.array([[0.9, 0.1]] * 3, np.float32)), subject_with(["positive", "negative"])
    rows = encoded_rows([5, 4], [0, 1])
    for setting in (Setting("exit_2", 2), Setting("learned", policy={"name": "learned", "threshold": 0.5})):
        write_point(subject, setting, outputs, rows, tmp_path, ("negative", "positive"))
    lines = (tmp_path / "exit_2.tsv").read_text().splitlines()
    assert lines[1:] == [
        "0\t1\t(5),emb; (5,24),layer_1; (5,24),layer_2; (24),exit_2",
        "1\t0\t(4),emb; (4,24),layer_1; (4,24),layer_2; (24),exit_2",
    ]
    lines = (tmp_path / "learned.tsv").read_text().splitlines()
    assert lines[2] == "1\t0\t(4),emb; (4,24),layer_1; (24),exit_1" and lines[1].count("exit_") == 3


def test_points_lie_on_the_front_of_lengths_and_depths(monkeypatch):
    """At half the tokens the answers are the same: every point has them, and one of them leaves at the middle exit."""
    labels, shown = np.arange(10) % 2, []
    right = [np.arange(10) < count for count in (5, 8, 10)]  # of each exit
    logits = np.stack([np.eye(2, dtype=np.float32)[np.where(one, labels, 1 - labels)] for one in right])
    monkeypatch.setattr(points, "outputs_of", lambda *given: shown.append(given[2]) or Observed(logits, None))
    short = [0.5, 0.5, 0.5]
    given = (subject_with(["negative", "positive"]), "entropy", [None, short], encoded_rows([20] * 10, labels), 3)
    found = points.choose_settings(*given, True)
    assert [one.length_config for one in found] == [short] * 3
    assert [one.name for one in found] == ["point_1", "point_2", "point_3"]
    left = [set(points.leave(given[0], one, Observed(logits, None))[1].tolist()) for one in found]
    assert left == [{1}, {2}, {3}]
    assert len(points.choose_settings(*given, False)) == 2
    assert [one.length_config for one in shown[:2]] == [None, short]


def test_a_submission_is_made_again_where_anything_it_is_made_of_has_changed(elue_start, tmp_path):
    other = shutil.copytree(elue_start, tmp_path / "other")
    model = ElasticBertModel.from_pretrained(other)
    model.embeddings.word_embeddings.weight.data += 1
    model.save_pretrained(other)
    kind = SimpleNamespace(problem_type="single_label_classification")
    job = SimpleNamespace(kind=kind, max_length=32, rows_hash=lambda split: split)

    def settings(method="elastic", checkpoint=elue_start, of=job, **changes):
        options = RunOptions(model="m", output="o", **changes)
        return json.dumps(elue_run._settings(options, of, METHODS[method], [checkpoint]))

    changed = [settings(checkpoint=other), settings(points=3), settings(shares=[1.0]), settings("voting")]
    changed.append(settings(of=SimpleNamespace(**vars(job) | {"max_length": 64})))
    changed.append(settings(of=SimpleNamespace(**vars(job) | {"rows_hash": lambda split: "other" + split})))
    assert settings() == settings() and len({settings(), *changed}) == 7


def test_every_sub_network_has_a_pass_of_its_own(monkeypatch):
    """And a policy without lengths is swept at all tokens alone."""
    passes, chosen = [], []
    monkeypatch.setattr(elue_run, "outputs_of", lambda subject, rows, one: passes.append(one) or one.sub_network)
    monkeypatch.setattr(elue_run, "choose_settings", lambda *given: chosen.append(given) or [])
    job = SimpleNamespace(kind=SimpleNamespace(problem_type="single_label_classification"))
    options, subject = RunOptions(model="m", output="o"), subject_with(["a", "b"], layers=12)
    for name, count in (("lengthdrop", 5), ("layerdrop", 7), ("elasticbert", 1)):
        found = list(elue_run._points(options, job, METHODS[name], subject, {"test": None}))
        assert all(outputs == setting.sub_network for setting, outputs in found)
        assert len(passes) == count and not passes.clear()
    assert found[0][0].sub_network == {"length_config": 1.0, "layer_config": None}
    assert not list(elue_run._points(options, job, METHODS["deebert"], subject, {"dev": None}))
    assert chosen[0][2] == [[1.0] * 12] and chosen[0][5] is False


def test_methods_and_depths(elue_start):
    config = ElasticBertConfig(num_hidden_layers=12)
    runs = {one.name: one.layer_config for one in METHODS["layerdrop"].settings(config, None)}
    assert list(runs) == [f"layers_{kept}" for kept in range(12, 5, -1)]
    assert runs["layers_9"] == [1, 3, 4, 5, 7, 8, 9, 11, 12] and runs["layers_6"] == [2, 4, 6, 8, 10, 12]
    assert elue_run._depths(RunOptions(model=str(elue_start), output="o")) == [1, 2, 3]
    assert not METHODS["deebert"].fits("regression") and METHODS["berxit"].fits("regression")
