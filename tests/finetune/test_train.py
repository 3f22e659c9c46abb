"""The loop: it learns, resumes where it was, sums gradients rightly, and writes a whole checkpoint or nothing."""

import copy
import dataclasses
import itertools
import json
import random
import re
import shutil
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import AutoTokenizer

import finetune.state
import finetune.train
from elastic_model import ElasticBertForSequenceClassification, ElasticBertModel
from elastic_model.arguments import parse
from elastic_model.operating_points import OperatingPoints, checkpoint_hash
from export.write import patch_config
from finetune.checkpoint import is_finished
from finetune.config import TrainOptions
from finetune.data import collate
from finetune.evaluate import observe
from finetune.figures import plot_confusion
from finetune.recipe import RECIPES, Update
from finetune.run import prepare
from finetune.state import Progress
from finetune.train import INTERRUPTED, _save, _step, backward, engine_of, learning_rate, train

SHIPPED = sorted((Path(finetune.train.__file__).parent / "recipes").glob("*.yaml"))


def weights_of(folder):
    return load_file(Path(folder) / "model.safetensors")


def assert_same_weights(first, second):
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def log_of(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name != "updates_per_second"} for line in lines]


def test_a_run_starts_without_lengths_chosen_for_other_weights(options, tiny_checkpoint):
    """They stayed the default: what the table called full depth dropped tokens."""
    patch_config(tiny_checkpoint, {"length_config": [0.5, 0.4, 0.3, 0.3]})
    assert train(options(epochs=1)) == 0
    model = ElasticBertForSequenceClassification.from_pretrained(options().output)
    assert model.config.length_config is None
    assert OperatingPoints.load(options().output).at("full").length_config == [1.0] * 4


def test_a_static_checkpoint_may_get_exits(options, tiny_checkpoint, tmp_path):
    """The layers asked for were left out without a word."""
    static = ElasticBertForSequenceClassification.from_pretrained(tiny_checkpoint, num_output_layers=1)
    static.save_pretrained(tiny_checkpoint)
    run = prepare(options(exit_layers=[2, 4]), Accelerator())
    assert run.exit_layers == [2, 4]
    assert torch.equal(run.model.classifiers.at(4).weight, static.classifier.weight)  # full depth is what it was
    for layer in (2, 4):
        ours, theirs = (one.elasticbert.encoder.pooler for one in (run.model, static))
        assert torch.equal(ours.at(layer).dense.weight, theirs.at(4).dense.weight)


def test_a_run_learns_and_leaves_a_checkpoint(trained, small_task):
    folder = Path(trained.output)
    model = ElasticBertForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [line.split("\t") for line in (small_task / "test.tsv").read_text().splitlines()[1:]]
    batch = tokenizer([text for text, _ in rows], padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch)
    named = [model.config.id2label[number] for number in output.logits.argmax(-1).tolist()]
    assert np.mean([name == label for name, (_, label) in zip(named, rows, strict=True)]) > 0.8  # a guess: 1/3
    assert model.config.exit_policy["name"] == "entropy"
    assert not Path(f"{trained.output}.run").exists()


def test_the_checkpoint_states_its_operating_points(trained):
    folder = Path(trained.output)
    points = OperatingPoints.load(folder)
    config = ElasticBertForSequenceClassification.from_pretrained(folder).config
    assert points.checkpoint == checkpoint_hash(folder) and points.policy == config.exit_policy
    full, calibrated = points.at("full"), points.at("calibrated")
    assert full.mean_exit_layer == 4 and calibrated.mean_exit_layer < 4 and calibrated.flops < full.flops
    assert calibrated.quality["value"] >= full.quality["value"] - trained.permitted_loss
    assert calibrated.thresholds == [config.exit_policy["threshold"]] * 4
    assert points.at({"max_drop": 100.0}).flops == min(point.flops for point in points.points)


def test_the_report_and_the_files_agree(trained):
    folder = Path(trained.output)
    report, evaluation = (folder / "report.txt").read_text(), json.loads((folder / "evaluation.json").read_text())
    for layer, scores in evaluation["exits"]["dev"].items():
        assert re.search(rf"^{layer} .*{scores[0]['value']:.4f}.*{scores[1]['value']:.4f}", report, re.M)
    assert evaluation["dev"]["calibrated"]["policy"] == json.loads((folder / "config.json").read_text())["exit_policy"]
    assert parse(TrainOptions, ["--config", str(folder / "finetune.yaml")]) == trained


@pytest.mark.parametrize(
    ("changes", "name"),
    [
        ({"length_drop": 0.9}, "length_drop 0.9"),
        ({"layer_drop": 0.0, "recipe": "self_distillation"}, "layer_drop 0.0"),
        ({"sampled": 7, "recipe": "sandwich", "phase_epochs": [1, 0]}, "sampled 7"),
        ({"sandwich_rule": False, "recipe": "alternating"}, "sandwich_rule False"),
        ({"temperature": 9.0}, "temperature 9.0"),
        ({"distillation": "none"}, "distillation none"),
        ({"hard_weight": 0.1, "recipe": "sandwich"}, "hard_weight 0.1"),
        ({"distillation": "none", "recipe": "self_distillation"}, "distillation none"),
        ({"temperature": 9.0, "recipe": "sandwich", "distillation": "none"}, "temperature 9.0"),
    ],
)
def test_an_option_that_nothing_reads_is_refused(options, changes, name):
    """The weights were the same with it and without."""
    with pytest.raises(ValueError, match=f"{name} would do nothing: it is for"):
        prepare(options(**changes), Accelerator())


def test_a_teacher_that_nothing_reads_is_refused(options, tiny_checkpoint):
    """It was asked for every row, or learned from where labels alone had been asked for."""
    teacher = str(tiny_checkpoint)
    with pytest.raises(ValueError, match="teacher .* would do nothing"):
        prepare(options(teacher=teacher, recipe="self_distillation", phase_epochs=[0, 1]), Accelerator())
    with pytest.raises(ValueError, match="distillation none would do nothing"):
        prepare(options(teacher=teacher, distillation="none"), Accelerator())
    prepare(options(teacher=teacher, recipe="sandwich", distillation="none", temperature=2.0), Accelerator())


def test_what_a_checkpoint_says_does_not_depend_on_the_precision_of_its_training(options):
    AcceleratorState._reset_state(True)
    half = Accelerator(mixed_precision="bf16")
    run = prepare(options(), half)
    how = (run.splits["dev"], run.tokenizer, 8, half)
    exact, mixed = (observe(run.model, *how, autocast=autocast).logits for autocast in (False, True))
    AcceleratorState._reset_state(True)
    plain = observe(run.model, run.splits["dev"], run.tokenizer, 8, Accelerator()).logits
    assert (exact == plain).all() and (mixed != plain).any()


def test_the_report_of_a_run_in_bf16_is_of_the_weights_as_they_are_read(options, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "finetune.checkpoint.observe", lambda *how, **more: seen.append(observe(*how, **more)) or seen[-1]
    )
    AcceleratorState._reset_state(True)
    assert train(options(precision="bf16", epochs=1)) == 0
    AcceleratorState._reset_state(True)
    run = prepare(options(output=f"{options().output}-other"), Accelerator())
    model = ElasticBertForSequenceClassification.from_pretrained(options().output)
    how = (run.splits["dev"], run.tokenizer, run.options.eval_batch_size, Accelerator())
    assert np.array_equal(seen[0].logits, observe(model, *how).logits)


@pytest.mark.parametrize("recipe", ["two_stage", "self_distillation"])
def test_a_weighting_that_leaves_out_what_a_phase_trains_is_refused(options, recipe):
    """A whole phase trained nothing, and a threshold was chosen over exits of random weights."""
    with pytest.raises(ValueError, match="exit_loss last gives no weight to the exits below the last"):
        prepare(options(recipe=recipe, exit_loss="last"), Accelerator())


def test_rows_of_a_run_are_known_by_what_they_are(options, small_task, monkeypatch):
    monkeypatch.chdir(small_task)
    own, renamed, other = (prepare(options(**changes), Accelerator()).settings for changes in (
        {}, {"train": "train.tsv"}, {"train": "more.tsv"}))  # fmt: skip
    assert own == renamed and own["train rows"] != other["train rows"]


def test_other_names_of_the_labels_are_another_task(options, small_task, tmp_path):
    """Of the same texts, in the same order of names, the rows are the same numbers."""
    start = ElasticBertModel.from_pretrained(options().model)
    start.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(options().model).save_pretrained(tmp_path / "start")
    renamed = {"early": "alpha", "late": "beta", "middle": "gamma"}
    for split in ("train", "dev"):
        rows = [line.split("\t") for line in (small_task / f"{split}.tsv").read_text().splitlines()]
        lines = [f"{text}\t{renamed.get(label, label)}" for text, label in rows]
        (tmp_path / f"{split}.tsv").write_text("\n".join(lines) + "\n")
    own = options(model=str(tmp_path / "start"), epochs=1)
    assert train(own) == 0
    other = {split: str(tmp_path / f"{split}.tsv") for split in ("train", "dev")}
    assert is_finished(prepare(own, Accelerator()))
    with pytest.raises(ValueError, match="out holds a run with labels = "):
        is_finished(prepare(dataclasses.replace(own, **other), Accelerator()))
    saved = Path(own.output) / "finetune.json"
    before = {name: value for name, value in json.loads(saved.read_text()).items() if name != "labels"}
    saved.write_text(json.dumps(before))  # of an earlier version
    assert is_finished(prepare(own, Accelerator()))


def test_a_run_begun_before_pooling_had_no_default_can_be_resumed(options):
    """Its settings say "mean", which of a single exit meant BERT's own."""
    for changes, said in (({}, "mean"), ({"exit_pooling": "cls"}, "cls"), ({"exit_layers": [4]}, "mean")):
        assert prepare(options(**changes), Accelerator()).settings["exit_pooling"] == said
    asked = prepare(options(exit_layers=[4], exit_pooling="mean"), Accelerator()).settings["exit_pooling"]
    assert asked not in ("mean", "cls")


def test_an_option_that_something_reads_is_taken(options, tiny_checkpoint):
    for changes in (
        {"recipe": "sandwich", "length_drop": 0.9, "layer_drop": 0.0, "sampled": 1, "sandwich_rule": False},
        {"recipe": "sandwich", "distillation": "none"},
        {"recipe": "self_distillation", "distillation": "reverse", "temperature": 2.0},
        {"teacher": str(tiny_checkpoint), "hard_weight": 0.1, "temperature": 2.0},
    ):
        prepare(options(**changes), Accelerator())


def test_a_rare_class_is_one_of_the_labels_whatever_rows_are_drawn(options, tmp_path, small_task):
    """They were those of the rows drawn: a class of dev was unknown, and a checkpoint of the task one of another."""
    rows = (small_task / "train.tsv").read_text() + "the people\trare\n"
    for split in ("train", "dev"):
        (tmp_path / f"{split}.tsv").write_text(rows)
    own = {split: str(tmp_path / f"{split}.tsv") for split in ("train", "dev")}
    start = ElasticBertModel.from_pretrained(options().model)
    start.save_pretrained(tmp_path / "start")
    AutoTokenizer.from_pretrained(options().model).save_pretrained(tmp_path / "start")
    for seed in range(3):
        run = prepare(options(**own, model=str(tmp_path / "start"), train_rows=12, seed=seed), Accelerator())
        assert run.labels.names == ["early", "late", "middle", "rare"] and len(run.splits["train"]) == 12
    with pytest.raises(ValueError, match="must be at least 1, got -5"):
        prepare(options(train_rows=-5), Accelerator())


def test_the_checkpoint_is_chosen_on_dev(options, small_task, tmp_path):
    """Test is reported: whatever it holds, the same weights are kept."""
    rows = [line.split("\t") for line in (small_task / "test.tsv").read_text().splitlines()]
    other = {"early": "middle", "middle": "late", "late": "early", "label": "label"}
    (tmp_path / "other.tsv").write_text("\n".join(f"{text}\t{other[label]}" for text, label in rows) + "\n")
    kept = []
    for name, test in (("as it is", small_task / "test.tsv"), ("changed", tmp_path / "other.tsv")):
        output = str(tmp_path / name)
        assert train(options(output=output, test=str(test), epochs=4, eval_steps=2)) == 0
        scores = json.loads((tmp_path / name / "evaluation.json").read_text())["exits"]
        kept.append((checkpoint_hash(output), scores["dev"]["4"], scores["test"]["4"]))
    assert kept[0][:2] == kept[1][:2] and kept[0][2] != kept[1][2]


class Crash(Exception):
    """What a killed process looks like from inside the loop."""


@pytest.mark.parametrize(  # a phase has 12 updates: at 12 the second one is just beginning
    ("recipe", "update"),
    [("joint", 1), ("alternating", 8), ("two_stage", 12), ("self_distillation", 19), ("sandwich", 14)],
)
def test_a_run_killed_at_any_update_resumes_to_the_same_weights(options, monkeypatch, tmp_path, recipe, update):
    settings = {"recipe": recipe, "dropout": 0.1, "save_steps": 3, "learning_rate": 1e-3}
    assert train(options(**settings, output=str(tmp_path / "whole"))) == 0

    def crash(run, phase, model, number):
        if number == update:
            raise Crash
        return backward(run, phase, model, number)

    monkeypatch.setattr(finetune.train, "backward", crash)
    with pytest.raises(Crash):
        train(options(**settings))
    assert not Path(options().output).exists()
    monkeypatch.undo()
    assert train(options(**settings, resume=True)) == 0
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(options().output))
    assert log_of(tmp_path / "whole") == log_of(options().output)


def test_sigterm_saves_and_exits_143(options, monkeypatch, tmp_path, capsys):
    assert train(options(output=str(tmp_path / "whole"))) == 0

    def terminated(run, phase, model, number):
        if number == 4:
            signal.raise_signal(signal.SIGTERM)
        return backward(run, phase, model, number)

    monkeypatch.setattr(finetune.train, "backward", terminated)
    before = signal.getsignal(signal.SIGTERM)
    assert train(options()) == INTERRUPTED == 143
    assert "stopped at update 5" in capsys.readouterr().out and signal.getsignal(signal.SIGTERM) == before
    monkeypatch.undo()
    assert train(options(resume=True)) == 0
    assert "resuming at update 5" in capsys.readouterr().out
    assert_same_weights(weights_of(tmp_path / "whole"), weights_of(options().output))


def test_sigterm_while_the_last_phase_is_saved_ends_the_run(options, monkeypatch, capsys):
    """A pipeline went on to its next stages, with exit code 0."""

    def terminated(run, progress, stop, bar):
        signal.raise_signal(signal.SIGTERM)
        end(run, progress, stop, bar)

    end = finetune.train._end
    monkeypatch.setattr(finetune.train, "_end", terminated)
    assert train(options()) == INTERRUPTED
    monkeypatch.undo()
    assert train(options(resume=True)) == 0 and Path(options().output).is_dir()


def test_a_finished_run_ends_at_once(trained, monkeypatch, capsys):
    before = weights_of(trained.output)
    monkeypatch.setattr(finetune.train, "fit", None)  # nothing is trained
    assert train(dataclasses.replace(trained, resume=True)) == 0
    assert "is finished already" in capsys.readouterr().out
    assert_same_weights(before, weights_of(trained.output))
    settings = Path(trained.output) / "finetune.json"
    ours = settings.read_text()
    settings.write_text(json.dumps({**json.loads(ours), "eval_batch_size": 64}))  # earlier versions noted more
    assert train(dataclasses.replace(trained, resume=True)) == 0
    settings.write_text(ours)


def test_a_finished_run_of_other_settings_is_not_replaced_by_resuming(trained, tmp_path, monkeypatch):
    """It was trained anew over the finished one, without a word."""
    output = tmp_path / "checkpoint"
    shutil.copytree(trained.output, output)
    other = dataclasses.replace(trained, output=str(output), learning_rate=0.002)
    before = weights_of(str(output))
    with pytest.raises(
        ValueError, match="checkpoint holds a run with learning_rate = 0.001, not 0.002; resume it with"
    ):
        train(dataclasses.replace(other, resume=True))
    assert_same_weights(before, weights_of(str(output)))
    monkeypatch.setattr(finetune.train, "fit", _stop_after_one)
    train(other)  # asked for without --resume, and interrupted
    monkeypatch.undo()
    assert train(dataclasses.replace(other, resume=True)) == 0
    assert json.loads((output / "finetune.json").read_text())["learning_rate"] == 0.002


def test_a_state_of_other_settings_is_not_continued(options, monkeypatch):
    monkeypatch.setattr(finetune.train, "fit", _stop_after_one)
    train(options())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="holds a run with learning_rate = 0.003, not 0.1; resume it with its own"):
        train(options(learning_rate=0.1, resume=True))


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "best.safetensors", "progress.json"])
def test_a_damaged_state_is_named(options, monkeypatch, file):
    monkeypatch.setattr(finetune.train, "fit", _stop_after_one)
    train(options())
    monkeypatch.undo()
    state = Path(options().output + ".run") / "state" / file
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(ValueError, match=f"state is damaged .*{file}.*; start anew without --resume"):
        train(options(resume=True))


def test_half_a_line_of_the_log_does_not_bar_the_way(options, monkeypatch):
    run = options(save_steps=5)

    def crash(run, phase, model, number):
        if number == 8:
            raise Crash
        return backward(run, phase, model, number)

    monkeypatch.setattr(finetune.train, "backward", crash)
    with pytest.raises(Crash):
        train(run)
    monkeypatch.undo()
    log = Path(f"{run.output}.run") / "metrics.jsonl"
    log.write_text(log.read_text() + '{"update": 999, "lo')
    assert train(dataclasses.replace(run, resume=True)) == 0
    saved = Path(run.output) / "finetune.json"
    saved.write_text("{")
    with pytest.raises(ValueError, match="finetune.json is damaged .*; remove .*, or choose another output"):
        train(dataclasses.replace(run, resume=True))


@pytest.mark.parametrize(("name", "value"), [("permitted_loss", float("nan")), ("weight_decay", -0.1), ("seed", -1)])
def test_numbers_out_of_range_are_named(options, name, value):
    with pytest.raises(ValueError, match=f"{name} must be .* got {value}"):
        train(options(**{name: value}))


def test_a_full_disk_leaves_the_state_before(options, monkeypatch):
    monkeypatch.setattr(finetune.train, "fit", _stop_after_one)
    train(options())
    monkeypatch.undo()

    def full(tensors, file):
        file.write_bytes(b"half")
        raise SafetensorError("No space left on device")

    monkeypatch.setattr(finetune.state, "save_file", full)
    with pytest.raises(OSError, match="state could not be written: No space left on device; the state before it is"):
        train(options(resume=True, save_steps=1))
    monkeypatch.undo()
    assert train(options(resume=True)) == 0


def _stop_after_one(run, progress):
    progress.update = 1
    _save(run, progress, engine_of(run))
    return False


def test_a_failed_run_leaves_the_old_checkpoint(trained, monkeypatch):
    before = weights_of(trained.output)
    monkeypatch.setattr(finetune.train, "write_checkpoint", _crash)
    with pytest.raises(Crash):
        train(dataclasses.replace(trained, epochs=1))
    assert_same_weights(before, weights_of(trained.output))


def _crash(*_):
    raise Crash


LABELS = {  # of a row, from its number and its class
    "regression": lambda number, label: str(0.5 + 2 * len(label) + number / 100),
    "multi_label_classification": lambda number, label: f"{label}|even" if number % 2 == 0 else label,
}
POLICY = {"regression": "patience", "multi_label_classification": "entropy"}


@pytest.mark.parametrize("problem_type", LABELS)
def test_the_other_kinds_of_labels(trained, small_task, tmp_path, problem_type):
    rows = [line.split("\t") for line in (small_task / "train.tsv").read_text().splitlines()[1:]]
    lines = [f"{text}\t{LABELS[problem_type](number, label)}" for number, (text, label) in enumerate(rows)]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    own = dict.fromkeys(("train", "dev", "test"), str(tmp_path / "rows.tsv"))
    run = dataclasses.replace(trained, **own, problem_type=problem_type, output=str(tmp_path / "out"), epochs=2)
    assert train(run) == 0
    model = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "out")
    points = OperatingPoints.load(tmp_path / "out")
    assert model.config.problem_type == problem_type and points.policy["name"] == POLICY[problem_type]
    assert model.config.num_labels == (1 if problem_type == "regression" else 4)
    assert points.at("full").mean_exit_layer == 4 and min(point.mean_exit_layer for point in points.points) < 4


def test_new_regression_heads_start_at_the_mean_of_the_labels(options, small_task, tmp_path):
    rows = [line.split("\t") for line in (small_task / "train.tsv").read_text().splitlines()[1:]]
    lines = [f"{text}\t{LABELS['regression'](number, label)}" for number, (text, label) in enumerate(rows)]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *lines]) + "\n")
    own = dict.fromkeys(("train", "dev"), str(tmp_path / "rows.tsv")) | {"problem_type": "regression"}
    own |= {"model": fresh_start(tmp_path / "start", options().model)}
    mean = np.mean([float(line.split("\t")[1]) for line in lines])
    run = prepare(options(**own), Accelerator())
    biases = [run.model.classifiers.at(layer).bias.item() for layer in run.exit_layers]
    assert biases == pytest.approx([mean] * 4)
    with torch.no_grad():
        run.model.classifiers.at(2).bias.fill_(0.5)  # as if trained
    run.model.save_pretrained(tmp_path / "start")
    again = prepare(options(**own), Accelerator()).model.classifiers
    assert again.at(2).bias.item() == 0.5 and again.at(3).bias.item() == pytest.approx(mean)


def test_micro_batches_sum_to_the_gradient_of_the_batch(options):
    gradients = {}
    for size in (None, 3):
        run = prepare(options(micro_batch_size=size), Accelerator())
        run.model.eval()  # no dropout
        backward(run, run.phases[0], engine_of(run), 0)
        gradients[size] = {name: one.grad for name, one in run.model.named_parameters() if one.grad is not None}
    assert gradients[None].keys() == gradients[3].keys()
    for name, gradient in gradients[None].items():
        torch.testing.assert_close(gradients[3][name], gradient, atol=1e-6, rtol=1e-4)


def test_the_sandwich_is_the_mean_of_its_four_losses(options):
    """The gradient summed over four backward passes is that of one summed loss; students pull towards the teacher."""
    run = prepare(options(recipe="sandwich"), Accelerator())
    phase, batch = run.phases[1], collate(run.splits["train"], list(range(8)), run.tokenizer, torch.device("cpu"))
    run.model.eval()  # no dropout, so that both ways see the same
    losses = list(phase.objective(run.model, run.model.config, batch, Update(3, random.Random(0), run.options)))
    sum(losses).backward()
    summed = {name: one.grad.clone() for name, one in run.model.named_parameters()}
    run.model.zero_grad()
    for loss in phase.objective(run.model, run.model.config, batch, Update(3, random.Random(0), run.options)):
        loss.backward()
    assert len(losses) == phase.passes(run.options) == 4 and losses[0].item() == pytest.approx(
        run.model(**batch).loss.item() / 4
    )
    for name, one in run.model.named_parameters():
        torch.testing.assert_close(one.grad, summed[name], atol=1e-6, rtol=1e-4)


def test_grouped_exits_take_turns(options):
    run = prepare(options(exit_groups=2), Accelerator())
    seen = []
    for update in (0, 1):
        run.model.zero_grad()
        backward(run, run.phases[0], engine_of(run), update)
        heads = {layer: run.model.get_parameter(f"classifiers.{layer - 1}.weight").grad for layer in run.exit_layers}
        seen.append([layer for layer, gradient in heads.items() if gradient is not None and gradient.abs().sum() > 0])
    assert seen == [[1, 3, 4], [2, 4]]


def test_the_learning_rate_rises_and_falls():
    rates = [learning_rate(update, 100, 1.0, 0.1) for update in range(100)]
    assert rates[0] == pytest.approx(0.1) and max(rates) == rates[9] == 1.0 and rates[10] == 1.0
    assert rates[-1] == pytest.approx(1 / 90) and rates[10:] == sorted(rates[10:], reverse=True)
    assert learning_rate(0, 10, 1.0, 0.0) == 1.0


def test_frozen_parts_stay_bit_for_bit(options, tiny_checkpoint):
    """Two stages: the second trains the inner exits alone; the last exit is what the first left."""
    train(options(recipe="two_stage", best_exit="mean", output=str(Path(options().output).with_name("stages"))))
    stages = weights_of(Path(options().output).with_name("stages"))
    start = weights_of(tiny_checkpoint)
    moved = {name for name in start if not torch.equal(start[name], stages[name])}
    assert {f"classifiers.{number}.weight" for number in range(4)} <= moved
    run = prepare(options(recipe="two_stage"), Accelerator())
    inner = {name for name, _ in run.model.named_parameters() if run.phases[1].trains(name, run.model.config)}
    last = {name for name, _ in run.model.named_parameters() if run.phases[0].trains(name, run.model.config)}
    assert inner | last == set(start) and not inner & last
    assert {name.split(".")[-3] if "pooler" in name else name.split(".")[1] for name in inner} == {"0", "1", "2"}


def test_best_checkpoint_is_the_best_of_the_log(trained):
    values = {line["update"]: line["dev"]["4"]["accuracy"] for line in log_of(trained.output) if "dev" in line}
    evaluation = json.loads((Path(trained.output) / "evaluation.json").read_text())
    assert evaluation["dev"]["full"]["quality"]["accuracy"] == max(values.values()) and len(values) == 6


@pytest.mark.parametrize("recipe", SHIPPED, ids=lambda recipe: recipe.stem)
def test_every_shipped_recipe_parses(recipe):
    options = parse(TrainOptions, ["--config", str(recipe), "--model", "m", "--output", "o"])
    assert options.recipe in RECIPES and options.max_length >= 32


@pytest.mark.parametrize("problem_type", ["single_label_classification", "regression"])
def test_the_learned_recipe_calibrates_its_own_policy(options, small_task, tmp_path, problem_type, capsys):
    rows = [line.split("\t") for line in (small_task / "more.tsv").read_text().splitlines()[1:]]
    if problem_type == "regression":
        rows = [[text, str(len(label) + number / 1000)] for number, (text, label) in enumerate(rows)]
    (tmp_path / "rows.tsv").write_text("\n".join(["text\tlabel", *map("\t".join, rows)]) + "\n")
    own = dict.fromkeys(("train", "dev", "test"), str(tmp_path / "rows.tsv"))
    run = options(**own, recipe="learned", problem_type=problem_type, epochs=1, permitted_loss=1.0)
    if problem_type == "regression":
        run.model = fresh_start(tmp_path / "start", run.model)
    assert train(run) == 0
    config = ElasticBertForSequenceClassification.from_pretrained(run.output).config
    assert config.exit_policy["name"] == "learned" and config.learned_exit_head
    assert OperatingPoints.load(run.output).at("calibrated").mean_exit_layer < 4
    assert "test, with exits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="add --learned_exit_head, or --recipe learned"):
        train(options(exit_policy="learned", output=str(tmp_path / "other")))


def fresh_start(folder, checkpoint):
    """A checkpoint without a task head, of the same encoder and tokenizer."""
    from elastic_model import ElasticBertModel

    ElasticBertModel.from_pretrained(checkpoint).save_pretrained(folder)
    AutoTokenizer.from_pretrained(checkpoint).save_pretrained(folder)
    return str(folder)


def test_a_phase_ends_early_with_its_best_weights(options, capsys):
    """Nothing improves at a rate of almost zero: evaluations 2 and 3 are two in a row that are no better."""
    run = options(recipe="sandwich", patience=2, eval_steps=1, epochs=3, learning_rate=1e-12, metric="macro_f1")
    assert train(run) == 0
    printed = capsys.readouterr().out
    assert "update 3: no better for 2 evaluations; back to update 3" in printed
    assert "update 21: no better for 2 evaluations; back to update 21" in printed and "dev macro_f1" in printed
    updates = [line["update"] for line in log_of(run.output) if "loss" in line]
    assert updates == [1, 2, 3, 19, 20, 21]


def test_a_phase_that_freezes_the_last_exit_is_not_decided_by_it(options, monkeypatch, capsys):
    """Its quality cannot change, so that any phase ended after so many evaluations, whatever the inner exits did."""
    qualities = itertools.count()
    measured = lambda run: {1: {"accuracy": next(qualities) / 100}, 4: {"accuracy": 0.5}}  # noqa: E731
    run = options(recipe="two_stage", phase_epochs=[1, 1], patience=1, eval_steps=2)
    monkeypatch.setattr("finetune.run._quality_on_dev", measured)
    assert train(run) == 0
    printed = capsys.readouterr().out
    assert printed.count("no better for 1 evaluations") == 1  # in the first phase, which the last exit decides


def test_what_a_run_leaves_to_look_at(trained):
    folder = Path(trained.output)
    matrix = json.loads((folder / "confusion.json").read_text())
    evaluation = json.loads((folder / "evaluation.json").read_text())
    counts = np.array(matrix["counts"])
    right = evaluation["dev"]["full"]["quality"]["accuracy"]
    assert counts.sum() == 30 and counts.trace() / 30 == pytest.approx(right) and len(matrix["labels"]) == 3
    for name in ("confusion.png", "exits.png"):
        assert (folder / name).read_bytes().startswith(b"\x89PNG")


def test_names_with_dollar_signs_are_drawn(tmp_path):
    """They were formulas, one that could not be read ended a run whose training was over."""
    plot_confusion(tmp_path / "confusion.png", np.eye(2, dtype=int), ["$10_$20", "$10%-$20%"], "dev")
    assert (tmp_path / "confusion.png").stat().st_size


def test_names_of_any_length_are_drawn(tmp_path):
    """The memory that a figure of so long a name takes ended a run whose training was over."""
    plot_confusion(tmp_path / "confusion.png", np.eye(3, dtype=int), ["a" * 15_000, "b c " * 9_000, "d"], "dev")
    assert (tmp_path / "confusion.png").stat().st_size < 200_000


def test_a_tracker_writes_into_the_checkpoint_also_after_a_resume(options, monkeypatch):
    settings = {"tracker": "tensorboard", "epochs": 1, "save_steps": 2}

    def crash(run, phase, model, number):
        if number == 4:
            raise Crash
        return backward(run, phase, model, number)

    monkeypatch.setattr(finetune.train, "backward", crash)
    with pytest.raises(Crash):
        train(options(**settings))
    monkeypatch.undo()
    time.sleep(1.1)  # a tracker's files are named by the second
    assert train(options(**settings, resume=True)) == 0
    written = list((Path(options().output) / "finetune").glob("events.out.tfevents.*"))
    assert len(written) == 2 and any(b"dev/4/accuracy" in file.read_bytes() for file in written)


def test_a_teacher_with_another_tokenizer_teaches(options, tiny_tokenizer, tmp_path, capsys):
    """A stock model of other sizes, labels in another order and a vocabulary of its own."""
    from transformers import BertConfig, BertForSequenceClassification

    from pretrain.tokenizer import train_wordpiece

    names = ["late", "middle", "early"]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    labels = {"id2label": dict(enumerate(names)), "label2id": {name: number for number, name in enumerate(names)}}
    BertForSequenceClassification(BertConfig(vocab_size=300, **sizes, **labels)).save_pretrained(tmp_path / "teacher")
    tokenizer = train_wordpiece(["other words other pieces treaty army energy"] * 3, 90, lowercase=False)
    tokenizer.save_pretrained(tmp_path / "teacher")
    assert train(options(teacher=str(tmp_path / "teacher"), epochs=1)) == 0
    config = BertConfig(vocab_size=300, max_position_embeddings=8, **sizes, **labels)
    BertForSequenceClassification(config).save_pretrained(tmp_path / "teacher")  # it reads what it can of each row
    assert train(options(teacher=str(tmp_path / "teacher"), epochs=1, output=str(tmp_path / "short"))) == 0
    with pytest.raises(ValueError, match="bare has no trained head for single_label"):
        train(options(teacher=str(no_head(tmp_path / "bare", tokenizer, sizes)), output=str(tmp_path / "other")))


def no_head(folder, tokenizer, sizes):
    from transformers import BertConfig, BertModel

    labels = {"id2label": {0: "early", 1: "middle", 2: "late"}, "label2id": {"early": 0, "middle": 1, "late": 2}}
    BertModel(BertConfig(vocab_size=300, **sizes, **labels)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_phase_that_ends_early_hands_on_its_best_weights(options, monkeypatch):
    """And every update is trained in training mode, also behind an evaluation."""
    qualities, seen = iter([0.9, 0.8, *[0.5] * 50]), []
    monkeypatch.setattr("finetune.run._quality_on_dev", lambda run: {4: {"accuracy": next(qualities)}})

    def watched(run, phase, engine, number):
        seen.append((number, engine.model.training, copy.deepcopy(run.model.state_dict())))
        return backward(run, phase, engine, number)

    monkeypatch.setattr(finetune.train, "backward", watched)
    assert train(options(recipe="two_stage", phase_epochs=[1, 1], patience=1, eval_steps=1)) == 0
    numbers = [number for number, _, _ in seen]
    assert numbers[:3] == [0, 1, 6] and all(training for _, training, _ in seen)
    assert_same_weights(seen[2][2], seen[1][2])  # phase 2 begins with what update 1 left, not update 2


def test_a_gradient_that_is_not_finite_ends_the_run(options):
    with pytest.raises(ValueError, match="the gradient of update 8 is nan; a lower learning_rate may help"):
        _step(SimpleNamespace(step=lambda rate: float("nan")), 0.1, Progress(update=7))
