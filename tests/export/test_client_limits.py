"""What a client asks of a file at its edges: the whole depth, a layer no row passes, long questions, other points."""

import json
from dataclasses import replace

import huggingface_hub
import numpy as np
import pytest
import torch
from huggingface_hub.errors import LocalEntryNotFoundError
from tokenizers import Tokenizer
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import ByteLevel as ByteLevelPieces
from transformers import AutoTokenizer

from elastic_model import (
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertModel,
    ElasticSession,
)
from elastic_model.answers import word_tags
from elastic_model.operating_points import FILE, OperatingPoint, OperatingPoints, checkpoint_hash
from export.benchmark import time_session
from export.config import ExportOptions
from export.write import export_checkpoint
from tests.export.graphs import lively

TEXTS = ["The harvest of this year has been plentiful.", "A treaty.", "Our people are strong in the country."]
ENTROPY = {"name": "entropy", "threshold": 0.9}
CONTEXT = "The mails reach every county of the western States. " * 12


@pytest.fixture
def session_of(tiny_config, tiny_tokenizer, tmp_path):
    """The session of a lively checkpoint, exported: fields of its configuration, points, options of the export."""

    def make(kind=ElasticBertForSequenceClassification, points=(), policy=ENTROPY, options=None, **fields):
        for name, value in fields.items():
            setattr(tiny_config, name, value)
        checkpoint, out = tmp_path / "checkpoint", tmp_path / "out"
        lively(tiny_config, kind=kind).save_pretrained(checkpoint)
        tiny_tokenizer.save_pretrained(checkpoint)
        if points:
            OperatingPoints(checkpoint_hash(checkpoint), policy, list(points)).save(checkpoint)
        export_checkpoint(ExportOptions(checkpoint, out, **{"files": ["model"], **(options or {})}))
        return ElasticSession.from_pretrained(out, threads=1)

    return make


def exits(answers):
    """The layers that the rows left at."""
    return [answer["exit_layer"] for answer in answers]


def torch_exits(session, kind=ElasticBertForSequenceClassification):
    """The layers at which the rows leave the PyTorch model of the same folder."""
    folder = session.file.parent.parent
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS, padding=True, return_tensors="pt")
    with torch.inference_mode():
        return kind.from_pretrained(folder)(**batch).exit_layers.tolist()


def test_a_budget_reaches_every_layer_though_the_file_stops_earlier_by_itself(session_of):
    deep = OperatingPoint("deep", [0.0] * 4, 4.0, flops=4e6)
    session = session_of(points=[deep], exit_policy={"name": "constant", "layer": 2})
    assert exits(session(TEXTS)) == torch_exits(session) == [2, 2, 2]
    assert exits(session(TEXTS, budget="full")) == exits(session(TEXTS, budget="deep")) == [4, 4, 4]
    assert exits(session(TEXTS, budget="full", max_layer=3)) == [3, 3, 3]


def test_points_do_not_become_the_default_of_a_configuration_without_a_policy(session_of):
    session = session_of(points=[OperatingPoint("fast", [0.9] * 4, 1.0, flops=1e6)], exit_policy=None)
    assert exits(session(TEXTS)) == torch_exits(session) == [4, 4, 4]


@pytest.mark.parametrize(
    ("kind", "fields", "options"),
    [
        (ElasticBertForSequenceClassification, {}, {"exit": 2}),
        (ElasticBertForSequenceClassification, {"num_output_layers": 1}, None),
        (ElasticBertModel, {}, {"exit": 2}),
    ],
)
def test_files_without_exits_have_a_full_budget_and_no_layer_below(session_of, kind, fields, options):
    session = session_of(kind, options=options, **fields)
    last = session.exit_layers[-1]
    for arguments in ({"budget": "full"}, {"max_layer": last}, {"max_layer": np.int64(last)}):
        assert exits(session(TEXTS, **arguments)) == [last] * 3
    with pytest.raises(ValueError, match=r"max_layer"):
        session(TEXTS, max_layer=1)


def test_no_row_can_leave_below_the_first_exit(session_of):
    session = session_of(exit_layers=[2, 4])
    assert max(exits(session(TEXTS, max_layer=2))) == 2
    with pytest.raises(ValueError, match="max_layer must be a layer from 2 to 4, got 1"):
        session(TEXTS, max_layer=1)


def test_the_bare_model_of_an_exit_is_cut_in_pytorch_too(session_of):
    session = session_of(ElasticBertModel, options={"exit": 2})
    folder = session.file.parent.parent
    batch = AutoTokenizer.from_pretrained(folder)(TEXTS[0], return_tensors="pt")
    with torch.inference_mode():
        states = ElasticBertModel.from_pretrained(folder)(**batch).last_hidden_state[0]
    np.testing.assert_allclose(session(TEXTS[0])[0]["embedding"], states.mean(0), atol=1e-5)


def test_a_long_question_is_cut_to_leave_room_for_its_context(session_of):
    session = session_of(ElasticBertForQuestionAnswering)
    long, short = session([(" ".join(["strong"] * 45), CONTEXT), ("Who was strong?", CONTEXT)])
    assert long["label"] in CONTEXT and short["label"] in CONTEXT


@pytest.mark.parametrize(("threshold", "answered"), [(None, True), (-1e6, True), (1e6, False)])
def test_the_threshold_of_no_answer_is_served(session_of, threshold, answered):
    session = session_of(ElasticBertForQuestionAnswering, no_answer_threshold=threshold)
    (answer,) = session([("Who was strong?", CONTEXT)])
    assert (answer["label"] != "") == answered and answer["score"] < 1e6


def test_points_of_another_policy_are_refused(session_of):
    session = session_of(points=[OperatingPoint("fast", [0.9] * 4, 1.0)], exit_policy=ENTROPY)
    folder = session.file.parent.parent
    content = json.loads((folder / FILE).read_text())
    (folder / FILE).write_text(json.dumps({**content, "policy": {"name": "confidence", "threshold": 0.9}}))
    with pytest.raises(ValueError, match="was measured with the exit policy .*confidence.*, model.onnx has .*entropy"):
        ElasticSession.from_pretrained(folder, threads=1)


def test_the_benchmark_runs_every_point_at_its_own_lengths(session_of, monkeypatch):
    shares = [0.5, 0.5, 0.25, 0.25]
    short = OperatingPoint("short", [0.0] * 4, 4.0, shares, flops=1e6)
    session = session_of(points=[short], exit_policy=ENTROPY, length_config=[0.75] * 4)
    run, seen = session.run, []
    monkeypatch.setattr(session, "run", lambda rows, **given: seen.append(given) or run(rows, **given))
    timings = time_session(session, TEXTS, 1, [3], seconds=0.0)
    assert [one.point for one in timings] == ["full", "short", "default"] and timings[0].mean_exit_layer == 4
    lengths = [given.get("length_config") for given in seen]
    assert lengths == [[1.0] * 4] * 2 + [shares] * 2 + [None] * 2


def test_words_are_read_as_in_training(session_of, tiny_tokenizer, tmp_path):
    """Byte-level tokens tell a word behind a space from one without: those of lists were others than in training."""
    session = session_of(ElasticBertForTokenClassification)
    bytes_of = Tokenizer(BPE({character: number for number, character in enumerate("Ġabc")}, []))
    bytes_of.pre_tokenizer = ByteLevel(add_prefix_space=False)
    bytes_of.post_processor = ByteLevelPieces(trim_offsets=True)
    session.tokenizer = bytes_of
    (one,) = session.encode([["ab", "c"]])
    assert one.ids == [0, 1, 2, 0, 3] and one.word_ids == [0, 0, 0, 1, 1]
    said = {"logits": np.eye(5, dtype=np.float32)}  # each token another tag: a word's is that of its first piece
    assert word_tags(["ab", "c"], [one], [said], list("vwxyz"))["label"] == ["v", "y"]


def test_windows_are_timed_and_compared(session_of, tmp_path):
    """Long questions ended the benchmark and the comparison with the tokenizer's own exception; words of a sentence
    were no text."""
    session = session_of(ElasticBertForQuestionAnswering)
    asked = [(" ".join(["strong"] * 90), CONTEXT), ("Who was strong?", CONTEXT)]
    assert time_session(session, asked, 1, [2], seconds=0.0)[0].rows_per_second > 0
    rows, again = tmp_path / "rows.tsv", ExportOptions(tmp_path / "checkpoint", tmp_path / "again", files=["model"])
    rows.write_text("text\tcontext\n" + "".join(f"{question}\t{context}\n" for question, context in asked))
    assert export_checkpoint(replace(again, rows=rows, pair="context"))["files"]["model"]
    with pytest.raises(ValueError, match="text 0 must be a pair of question and context"):
        export_checkpoint(replace(again, rows=rows))


def test_a_vector_is_kept_of_the_bare_model_and_not_its_states(session_of):
    session = session_of(ElasticBertModel)
    outputs = session.run(session.encode(TEXTS))
    assert session._row(outputs, 0, 5)["last_hidden_state"].shape == outputs["last_hidden_state"].shape[2:]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"min_agreement": 0.9}, "--min_agreement needs --rows"),
        ({"pair": "context"}, "--pair needs --rows"),
        ({"activations": "tensor", "files": ["model_fp16"]}, "--activations tensor is of int8 files"),
    ],
)
def test_options_that_would_do_nothing_are_refused(session_of, options, says):
    with pytest.raises(ValueError, match=says):
        session_of(options=options)


def test_a_checkpoint_is_not_replaced_by_its_export(session_of, tmp_path):
    session_of()
    checkpoint = tmp_path / "checkpoint"
    for output in (checkpoint, tmp_path):
        (output / ".elastic-model").touch()  # ours: nothing else protects it
        with pytest.raises(ValueError, match="would replace .*checkpoint, which is read"):
            export_checkpoint(ExportOptions(checkpoint, output, to="bert", exit=1))
    assert len(torch_exits(ElasticSession.from_pretrained(tmp_path / "out"))) == 3
    assert (checkpoint / "model.safetensors").is_file()


def test_a_tagger_has_no_pooler_that_a_stock_model_could_lack(session_of, tmp_path):
    session = session_of(ElasticBertForTokenClassification, exit_pooling="mean", options={"to": "bert"})
    assert len(session("A treaty.")) == 1


def test_labels_that_the_model_does_not_know_are_named(session_of, tmp_path):
    rows = tmp_path / "rows.tsv"
    rows.write_text("text\tlabel\nA treaty.\t0\nThe mails.\t1\n")
    with pytest.raises(ValueError, match="--label: the model answers no '0', '1'; its labels are "):
        session_of(options={"rows": rows, "label": "label"})


@pytest.mark.parametrize("text", [("a",), (), "\ud800"])
def test_what_is_no_text_is_refused(session_of, text):
    with pytest.raises(ValueError, match="text 0 "):
        session_of()([text])


def test_without_a_connection_a_report_is_not_taken_for_absent(monkeypatch, tmp_path):
    """The hash check must not be skipped because the hub was away for a moment."""

    def away(name, path, revision=None):
        if path == "tokenizer.json":
            return str(tmp_path / "abc" / path)
        raise LocalEntryNotFoundError("the hub is away")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", away)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(ValueError, match="the hub is away"):
        ElasticSession.from_pretrained("org/model")
