"""Every kind of artefact from end to end: heads, plain and stock files, defaults at a point, ways to compute."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
import transformers
from transformers import AutoTokenizer

from elastic_model import (
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertModel,
    ElasticSession,
    cost,
)
from elastic_model.operating_points import OperatingPoint, OperatingPoints, checkpoint_hash
from elastic_model.session import Encoding
from export.checkpoint import load_checkpoint
from export.config import ExportOptions
from export.ranges import input_ranges
from export.write import export_checkpoint
from tests.export.graphs import lively, torch_output
from tests.export.test_graph import VARIANTS

TEXTS = ["A treaty of commerce was signed in the spring.", "Our people are strong.", "The debt has been reduced."]
INT8 = "model_quint8_avx2"
SLOW = pytest.mark.slow
PATH = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
CONTEXT = "The mails reach every county of the western States. " * 12 + "A treaty was signed in the spring."


@pytest.fixture
def checkpoint_of(tiny_config, tiny_tokenizer, tmp_path):
    """Saves a lively checkpoint of a kind, with fields of its configuration changed."""

    def make(kind=ElasticBertForSequenceClassification, **fields):
        for name, value in fields.items():
            setattr(tiny_config, name, value)
        model = lively(tiny_config, kind=kind)
        model.save_pretrained(tmp_path / "checkpoint")
        tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
        return model, tmp_path / "checkpoint"

    return make


def exported(checkpoint, **options):
    out = checkpoint.parent / "out"
    report = export_checkpoint(ExportOptions(checkpoint, out, **{"files": [INT8], **options}))
    return out, report


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (ElasticBertForSequenceClassification, {}),
        (ElasticBertForSequenceClassification, {"exit": 2}),
        (ElasticBertForTokenClassification, {}),
        (ElasticBertForQuestionAnswering, {}),
        (ElasticBertModel, {}),
    ],
)
def test_a_card_says_what_its_file_has_and_how_to_ask_it(checkpoint_of, kind, options):
    """It named inputs and outputs of other kinds, and its code gave a question's model a text."""
    out, report = exported(checkpoint_of(kind)[1], **options)
    card = (out / "README.md").read_text()
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    first = report["files"]["model"]
    assert set(first["inputs"]) == session.inputs and first["outputs"] == session.outputs
    assert all(f"`{name}`" in card for name in (*session.inputs, *session.outputs))
    every = ("exit_threshold", "max_layer", "length_config", "length_mass", "exit_logits", "kept_tokens", "exit_layer")
    absent = set(every) - session.inputs - set(session.outputs)
    assert not [name for name in absent if f"`{name}`" in card.partition("## ONNX files")[2]]
    code = card.partition("Without torch")[2].split("```")[1].removeprefix("python")
    done = subprocess.run([sys.executable, "-c", code], cwd=out, env=PATH, capture_output=True, text=True)
    assert "exit_layer" in done.stdout, done.stderr


def test_a_text_is_cut_where_the_tokenizer_cuts_it(checkpoint_of):
    """Sessions read the beginning of a long text, whatever fine-tuning had read."""
    model, checkpoint = checkpoint_of()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint, truncation_side="left")
    tokenizer.save_pretrained(checkpoint)
    text = " ".join(TEXTS * 20)
    batch = tokenizer(text, truncation=True, max_length=64, return_tensors="pt")
    (encoding,) = ElasticSession.from_pretrained(exported(checkpoint)[0], "model", threads=1).encode(text)
    assert encoding.ids == batch["input_ids"][0].tolist() != tokenizer(text)["input_ids"][:64]


def test_words_get_a_tag_each(checkpoint_of):
    model, checkpoint = checkpoint_of(
        ElasticBertForTokenClassification, exit_policy={"name": "entropy", "threshold": 0.9}
    )
    out, report = exported(checkpoint)
    assert report["files"]["model"]["largest_difference"]["4"] < 1e-4
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    words = "A treaty of commerce was signed".split()
    (given,) = session([words])
    assert set(given) == {"label", "score", "words", "exit_layer", "point"}
    assert given["words"] == words and len(given["label"]) == len(given["score"]) == 6
    (found,) = session("A treaty of commerce was signed")
    assert found == given
    tokens = AutoTokenizer.from_pretrained(checkpoint)(words, is_split_into_words=True, return_tensors="pt")
    with torch.no_grad():
        logits = model(**tokens).logits[0]
    first = [tokens.word_ids().index(number) for number in range(len(words))]
    assert given["label"] == [model.config.id2label[one] for one in logits[first].argmax(-1).tolist()]


def test_a_long_text_is_tagged_to_its_end(checkpoint_of):
    _, checkpoint = checkpoint_of(ElasticBertForTokenClassification)
    out, _ = exported(checkpoint)
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    words = ("The mails reach every county of the western States " * 30).split()
    (given,) = session([words])
    (text,) = session(" ".join(words))
    assert given["words"] == text["words"] == words
    assert given["label"] == text["label"] and None not in given["label"]
    assert session.exit_logits(["A treaty.", "The debt has been reduced."]).shape[:2] == (4, 2)


def test_questions_are_answered_from_the_end_of_a_long_context(checkpoint_of):
    model, checkpoint = checkpoint_of(ElasticBertForQuestionAnswering)
    out, report = exported(checkpoint)
    assert set(report["files"]["model"]["largest_difference"]) == {"1", "2", "3", "4"}
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    (result,) = session([("Who was strong?", CONTEXT)])
    assert set(result) == {"label", "score", "start", "end", "exit_layer", "point"}
    assert CONTEXT[result["start"] : result["end"]] == result["label"] != ""
    windows = session.encode([("Who was strong?", CONTEXT)])
    assert len(windows) > 3
    logits = session.exit_logits([("Who was strong?", CONTEXT)])
    assert logits.shape == (4, len(windows), max(len(one.ids) for one in windows), 2)
    batch = {"input_ids": np.array([windows[0].ids]), "token_type_ids": np.array([windows[0].type_ids])}
    expected = torch_output(model, batch)
    np.testing.assert_allclose(logits[-1, 0, : len(windows[0].ids), 0], expected.start_logits[0], atol=1e-4)
    with pytest.raises(ValueError, match="pair of question and context"):
        session(["no context"])
    with pytest.raises(ValueError, match="the context .* has no token that could answer"):
        session([("Who was strong?", CONTEXT), ("Who was strong?", "\u200b")])  # what normalising removes


def test_a_bare_model_stops_where_its_configuration_says(checkpoint_of):
    """A constant policy of its own was left out, in PyTorch and in the file; so was the pooler, in its FLOPs."""
    model, checkpoint = checkpoint_of(ElasticBertModel, exit_policy={"name": "constant", "layer": 2})
    batch = AutoTokenizer.from_pretrained(checkpoint)(TEXTS[0], return_tensors="pt")
    with torch.no_grad():
        own, asked = model(**batch), model(**batch, exit_policy={"name": "constant", "layer": 2})
        full = model(**batch, exit_policy={"name": "never"})
    assert torch.equal(own.pooler_output, asked.pooler_output) and not torch.equal(own[0], full[0])
    model.train()(**batch).pooler_output.sum().backward()  # training knows no policy, as with heads
    assert all(layer.output.dense.weight.grad is not None for layer in model.encoder.layer)
    session = ElasticSession.from_pretrained(exported(checkpoint)[0], "model", threads=1)
    (found,) = session(TEXTS[:1], cost=True)
    np.testing.assert_allclose(found["embedding"], own.last_hidden_state[0].mean(0), atol=1e-5)
    tokens = batch["input_ids"].shape[1]
    assert found["exit_layer"] == 2
    assert found["flops"] == cost.flops(model.config, tokens, exit_layer=2, head="none")


@pytest.mark.parametrize("policy", [{"name": "patience", "patience": 1}, {"name": "voting", "votes": 2}])
def test_points_of_a_policy_that_counts_are_exported_without_a_default(checkpoint_of, policy):
    """The check followed the points' count, and the file the count that lets nobody leave."""
    _, checkpoint = checkpoint_of()
    points = [OperatingPoint("full", [4.0] * 4, 4.0), OperatingPoint("fast", [float(policy.get("votes", 1))] * 4, 2.0)]
    OperatingPoints(checkpoint_hash(checkpoint), policy, points).save(checkpoint)
    session = ElasticSession.from_pretrained(exported(checkpoint)[0], "model", threads=1)
    assert [one["exit_layer"] for one in session(TEXTS)] == [4] * 3
    assert min(one["exit_layer"] for one in session(TEXTS, budget="fast")) < 4
    assert session.exit_logits(TEXTS).shape == (4, 3, 3) and np.isfinite(session.exit_logits(TEXTS)).all()
    nobody = session.run(session.encode(TEXTS), thresholds=session.never)
    assert nobody["exit_layer"].tolist() == [4] * 3


@pytest.mark.parametrize("kind", [ElasticBertModel, ElasticBertForSequenceClassification])
def test_a_constant_policy_at_a_layer_without_an_exit_is_refused(checkpoint_of, kind):
    _, checkpoint = checkpoint_of(kind, exit_layers=[2, 4], exit_policy={"name": "constant", "layer": 3})
    with pytest.raises(ValueError, match=r"exit_policy 'constant': layer must be one of \[2, 4\], got 3"):
        exported(checkpoint)


def test_points_of_another_policy_name_what_helps(checkpoint_of):
    """It said "evaluate the checkpoint again", which writes no points."""
    _, checkpoint = checkpoint_of(exit_policy={"name": "entropy", "threshold": 0.5})
    points = [OperatingPoint("full", [1.0] * 4, 4.0)]
    OperatingPoints(checkpoint_hash(checkpoint), {"name": "confidence", "threshold": 1.0}, points).save(checkpoint)
    with pytest.raises(ValueError, match="give --at POINT, search again with that policy"):
        exported(checkpoint)
    out, _ = exported(checkpoint, at="full")
    assert ElasticSession.from_pretrained(out, "model").policy["name"] == "confidence"


def test_points_of_another_patience_are_refused_before_the_file_is_written(checkpoint_of):
    """It passed, and no session could load what was written."""
    own = {"name": "patience", "patience": 2, "threshold": 0.5}
    _, checkpoint = checkpoint_of(num_labels=1, exit_policy=own)
    points = [OperatingPoint("full", [0.0] * 4, 4.0)]
    OperatingPoints(checkpoint_hash(checkpoint), {**own, "patience": 1}, points).save(checkpoint)
    with pytest.raises(ValueError, match="exit policy is .*'patience': 2.*were measured with .*'patience': 1"):
        exported(checkpoint)


def test_one_row_of_a_regression_is_enough_to_compare(checkpoint_of, tmp_path):
    """No spread between rows allowed no difference; a correlation without one was NaN, which JSON has not."""
    _, checkpoint = checkpoint_of(num_labels=1)
    (tmp_path / "rows.tsv").write_text("text\tlabel\n" + f"{TEXTS[0]}\t1.5\n")
    out, report = exported(checkpoint, rows=tmp_path / "rows.tsv", label="label", min_agreement=0.5)
    assert report["files"][INT8]["quality"] == {"full": None, "default": None}
    assert "NaN" not in (out / "export_report.json").read_text()


def test_vectors_are_means_of_the_last_states(checkpoint_of):
    model, checkpoint = checkpoint_of(ElasticBertModel)
    out, _ = exported(checkpoint)
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    for text, result in zip(TEXTS, session(TEXTS, max_layer=3), strict=True):
        with torch.no_grad():
            output = model(**tokenizer(text, return_tensors="pt"), exit_policy={"name": "constant", "layer": 3})
        np.testing.assert_allclose(result["embedding"], output.last_hidden_state[0].mean(0), atol=1e-5)
        assert result["exit_layer"] == 3


@pytest.mark.parametrize(
    "variant",
    ["pruned", "mean tokens below", *(pytest.param(one, marks=SLOW) for one in ("plain", "static", "roberta"))],
)
def test_a_plain_file_answers_as_its_exit(checkpoint_of, variant):
    fields = {"vocab_size": 200, **VARIANTS[variant]}
    model, checkpoint = checkpoint_of(**fields)
    layer = 4 if variant == "static" else 2
    out, report = exported(checkpoint, exit=layer)
    assert report["exit"] == layer
    session = onnxruntime.InferenceSession(out / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    assert not session.get_overridable_initializers() and [one.name for one in session.get_outputs()] == ["logits"]
    import onnx

    assert not {"If", "Loop", "Scan"} & {node.op_type for node in onnx.load(out / "onnx/model.onnx").graph.node}
    (result,) = ElasticSession.from_pretrained(out, "model", threads=1)(TEXTS[0])
    with torch.no_grad():
        batch = AutoTokenizer.from_pretrained(checkpoint)(TEXTS[0], return_tensors="pt")
        batch = {name: value for name, value in batch.items() if name != "token_type_ids" or variant != "roberta"}
        logits = model(**batch, exit_policy={"name": "constant", "layer": layer}).logits[0]
        alike = type(model).from_pretrained(out)(**batch).logits[0]
    assert result["exit_layer"] == layer and result["label"] == model.config.id2label[int(logits.argmax())]
    assert result["score"] == pytest.approx(float(logits.softmax(-1).max()), abs=1e-4)
    torch.testing.assert_close(alike, logits)


@pytest.mark.parametrize(
    ("kind", "auto"),
    [
        (ElasticBertForSequenceClassification, "AutoModelForSequenceClassification"),
        pytest.param(ElasticBertForTokenClassification, "AutoModelForTokenClassification", marks=SLOW),
        pytest.param(ElasticBertForQuestionAnswering, "AutoModelForQuestionAnswering", marks=SLOW),
    ],
)
def test_a_stock_folder_is_bert(checkpoint_of, kind, auto):
    model, checkpoint = checkpoint_of(kind)
    out, report = exported(checkpoint, to="bert", exit=3)
    assert report["stock_difference"] <= 1e-5
    assert not list(out.glob("*.py")) and "auto_map" not in json.loads((out / "config.json").read_text())
    stock = getattr(transformers, auto).from_pretrained(out).eval()
    assert type(stock).__name__ == kind.__name__.replace("Elastic", "")
    batch = AutoTokenizer.from_pretrained(out)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        theirs, ours = stock(**batch), model(**batch, exit_policy={"name": "constant", "layer": 3})
    real = batch["attention_mask"].bool()
    for name in set(theirs) & {"logits", "start_logits", "end_logits"}:
        both = [one[name] if one[name].shape[1] != real.shape[1] else one[name][real] for one in (ours, theirs)]
        torch.testing.assert_close(*both, atol=1e-5, rtol=0)
    inputs = {name: value.numpy() for name, value in batch.items()}
    session = onnxruntime.InferenceSession(out / "onnx/model.onnx", providers=["CPUExecutionProvider"])
    name = session.get_outputs()[0].name
    found = session.run([name], inputs)[0]
    expected = theirs[name].numpy()
    if found.shape[1] == real.shape[1]:
        found, expected = found[real.numpy()], expected[real.numpy()]
    np.testing.assert_allclose(found, expected, atol=1e-4)


@SLOW
@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"num_attention_heads_per_layer": [4, 2, 4, 4], "attention_head_size": 8},
            "the same heads and FFN width in every layer",
        ),
        ({"exit_pooling": "mean"}, "BERT's pooler reads .CLS., that of exit 3 the mean of the tokens"),
    ],
)
def test_what_stock_bert_cannot_be_is_said(checkpoint_of, fields, message):
    _, checkpoint = checkpoint_of(**fields)
    with pytest.raises(ValueError, match=message):
        exported(checkpoint, to="bert", exit=3)
    assert not (checkpoint.parent / "out").exists()


def test_a_file_at_a_point_runs_at_it_by_itself(checkpoint_of):
    policy = {"name": "entropy", "threshold": 0.2}
    model, checkpoint = checkpoint_of(exit_policy=policy)
    lengths = [1.0, 0.5, 0.5, 0.25]
    table = [
        OperatingPoint("full", [0.0] * 4, 4.0, flops=4e6),
        OperatingPoint("short", [0.9] * 4, 2.0, length_config=lengths, flops=1e6),
    ]
    OperatingPoints(checkpoint_hash(checkpoint), policy, table).save(checkpoint)
    out, _ = exported(checkpoint)
    usual = ElasticSession.from_pretrained(out, "model", threads=1)
    by_budget = usual(TEXTS, budget={"speedup": 4}, cost=True)
    assert {result["point"] for result in by_budget} == {"short"}
    out, _ = exported(checkpoint, at="speedup=4")
    by_itself = ElasticSession.from_pretrained(out, "model", threads=1)(TEXTS, cost=True)
    assert by_itself == by_budget
    batch = AutoTokenizer.from_pretrained(checkpoint)(TEXTS, padding=True, return_tensors="pt")
    with torch.no_grad():
        expected = model(
            **batch, exit_policy={"name": "entropy", "threshold": 0.9}, length_config=[1.0, 0.5, 0.5, 0.25]
        )
        alike = type(model).from_pretrained(out)(**batch)
    torch.testing.assert_close(alike.logits, expected.logits)
    assert [result["exit_layer"] for result in by_itself] == expected.exit_layers.tolist()
    for row, result in enumerate(by_itself):
        tokens = int(batch["attention_mask"][row].sum())
        flops = cost.flops(model.config, tokens, length_config=lengths, exit_layer=int(expected.exit_layers[row]))
        assert result["flops"] == flops
    with pytest.raises(ValueError, match="no operating point named 'quick'; the names are: full, short"):
        exported(checkpoint, at="quick")


@pytest.mark.parametrize("activations", ["tensor", "static"])
def test_scales_of_a_tensor(checkpoint_of, activations):
    _, checkpoint = checkpoint_of()
    (checkpoint / "rows.txt").write_text("\n".join(TEXTS * 3))
    out, report = exported(checkpoint, activations=activations, rows=checkpoint / "rows.txt", min_agreement=0.5)
    assert report["files"][INT8]["int8_share"] > 0.95 and report["files"][INT8]["relative_error"]["4"] < 0.2
    assert len(ElasticSession.from_pretrained(out, INT8, threads=1)(TEXTS)) == 3


@SLOW
def test_weights_of_sixteen_bits_are_half_as_large(checkpoint_of):
    _, checkpoint = checkpoint_of(hidden_size=64, intermediate_size=256)
    _, report = exported(checkpoint, files=["model_fp16", "model_bf16"])
    files = report["files"]
    for name, error in (("model_fp16", 0.01), ("model_bf16", 0.05)):
        assert files[name]["bytes"] < 0.8 * files["model"]["bytes"]
        assert max(files[name]["relative_error"].values()) < error


@SLOW
def test_quality_on_labelled_rows(checkpoint_of):
    _, checkpoint = checkpoint_of()
    (checkpoint / "rows.tsv").write_text("text\tlabel\n" + "".join(f"{text}\tearly\n" for text in TEXTS))
    _, report = exported(checkpoint, rows=checkpoint / "rows.tsv", label="label", min_agreement=0.3)
    assert 0 <= report["files"]["model"]["quality"]["full"] <= 1
    with pytest.raises(ValueError, match="there is no column 'truth'; columns: text, label"):
        exported(checkpoint, rows=checkpoint / "rows.tsv", label="truth")


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"exit": 9}, "the exits are after layers"),
        ({"exit": 0}, "must be a layer from 1"),
        ({"at": "full"}, "no operating_points.json"),
        ({"at": "full", "exit": 2}, "a plain file .* has none"),
        ({"activations": "static"}, "needs --rows"),
        ({"label": "label"}, "needs --rows"),
    ],
)
def test_options_that_do_not_fit_are_refused(checkpoint_of, options, says):
    _, checkpoint = checkpoint_of()
    with pytest.raises(ValueError, match=says):
        exported(checkpoint, **options)
    assert not (checkpoint.parent / "out").exists()


def test_outlying_channels_are_evened_out(checkpoint_of, monkeypatch):
    """A few LayerNorm channels forty times as large, with weights as much smaller: per token, one scale would leave
    the others two bits. Evened out, the error stays within two hundredths."""
    from export import encoder
    from tests.export.graphs import batch_of, session_of

    model, _ = checkpoint_of(hidden_size=64, num_attention_heads=4, intermediate_size=128)
    with torch.no_grad():
        for layer in model.elasticbert.encoder.layer:
            for norm, consumers in (
                (layer.attention.output.LayerNorm, [layer.intermediate.dense]),
                (layer.output.LayerNorm, []),
            ):
                norm.weight[[3, 17]] *= 40
                for linear in consumers:
                    linear.weight[:, [3, 17]] /= 40
        layers = model.elasticbert.encoder.layer
        for below, above in zip(layers, layers[1:], strict=False):
            del below
            for linear in (above.attention.self.query, above.attention.self.key, above.attention.self.value):
                linear.weight[:, [3, 17]] /= 40
        for layer in range(1, 5):
            model.elasticbert.encoder.pooler.at(layer).dense.weight[:, [3, 17]] /= 40
    batch = batch_of(model.config, [9, 30, 17, 5] * 4)
    expected = torch.stack(torch_output(model, batch).exit_logits).numpy()
    errors = []
    for factors in (encoder.smoothing, lambda *_: None):
        monkeypatch.setattr(encoder, "smoothing", factors)
        found = session_of(model, INT8).run(["exit_logits"], batch)[0]
        errors.append(np.abs(found - expected).mean() / np.sqrt(np.square(expected).mean()))
    assert errors[0] < 0.03 < 2 * errors[0] < errors[1]


WORDS = ("The mails reach every county of the western States " * 30).split()


def test_a_text_of_several_windows_costs_what_they_cost_together(checkpoint_of):
    out, _ = exported(checkpoint_of(ElasticBertForTokenClassification)[1])
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    (found,) = session([WORDS], cost=True)
    windows = session.encode([WORDS])
    assert found["flops"] == sum(session.flops(len(one.ids), 4) for one in windows)
    assert all({*one.word_ids} & {*other.word_ids} - {None} for one, other in itertools.pairwise(windows))
    logits = session.exit_logits(["A treaty.", "The debt has been reduced."])
    assert np.isnan(logits[:, 0, -1]).all() and np.isfinite(logits[:, 1]).all()


def test_a_text_left_where_its_last_window_left(checkpoint_of):
    policy = {"name": "entropy", "threshold": 0.5}
    out, _ = exported(checkpoint_of(ElasticBertForTokenClassification, exit_policy=policy)[1])
    session = ElasticSession.from_pretrained(out, "model", threads=1)
    words = "treaty commerce signed spring army".split() * 20 + "law harvest revenue debt Senate".split() * 20
    windows = session.encode([words])
    left = {cut: session.run(windows, thresholds=[cut] * 4)["exit_layer"] for cut in np.linspace(0.3, 1, 141).tolist()}
    mixed = next(cut for cut, layers in left.items() if len(set(layers.tolist())) > 1)
    OperatingPoints("", policy, [OperatingPoint("mixed", [mixed] * 4, 2.0)]).save(out)
    (found,) = ElasticSession.from_pretrained(out, "model", threads=1)([words], budget="mixed")
    assert found["exit_layer"] == left[mixed].max()


def test_dropped_tokens_cost_what_the_configuration_says(checkpoint_of):
    model, checkpoint = checkpoint_of()
    session = ElasticSession.from_pretrained(exported(checkpoint)[0], "model", threads=1)
    lengths = [0.8, 0.5, 0.5, 0.2]
    (encoding,) = session.encode("Our people are strong.")
    kept = session.run([encoding], length_config=lengths)["kept_tokens"][0]
    assert session.flops(len(encoding.ids), 4, kept) == cost.flops(
        model.config, len(encoding.ids), length_config=lengths
    )


def test_the_range_of_rows_is_that_of_all_of_them(checkpoint_of):
    checkpoint = load_checkpoint(checkpoint_of()[1])
    rows = [Encoding([2, *ids, 3], [0] * (len(ids) + 2)) for ids in ([9, 8, 7], [40, 50, 60, 70])]
    whole = input_ranges(checkpoint, rows)
    checkpoint.model.config.length_config = [0.5, 0.4, 0.3, 0.3]  # every token counts, whatever the default
    assert input_ranges(checkpoint, rows) == whole
    (first, second), both = (input_ranges(checkpoint, [row]) for row in rows), input_ranges(checkpoint, rows)
    for name, (low, high) in both.items():
        assert (low, high) == (min(first[name][0], second[name][0]), max(first[name][1], second[name][1]))
