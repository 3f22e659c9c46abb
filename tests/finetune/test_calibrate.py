"""The command that certifies thresholds: what it promises holds on what it writes, and what it cannot it refuses."""

import json
import re
import shutil
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoTokenizer

from elastic_model import ElasticBertForSequenceClassification, ElasticSession
from elastic_model.arguments import dispatch, run
from elastic_model.calibration import allowed_failures, upper_bound
from elastic_model.exit_policies import normalised_entropy, predict
from elastic_model.operating_points import FILE, OperatingPoints
from export.__main__ import COMMANDS
from finetune.__main__ import _command
from finetune.calibrate import Served, _check, calibrate, certify, chosen_on, differing
from finetune.config import CalibrateOptions
from finetune.policies import candidates
from tests.export.graphs import lively


@pytest.fixture
def checkpoint(tiny_config, tiny_tokenizer, small_task, tmp_path):
    """A classifier of random weights that answers all three classes, and whose exits answer more and more as the last
    one: the first differs in an eighth of the rows."""
    torch.manual_seed(0)
    tiny_config.initializer_range, tiny_config.exit_pooling = 0.05, ["mean"] * 4
    model = ElasticBertForSequenceClassification(tiny_config).eval()
    heads, poolers = model.classifiers, model.elasticbert.encoder.pooler
    for weight, std in ((model.get_input_embeddings(), 1.0), (poolers.at(4).dense, 0.3), (heads.at(4), 2.0)):
        torch.nn.init.normal_(weight.weight, std=std)
    lines = [line.split("\t")[0] for line in (small_task / "more.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():
        heads.at(4).bias -= model(**tiny_tokenizer(lines, padding=True, return_tensors="pt")).logits.mean(0)
    for layer in (1, 2, 3):
        poolers.at(layer).load_state_dict(poolers.at(4).state_dict())
        heads.at(layer).load_state_dict(heads.at(4).state_dict())
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def options_of(checkpoint, small_task, **changes):
    own = {"dev": str(small_task / "more.tsv"), "text": "text", "label": "label", "max_length": 32}
    return CalibrateOptions(**{"model": str(checkpoint), "max_disagreement": 0.2, **own, **changes})


@pytest.fixture
def texts(small_task, tmp_path):
    lines = [line.split("\t")[0] for line in (small_task / "more.tsv").read_text().splitlines()[1:]]
    (tmp_path / "texts.txt").write_text("\n".join(lines) + "\n")
    return tmp_path / "texts.txt"


def answers(model, tokenizer, lines, **how):
    batch = tokenizer(lines, padding=True, return_tensors="pt")
    with torch.no_grad():
        output = model(**batch, **how)
    return output.logits.argmax(-1), output.exit_layers


def test_the_checkpoint_answers_as_was_promised(checkpoint, small_task, texts, tiny_tokenizer, tmp_path, capsys):
    calibrate(options_of(checkpoint, small_task, output=str(tmp_path / "report.json")))
    report, point = (
        json.loads((tmp_path / "report.json").read_text()),
        OperatingPoints.load(checkpoint).at("calibrated"),
    )
    model = ElasticBertForSequenceClassification.from_pretrained(checkpoint).eval()
    lines = texts.read_text().splitlines()
    early, left = answers(model, tiny_tokenizer, lines)  # the config's own policy
    full, _ = answers(model, tiny_tokenizer, lines, exit_policy={"name": "never"})
    assert (early != full).sum() == report["failures"] <= report["upper_bound"] * 240 < 0.2 * 240
    assert Counter(map(str, left.tolist())) == report["exit_counts"] == point.calibration["exit_counts"]
    assert point.mean_exit_layer < 4 and report["speedup"] > 1 and "exchangeable" in capsys.readouterr().out
    assert (tmp_path / "report.png").stat().st_size
    assert sum(one["rows"] for one in report["classes"]) == 240
    assert sum(one["failures"] for one in report["classes"]) == report["failures"]


def test_unlabelled_texts_against_an_original(checkpoint, small_task, texts, tmp_path, capsys):
    original = tmp_path / "original"
    ElasticBertForSequenceClassification.from_pretrained(checkpoint).save_pretrained(original)
    for file in checkpoint.glob("tokenizer*"):
        (original / file.name).write_bytes(file.read_bytes())
    own = {"dev": None, "text": None, "label": None, "texts": str(texts)}
    calibrate(options_of(checkpoint, small_task, **own, reference=str(original)))
    first = OperatingPoints.load(checkpoint).at("calibrated")
    assert first.quality is None and first.calibration["against"] == "original"
    calibrate(options_of(checkpoint, small_task))
    assert OperatingPoints.load(checkpoint).at("calibrated").thresholds == first.thresholds


def test_an_exported_folder_is_calibrated_on_what_it_serves(checkpoint, small_task, texts, tmp_path, capsys):
    assert run(lambda: dispatch(COMMANDS, [str(checkpoint), str(tmp_path / "exported")], "export")) == 0
    calibrate(options_of(tmp_path / "exported", small_task))
    session = ElasticSession.from_pretrained(tmp_path / "exported")
    point, lines = session.points.at("calibrated"), texts.read_text().splitlines()
    early, full = session(lines, budget="calibrated"), session.exit_logits(lines)[-1].argmax(-1)
    wrong = sum(one["label"] != session.labels[best] for one, best in zip(early, full, strict=True))
    assert wrong == point.calibration["failures"] and point.calibration["file"] == session.file.stem
    assert Counter(str(one["exit_layer"]) for one in early) == point.calibration["exit_counts"]

    for name, kept in (("same", early), ("other", [{"exit_layer": 4}] * 200)):
        rows = [f"x\t{one['exit_layer']}" for one in kept]
        (tmp_path / f"{name}.tsv").write_text("\n".join(["label\texit_layer", *rows]))
    calibrate(options_of(tmp_path / "exported", small_task, drift=str(tmp_path / "same.tsv")))
    assert "no drift is seen" in capsys.readouterr().out
    calibrate(options_of(tmp_path / "exported", small_task, drift=str(tmp_path / "other.tsv")))
    assert "calibrate anew" in capsys.readouterr().out
    (tmp_path / "full.tsv").write_text("label\texit_layer\tpoint\n" + "x\t4\tfull\n" * 9)
    with pytest.raises(ValueError, match="full.tsv holds answers at the point full, not 'calibrated'"):
        calibrate(options_of(tmp_path / "exported", small_task, drift=str(tmp_path / "full.tsv")))


def test_an_export_that_drops_tokens_is_held_against_the_full_model(
    checkpoint, tiny_config, tiny_tokenizer, small_task, tmp_path
):
    """It was held against its own last exit, at the lengths that it drops to."""
    tiny_config.length_config = [0.3, 0.2, 0.15, 0.1]
    shorter = lively(tiny_config)
    lines = [line.split("\t")[0] for line in (small_task / "more.tsv").read_text().splitlines()[1:]]
    with torch.no_grad():  # classes as likely as each other, so that lengths decide some answers
        batch = tiny_tokenizer(lines, padding=True, return_tensors="pt")
        shorter.classifiers.at(4).bias -= shorter(**batch, exit_policy={"name": "never"}).logits.mean(0)
    shorter.save_pretrained(checkpoint)
    assert run(lambda: dispatch(COMMANDS, [str(checkpoint), str(tmp_path / "exported")], "export")) == 0
    session = ElasticSession.from_pretrained(tmp_path / "exported")
    whole = session.exit_logits(lines, length_config=[1.0] * 4)[-1].argmax(-1)
    differing = (session.exit_logits(lines)[-1].argmax(-1) != whole).mean()
    assert differing > 0.02
    with pytest.raises(ValueError, match=f"not even full depth can be certified: {round(differing * 240)} of 240"):
        calibrate(options_of(tmp_path / "exported", small_task, max_disagreement=float(differing)))


def test_an_export_reads_its_rows_whole(checkpoint, small_task, tmp_path, capsys):
    """Its costs, and what a reference read, were of rows cut at --max_length."""
    assert run(lambda: dispatch(COMMANDS, [str(checkpoint), str(tmp_path / "exported")], "export")) == 0
    calibrate(options_of(tmp_path / "exported", small_task, max_length=8))
    cut = OperatingPoints.load(tmp_path / "exported").points
    assert "note: an exported folder reads up to 64 tokens" in capsys.readouterr().out
    calibrate(options_of(tmp_path / "exported", small_task, max_length=64))
    assert OperatingPoints.load(tmp_path / "exported").points == cut and cut[0].name == "full"


def test_points_of_other_weights_are_replaced(checkpoint, small_task, tmp_path, capsys):
    """They were refused, with the advice to calibrate, which refused them."""
    calibrate(options_of(checkpoint, small_task))
    table = OperatingPoints.load(checkpoint)
    replace(table, checkpoint="0" * 64).save(checkpoint)
    calibrate(options_of(checkpoint, small_task))
    assert OperatingPoints.load(checkpoint) == table
    exported = tmp_path / "exported"  # its session was opened with them
    assert run(lambda: dispatch(COMMANDS, [str(checkpoint), str(exported)], "export")) == 0
    for stale in (replace(table, checkpoint="0" * 64), replace(table, policy={"name": "margin", "threshold": 1.0})):
        stale.save(exported)
        calibrate(options_of(exported, small_task, max_length=64))
        assert OperatingPoints.load(exported).policy["name"] == "entropy" and ElasticSession.from_pretrained(exported)


def test_output_that_is_no_file_gets_no_figure(checkpoint, small_task, tmp_path, capsys):
    calibrate(options_of(checkpoint, small_task, output="/dev/null"))
    assert not Path("/dev/null.png").exists()
    calibrate(options_of(checkpoint, small_task, output=str(tmp_path / "report.json")))
    assert (tmp_path / "report.png").is_file()


def test_accuracy_and_lengths(checkpoint, small_task, capsys):
    bound = {"max_disagreement": None, "max_accuracy_loss": 0.2}
    calibrate(options_of(checkpoint, small_task, **bound, length_config=[1.0, 0.9, 0.9, 0.9]))
    point = OperatingPoints.load(checkpoint).at("calibrated")
    assert point.length_config == [1.0, 0.9, 0.9, 0.9] and point.calibration["bounds"] == "accuracy loss"
    assert json.loads((checkpoint / "config.json").read_text())["length_config"] == [1.0, 0.9, 0.9, 0.9]


def test_the_table_stays_comparable(checkpoint, small_task, texts, capsys):
    """Costs on other rows than the table's, and without quality, made the calibrated point full depth."""
    calibrate(options_of(checkpoint, small_task, dev=None, text=None, label=None, texts=str(texts)))
    table = OperatingPoints.load(checkpoint)
    assert [point.name for point in table.points] == ["full", "calibrated"] and table.full().name == "full"
    speedup = table.points[0].flops / table.points[1].flops
    assert table.at(speedup=speedup * 0.999).name == "calibrated" and speedup > 1
    smaller = [replace(table.points[0], flops=table.points[0].flops / 10)]  # measured on shorter rows
    replace(table, points=smaller).save(checkpoint)
    calibrate(options_of(checkpoint, small_task, dev=None, text=None, label=None, texts=str(texts)))
    full, calibrated = OperatingPoints.load(checkpoint).points
    assert full.flops / calibrated.flops == pytest.approx(speedup)


def test_rows_that_chose_the_checkpoint_are_told(trained, tmp_path, capsys):
    folder = shutil.copytree(trained.output, tmp_path / "checkpoint")
    own = {"text": "text", "label": "label", "max_length": trained.max_length, "max_disagreement": 0.3}
    calibrate(CalibrateOptions(model=str(folder), dev=trained.dev, **own))
    assert "warning: the stage 'finetune' of this checkpoint was trained or chosen on" in capsys.readouterr().out
    calibrate(CalibrateOptions(model=str(folder), dev=trained.test or trained.dev.replace("dev", "test"), **own))
    assert "warning" not in capsys.readouterr().out
    assert run(lambda: dispatch(COMMANDS, [str(folder), str(tmp_path / "exported")], "export")) == 0
    calibrate(
        CalibrateOptions(model=str(tmp_path / "exported"), dev=trained.dev, **own)
    )  # reads longer rows than train
    assert "warning: the stage 'finetune' of this checkpoint was trained or chosen on" in capsys.readouterr().out


def test_points_of_another_policy_are_left_out_aloud(checkpoint, small_task, texts, capsys):
    own = {"dev": None, "text": None, "label": None, "texts": str(texts)}
    calibrate(options_of(checkpoint, small_task, **own, exit_policy="entropy"))
    assert "left out" not in capsys.readouterr().out
    calibrate(options_of(checkpoint, small_task, **own, exit_policy="confidence"))
    assert "its points (full, calibrated) are of the policy 'entropy', and left out" in capsys.readouterr().out


def test_rows_that_training_only_reported_are_free(trained, tmp_path):
    """The warning said that they had trained or chosen the checkpoint."""
    folder = shutil.copytree(trained.output, tmp_path / "checkpoint")
    record = json.loads((folder / "provenance.json").read_text())
    (stage,) = record["stages"]
    stage["data"] = [{**data, "split": "test"} for data in stage["data"] if data["split"] == "dev"]
    own = {"text": "text", "label": "label", "max_length": trained.max_length, "max_disagreement": 0.3}
    options = CalibrateOptions(model=str(folder), dev=trained.dev, **own)
    how = (folder, options, AutoConfig.from_pretrained(folder), AutoTokenizer.from_pretrained(folder), True)
    assert chosen_on(*how) is not None
    (folder / "provenance.json").write_text(json.dumps(record))
    assert chosen_on(*how) is None


def test_rows_that_choose_their_own_lengths_are_refused_at_once(checkpoint, small_task):
    content = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**content, "length_config": {"mass": [0.9] * 4}}))
    with pytest.raises(ValueError, match="rows choose their own lengths .* calibrate at shares: --length_config"):
        calibrate(options_of(checkpoint, small_task))


def test_accuracy_is_not_lost_of_questions():
    """Answers are texts and the truth is several of them: none was ever equal, so that nothing counted as lost."""
    with pytest.raises(ValueError, match="--max-accuracy-loss needs labels of classes; use --max-disagreement"):
        _check(CalibrateOptions(model="", max_accuracy_loss=0.1), "question_answering")


def test_the_learned_head(checkpoint, small_task, tiny_tokenizer, texts, capsys):
    with pytest.raises(ValueError, match="asks a learned exit head"):
        calibrate(options_of(checkpoint, small_task, exit_policy="learned"))
    model = ElasticBertForSequenceClassification.from_pretrained(checkpoint, learned_exit_head=True).eval()
    torch.nn.init.normal_(model.exit_uncertainty.weight, std=1.0)
    model.save_pretrained(checkpoint)
    calibrate(options_of(checkpoint, small_task, exit_policy="learned"))
    point = OperatingPoints.load(checkpoint).at("calibrated")
    policy, _ = point
    _, left = answers(model, tiny_tokenizer, texts.read_text().splitlines(), exit_policy=policy)
    assert policy["name"] == "learned" and Counter(map(str, left.tolist())) == point.calibration["exit_counts"]

    # the head was asked at full length, whatever the checkpoint's own
    model.config.length_config = [0.5, 0.4, 0.3, 0.3]
    (checkpoint / FILE).unlink()
    model.save_pretrained(checkpoint)
    calibrate(options_of(checkpoint, small_task, exit_policy="learned", max_disagreement=0.9))
    point = OperatingPoints.load(checkpoint).at("calibrated")
    how = {"exit_policy": point.policy, "length_config": point.length_config}
    _, left = answers(model, tiny_tokenizer, texts.read_text().splitlines(), **how)
    assert Counter(map(str, left.tolist())) == point.calibration["exit_counts"]

    given = [0.9, 0.8, 0.7, 0.6]  # and at lengths that are named
    calibrate(options_of(checkpoint, small_task, exit_policy="learned", max_disagreement=0.9, length_config=given))
    point = OperatingPoints.load(checkpoint).at("calibrated")
    how = {"exit_policy": point.policy, "length_config": given}
    _, left = answers(model, tiny_tokenizer, texts.read_text().splitlines(), **how)
    assert Counter(map(str, left.tolist())) == point.calibration["exit_counts"]


def test_regression_within_a_tolerance(tiny_config, tiny_tokenizer, small_task, tmp_path, capsys):
    torch.manual_seed(0)
    tiny_config.num_labels = 1
    model = ElasticBertForSequenceClassification(tiny_config)
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    scores = "\n".join(f"the {word} treaty\t{number / 7:.3f}" for number, word in enumerate(200 * ["army", "people"]))
    (tmp_path / "scores.tsv").write_text(f"text\tlabel\n{scores}\n")
    options = options_of(tmp_path / "checkpoint", small_task, dev=str(tmp_path / "scores.tsv"), tolerance=0.3)
    calibrate(options)
    policy, _ = OperatingPoints.load(tmp_path / "checkpoint").at("calibrated")
    assert policy["name"] == "patience" and max(policy["threshold"]) > 0
    with pytest.raises(ValueError, match="regression needs --tolerance"):
        calibrate(options_of(tmp_path / "checkpoint", small_task))

    # the steps that a patience counts are built into a file: a table of others made it unloadable
    model.config.exit_policy = {"name": "patience", "patience": 2, "threshold": 0.5}
    model.save_pretrained(tmp_path / "checkpoint")
    (tmp_path / "checkpoint" / FILE).unlink()
    assert run(lambda: dispatch(COMMANDS, [str(tmp_path / "checkpoint"), str(tmp_path / "exported")], "export")) == 0
    for folder in (tmp_path / "exported", tmp_path / "checkpoint"):
        calibrate(replace(options, model=str(folder)))
        assert OperatingPoints.load(folder).policy["patience"] == 2
    assert ElasticSession.from_pretrained(tmp_path / "exported")("the army", budget="calibrated")


def test_what_answers_nan_is_not_certified(tiny_config, tiny_tokenizer, small_task, texts, tmp_path):
    tiny_config.num_labels, tiny_config.problem_type = 1, "regression"
    model = ElasticBertForSequenceClassification(tiny_config)
    for name in ("sound", "broken"):
        model.save_pretrained(tmp_path / name)
        tiny_tokenizer.save_pretrained(tmp_path / name)
        with torch.no_grad():
            model.elasticbert.encoder.layer[2].output.dense.weight[0, 0] = float("nan")
    given = {"dev": None, "label": None, "text": None, "texts": str(texts), "tolerance": 0.5}
    with pytest.raises(
        ValueError, match="logits are NaN or infinite at the exits 3, 4 .of 1, 2, 3, 4. for 64 of 64 rows"
    ):
        calibrate(options_of(tmp_path / "broken", small_task, **given))
    with pytest.raises(ValueError, match="broken answers NaN or infinity to row"):
        calibrate(options_of(tmp_path / "sound", small_task, reference=str(tmp_path / "broken"), **given))
    answers, truth = np.array([1.0, np.nan, np.nan]), np.array([1.0, 1.0, np.nan])
    assert differing(answers, truth, 0.5).tolist() == [False, True, True]


def test_options_of_a_task_are_refused_beside_texts(checkpoint, small_task, texts):
    given = {"dev": None, "label": None, "text": None, "texts": str(texts)}
    for name, value in (("split", "test"), ("metrics", ["macro_f1"]), ("dataset_config", "x")):
        with pytest.raises(ValueError, match=f"calibrated on without a task and its labels: leave --{name} away"):
            calibrate(options_of(checkpoint, small_task, **given, **{name: value}))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"max_disagreement": 0.01}, "240 calibration rows cannot bound a rate by 0.01 .* at least 299 are needed"),
        ({"max_disagreement": None}, "give one bound: --max-disagreement or --max-accuracy-loss"),
        ({"max_accuracy_loss": 0.1}, "give one bound"),
        ({"max_disagreement": 0.0}, "max_disagreement must lie between 0 and 1"),
        ({"confidence": 1.0}, "confidence must lie between 0 and 1"),
        ({"tolerance": 0.5}, "--tolerance is for regression"),
        ({"exit_policy": "constant"}, "'constant' cannot be calibrated"),
        ({"length_config": [0.5, 0.6, 0.6, 0.6]}, "must not rise"),
        ({"model": "/nowhere"}, "/nowhere is not a folder"),
        ({"file": "model"}, "--file names one of an exported folder"),
        ({"texts": "texts.txt"}, "leave --dev, --label away"),
    ],
)
def test_what_cannot_be_certified_is_named_and_nothing_is_written(checkpoint, small_task, changes, says):
    before = (checkpoint / "config.json").read_text()
    with pytest.raises(ValueError, match=says):
        calibrate(options_of(checkpoint, small_task, **changes))
    assert not (checkpoint / FILE).exists() and (checkpoint / "config.json").read_text() == before


def test_a_single_class_and_hyphens(checkpoint, small_task, tmp_path, capsys):
    (tmp_path / "one.tsv").write_text("text\tlabel\n" + "the army\tearly\n" * 100)
    argv = ["calibrate", str(checkpoint), "--dev", str(tmp_path / "one.tsv"), "--text", "text", "--label", "label"]
    argv += ["--max-length", "32", "--max-disagreement", "0.2", "--confidence", "0.95"]
    assert run(lambda: _command(argv)) == 2
    assert re.search("the dev split has one class only", capsys.readouterr().err)
    argv[3] = str(small_task / "more.tsv")
    assert run(lambda: _command(argv)) == 0 and np.isfinite(OperatingPoints.load(checkpoint).at("calibrated").flops)


def test_the_confidence_asked_for_is_that_of_the_promise(checkpoint, small_task, tmp_path, capsys):
    found = {}
    for confidence in (0.55, 0.999):
        output = tmp_path / f"{confidence}.json"
        calibrate(options_of(checkpoint, small_task, confidence=confidence, output=str(output), max_disagreement=0.12))
        found[confidence] = json.loads(output.read_text())
        report = found[confidence]
        assert report["failures"] <= allowed_failures(240, 0.12, confidence)
        assert report["upper_bound"] == upper_bound(report["failures"], 240, confidence) <= 0.12
        assert all(
            one["upper_bound"] is None or one["upper_bound"] == upper_bound(one["failures"], one["rows"], confidence)
            for one in report["classes"]
        )
    assert found[0.55]["failures"] > found[0.999]["failures"]


def test_what_the_reference_gets_wrong_cannot_be_lost(checkpoint, small_task, texts, tiny_tokenizer):
    calibrate(options_of(checkpoint, small_task, max_disagreement=None, max_accuracy_loss=0.2))
    point = OperatingPoints.load(checkpoint).at("calibrated")
    model = ElasticBertForSequenceClassification.from_pretrained(checkpoint).eval()
    lines = texts.read_text().splitlines()
    truth = [line.split("\t")[1] for line in (small_task / "more.tsv").read_text().splitlines()[1:]]
    early, _ = answers(model, tiny_tokenizer, lines)
    full, _ = answers(model, tiny_tokenizer, lines, exit_policy={"name": "never"})
    right = full == torch.tensor([model.config.label2id[label] for label in truth])
    lost = (right & (early != full)).sum()
    assert point.calibration["failures"] == lost < (early != full).sum()


def test_a_reference_answers_in_our_order_and_at_its_full_depth(checkpoint, small_task, texts, tmp_path, capsys):
    """Whatever the order of its labels and its own default policy."""
    own = {"dev": None, "text": None, "label": None, "texts": str(texts)}
    calibrate(options_of(checkpoint, small_task, **own))
    expected = OperatingPoints.load(checkpoint).at("calibrated")
    (checkpoint / FILE).unlink()
    other = ElasticBertForSequenceClassification.from_pretrained(checkpoint)
    order = [2, 0, 1]
    for layer in range(1, 5):
        head = other.classifiers.at(layer)
        head.weight.data, head.bias.data = head.weight.data[order], head.bias.data[order]
    names = [other.config.id2label[number] for number in order]
    other.config.id2label, other.config.label2id = dict(enumerate(names)), {name: n for n, name in enumerate(names)}
    other.config.exit_policy, other.config.length_config = {"name": "constant", "layer": 1}, [0.3] * 4
    other.save_pretrained(tmp_path / "other")
    for file in checkpoint.glob("tokenizer*"):
        shutil.copy(file, tmp_path / "other")
    calibrate(options_of(checkpoint, small_task, **own, reference=str(tmp_path / "other")))
    found = OperatingPoints.load(checkpoint).at("calibrated")
    assert found.thresholds == expected.thresholds
    assert found.calibration["failures"] == expected.calibration["failures"]


def test_of_settings_that_do_the_same_the_strictest_is_kept(tiny_config):
    """What lies between two rows' certainties was not seen: a looser threshold promises nothing more."""
    logits = np.zeros((4, 100, 3), dtype=np.float32)
    logits[:, :50, 0], logits[:, 50:, 1] = 9.0, 0.1  # sure rows and unsure ones, none in between
    logits[3, 50:, 2] = 5.0  # where the unsure ones are wrong
    rows = SimpleNamespace(
        encoded=SimpleNamespace(mask=None, labels=None),
        labels=SimpleNamespace(problem_type="single_label_classification", names=["a", "b", "c"]),
    )
    options = CalibrateOptions(model="", max_disagreement=0.1)
    tiny_config.exit_layers = [1, 2, 3, 4]
    found = certify(options, rows, Served(logits, logits[-1]), logits[-1].argmax(-1), tiny_config)
    grid = [one["threshold"] for one in candidates("entropy", logits, "single_label_classification")]
    doubt = normalised_entropy(predict(torch.from_numpy(logits[0, :1]), "single_label_classification")).item()
    assert found.policy["threshold"] == min(one for one in grid if one > doubt) < 0.5
    assert found.places.tolist() == [0] * 50 + [3] * 50 and not found.failing.any()


def test_a_tolerance_that_is_just_met_is_met():
    assert differing(np.array([0.5, 0.75]), np.zeros(2), 0.5).tolist() == [False, True]


def test_rows_of_a_split_that_chose_are_told_however_they_were_cut(checkpoint, monkeypatch):
    """As of a run on some of its rows: their hash is another one."""
    stage = SimpleNamespace(
        stage="search", settings={}, data=[SimpleNamespace(name="sst2", split="dev", sha256="of some of them")]
    )
    monkeypatch.setattr("finetune.calibrate.read_provenance", lambda folder: [stage])
    monkeypatch.setattr("finetune.calibrate.read_rows", lambda *how: SimpleNamespace(encoded=None))
    monkeypatch.setattr("finetune.calibrate.rows_hash", lambda encoded: "of all of them")
    told = {split: chosen_on(checkpoint, CalibrateOptions(model="", task="sst2", split=split), None, None, True)
            for split in ("dev", "test")}  # fmt: skip
    assert "the stage 'search' of this checkpoint was trained or chosen on" in told["dev"] and told["test"] is None
