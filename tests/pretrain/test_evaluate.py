import json
import sys

import numpy as np
import pytest
import torch

from elastic_model.distributed import start_accelerator
from elastic_model.operating_points import checkpoint_hash
from pretrain.__main__ import main
from pretrain.checkpoint import save_model
from pretrain.data import Examples
from pretrain.evaluate import evaluate, unigram_losses
from pretrain.masking import IGNORED
from pretrain.prepare import prepare
from pretrain.report import plot_losses
from pretrain.train import build_model, train


@pytest.fixture
def parts(options):
    config = options(validation_fraction=0.3)
    corpus = prepare(config)
    held_out = Examples(corpus, config, held_out=True)
    unigram = unigram_losses(Examples(corpus, config, held_out=False).token_counts())
    return (
        start_accelerator(config.precision, config.tracker, config.output),
        build_model(config, corpus.tokenizer, unigram),
        held_out,
        unigram,
    )


def test_unigram_losses_are_minus_log_of_a_distribution():
    losses = unigram_losses(np.array([0, 3, 6]))
    assert losses.tolist() == pytest.approx([-np.log(1 / 12), -np.log(4 / 12), -np.log(7 / 12)])


def test_the_sums_are_those_of_one_batch_of_everything(parts):
    accelerator, model, held_out, unigram = parts
    result = evaluate(accelerator, model, held_out, unigram, len(held_out), rows=5)
    batch = held_out.collate(0, np.arange(len(held_out)))
    model.eval()
    with torch.no_grad():
        whole = model(**batch)
    assert list(result.mlm_loss.values()) == pytest.approx([float(loss) for loss in whole.mlm_losses], rel=1e-5)
    assert list(result.sop_loss.values()) == pytest.approx([float(loss) for loss in whole.sop_losses], rel=1e-5)
    labels = batch["labels"][batch["labels"] != IGNORED]
    assert result.masked_tokens == len(labels) and result.examples == len(held_out)
    assert result.unigram_loss == pytest.approx(float(unigram[labels].mean()))
    predicted = whole.prediction_logits[batch["labels"] != IGNORED].argmax(-1)
    assert result.mlm_accuracy[2] == pytest.approx(float((predicted == labels).float().mean()))
    assert result.pairs == int((batch["sentence_order_label"] != IGNORED).sum())


def test_an_evaluation_can_be_repeated_and_limited(parts):
    accelerator, model, held_out, unigram = parts
    first, again = (evaluate(accelerator, model, held_out, unigram, 7, rows=3) for _ in range(2))
    assert first == again and first.examples == 7
    assert model.training


def test_the_table_names_every_exit_and_what_to_compare_with(parts):
    accelerator, model, held_out, unigram = parts
    lines = evaluate(accelerator, model, held_out, unigram, 7, rows=3).table().splitlines()
    assert [line.split()[0] for line in lines] == ["exit", "1", "2", "unigram", "7"]


@pytest.fixture
def checkpoint(parts, options, tmp_path):
    """An untrained model and its tokenizer."""
    save_model(tmp_path / "checkpoint", parts[1], prepare(options()).tokenizer)
    return tmp_path / "checkpoint"


def command(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["pretrain", "evaluate", *map(str, argv)])
    return main(), capsys.readouterr()


def test_a_checkpoint_is_evaluated_on_any_text(checkpoint, corpus_file, tmp_path, monkeypatch, capsys, cache, parts):
    flags = ("--model", checkpoint, "--text", corpus_file, "--cache", cache, "--max_length", "24")
    output = tmp_path / "result.json"
    code, shown = command(monkeypatch, capsys, *flags, "--output", output, "--held_out", "0.3")
    result = json.loads(output.read_text())
    assert code == 0 and result["sha256"] == checkpoint_hash(checkpoint) and result["not_in_the_checkpoint"] == []
    accelerator, model, held_out, unigram = parts
    same = evaluate(accelerator, model, held_out, unigram, None, rows=8)
    assert result["examples"] == same.examples
    assert list(result["mlm_loss"].values()) == pytest.approx(list(same.mlm_loss.values()))
    assert result["unigram_loss"] == pytest.approx(same.unigram_loss)  # counted in what is not held out
    assert f"{result['mlm_loss']['2']:.4f}" in shown.out and "random" not in shown.out
    code, _ = command(monkeypatch, capsys, *flags, "--output", output, "--length_config", "0.5", "0.2")
    everything = json.loads(output.read_text())
    assert everything["examples"] > result["examples"] and everything["length_config"] == [0.5, 0.2]


def test_one_document_is_text_enough_to_evaluate_on(checkpoint, tmp_path, monkeypatch, capsys, cache):
    (tmp_path / "one.txt").write_text("The senate funds the navy of court 3. The army needs the budget of union 4.\n")
    flags = ("--model", checkpoint, "--cache", cache, "--max_length", "24", "--text", tmp_path / "one.txt")
    code, shown = command(monkeypatch, capsys, *flags)
    assert code == 0 and "examples" in shown.out


def test_the_length_is_the_models_where_it_reads_less_than_the_default(
    checkpoint, corpus_file, tmp_path, monkeypatch, capsys, cache
):
    """It was refused: 128 tokens are more than its 32."""
    flags = ("--model", checkpoint, "--text", corpus_file, "--cache", cache, "--output", tmp_path / "result.json")
    assert command(monkeypatch, capsys, *flags)[0] == 0
    assert json.loads((tmp_path / "result.json").read_text())["max_length"] == 32


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--text", "nowhere.txt"), "no file 'nowhere.txt'"),
        (("--max_length", "33"), "max_length must be at most 32, the longest input of the model, got 33"),
        (("--length_config", "0.5"), "one entry per layer, 2 in all, got 1"),
        (("--held_out", "0.9"), "held_out must lie within 0.0001..0.5, as validation_fraction, got 0.9"),
        (("--held_out", "0"), "held_out must lie within"),
        (("--output", "nowhere/result.json"), "there is no folder nowhere"),
        (("--batch_size", "0"), "batch_size must be at least 1, got 0"),
        (("--model", "nowhere"), "nowhere is no checkpoint folder"),
    ],
)
def test_what_cannot_be_evaluated_is_named(checkpoint, corpus_file, monkeypatch, capsys, cache, flags, named):
    defaults = ("--model", checkpoint, "--text", corpus_file, "--cache", cache, "--max_length", "24")
    code, shown = command(monkeypatch, capsys, *defaults, *flags)
    assert code == 2 and shown.err.startswith("error: ") and shown.err.count("\n") == 1 and named in shown.err


def test_a_result_replaces_neither_the_text_nor_the_model(
    checkpoint, corpus_text, tmp_path, monkeypatch, capsys, cache
):
    (tmp_path / "text.txt").write_text(corpus_text)
    flags = ("--model", checkpoint, "--text", tmp_path / "text.txt", "--cache", cache, "--max_length", "24")
    for read in (tmp_path / "text.txt", checkpoint / "config.json"):
        before = read.read_bytes()
        code, shown = command(monkeypatch, capsys, *flags, "--output", read)
        assert code == 2 and "would replace that file" in shown.err and read.read_bytes() == before


def test_without_pairs_nothing_is_said_of_their_order(options, tmp_path):
    text = tmp_path / "lines.txt"
    text.write_text("\n\n".join(f"the senate needs the navy of court {number % 9}" for number in range(80)))
    config = options(text=text, output=tmp_path / "run", vocab_size=80, steps=2, warmup_steps=0, log_every=1)
    train(config)
    lines = [json.loads(line) for line in (config.output / "metrics.jsonl").read_text().splitlines()]
    result = json.loads((config.output / "evaluation.json").read_text())
    assert lines[0]["sop_loss"] == {} == result["sop_accuracy"] and result["mlm_loss"].keys() == {"1", "2"}
    assert "sop_accuracy" not in (config.output / "README.md").read_text()
    assert (config.output / "losses.png").is_file()


def test_the_plot_is_drawn_from_the_log(tmp_path):
    losses = {"mlm_loss": {"1": 4.0, "2": 3.5}, "sop_loss": {"1": 0.7, "2": 0.6}}
    held_out = {**losses, "unigram_loss": 5.0}
    lines = [{"step": 1, "mlm_loss": {"2": 4.5}, "sop_loss": {"2": 0.7}}, {"step": 2, **losses}]
    text = "".join(json.dumps(line) + "\n" for line in [*lines, {"step": 2, "held_out": held_out}])
    (tmp_path / "metrics.jsonl").write_text(text)
    plot_losses(tmp_path / "metrics.jsonl", tmp_path / "losses.png")
    assert (tmp_path / "losses.png").read_bytes().startswith(b"\x89PNG")
    assert [path.name for path in sorted(tmp_path.iterdir())] == ["losses.png", "metrics.jsonl"]
