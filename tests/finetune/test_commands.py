"""The commands as a user runs them: one line for each mistake, exit code 2, nothing written."""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoTokenizer, RobertaConfig, RobertaModel, T5Config

from elastic_model import ElasticBertForPreTraining, ElasticBertForSequenceClassification
from elastic_model.arguments import run
from export.write import patch_config
from finetune.__main__ import _command
from finetune.config import CalibrateOptions, EvaluateOptions, SearchOptions
from finetune.evaluate import evaluate
from finetune.prepare import check_length, check_metric


def flags_of(options):
    pairs = [(name.replace("_", "-"), value) for name, value in vars(options).items() if value not in (None, [])]
    return [word for name, value in pairs for word in (f"--{name}", str(value))]


def error_of(capsys, *argv):
    """The line that a command ends with; its exit code must be 2."""
    capsys.readouterr()
    assert run(lambda: _command(list(argv))) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1
    return lines[0]


def test_no_command_replaces_the_checkpoint_that_it_reads(options, capsys):
    """The folder is ours: nothing else protects it."""
    train = options()
    model = Path(train.model)
    (model / ".elastic-model").touch()
    before = (model / "model.safetensors").read_bytes()
    for command in (["train", *flags_of(train)], ["evaluate", str(model)]):
        assert "would replace" in error_of(capsys, *command, "--output", str(model))
    assert (model / "model.safetensors").read_bytes() == before
    rows = shutil.copytree(Path(train.dev).parent, model.parent / "rows")  # nor what it reads beside it
    (rows / ".elastic-model").touch()
    for given in (["--dev", str(rows / "dev.tsv")], ["--dataset", str(rows)]):
        says = error_of(capsys, "evaluate", str(model), *given, "--output", str(rows))
        assert "would replace" in says and (rows / "dev.tsv").is_file()


def changed(options, **changes):
    return ["train", *flags_of(options(**changes))]


def table(tmp_path, *rows, name="bad.tsv"):
    (tmp_path / name).write_text("\n".join(rows) + "\n")
    return str(tmp_path / name)


ROWS = [f"the {word}\t{label}" for label in ("early", "middle", "late") for word in "abcdefgh"]


def test_a_checkpoint_that_always_leaves_at_one_layer_can_be_evaluated(trained, small_task, tmp_path, capsys):
    """Its policy has no settings to sweep: the commands stopped there, as at one asked for."""
    folder = shutil.copytree(trained.output, tmp_path / "constant")
    patch_config(folder, {"exit_policy": {"name": "constant", "layer": 2}})
    own = [f"--dev={trained.dev}", "--text=text", "--label=label", "--max_length=32", "--timed_rows=0"]
    assert run(lambda: _command(["evaluate", str(folder), *own])) == 0
    assert "the checkpoint's own       2.00 " in capsys.readouterr().out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"text": "sentence"}, r"there is no column 'sentence'; columns: text, label"),
        ({"label": "class"}, r"there is no column 'class'; columns: text, label"),
        ({"recipe": "jiont"}, r"recipe 'jiont' is unknown; allowed: joint, two_stage"),
        ({"task": "era"}, r"--task era has its own files and columns; --train is for your own data"),
        ({"dev": None}, r"task 'own files' has no dev split; it has: train"),
        ({"max_length": 65}, r"max_length must be 3 to 64 \(the positions of the model\), got 65"),
        ({"exit_layers": "9"}, r"exit_layers must be a rising list of layers within 1..4, got \[9\]"),
        ({"batch_size": 61}, r"60 rows in the train split, fewer than a batch \(61\); lower batch_size"),
        ({"batch_size": 0}, r"batch_size must be at least 1, got 0"),
        ({"warmup": 1.5}, r"warmup must be from 0 to 1, got 1.5"),
        ({"learning_rate": 0.0}, r"learning_rate must be above 0, got 0.0"),
        ({"exit_policy": "constant"}, r"exit policy 'constant' cannot be calibrated"),
        ({"exit_loss": "max"}, r"exit_loss must be one of sum, last, .* got 'max'"),
        ({"problem_type": "regression"}, r"has a head for single_label_classification, the task is regression"),
        ({"model": "/nowhere"}, r"model /nowhere is not a folder"),
        ({"train": "/nowhere.tsv"}, r"/nowhere.tsv: No such file"),
    ],
)
def test_a_wrong_option_is_one_line(options, capsys, changes, message):
    assert re.search(message, error_of(capsys, *changed(options, **changes)))
    assert not list(Path(options().output).parent.glob("out*"))


def test_positions_that_roberta_reserves_are_not_for_tokens(options, capsys, tiny_tokenizer, tmp_path):
    """Of 64 positions two lie below the first token, in a stock checkpoint and in ours made from it."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    config = RobertaConfig(vocab_size=200, max_position_embeddings=64, type_vocab_size=1, pad_token_id=1, **sizes)
    RobertaModel(config).save_pretrained(tmp_path / "stock")
    ElasticBertForPreTraining.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    for folder in (tmp_path / "stock", tmp_path / "ours"):
        tiny_tokenizer.save_pretrained(folder)
        for length in (63, 64):
            line = error_of(capsys, *changed(options, model=str(folder), max_length=length))
            assert f"max_length must be 3 to 62 (the positions of the model), got {length}" in line
        longest = torch.full((1, 62), 7)
        ElasticBertForPreTraining.from_pretrained(folder)(input_ids=longest)
        check_length(AutoConfig.from_pretrained(folder), 62)
    assert not list(tmp_path.glob("out*"))


def test_a_model_of_another_family_is_named(options, capsys, tiny_tokenizer, tmp_path):
    """T5's configuration does not know positions: an AttributeError."""
    T5Config(vocab_size=200, d_model=16).save_pretrained(tmp_path / "t5")
    (tmp_path / "t5" / "model.safetensors").write_bytes(b"")
    tiny_tokenizer.save_pretrained(tmp_path / "t5")
    line = error_of(capsys, *changed(options, model=str(tmp_path / "t5")))
    assert "model_type must be one of bert, roberta, distilbert, elasticbert, got 't5'" in line


def test_a_learned_head_of_the_start_may_be_asked(options, capsys, tiny_checkpoint):
    flags = ["--exit_policy", "learned"]
    assert "asks a head that is not there" in error_of(capsys, *changed(options), *flags)
    ElasticBertForSequenceClassification.from_pretrained(tiny_checkpoint, learned_exit_head=True).save_pretrained(
        tiny_checkpoint
    )
    assert "/nowhere.tsv: No such file" in error_of(capsys, *changed(options, dev="/nowhere.tsv"), *flags)
    prune = ["prune", *(f"--{name}={getattr(options(), name)}" for name in ("model", "train", "dev", "output"))]
    line = error_of(
        capsys, *prune, "--text=text", "--label=label", "--max_length=32", "--batch_size=10", "--heads=2", *flags
    )
    assert "distill and prune keep no learned exit head" in line


def test_metrics_must_fit(options, capsys):
    line = error_of(capsys, *changed(options), "--metrics", "pearson")
    assert "metric 'pearson' does not fit a task of the type single_label_classification" in line
    for flag in ("--metrics", "--metric"):  # of three classes it was F1 of the second alone
        line = error_of(capsys, *changed(options), flag, "f1")
        assert "metric 'f1' does not fit" in line and "with 3 labels; those that do: accuracy, macro_f1" in line
    with pytest.raises(ValueError, match="metric 'entity_f1' does not fit .* those that do: token_accuracy"):
        check_metric("entity_f1", "token_classification", ["NOUN", "VERB"])


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "has no rows"),
        (["text\tlabel"], "has no rows"),
        (["text\tlabel", *ROWS, "\tearly"], r"row 26: column 'text' has no text"),
        (["text\tlabel", *ROWS[:8], *ROWS[:8]], "classifier of other labels: early, middle, late; the task has early"),
    ],
)
def test_a_bad_train_file_is_one_line(options, capsys, tmp_path, rows, message):
    assert re.search(message, error_of(capsys, *changed(options, train=table(tmp_path, *rows))))


@pytest.mark.parametrize("value", ["nan", "high", ""])
def test_a_bad_regression_label_is_one_line(trained, tmp_path, capsys, value):
    file = table(tmp_path, "text\tlabel", *(f"the {number}\t{number}.5" for number in range(12)), f"the x\t{value}")
    run = dataclasses.replace(trained, train=file, dev=file, problem_type="regression", output=str(tmp_path / "out"))
    line = error_of(capsys, "train", *flags_of(run))
    assert (
        f"row 14: a regression label must be a finite number (at most 3.4e+38), got '{value}'" in line
        and not (tmp_path / "out").exists()
    )


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["text\tlabel", *ROWS[:8]], r"the dev split has one class only \(8 rows\)"),
        (["text\tlabel", *ROWS, "the i\tancient"], r"row 26: label 'ancient' is not among the labels"),
    ],
)
def test_a_bad_dev_file_is_one_line(options, capsys, tmp_path, rows, message):
    assert re.search(message, error_of(capsys, *changed(options, dev=table(tmp_path, *rows))))


def test_a_checkpoint_of_other_labels_is_named(options, capsys, tmp_path):
    rows = [row.replace("early", "old") for row in ROWS]
    line = error_of(capsys, *changed(options, train=table(tmp_path, "text\tlabel", *rows)))
    assert "is a classifier of other labels: early, middle, late; the task has late, middle, old" in line


@pytest.mark.parametrize(
    ("missing", "message"),
    [
        ("config.json", "has no config.json: it is not a checkpoint"),
        ("model.safetensors", "has no weights"),
        ("tokenizer", "has no tokenizer that loads"),
    ],
)
def test_an_incomplete_checkpoint_is_one_line(options, capsys, tiny_checkpoint, missing, message):
    for file in tiny_checkpoint.glob(f"{missing}*"):
        file.unlink()
    assert message in error_of(capsys, *changed(options))


def test_damaged_weights_are_one_line(options, capsys, tiny_checkpoint):
    file = tiny_checkpoint / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    assert f"the weights of {tiny_checkpoint} are damaged" in error_of(capsys, *changed(options))


def test_an_output_that_is_not_ours_is_left_alone(options, capsys):
    theirs = Path(options().output)
    theirs.mkdir()
    (theirs / "thesis.txt").write_text("years of work")
    assert "exists and was not made by elastic-model" in error_of(capsys, *changed(options))
    assert [file.name for file in theirs.iterdir()] == ["thesis.txt"]


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        ("batchsize: 4", r"unknown key 'batchsize' \(value 4\); did you mean batch_size\?"),
        ("batch_size: four", r"batch_size: expected a whole number, got 'four'"),
        ("- joint", r"a recipe is a mapping of flags"),
        ("best_exit: first", r"best_exit: expected one of last, mean, got 'first'"),
    ],
)
def test_a_bad_recipe_is_one_line(options, capsys, tmp_path, recipe, message):
    (tmp_path / "bad.yaml").write_text(recipe)
    assert re.search(message, error_of(capsys, *changed(options), "--config", str(tmp_path / "bad.yaml")))


def test_an_unknown_command_lists_those_there(capsys):
    assert "command 'fit' is unknown; allowed: train, elastify," in error_of(capsys, "fit")


def test_help_answers_at_once():
    began = time.perf_counter()
    shown = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "finetune", "train", "--help"], capture_output=True
    )
    elapsed = time.perf_counter() - began
    assert b"--exit-loss" in shown.stdout and b"| torch" not in shown.stderr and b"transformers" not in shown.stderr
    assert elapsed < 10  # two seconds on an idle machine; what makes it so is that neither is imported


def evaluation_of(trained, small_task, **changes):
    own = {"test": str(small_task / "test.tsv"), "text": "text", "label": "label", "split": "test", "max_length": 32}
    return EvaluateOptions(**{"model": trained.output, **own, **changes})


def test_evaluate_writes_what_it_prints(trained, small_task, tmp_path, capsys):
    evaluate(evaluation_of(trained, small_task, output=str(tmp_path / "evaluation")))
    printed, curve = capsys.readouterr().out, json.loads((tmp_path / "evaluation/curve.json").read_text())
    for layer in "1234":
        assert f"{curve['exits'][layer][0]['value']:.4f}" in printed
    policies = [one["mean_exit_layer"] for one in curve["policies"].values()][:-2]
    assert policies == sorted(policies, reverse=True) and policies[-1] < policies[0]
    rows = [line.split("\t") for line in (tmp_path / "evaluation/predictions.tsv").read_text().splitlines()]
    own = curve["policies"]["the checkpoint's own"]
    right = sum(row[1] == row[2] for row in rows[1:]) / 30
    assert len(rows) == 31 and right == pytest.approx(own["quality"]["accuracy"])
    assert sum(int(row[3]) for row in rows[1:]) / 30 == pytest.approx(own["mean_exit_layer"])


def test_evaluate_takes_some_rows_which_keep_their_places(trained, small_task, tmp_path, capsys):
    found = []
    for rows in (None, 7):
        evaluate(evaluation_of(trained, small_task, rows=rows, output=str(tmp_path / str(rows))))
        found.append((tmp_path / str(rows) / "predictions.tsv").read_text().splitlines()[1:])
    everything, some = found
    assert len(some) == 7 and some == [everything[int(line.split("\t")[0])] for line in some]
    assert "7 rows" in capsys.readouterr().out
    for name, value, least in (("rows", 0, 1), ("eval_batch_size", -1, 1), ("timed_rows", -1, 0)):
        with pytest.raises(ValueError, match=f"{name} must be at least {least}, got {value}"):
            evaluate(evaluation_of(trained, small_task, **{name: value}))


def test_evaluate_takes_a_policy_and_thresholds(trained, small_task, capsys):
    evaluate(evaluation_of(trained, small_task, exit_policy="confidence", thresholds=[0.2, 0.9]))
    printed = capsys.readouterr().out
    assert "confidence, threshold 0.2  1.00" in printed and "confidence, threshold 0.9" in printed
    evaluate(evaluation_of(trained, small_task, exit_policy="voting", thresholds=[2.0]))
    assert "voting, votes 2" in capsys.readouterr().out
    for name, what in (("voting", "votes"), ("patience", "patience")):
        for wrong in (1.5, 0.0, float("nan")):  # 1.5 was measured as 1
            with pytest.raises(ValueError, match=f"of {name} are whole numbers of at least 1, {what}, got {wrong:g}"):
                evaluate(evaluation_of(trained, small_task, exit_policy=name, thresholds=[wrong]))


@pytest.mark.parametrize(("labels", "policy"), [(3, "patience"), (1, None)])
def test_one_exit_is_evaluated(tiny_config, tiny_tokenizer, small_task, tmp_path, labels, policy, capsys):
    """There was nothing to sweep: a traceback, or "zero-size array to reduction operation"."""
    names = ["early", "late", "middle"] if labels == 3 else ["LABEL_0"]
    tiny_config.exit_layers, tiny_config.num_labels = [4], labels
    tiny_config.id2label, tiny_config.label2id = dict(enumerate(names)), dict(zip(names, range(3), strict=False))
    ElasticBertForSequenceClassification(tiny_config).save_pretrained(tmp_path / "one")
    tiny_tokenizer.save_pretrained(tmp_path / "one")
    rows = [f"the harvest {number}\t{names[number % 3] if policy else number}" for number in range(9)]
    dev = table(tmp_path, "text\tlabel", *rows)
    own = [f"--dev={dev}", "--text=text", "--label=label", "--max_length=32"]
    own += [f"--exit_policy={policy}"] if policy else []
    assert run(lambda: _command(["evaluate", str(tmp_path / "one"), *own])) == 0
    assert "full depth" in capsys.readouterr().out


def test_a_learned_head_is_asked_at_the_lengths_given(trained, small_task, tmp_path, capsys):
    """The row of the checkpoint's own policy mixed exits at those lengths with a head asked at others."""
    model = ElasticBertForSequenceClassification.from_pretrained(trained.output, learned_exit_head=True).eval()
    torch.nn.init.normal_(model.exit_uncertainty.weight, std=1.0)
    model.config.exit_policy = {"name": "learned", "threshold": 0.5}
    model.save_pretrained(tmp_path / "learned")
    tokenizer = AutoTokenizer.from_pretrained(trained.output)
    tokenizer.save_pretrained(tmp_path / "learned")
    lengths, given = [0.5, 0.3, 0.2, 0.1], {"model": str(tmp_path / "learned"), "output": str(tmp_path / "seen")}
    evaluate(evaluation_of(trained, small_task, **given, length_config=lengths))
    rows = [line.split("\t") for line in (tmp_path / "seen/predictions.tsv").read_text().splitlines()[1:]]
    texts = [line.split("\t")[0] for line in (small_task / "test.tsv").read_text().splitlines()[1:]]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    with torch.inference_mode():
        left = model(**batch, length_config=lengths).exit_layers
    assert [int(row[3]) for row in rows] == left.tolist()


def test_a_checkpoint_is_read_at_the_length_of_its_training(trained, small_task, tmp_path):
    for kind in (EvaluateOptions, SearchOptions, CalibrateOptions):
        assert kind(model=trained.output).max_length == 32
        assert kind(model=trained.output, max_length=24).max_length == 24
        assert kind(model=str(tmp_path)).max_length == 128


def test_another_length_than_in_training_is_told(trained, small_task, capsys):
    evaluate(evaluation_of(trained, small_task, max_length=24))
    assert "was trained at --max_length 32, it is read at 24" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"max_length must be 3 to 64 .* got 128; .* was trained at 32"):
        evaluate(evaluation_of(trained, small_task, max_length=128))


def test_evaluate_takes_lengths(trained, small_task, tmp_path, capsys):
    curves = []
    for number, lengths in enumerate([{}, {"length_rate": 0.5}, {"length_config": [0.5, 0.25, 0.125, 0.0625]}]):
        evaluate(evaluation_of(trained, small_task, output=str(tmp_path / str(number)), **lengths))
        curves.append(json.loads((tmp_path / f"{number}/curve.json").read_text())["policies"]["full depth"])
        assert (tmp_path / f"{number}/curve.png").stat().st_size
    assert curves[1]["flops"] == curves[2]["flops"] < curves[0]["flops"] < curves[0]["padded_flops"]
    assert all(curve["ms"] > 0 for curve in curves) and "MFLOPs, padded" in capsys.readouterr().out
    for wrong, says in (
        ({"length_rate": 1.5}, "length_rate must lie above 0"),
        ({"length_rate": 0.5, "length_config": [0.5] * 4}, "not both"),
        ({"length_config": [0.5, 0.6, 0.5, 0.5]}, "must not rise"),
    ):
        with pytest.raises(ValueError, match=says):
            evaluate(evaluation_of(trained, small_task, **wrong))


def test_evaluate_names_a_checkpoint_that_is_no_classifier(trained, small_task, tiny_config, tiny_tokenizer, tmp_path):
    ElasticBertForPreTraining(tiny_config).save_pretrained(tmp_path / "start")
    tiny_tokenizer.save_pretrained(tmp_path / "start")
    with pytest.raises(ValueError, match="holds ElasticBertForPreTraining, not a classifier"):
        evaluate(evaluation_of(trained, small_task, model=str(tmp_path / "start")))


def test_evaluate_names_a_label_that_the_checkpoint_has_not(trained, small_task, tmp_path):
    file = table(tmp_path, "text\tlabel", *ROWS, "the i\tancient")
    with pytest.raises(ValueError, match="label 'ancient' is not among the labels of the model: early, late, middle"):
        evaluate(evaluation_of(trained, small_task, test=file))


@pytest.mark.slow
def test_kill_nine_and_resume(options, tmp_path):
    """A real process, killed twice at whatever it is doing, ends with the weights of one that was left alone."""
    changes = {"epochs": 30, "save_steps": 10, "dropout": 0.1}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def start(output, *more):
        argv = [sys.executable, "-m", "finetune", *changed(options, **changes, output=str(output)), *more]
        return subprocess.Popen(argv, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    assert start(tmp_path / "whole").wait() == 0
    for _ in range(2):
        process = start(tmp_path / "killed", "--resume", "true")
        state = tmp_path / "killed.run/state/progress.json"
        deadline = time.monotonic() + 300
        seen = state.stat().st_mtime if state.exists() else 0.0
        while process.poll() is None and time.monotonic() < deadline:
            if state.exists() and state.stat().st_mtime > seen:
                break
            time.sleep(0.02)
        process.kill()
        process.wait()
    assert start(tmp_path / "killed", "--resume", "true").wait() == 0
    first, second = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "killed"))
    assert all((first[name] == second[name]).all() for name in first)
