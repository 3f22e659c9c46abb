"""elastify: exits for stock models that learn from the models themselves; the last exit stays what they are."""

import gzip
import json
import lzma
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from accelerate import Accelerator
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoModelForTokenClassification, AutoTokenizer

from elastic_model import ElasticBertForSequenceClassification, ElasticBertForTokenClassification
from elastic_model.provenance import read_provenance
from finetune.config import ElastifyOptions
from finetune.data import Encoded, rows_of
from finetune.elastify import agreement, elastify
from finetune.teacher import ask, final_logits
from finetune.texts import read_texts

SIZES = {
    "bert": {"num_hidden_layers": 3, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 64},
    "distilbert": {"n_layers": 3, "dim": 32, "n_heads": 4, "hidden_dim": 64},
}
SIZES["roberta"] = {**SIZES["bert"], "type_vocab_size": 1}
STOCK = {  # family, problem type -> class
    ("bert", "single_label_classification"): "BertForSequenceClassification",
    ("roberta", "multi_label_classification"): "RobertaForSequenceClassification",
    ("distilbert", "regression"): "DistilBertForSequenceClassification",
    ("distilbert", "token_classification"): "DistilBertForTokenClassification",
}


def stock_model(folder, tokenizer, family, problem_type):
    """A stock model with weights that make its answers differ from text to text."""
    labels = 1 if problem_type == "regression" else 3
    settings = {"vocab_size": 200, "max_position_embeddings": 64, "initializer_range": 0.3, "num_labels": labels}
    if problem_type != "token_classification":
        settings["problem_type"] = problem_type
    config = AutoConfig.for_model(family, **settings, **SIZES[family], pad_token_id=tokenizer.pad_token_id)
    torch.manual_seed(0)
    getattr(transformers, STOCK[family, problem_type])(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def texts(small_task, tmp_path):
    """A file of 240 unlabelled texts, one a line."""
    lines = (small_task / "more.tsv").read_text().splitlines()[1:]
    (tmp_path / "texts.txt").write_text("".join(line.split("\t")[0] + "\n" for line in lines))
    return tmp_path / "texts.txt"


@pytest.fixture
def options(texts, tmp_path):
    """-> options(model, **changes): a short run."""
    short = {"max_length": 32, "epochs": 3, "batch_size": 24, "log_steps": 1}
    return lambda model, **changes: ElastifyOptions(
        **{"model": str(model), "texts": str(texts), "output": str(tmp_path / "out"), **short, **changes}
    )


def answers(folder, auto_class, lines, elastic):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    batch = dict(tokenizer(lines, padding=True, return_tensors="pt"))
    if not elastic and "distil" in AutoConfig.from_pretrained(folder).model_type:
        del batch["token_type_ids"]
    with torch.no_grad():
        return auto_class.from_pretrained(folder).eval()(**batch), batch["attention_mask"].bool()


@pytest.mark.parametrize(("family", "problem_type"), STOCK)
def test_the_last_exit_is_the_original_and_the_others_learn_from_it(
    tiny_tokenizer, tmp_path, texts, options, family, problem_type
):
    original = stock_model(tmp_path / "stock", tiny_tokenizer, family, problem_type)
    assert elastify(options(original)) == 0
    tags = problem_type == "token_classification"
    stock = AutoModelForTokenClassification if tags else AutoModelForSequenceClassification
    ours = ElasticBertForTokenClassification if tags else ElasticBertForSequenceClassification
    lines = texts.read_text().splitlines()[:50]
    (expected, mask), (found, _) = answers(original, stock, lines, False), answers(tmp_path / "out", ours, lines, True)
    real = (lambda logits: logits[mask]) if tags else (lambda logits: logits)
    torch.testing.assert_close(real(found.logits), real(expected.logits), atol=1e-5, rtol=0)
    result = json.loads((tmp_path / "out" / "elastify.json").read_text())
    assert result["largest_difference"] <= 1e-5 and result["held_out"] == 12 and result["texts"] == 228
    assert list(result["exits"]) == ["1", "2", "3"] and result["exits"]["3"][result["metric"]] == pytest.approx(1)
    log = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in log if "loss" in line]
    assert sum(losses[-5:]) < 0.85 * sum(losses[:5])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config.get("exit_policy") is None  # thresholds are left to calibration
    assert config["exit_pooling"] == ["mean", "mean", "cls"]
    assert read_provenance(tmp_path / "out")[-1].stage == "elastify"


def test_the_backbone_may_train_too_then_lengths_learn_from_the_original(tiny_tokenizer, tmp_path, options, capsys):
    original = stock_model(tmp_path / "stock", tiny_tokenizer, "bert", "single_label_classification")
    changes = {"train_backbone": True, "epochs": 1, "backbone_learning_rate": 1e-3}
    assert elastify(options(original, **changes)) == 0
    assert "backbone trained" in capsys.readouterr().out
    result = json.loads((tmp_path / "out" / "elastify.json").read_text())
    assert result["largest_difference"] > 1e-4 and result["backbone"] == "trained"
    assert elastify(options(original, **changes, resume=True)) == 0
    assert "is finished already" in capsys.readouterr().out


def test_a_learned_exit_head_learns_where_an_exit_differs(tiny_tokenizer, tmp_path, options):
    original = stock_model(tmp_path / "stock", tiny_tokenizer, "bert", "single_label_classification")
    assert elastify(options(original, learned_exit_head=True)) == 0
    model = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "out").eval()
    output = model(input_ids=torch.tensor([[2, 9, 8, 3]]), exit_policy={"name": "learned", "threshold": 0.9})
    assert output.exit_uncertainty is not None and model.config.learned_exit_head


def test_texts_are_lines_or_columns(tmp_path):
    (tmp_path / "t.tsv").write_text("a\tb\nfirst one\tsecond\nthird\tfourth\n")
    found = read_texts(tmp_path / "t.tsv", "a", "b")
    assert (found.texts, found.pairs) == (["first one", "third"], ["second", "fourth"])
    with pytest.raises(ValueError, match="t.tsv is a table: name the column of its text with --text"):
        read_texts(tmp_path / "t.tsv", None, None)
    with lzma.open(tmp_path / "my.t.txt.xz", "wt") as packed:
        packed.write("one\ntwo\n")
    assert read_texts(tmp_path / "my.t.txt.xz", None, None).texts == ["one", "two"]
    (tmp_path / "t.txt").write_text("first\n\n second\tstill the second \n")
    assert read_texts(tmp_path / "t.txt", None, None).texts == ["first", "second\tstill the second"]


def test_texts_of_words_and_damaged_ones(tmp_path):
    """A list of words was read as Python prints it, a damaged archive ended in a traceback."""
    (tmp_path / "t.jsonl").write_text('{"words": ["EU", "rejects", "it"]}\n')
    assert read_texts(tmp_path / "t.jsonl", "words", None).texts == ["EU rejects it"]
    (tmp_path / "t.jsonl").write_text('{"words": {"a": 1}}\n')
    with pytest.raises(ValueError, match="a text is needed, got {'a': 1}"):
        read_texts(tmp_path / "t.jsonl", "words", None)
    whole = gzip.compress(b"one\ntwo\n" * 99)
    (tmp_path / "t.txt.gz").write_bytes(whole[:12] + bytes([whole[12] ^ 255]) + whole[13:])
    with pytest.raises(ValueError, match="t.txt.gz: not a readable text file"):
        read_texts(tmp_path / "t.txt.gz", None, None)


def test_agreement_on_known_answers():
    ours, reference = np.eye(3)[[0, 1, 2, 2]], np.eye(3)[[0, 1, 2, 0]]
    assert agreement(list(ours), list(reference), "single_label_classification") == {"agreement": 0.75}
    tags = agreement([ours[:3], ours[3:]], [reference[:3], reference[3:]], "token_classification")
    assert tags == {"agreement": 0.75}
    several = agreement(list(ours - 0.5), list(reference - 0.5), "multi_label_classification", seed=0)
    assert several["agreement"] == 0.75 and several["low"] <= 0.75 <= several["high"]
    numbers = agreement([np.array([1.0]), np.array([3.0])], [np.array([1.0]), np.array([2.0])], "regression")
    assert numbers == {"r2": -1.0, "absolute_difference": 0.5}
    several = [np.array([row, row + 1.0]) for row in range(10)]  # two numbers a row; the last five are wrong
    wrong = [one + (100 if row > 4 else 0) for row, one in enumerate(several)]
    assert agreement(wrong, several, "regression")["r2"] < 0 and agreement(several, several, "regression")["r2"] == 1
    for rows in (1, 2, 3):  # resamples of few rows have no spread: R^2 was minus infinity, the interval not a number
        few = agreement([np.array([1.0])] * rows, list(np.arange(1.0, rows + 1)[:, None]), "regression", seed=0)
        assert all(np.isfinite(value) for value in few.values()), few


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "/no/such/model"}, "model /no/such/model is neither a folder nor a hub id"),
        ({"texts": "missing.txt"}, "texts missing.txt is not a file"),
        ({"pair": "b"}, "give the column of the first text with --text"),
        ({"batch_size": 500}, "228 texts to train on, fewer than a batch"),
        ({"distillation": "none"}, "nothing but the original's answers to learn from"),
        ({"exit_layers": [3]}, "there is no exit below the last one"),
        ({"max_length": 100}, "max_length must be 3 to 64"),
        ({"exit_layers": [2, 9]}, "exit_layers must be a rising list of layers within 1..3"),
        ({"backbone_learning_rate": 0.0}, "backbone_learning_rate must be above 0, got 0"),
        ({"phase_epochs": [1, 2]}, "phase_epochs must have .* for each phase .1 here., not all 0, got .1, 2."),
        ({"length_drop": 0.5}, "length_drop 0.5 would do nothing: it is for sub-networks"),
        ({"train_backbone": True, "phase_epochs": [1, 0]}, "train_backbone would do nothing: --phase_epochs gives"),
        ({"backbone_learning_rate": 1e-3}, "backbone_learning_rate would do nothing: without --train_backbone"),
    ],
)
def test_bad_input_is_named_before_anything_is_written(tiny_tokenizer, tmp_path, options, changes, message):
    original = stock_model(tmp_path / "stock", tiny_tokenizer, "bert", "single_label_classification")
    with pytest.raises(ValueError, match=message):
        elastify(options(**{"model": original, **changes}))
    assert not Path(options(original).output).exists()


def test_a_model_without_a_head_is_named(tiny_tokenizer, tmp_path, options):
    config = AutoConfig.for_model("bert", vocab_size=200, **SIZES["bert"])
    transformers.BertModel(config).save_pretrained(tmp_path / "stock")
    tiny_tokenizer.save_pretrained(tmp_path / "stock")
    with pytest.raises(ValueError, match="holds BertModel; elastify takes a fine-tuned classifier or token tagger"):
        elastify(options(tmp_path / "stock"))


def test_an_original_that_drops_tokens_by_default_is_asked_with_all_of_them(trained, tiny_tokenizer, tmp_path):
    """What teachers answered was their own shortened answer."""
    model = ElasticBertForSequenceClassification.from_pretrained(trained.output).eval()
    rows = rows_of(tiny_tokenizer(["the people and the army of the nation " * 3, "the treaty"]))
    how = (Encoded(rows, {}, np.zeros(2), 0), tiny_tokenizer, 2, Accelerator(), final_logits)
    whole = ask(model, *how)
    model.config.length_config = [0.6, 0.4, 0.3, 0.2]
    assert all((one == other).all() for one, other in zip(ask(model, *how), whole, strict=True))
