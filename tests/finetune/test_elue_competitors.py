"""Methods from elsewhere: what each claims of its models, and that their test files are scored as anybody's."""

import itertools
import json
import re
import shutil

import pytest
import torch

from benchmarks.competitors.__main__ import COMPETITORS, _command
from benchmarks.competitors.dynabert import widths_of
from benchmarks.competitors.head_prune import kept_heads
from benchmarks.competitors.power_bert import configuration_of, retention_rate, soft_extract
from elastic_model import ElasticBertForSequenceClassification
from elastic_model.arguments import run
from elastic_model.cost import flops
from elastic_model.folders import MARKER
from finetune.__main__ import _command as finetune_command
from finetune.elue.scoring import read_result
from finetune.train import learning_rate
from finetune.widths import gated, importance, narrowed


@pytest.fixture
def model(tiny_config):
    """A single-exit classifier."""
    torch.manual_seed(0)
    tiny_config.exit_layers = [4]
    return ElasticBertForSequenceClassification(tiny_config).eval()


@pytest.fixture
def batch():
    """Three rows, the last two padded."""
    draw = torch.Generator().manual_seed(0)
    ids = torch.randint(5, 200, (3, 12), generator=draw)
    mask = torch.arange(12) < torch.tensor([12, 7, 3])[:, None]
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": torch.tensor([0, 1, 2])}


def inputs(batch):
    return {name: tensor for name, tensor in batch.items() if name != "labels"}


HEADS = [[0, 2], [1], [0, 1, 2, 3], [3]]
NEURONS = [[*range(0, 64, 2)], [*range(5)], [*range(64)], [7]]


def masks(kept, counts):
    return [torch.zeros(count).index_fill(0, torch.tensor(one), 1.0) for one, count in zip(kept, counts, strict=True)]


@torch.no_grad()
def test_the_narrow_model_is_the_masked_one(model, batch):
    with gated(model, masks(HEADS, [4] * 4), masks(NEURONS, [64] * 4)):
        expected = model(**inputs(batch)).logits
    narrow = narrowed(model, HEADS, NEURONS)
    torch.testing.assert_close(narrow(**inputs(batch)).logits, expected, atol=1e-5, rtol=0)
    assert flops(narrow.config, 12) < flops(model.config, 12)
    assert not torch.allclose(expected, model(**inputs(batch)).logits, atol=1e-4)


def test_importance_is_the_gradient_of_the_gates(model, batch):
    heads, neurons = importance(model, [batch, batch])
    once, _ = importance(model, [batch])
    assert [len(gate) for gate in heads] == [4] * 4 and [len(gate) for gate in neurons] == [64] * 4
    assert all(torch.allclose(twice, 2 * one) for twice, one in zip(heads, once, strict=True))
    step = 1e-2
    ones = [torch.ones(4) for _ in range(4)], [torch.ones(64) for _ in range(4)]
    losses = []
    for sign in (1, -1):
        moved = [gate.clone() for gate in ones[0]]
        moved[1][2] += sign * step
        with gated(model, moved, ones[1]), torch.no_grad():
            losses.append(model(**batch).loss)
    assert float(abs(losses[0] - losses[1]) / (2 * step)) == pytest.approx(float(once[1][2]), rel=2e-2, abs=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("updates", [10, 126, 312, 5000])
def test_retention_can_go_from_1_to_0_in_a_run_of_any_length(updates):
    moves = (learning_rate(update, updates, retention_rate(updates), warmup=0.1) for update in range(updates))
    assert sum(moves) > 1


def test_soft_extract_keeping_everything_is_the_model(model, batch):
    logits = soft_extract(model, batch, torch.ones(4, 12))
    torch.testing.assert_close(logits, model(**inputs(batch)).logits, atol=1e-5, rtol=0)


@torch.no_grad()
def test_soft_extract_of_zeros_and_ones_drops_the_least_significant(model, batch):
    """Of tokens that are kept by rank in the last layer alone, [CLS] and so the answer is the same: hard or soft."""
    lengths = [12, 12, 12, 4]
    retention = (torch.arange(12) < torch.tensor(lengths)[:, None]).float()
    expected = model(**inputs(batch), length_config=lengths).logits
    torch.testing.assert_close(soft_extract(model, batch, retention), expected, atol=1e-5, rtol=0)


def test_the_learned_configuration_never_rises():
    draw = torch.Generator().manual_seed(0)
    for _ in range(20):
        lengths = configuration_of(torch.rand(6, 32, generator=draw))
        assert min(lengths) >= 2 and all(after <= before for before, after in itertools.pairwise(lengths))
    assert configuration_of(torch.tensor([[1.0, 1.0, 0.2], [0.5, 0.0, 0.0], [1.0, 1.0, 1.0]])) == [3, 2, 2]


def test_widths_are_nested_and_heads_stay_in_every_layer():
    scores = [torch.tensor([0.1, 0.9, 0.5, 0.2]), torch.tensor([3.0, 1.0, 2.0, 0.0])]
    assert widths_of(scores, 0.5) == [[1, 2], [0, 2]]
    assert widths_of(scores, 0.25) == [[1], [0]]
    assert kept_heads(scores, 0.5) == [[1], [0, 1, 2]]
    assert kept_heads(scores, 1.0) == [[0, 1, 2, 3]] * 2


def test_an_unknown_competitor_is_named(capsys):
    assert run(lambda: _command(["tinybert"])) == 2
    assert "competitor 'tinybert' is unknown; allowed: head_prune, dynabert, power_bert" in capsys.readouterr().err


def test_a_run_is_not_put_into_a_checkpoint(elue_data, elue_start, tmp_path, capsys):
    folder = shutil.copytree(elue_start, tmp_path / "ours")
    (folder / MARKER).write_text("")
    flags = ["--model", str(elue_start), "--tasks", "sst2", "--output", str(folder)]
    assert run(lambda: _command(["head_prune", *flags])) == 2
    assert f"output {folder} is a checkpoint; choose another output" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("name", COMPETITORS)
def test_a_competitor_from_checkpoint_to_score(name, elue_data, elue_start, capsys):
    short = ["--epochs", "1", "--max-length", "32", "--batch-size", "16", "--learning-rate", "1e-3", "--seeds", "0"]
    out = elue_data / "out"
    flags = ["--model", str(elue_start), "--output", str(out), "--tasks", "sst2", "stsb", *short]
    assert run(lambda: _command([name, *flags])) == 0
    own = ["--submission", str(out / "submissions" / name / "seed-0"), "--labels", str(out / "labels")]
    assert run(lambda: finetune_command(["elue", "score", *own, "--output", str(elue_data / "scored")])) == 0
    tasks = read_result(elue_data / "scored").tasks
    assert set(tasks) == {"sst2", "stsb"} and read_result(out / "results" / f"{name}.json").tasks == tasks
    board = json.loads((out / "leaderboard.json").read_text())
    assert board["entries"][0]["note"].startswith(COMPETITORS[name].paper) and len(board["notes"]) == 2
    costs = [{point.flops for point in task.points} for task in tasks.values()]
    assert all(len(task.points) >= 4 for task in tasks.values())
    # so few updates teach PoWER-BERT to drop nothing: models of several qualities at one cost are no reference curve
    assert name == "power_bert" or all(len(one) >= 4 for one in costs)
    given = str(elue_data / "scored" / "scores.json")
    is_curve = all(len({point.quality for point in task.points if point.flops == cost}) == 1
                   for task, own in zip(tasks.values(), costs, strict=True) for cost in own)  # fmt: skip
    capsys.readouterr()
    assert run(lambda: _command([name, *flags, "--reference", given])) == (0 if is_curve else 2)
    assert is_curve or re.search("sst2|stsb: the reference has two qualities at", capsys.readouterr().err)
    board = json.loads((out / "leaderboard.json").read_text())
    assert not is_curve or (board["reference"] == given and board["entries"][0]["macro"] == 0.0)


def test_what_fails_later_is_told_before_training(elue_data, elue_start, tmp_path, capsys):
    own = ["--model", str(elue_start), "--output", str(tmp_path / "out"), "--tasks", "sst2", "stsb", "--seeds", "0"]
    (tmp_path / "curve.tsv").write_text("task\tflops\tquality\nsst2\t5\t1\nsst2\t5\t2\n")
    for flags, message in (
        (["--max-length", "sst2=24", "stsb=999"], "stsb: max_length must be 3 to 64"),
        (["--max-length", "32", "--train-rows", "stsb=3"], "3 train rows of stsb, fewer than a batch"),
        (["--max-length", "32", "--reference", str(tmp_path / "curve.tsv")], "sst2: the reference has two qualities"),
        (["--epochs", "sst2="], "--epochs: expected TASK=VALUE, got 'sst2='"),
        (["--epochs", "sst2=1", "sst2=2"], "--epochs: sst2 is there twice, with 1 and 2"),
    ):
        assert run(lambda flags=flags: _command(["head_prune", *own, *flags])) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_checkpoint_is_where_every_seed_starts(elue_data, elue_start, capsys):
    """They were given and not run; and nothing beside the numbers said what was trained, and from which weights."""
    short = ["--max-length", "32", "--batch-size", "16", "--tasks", "sst2", "--epochs", "1"]
    own = ["--model", str(elue_start), *short]
    flags = ["--output", str(elue_data / "run"), "--seeds", "0", "--methods", "elasticbert"]
    assert run(lambda: finetune_command(["elue", "run", *own, *flags])) == 0
    given = ["--checkpoints", f"sst2={elue_data / 'run/checkpoints/elasticbert/sst2/seed-0'}", "--seeds", "0,1"]
    assert run(lambda: _command(["dynabert", "--output", str(elue_data / "out"), *short, *given])) == 0
    result = read_result(elue_data / "out" / "results" / "dynabert.json")
    assert len(result.tasks["sst2"].seeds) == 2
    assert re.search("1 epoch a phase, .*, from weights [0-9a-f]{12}, 32 tokens, .* 2 seeds", result.settings["sst2"])


@pytest.mark.slow
def test_other_sizes_are_run_again(elue_data, elue_start, capsys):
    """What lay there was published with the new sizes beside it."""
    short = ["--max-length", "32", "--batch-size", "16", "--learning-rate", "1e-3", "--seeds", "0", "--tasks", "sst2"]
    flags = ["head_prune", "--model", str(elue_start), "--output", str(elue_data / "out"), *short]
    folder = elue_data / "out" / "submissions" / "head_prune" / "seed-0" / "sst2"
    made = []
    for epochs in ("1", "1", "2"):
        assert run(lambda epochs=epochs: _command([*flags, "--epochs", epochs])) == 0
        made.append((folder.stat().st_ino, json.loads((folder / "settings.json").read_text())["epochs"]))
    assert made[0] == made[1] and made[2][1] == 2 and made[2][0] != made[0][0]
