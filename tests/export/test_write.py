"""The command: what the folder holds, what its checks stop, what it says of bad input."""

import csv
import json
import platform
import subprocess
import sys

import numpy as np
import onnxruntime
import pytest
import torch
from transformers import AutoTokenizer

from elastic_model import ElasticBertForSequenceClassification
from elastic_model.operating_points import OperatingPoint, OperatingPoints, checkpoint_hash
from export import arithmetic, check, write
from export.__main__ import main
from export.benchmark import benchmark_folder
from export.config import BenchmarkOptions, ExportOptions, PredictOptions
from export.emulated import EmulatedSession
from export.predict import predict_file
from export.rows import read_column, read_texts
from export.write import export_checkpoint

TEXTS = ["A treaty of commerce was signed in the spring.", "Our people are strong.", "The debt has been reduced."]
INT8 = "model_quint8_avx2"


def export_to(folder, checkpoint, **options):
    return export_checkpoint(ExportOptions(checkpoint, folder, **{"files": [INT8], **options}))


def test_the_folder_is_complete(lively_checkpoint, tmp_path):
    report = export_to(tmp_path / "out", lively_checkpoint)
    out = tmp_path / "out"
    assert {path.name for path in (out / "onnx").iterdir()} == {"model.onnx", f"{INT8}.onnx"}
    assert json.loads((out / "export_report.json").read_text()) == report
    assert max(report["files"]["model"]["largest_difference"].values()) < 1e-4
    assert report["files"][INT8]["int8_share"] > 0.95
    assert all(name.startswith(("classifiers", "attention")) for name in report["files"][INT8]["float32_products"])
    assert "ElasticSession" in (out / "README.md").read_text()
    model = ElasticBertForSequenceClassification.from_pretrained(out)
    assert model.config.id2label[2] == "late"


@pytest.mark.parametrize("file", ["model", INT8])
def test_a_plain_session_needs_the_tokenizer_only(lively_checkpoint, tmp_path, file):
    export_to(tmp_path / "out", lively_checkpoint)
    session = onnxruntime.InferenceSession(tmp_path / "out/onnx" / f"{file}.onnx", providers=["CPUExecutionProvider"])
    tokens = AutoTokenizer.from_pretrained(tmp_path / "out")(TEXTS, padding=True, return_tensors="np")
    assert set(tokens) == {one.name for one in session.get_inputs()}
    logits, exit_layer, exit_logits = session.run(["logits", "exit_layer", "exit_logits"], dict(tokens))
    assert logits.shape == (3, 3) and exit_layer.tolist() == [4, 4, 4]
    np.testing.assert_array_equal(exit_logits[-1], logits)
    assert json.loads(session.get_modelmeta().custom_metadata_map["elastic_labels"]) == ["early", "middle", "late"]


def test_rows_to_compare_on(lively_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "rows.tsv").write_text("text\tother\n" + "".join(f"{text}\tx\n" for text in TEXTS * 9))
    options = {"rows": tmp_path / "rows.tsv", "max_rows": 20}
    report = export_to(tmp_path / "out", lively_checkpoint, min_agreement=0.3, **options)
    result = report["files"][INT8]
    assert result["rows"] == 20 and result["real_rows"]
    monkeypatch.setattr(check, "same_answers", lambda ours, *_: np.arange(20) < ([[20]] * 3 + [[18]])[: len(ours)])
    with pytest.raises(
        ValueError, match="answers 0.900 of 20 rows like float32, expected 0.95; the exit after layer 4"
    ):
        export_to(tmp_path / "strict", lively_checkpoint, **options)


@pytest.mark.parametrize("share", [-0.1, 1.1, float("nan")])
def test_a_share_that_rows_cannot_agree_in(lively_checkpoint, tmp_path, share):
    with pytest.raises(ValueError, match=f"min_agreement must be from 0 to 1, got {share:g}"):
        export_to(tmp_path / "out", lively_checkpoint, min_agreement=share)


def test_operating_points_travel_with_the_weights_they_belong_to(lively_checkpoint, tmp_path):
    points = [OperatingPoint("half", [0.5] * 4, 2.0)]
    stay = {"name": "confidence", "threshold": 1.0}
    OperatingPoints(checkpoint_hash(lively_checkpoint), stay, points).save(lively_checkpoint)
    report = export_to(tmp_path / "out", lively_checkpoint)
    assert report["policy"] == stay
    assert OperatingPoints.load(tmp_path / "out").at("half").thresholds == [0.5] * 4
    OperatingPoints("0" * 64, stay, points).save(lively_checkpoint)
    with pytest.raises(ValueError, match="belongs to another checkpoint"):
        export_to(tmp_path / "again", lively_checkpoint)


def test_a_float32_graph_that_differs_is_not_kept(lively_checkpoint, tmp_path, monkeypatch):
    """The third layer's feed-forward is off by a thousandth: the check names that exit, and nothing is written."""
    exact = arithmetic.ARITHMETICS["model"].product

    def slightly_off(graph, tokens, name, weight):
        return exact(graph, tokens, name, weight * (1.001 if "layer.2.intermediate" in name else 1))

    broken = arithmetic.Arithmetic(slightly_off, arithmetic.ARITHMETICS["model"].lookup)
    monkeypatch.setitem(arithmetic.ARITHMETICS, "model", broken)
    with pytest.raises(ValueError, match="the exit after layer 3 is the first"):
        export_to(tmp_path / "out", lively_checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == [lively_checkpoint.name]


def test_an_int8_graph_that_differs_is_not_kept(lively_checkpoint, tmp_path, monkeypatch):
    """A scale lost for one layer's products, as a fusion once did."""
    exact = arithmetic.product_int8

    def scale_lost(graph, tokens, name, weight, pairs):
        return exact(graph, tokens, name, weight * (30 if "layer.1." in name else 1), pairs=pairs)

    broken = arithmetic.Arithmetic(lambda *given: scale_lost(*given, pairs=True), arithmetic.lookup_int8)
    monkeypatch.setitem(arithmetic.ARITHMETICS, INT8, broken)
    with pytest.raises(ValueError, match=f"{INT8}.onnx differs from float32 .* the exit after layer 2 is the first"):
        export_to(tmp_path / "out", lively_checkpoint)
    assert not (tmp_path / "out").exists()


def test_rows_that_leave_wrongly_are_noticed(lively_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(check, "_leaves_at", lambda *given: np.full(given[2].shape[1], 1))
    with pytest.raises(ValueError, match="leaves after layer 4"):
        export_to(tmp_path / "out", lively_checkpoint)


def test_a_file_for_another_cpu_is_marked_unchecked(lively_checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(write, "cpu_flags", lambda: {"avx2"})
    report = export_to(tmp_path / "out", lively_checkpoint, files=["model_qint8_avx512_vnni"])
    assert "avx512_vnni" in report["files"]["model_qint8_avx512_vnni"]["unchecked"]


needs_x86 = pytest.mark.skipif(platform.machine() != "x86_64", reason="the emulator is this machine itself")


@needs_x86
def test_a_file_for_another_cpu_is_checked_by_an_emulator(lively_checkpoint, tmp_path, monkeypatch):
    """The emulator is a Python of this processor: what is tested is all but the emulation."""
    here = export_to(tmp_path / "here", lively_checkpoint)["files"][INT8]
    monkeypatch.setattr(write, "cpu_flags", lambda: {"asimddp"})
    there = export_to(tmp_path / "there", lively_checkpoint, files=[INT8], emulator=sys.executable)["files"][INT8]
    assert there == {**here, "emulated": "x86_64"} and "agreement" in there


@needs_x86
@pytest.mark.parametrize(
    ("emulator", "says"),
    [
        (sys.executable, "runs a x86_64; model_qint8_arm64.onnx is for aarch64 or arm64"),
        ("false", "'false' ended with exit code 1: it said nothing"),
        (f"{sys.executable} /nowhere.py", "ended with exit code 2: .*can't open file"),
        ("no-such-emulator -L /", "'no-such-emulator -L /' cannot be started: .*No such file"),
    ],
)
def test_an_emulator_that_cannot_check_is_named(lively_checkpoint, tmp_path, emulator, says):
    with pytest.raises(ValueError, match=says):
        export_to(tmp_path / "out", lively_checkpoint, files=["model_qint8_arm64"], emulator=emulator)
    assert not (tmp_path / "out").exists()


def test_an_emulator_that_nothing_needs_is_refused(lively_checkpoint, tmp_path):
    with pytest.raises(ValueError, match="emulator nope would do nothing: this CPU runs model and model_fp16 itself"):
        export_to(tmp_path / "out", lively_checkpoint, files=["model_fp16"], emulator="nope")


def test_a_file_that_says_nan_is_refused_on_real_rows_too(lively_checkpoint, tmp_path):
    """Its argmax was class 0, and so was the other's: 100 % like float32."""
    model = ElasticBertForSequenceClassification.from_pretrained(lively_checkpoint)
    layer = model.elasticbert.encoder.layer[1]
    with torch.no_grad():
        layer.intermediate.dense.weight *= 1e6  # beyond float16
        layer.output.dense.weight *= 1e-6
        for head in model.classifiers:
            model.classifiers[head].bias[0] = 1e3
    model.save_pretrained(lively_checkpoint)
    (tmp_path / "rows.txt").write_text("the army\nof the ships\n")
    with pytest.raises(ValueError, match="model_fp16.onnx says NaN or infinity; the exit after layer 2 is the first"):
        export_to(tmp_path / "out", lively_checkpoint, files=["model_fp16"], rows=tmp_path / "rows.txt")


@pytest.mark.parametrize(
    "policy", [None, "entropy", {}, {"name": "foo"}, {"name": "never"}, {"name": "learned"}, {"name": "confidence"}]
)
def test_a_table_of_points_that_no_file_can_follow_is_refused(lively_checkpoint, tmp_path, policy):
    points = [
        {"name": "full", "thresholds": [0.0 if policy == {"name": "learned"} else 5.0] * 4, "mean_exit_layer": 4.0}
    ]
    table = {"format": 1, "checkpoint": checkpoint_hash(lively_checkpoint), "policy": policy, "points": points}
    (lively_checkpoint / "operating_points.json").write_text(json.dumps(table))
    with pytest.raises(ValueError, match="the policy of operating points must be|learned_exit_head=true|threshold"):
        export_to(tmp_path / "out", lively_checkpoint)
    assert not (tmp_path / "out").exists()


def test_no_rows_end_no_process(lively_checkpoint, tmp_path):
    """onnxruntime divided by the number of columns of a matrix without any."""
    export_to(tmp_path / "plain", lively_checkpoint, exit=2)
    code = (
        "import sys, numpy as np, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "named = [one.name for one in session.get_inputs() if one.type == 'tensor(int64)']\n"
        "none = dict.fromkeys(named, np.zeros((0, 5), np.int64))\n"
        "print(session.run(None, none)[0].shape)"
    )
    file = tmp_path / "plain" / "onnx" / "model.onnx"
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True)
    assert done.returncode == 0 and done.stdout.strip() == "(0, 3)", (done.returncode, done.stderr)


def test_an_emulator_that_ends_amid_a_batch_is_named(lively_checkpoint, tmp_path, monkeypatch):
    export_to(tmp_path / "out", lively_checkpoint)
    session = EmulatedSession(
        sys.executable, tmp_path / "out" / "onnx" / "model.onnx", tmp_path / "out" / "tokenizer.json"
    )
    session.process.kill()
    with pytest.raises(ValueError, match="ended with exit code -9"):
        session.run([check.Encoding([2, 3], [0, 0])])


@pytest.fixture
def run_export(monkeypatch, capsys):
    """Runs the command line in this process: (exit code, stdout, stderr)."""

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["python -m export", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        return end.value.code, *capsys.readouterr()

    return run


def spoil(folder, case):
    config = json.loads((folder / "config.json").read_text())
    if case == "no weights":
        (folder / "model.safetensors").unlink()
    elif case == "truncated weights":
        content = (folder / "model.safetensors").read_bytes()
        (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    elif case == "no tokenizer":
        (folder / "tokenizer.json").unlink()
    elif case == "another model":
        (folder / "config.json").write_text(json.dumps({**config, "model_type": "bert"}))
    elif case == "another head":
        (folder / "config.json").write_text(json.dumps({**config, "architectures": ["ElasticBertForPreTraining"]}))
    elif case == "damaged config":
        (folder / "config.json").write_text("{")
    elif case == "no config":
        (folder / "config.json").unlink()


@pytest.mark.parametrize(
    ("case", "says"),
    [
        ("no weights", "has no weights"),
        ("truncated weights", "cannot be loaded"),
        ("no tokenizer", "no tokenizer.json"),
        ("another model", "model_type 'bert'"),
        ("another head", "ElasticBertForPreTraining is not exported"),
        ("damaged config", "not JSON"),
        ("no config", "no config.json"),
    ],
)
def test_a_checkpoint_that_is_not_one(lively_checkpoint, tmp_path, case, says):
    spoil(lively_checkpoint, case)
    with pytest.raises(ValueError, match=says):
        export_to(tmp_path / "out", lively_checkpoint)
    assert not (tmp_path / "out").exists()


def test_a_checkpoint_that_lacks_a_head_is_not_exported_with_a_random_one(lively_model, lively_checkpoint, tmp_path):
    tensors = {name: tensor for name, tensor in lively_model.state_dict().items() if "classifiers.2" not in name}
    lively_model.save_pretrained(lively_checkpoint, state_dict=tensors)
    with pytest.raises(ValueError, match="lacks weights: classifiers.2"):
        export_to(tmp_path / "out", lively_checkpoint)


def test_the_command_reports_in_one_line_and_overwrites_nothing(tiny_checkpoint, tmp_path, run_export):
    (tmp_path / "theirs").mkdir()
    (tmp_path / "theirs" / "thesis.txt").write_text("mine")
    code, _, errors = run_export(tiny_checkpoint, tmp_path / "theirs")
    assert code == 2 and len(errors.strip().splitlines()) == 1
    assert "was not made by elastic-model" in errors
    assert [path.name for path in (tmp_path / "theirs").iterdir()] == ["thesis.txt"]
    code, _, errors = run_export(tmp_path / "nowhere", tmp_path / "out")
    assert code == 2 and "nowhere is not a folder" in errors
    code, _, errors = run_export(tiny_checkpoint, tmp_path / "out", "--files", "model_fp4")
    assert code == 2 and "model_fp4" in errors and "model_quint8_avx2" in errors


def test_the_commands_end_to_end(tiny_checkpoint, tmp_path, run_export):
    code, output, _ = run_export(tiny_checkpoint, tmp_path / "out")
    assert code == 0 and "onnx/model.onnx: " in output and "differs from PyTorch" in output
    (tmp_path / "texts.txt").write_text("\n".join(TEXTS) + "\n")
    _, output, _ = run_export("predict", tmp_path / "out", "--input", tmp_path / "texts.txt", "--max_layer", 2)
    lines = [line.split("\t") for line in output.splitlines()]
    assert lines[0] == ["label", "score", "exit_layer", "point"] and len(lines) == 4
    assert all(line[0] in ("early", "middle", "late") and line[2] == "2" for line in lines[1:])
    timings = tmp_path / "timings.json"
    flags = ["--input", tmp_path / "texts.txt", "--seconds", 0.05, "--output", timings]
    assert run_export("benchmark", tmp_path / "out", *flags)[0] == 0
    assert {(one["file"], one["batch"]) for one in json.loads(timings.read_text())} >= {("model", 1), ("model", 32)}


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("rows.tsv", b"body\tlabel\nx\ty\n", "row 2: there is no column 'text'; columns: body, label"),
        ("rows.tsv", b"text\ttext\nx\ty\n", "the column 'text' is there twice .text, text."),
        ("rows.tsv", b"text\tlabel\nx\n", "row 2: 1 cells under 2 columns"),
        ("rows.tsv", b"text\tlabel\nx\ty\n \ty\n", "row 3: column 'text' has no text .its value: ' '."),
        ("rows.tsv", b"text\none\n\ntwo\n", "row 3: a blank line between rows"),
        ("rows.tsv", b"text\tlabel\rx\ty\r", "its lines end in a carriage return alone"),
        ("rows.txt", b"\xff\xfe\n", "not a readable text file in UTF-8"),
        ("rows.txt", b"\n\n", "has no texts"),
        ("rows.txt", b"one\n\ntwo\n", "line 2: an empty text; leave such lines out"),  # answers were shifted
        ("rows.txt.xz", b"not xz", "not a readable text file"),
        ("rows.txt.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03\xff\xff\xff\xff\xff", "not a readable text file"),
        ("rows.csv", b"text,label\nx\n", "row 2: 1 cells under 2 columns"),
        ("rows.csv", b"text,label\n\nx,y\n", "row 2: a blank line between rows"),  # answers would be shifted
        ("rows.csv", b"\xff\xfe\n", "not a readable csv file in UTF-8"),
        ("rows.csv", b"", "the file has no rows"),
        ("rows.jsonl", b"{}\n", "line 1: there is no column 'text'"),
        ("rows.jsonl", b'{"text": 3}\n', "line 1: column 'text' has no text .its value: 3."),
        ("rows.conll", b"one B-x\n", "there is no column 'text'; columns: 1, 2"),  # each line was a text, with its tag
        ("rows", b"one\n", "expected a .txt, .tsv, .csv or .jsonl file"),
        ("rows.txt", b"one\rtwo\r", "its lines end in CR alone"),
        ("rows.txt", b"text\tlabel\nx\ty\n", "a .txt is read as a text a line, this looks like a table"),
        ("rows.txt.bz2", b"not bz2", "not a readable text file"),
    ],
)
def test_a_file_of_texts_that_is_not_one(tmp_path, name, content, says):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=says):
        read_texts(tmp_path / name, "text")


def test_a_blank_last_line_is_no_row(tmp_path):
    for ending, between in (("tsv", "\t"), ("csv", ",")):
        file = tmp_path / f"t.{ending}"
        file.write_text(f"text{between}label\none{between}a\ntwo{between}b\n\n")
        assert read_texts(file, "text") == ["one", "two"] and read_column(file, "label") == ["a", "b"]


def test_quoted_cells_are_those_of_a_csv(tmp_path):
    """Of a .tsv a quotation mark is a character, as in training."""
    rows = [("text", "pair"), ('she said "no", twice', "one\ntwo"), ("x" * 200_000, "y")]
    with (tmp_path / "rows.csv").open("w", newline="", encoding="utf-8") as content:
        csv.writer(content).writerows(rows)
    assert read_texts(tmp_path / "rows.csv", "text", "pair") == rows[1:]
    assert read_texts(tmp_path / "rows.csv", "pair", limit=1) == ["one\ntwo"]
    (tmp_path / "rows.tsv").write_text('text\tpair\n"no\ta\rb\n', newline="")
    assert read_texts(tmp_path / "rows.tsv", "text", "pair") == [('"no', "a\rb")]


def test_every_form_that_is_trained_on_is_read(tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": "one", "label": 1}\n{"text": ["two", "words"], "label": 0}\n')
    assert read_texts(tmp_path / "rows.jsonl", "text") == ["one", ["two", "words"]]
    assert read_column(tmp_path / "rows.jsonl", "label", limit=1) == ["1"]
    (tmp_path / "rows.conll").write_text("EU B-ORG\nagrees O\n")
    assert read_texts(tmp_path / "rows.conll", "1") == [["EU", "agrees"]]


def test_tables_are_read_as_in_training(tmp_path):
    """With a mark of UTF-8, which was part of the first column's name, and in capitals, which were no table."""
    (tmp_path / "ROWS.TSV").write_text("text\tlabel\none\t1\n", encoding="utf-8-sig")
    assert read_texts(tmp_path / "ROWS.TSV", "text") == ["one"]
    with pytest.raises(ValueError, match="at least 1 row must be read, got max_rows 0"):
        read_texts(tmp_path / "ROWS.TSV", "text", limit=0)
    (tmp_path / "rows.txt").write_text("text\n", encoding="utf-8")
    with pytest.raises(ValueError, match="looks like a table; name it .tsv"):
        read_texts(tmp_path / "rows.txt", "text", "second")
    assert read_texts(tmp_path / "rows.txt", "text") == ["text"]


def test_predict_does_not_replace_its_input(tmp_path):
    texts = tmp_path / "texts.tsv"
    texts.write_text("text\none\n")
    with pytest.raises(ValueError, match="texts.tsv would replace that file, which is read"):
        predict_file(PredictOptions(folder=tmp_path, input=texts, output=texts))
    for changes, says in (({"batch_sizes": [0]}, "batch_sizes must"), ({"threads": [0]}, "threads must"),
                          ({"seconds": float("nan")}, "seconds must be above 0, got nan")):  # fmt: skip
        with pytest.raises(ValueError, match=says):
            benchmark_folder(BenchmarkOptions(folder=tmp_path, input=texts, **changes))


def test_rows_must_agree_also_as_the_file_runs_by_itself(lively_checkpoint, tmp_path, monkeypatch):
    (tmp_path / "rows.tsv").write_text("text\tother\n" + "".join(f"{text}\tx\n" for text in TEXTS * 9))
    # all exits agree; the answers by default, of one exit alone, do not
    agreeing = lambda ours, *_: np.arange(20) < ([[20]] * 4 if len(ours[0]) > 1 else [[18]])  # noqa: E731
    monkeypatch.setattr(check, "same_answers", agreeing)
    with pytest.raises(ValueError, match="answers 0.900 of 20 rows like float32, expected 0.95; as the file runs by"):
        export_to(tmp_path / "out", lively_checkpoint, rows=tmp_path / "rows.tsv", max_rows=20)


def test_weights_that_are_not_finite_are_named(lively_checkpoint, tmp_path):
    model = ElasticBertForSequenceClassification.from_pretrained(lively_checkpoint)
    model.elasticbert.encoder.layer[1].output.dense.bias.data[3] = float("nan")
    model.save_pretrained(lively_checkpoint)
    with pytest.raises(ValueError, match="weights that are not finite: elasticbert.encoder.layer.1.output.dense.bias"):
        export_to(tmp_path / "out", lively_checkpoint)
    assert not (tmp_path / "out").exists()


def test_the_same_answer_is_the_whole_answer():
    """All labels of a row, both ends of a span."""
    ours, theirs = [np.array([[1.0, -1.0]]), np.array([[1.0, 1.0]])], [np.array([[1.0, 1.0]]), np.array([[2.0, 3.0]])]
    assert check.same_answers(ours, theirs, "multi_label_classification").tolist() == [[False, True]]
    spans = np.zeros((2, 1, 4, 2))  # rows, exits, tokens, start and end
    spans[:, 0, 1, 0] = spans[:, 0, 2, 1] = 1.0
    other = spans.copy()
    other[0, 0, 3, 1] = 2.0
    assert check.same_answers(list(spans), list(other), "question_answering").tolist() == [[False, True]]
