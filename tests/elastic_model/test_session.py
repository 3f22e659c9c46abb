"""The client of an exported folder, in a process that cannot import torch and in this one."""

import json
import os
import pickle
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from elastic_model import ElasticSession, processor
from elastic_model.exit_policies import normalised_entropy, predict
from elastic_model.operating_points import OperatingPoint, OperatingPoints
from tests.elastic_model.hub_server import HubServer
from tests.export.graphs import lively

TEXTS = [
    "The harvest of this year has been plentiful.",
    "Tonight the state of our Union is strong because our people are strong, in every part of the country.",
    "A treaty.",
    "It remains for the wisdom of the legislature to provide for the public lands.",
] * 6


def middle_entropy(model, tokenizer):
    """A threshold at which some of the texts leave at the first exit and others go on."""
    batch = tokenizer(TEXTS[:4], padding=True, truncation=True, max_length=40, return_tensors="pt")
    with torch.no_grad():
        first = model(**batch).exit_logits[0]
    entropies = normalised_entropy(predict(first, "single_label_classification")).sort().values
    return float(entropies[1:3].mean())


@pytest.fixture(scope="module")
def exported(tmp_path_factory, tiny_tokenizer):
    """The artefact of a lively tiny classifier with three operating points."""
    from elastic_model import ElasticBertConfig
    from elastic_model.operating_points import checkpoint_hash
    from export.config import ExportOptions
    from export.write import export_checkpoint

    folder = tmp_path_factory.mktemp("session")
    config = ElasticBertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=40,
        id2label={0: "early", 1: "middle", 2: "late"},
        label2id={"early": 0, "middle": 1, "late": 2},
    )
    model = lively(config)
    usual = middle_entropy(model, tiny_tokenizer)
    config.exit_policy = {"name": "entropy", "threshold": usual}
    model.save_pretrained(folder / "checkpoint")
    tiny_tokenizer.save_pretrained(folder / "checkpoint")
    table = [
        OperatingPoint(name, [threshold] * 4, layer, lengths, flops=layer * 1e6)
        for name, threshold, layer, lengths in [
            ("full", 0.0, 4.0, None),
            ("usual", usual, 3.5, None),
            ("short", 0.0, 2.0, [1.0, 0.5, 0.5, 0.2]),
            ("fast", 1.0, 1.0, None),
        ]
    ]
    points = OperatingPoints(checkpoint_hash(folder / "checkpoint"), config.exit_policy, table)
    points.save(folder / "checkpoint")
    export_checkpoint(ExportOptions(folder / "checkpoint", folder / "out"))
    return folder / "out"


@pytest.fixture
def session(exported):
    return ElasticSession.from_pretrained(exported, threads=1)


def test_a_process_without_torch_and_transformers_answers(exported):
    script = f"""
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "transformers", "onnx"):
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Refuse())
from elastic_model import ElasticSession
print(ElasticSession.from_pretrained({str(exported)!r}, threads=1)("The harvest has been plentiful.")[0])
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'label':" in done.stdout and "'point': 'usual'" in done.stdout


def test_answers_are_in_the_order_of_the_texts(session):
    many = session(TEXTS, batch_size=5)
    assert [set(result) for result in many] == [{"label", "score", "exit_layer", "point"}] * len(TEXTS)
    for text, result in zip(TEXTS[:4], many, strict=False):
        (alone,) = session(text)
        assert alone["label"] == result["label"] and alone["exit_layer"] == result["exit_layer"]
        assert alone["score"] == pytest.approx(result["score"], abs=1e-5)
    assert len({result["exit_layer"] for result in many}) > 1


def test_scores_are_probabilities_of_the_exit_that_answered(session):
    logits = session.exit_logits(TEXTS[:4])
    assert logits.shape == (4, 4, 3) and np.isfinite(logits).all()
    for number, result in enumerate(session(TEXTS[:4])):
        row = logits[session.exit_layers.index(result["exit_layer"]), number].astype(float)
        shares = np.exp(row) / np.exp(row).sum()
        assert result["label"] == session.labels[shares.argmax()]
        assert result["score"] == pytest.approx(shares.max(), abs=1e-4)


def test_budgets_choose_the_operating_point(session):
    assert {result["point"] for result in session(TEXTS)} == {"usual"}
    full = session(TEXTS, budget="full")
    assert {(result["exit_layer"], result["point"]) for result in full} == {(4, "full")}
    fast = session(TEXTS, budget={"speedup": 4})
    assert {(result["exit_layer"], result["point"]) for result in fast} == {(1, "fast")}
    assert max(result["exit_layer"] for result in session(TEXTS, max_layer=2)) == 2


def test_full_depth_needs_no_measured_point(exported, session):
    bare = ElasticSession(session.file, exported / "tokenizer.json", threads=1)
    assert bare(TEXTS, budget="full") == session(TEXTS, budget="full")


def test_a_file_that_stops_at_a_lower_layer_is_not_called_full(exported, tmp_path):
    from export.config import ExportOptions
    from export.write import export_checkpoint, patch_config

    checkpoint = shutil.copytree(exported.parent / "checkpoint", tmp_path / "checkpoint")
    patch_config(checkpoint, {"exit_policy": {"name": "constant", "layer": 2}})
    export_checkpoint(ExportOptions(checkpoint, tmp_path / "out"))
    session = ElasticSession.from_pretrained(tmp_path / "out", threads=1)
    assert [(one["exit_layer"], one["point"]) for one in session(TEXTS[:2])] == [(2, "default")] * 2
    assert {(one["exit_layer"], one["point"]) for one in session(TEXTS[:2], budget="full")} == {(4, "full")}


def test_a_point_with_lengths_drops_tokens(session):
    short, full = session(TEXTS, budget="short", cost=True), session(TEXTS, budget="full", cost=True)
    assert all(less["flops"] < more["flops"] for less, more in zip(short, full, strict=True))
    assert any(less["score"] != more["score"] for less, more in zip(short, full, strict=True))
    encodings = session.encode(TEXTS)
    outputs = session.run(encodings, session.never, 4, [1.0, 0.5, 0.5, 0.2])
    labels = [session.labels[one] for one in outputs["logits"].argmax(-1)]
    assert labels == [result["label"] for result in short]
    (text,) = session("A treaty.", budget="short")
    assert text == pytest.approx({**session(["A treaty.", TEXTS[1]], budget="short")[0]}, abs=1e-6)


def test_an_iterator_is_answered_lazily(session, monkeypatch):
    """A few texts at a time are read, whatever comes after them; progress is told."""
    monkeypatch.setattr("elastic_model.session.CHUNK", 3)
    read, told = [], []

    def endless():
        while True:
            read.append(1)
            yield TEXTS[len(read) % 4]

    answers = session(endless(), progress=told.append)
    first = [next(answers) for _ in range(7)]
    assert len(read) == 9 and told == [3, 6]
    assert first == session([TEXTS[number % 4] for number in range(1, 8)])
    assert list(session(iter([]))) == []


def test_memory_is_bounded_in_tokens(session, monkeypatch):
    """A batch holds no more slots than are set aside, long rows fewer than short ones."""
    monkeypatch.setattr("elastic_model.session.BATCH_TOKENS", 60)
    sizes, run = [], type(session).run

    def counted(self, rows, *given):
        sizes.append([len(row.ids) for row in rows])
        return run(self, rows, *given)

    monkeypatch.setattr(type(session), "run", counted)
    session(TEXTS)
    assert all(len(rows) == 1 or len(rows) * max(rows) <= 60 for rows in sizes) and max(map(len, sizes)) > 1


def test_a_pickled_session_and_a_forked_process_answer(session, exported):
    expected = session(TEXTS[:4])
    assert pickle.loads(pickle.dumps(session))(TEXTS[:4]) == expected
    script = f"""
import multiprocessing, sys
from elastic_model import ElasticSession
session = ElasticSession.from_pretrained({str(exported)!r}, threads=2)
texts = {TEXTS[:4]!r}
expected = [one["label"] for one in session(texts)]
child = multiprocessing.get_context("fork").Process(
    target=lambda: sys.exit(0 if [one["label"] for one in session(texts)] == expected else 7)
)
child.start()
child.join(60)
print(child.exitcode, [one["label"] for one in session(texts)] == expected)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.stdout.split() == ["0", "True"], done.stderr


def test_a_hub_id_fetches_the_file_for_this_cpu_alone(exported, tmp_path):
    server = HubServer()
    server.upload("org/exported", exported)
    script = f"""
import json
from elastic_model import ElasticSession
session = ElasticSession.from_pretrained("org/exported", threads=1)
print(json.dumps([session.file.stem, session({TEXTS[0]!r})[0]["label"]]))
for name in ("org/nothing", "no such name!"):
    try:
        ElasticSession.from_pretrained(name)
    except ValueError as error:
        print(json.dumps(str(error)))
"""
    environment = {**os.environ, "HF_ENDPOINT": server.url, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    server.close()
    assert done.returncode == 0, done.stderr
    (file, label), *errors = [json.loads(line) for line in done.stdout.splitlines()]
    here = ElasticSession.from_pretrained(exported, threads=1)
    assert (file, label) == (here.file.stem, here(TEXTS[0])[0]["label"])
    assert len(errors) == 2 and all("is not a folder" in error or "neither a folder" in error for error in errors)
    fetched = {path.name for path in tmp_path.rglob("*") if path.suffix in (".onnx", ".safetensors", ".py")}
    assert fetched == {f"{file}.onnx"}


def test_a_folder_of_another_version_is_named(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    model = onnx.load(tmp_path / "out/onnx/model.onnx")
    for entry in model.metadata_props:
        if entry.key == "elastic_format":
            entry.value = "7"
    onnx.save(model, tmp_path / "out/onnx/model.onnx")
    (tmp_path / "out/export_report.json").unlink()
    with pytest.raises(ValueError, match="written in format 7, this version reads format 2"):
        ElasticSession.from_pretrained(tmp_path / "out", "model")


def test_texts_as_long_and_as_odd_as_they_come(session):
    for text in ("x", "\x00\u200b!", "a" * 100_000, "word " * 20_000, "\U0001f600", "e\u0301" * 50):
        (result,) = session(text)
        assert result["label"] in session.labels and np.isfinite(result["score"])


def test_every_exit_of_a_regression_is_answered(tmp_path, tiny_tokenizer, tiny_config):
    """With a patience of values a large threshold lets everyone leave, where one of votes would keep everyone."""
    from export.config import ExportOptions
    from export.write import export_checkpoint

    tiny_config.num_labels = 1
    tiny_config.exit_policy = {"name": "patience", "patience": 1, "threshold": 0.5}
    lively(tiny_config).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    export_checkpoint(ExportOptions(tmp_path / "checkpoint", tmp_path / "out"))
    logits = ElasticSession.from_pretrained(tmp_path / "out", threads=1).exit_logits(TEXTS)
    assert logits.shape == (4, len(TEXTS), 1) and np.isfinite(logits).all()


def test_one_text_is_one_encoding(session):
    """Each letter was one, and a pair two texts."""
    assert [len(session.encode(texts)) for texts in ("our people", ("our", "people"), ["our", "people"])] == [1, 1, 2]


def test_pairs_and_long_texts(session):
    pair, joined = session([("The harvest has", "been plentiful.")]), session(["The harvest has been plentiful."])
    assert pair[0]["score"] != joined[0]["score"]  # separated, with token types of their own
    assert session("peace " * 1000)[0]["label"] in session.labels  # cut to the 40 positions there are
    assert session([]) == [] and session.exit_logits([]).shape == (4, 0, 3)


def test_threads_may_share_a_session(session):
    expected = session(TEXTS)
    with ThreadPoolExecutor(8) as pool:
        for found in pool.map(lambda _: session(TEXTS), range(24)):
            assert [(one["label"], one["exit_layer"]) for one in found] == [
                (one["label"], one["exit_layer"]) for one in expected
            ]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda session: session(["fine", "  "]), r"text 1 is empty"),
        (lambda session: session([3]), r"text 0 must be a string or a pair"),
        (lambda session: session(["a"], max_layer=5), r"from 1 to 4, got 5"),
        (lambda session: session(["a"], max_layer=0), r"from 1 to 4, got 0"),
        (lambda session: session(["a"], budget="quick"), r"the names are: full, usual, short, fast"),
        (lambda session: session(["a"], batch_size=0), r"batch_size must be a whole number of at least 1, got 0"),
        (lambda session: session(["a"], batch_size="3"), r"batch_size must be a whole number .* got '3'"),
        (lambda session: session.run([]), r"encodings is empty"),
        (lambda session: session.run(session.tokenizer.encode_batch(["a"]), [float("nan")] * 4), r"4 finite numbers"),
        (lambda session: session.run(session.tokenizer.encode_batch(["a"]), [0.1]), r"4 finite numbers"),
        (lambda session: session.exit_logits(["a"], length_config=[0.5, 0.9, 0.5, 0.5]), r"must not rise"),
        (
            lambda session: session.exit_logits(["a"], length_config=[float("nan")] * 4),
            r"must lie in \(0, 1\]",
        ),
        (lambda session: session.exit_logits(["a"], length_config=[0.5]), r"one entry per layer, 4 in all"),
        (lambda session: session.exit_logits(["a"], length_config={"mass": [0.5]}), r"4 shares in \(0, 1\]"),
        (lambda session: session("a", budget={"latency_ms": 3}), r"latency_ms"),
        (lambda session: session(None), r"texts must be a string, a pair of strings, or a list of them, got None"),
        (lambda session: session(b"a"), r"texts must be a string, .* got b'a'"),
        (lambda session: session({"text": "a", "text_pair": "b"}), r"texts must be a string, .* got {'text'"),
        (lambda session: session(5), r"texts must be a string, .* got 5"),
        (
            lambda session: ElasticSession(session.file, session.file, threads=0),
            r"threads must be a whole number of at least 1, got 0",
        ),
        (
            lambda session: ElasticSession(session.file, session.file, threads="2"),
            r"threads must be a whole number of at least 1, got '2'",
        ),
    ],
)
def test_bad_calls_say_what_is_allowed(session, call, says):
    with pytest.raises(ValueError, match=says):
        call(session)


def test_folders_that_are_not_artefacts(exported, tmp_path):
    with pytest.raises(ValueError, match="is not a folder"):
        ElasticSession.from_pretrained(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="has no folder onnx: it is not an export; make one by `python -m export"):
        ElasticSession.from_pretrained(tmp_path)
    (tmp_path / "onnx").mkdir()
    with pytest.raises(ValueError, match="has no file for this CPU; present: none"):
        ElasticSession.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="has no model_fp4; present: "):
        ElasticSession.from_pretrained(exported, "model_fp4")


@pytest.mark.parametrize("case", ["truncated", "empty", "not onnx"])
def test_a_damaged_file_is_named(exported, tmp_path, case):
    shutil.copytree(exported, tmp_path / "out")
    file = tmp_path / "out/onnx/model.onnx"
    content = {"truncated": file.read_bytes()[:5000], "empty": b"", "not onnx": b"hello"}[case]
    file.write_bytes(content)
    with pytest.raises(ValueError, match="model.onnx is damaged or was changed: its sha256"):
        ElasticSession.from_pretrained(tmp_path / "out", "model")
    (tmp_path / "out/export_report.json").unlink()
    with pytest.raises(ValueError, match="model.onnx: (onnxruntime .* cannot load it|not a file that)"):
        ElasticSession.from_pretrained(tmp_path / "out", "model")


def test_points_of_another_checkpoint_are_not_served(exported, tmp_path):
    """Of as many exits they fit: the thresholds, and the guarantee, of other weights."""
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()  # a session reads no weights but the ONNX file's
    OperatingPoints("0" * 64, {"name": "entropy"}, [OperatingPoint("one", [0.1] * 4, 1.0)]).save(tmp_path / "out")
    with pytest.raises(ValueError, match="operating_points.json belongs to another checkpoint .*000"):
        ElasticSession.from_pretrained(tmp_path / "out")


def test_an_artefact_without_its_tokenizer_or_with_other_points(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "out")
    (tmp_path / "out/model.safetensors").unlink()  # a session reads no weights but the ONNX file's
    OperatingPoints("", {"name": "entropy"}, [OperatingPoint("two exits", [0.1, 0.1], 1.0)]).save(tmp_path / "out")
    with pytest.raises(ValueError, match="2 thresholds per point for the 4 exits"):
        ElasticSession.from_pretrained(tmp_path / "out")
    of_tokens = [OperatingPoint("tokens", [0.1] * 4, 1.0, [8, 8, 4, 4])]  # another share for every text
    OperatingPoints("", {"name": "entropy"}, of_tokens).save(tmp_path / "out")
    with pytest.raises(ValueError, match="operating_points.json: point 'tokens': .*shares"):
        ElasticSession.from_pretrained(tmp_path / "out")
    (tmp_path / "out/operating_points.json").unlink()
    with pytest.raises(ValueError, match="has no operating_points.json"):
        ElasticSession.from_pretrained(tmp_path / "out")(["a"], budget={"speedup": 2})
    (tmp_path / "out/tokenizer.json").write_text(json.dumps({"version": "1.0"}))
    with pytest.raises(ValueError, match="not a tokenizer"):
        ElasticSession.from_pretrained(tmp_path / "out")
    (tmp_path / "out/tokenizer.json").unlink()
    with pytest.raises(ValueError, match="tokenizer.json is missing"):
        ElasticSession.from_pretrained(tmp_path / "out")


def test_the_file_fits_the_cpu(monkeypatch, tmp_path):
    assert processor.fitting_files({"avx2", "avx512_vnni"})[0] == "model_qint8_avx512_vnni"
    assert processor.fitting_files({"avx2", "avx512f"})[0] == "model_quint8_avx2"  # it would saturate with the other
    assert processor.fitting_files({"asimd", "asimddp"})[0] == "model_qint8_arm64"
    assert processor.fitting_files(set()) == ["model", "model_fp16", "model_bf16"]
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("processor\t: 0\nmodel name\t: EPYC: a CPU\nflags\t\t: fpu avx2 avx_vnni\n")
    monkeypatch.setattr(processor, "CPUINFO", cpuinfo)
    assert processor.cpu_flags() == {"fpu", "avx2", "avx_vnni"} and processor.cpu_name() == "EPYC: a CPU"
    cpuinfo.unlink()
    assert processor.cpu_name()


def test_threads_respect_the_container(monkeypatch, tmp_path):
    quota = tmp_path / "cpu.max"
    monkeypatch.setattr(processor, "CPU_MAX", quota)
    monkeypatch.setattr(processor.os, "sched_getaffinity", lambda _: set(range(8)))
    assert processor.available_cores() == 8
    for content, cores in [("max 100000", 8), ("250000 100000", 2), ("50000 100000", 1)]:
        quota.write_text(content)
        assert processor.available_cores() == cores


def test_without_onnxruntime_a_session_says_what_to_install(tmp_path):
    code = (
        "import sys; sys.modules['onnxruntime'] = None\n"
        "try:\n    from elastic_model import ElasticSession\n"
        "except ModuleNotFoundError as error:\n    print(error)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=os.getcwd())
    assert 'pip install "elastic-model[serve]"' in done.stdout, done.stderr


def test_the_last_threshold_does_not_tell_points_apart(session):
    """Nobody is asked there."""
    usual = session.points.at("usual")
    session.points = OperatingPoints(
        "", session.points.policy, [replace(usual, thresholds=[*usual.thresholds[:-1], 0.9])]
    )
    assert session.default_point == "usual"
    session.__dict__.pop("default_point")
    session.points = OperatingPoints(
        "", session.points.policy, [replace(usual, thresholds=[0.9, *usual.thresholds[1:]])]
    )
    assert session.default_point == "default"


def test_texts_that_are_all_there_are_checked_before_any_is_answered(session, monkeypatch):
    answered = []
    monkeypatch.setattr("elastic_model.session.CHUNK", 2)
    monkeypatch.setattr(session, "run", lambda *given, **named: answered.append(given))
    with pytest.raises(ValueError, match="text 3 is empty"):
        session([*TEXTS[:3], " "])
    assert not answered


def test_points_with_chosen_lengths_have_one_a_layer(exported, tmp_path):
    folder = shutil.copytree(exported, tmp_path / "out")
    table = OperatingPoints.read(folder)
    for lengths in ([0.9] * 3, {"mass": [0.9] * 3}):
        replace(table, points=[replace(table.points[0], length_config=lengths)]).save(folder)
        with pytest.raises(ValueError, match="point 'full' has 3 lengths for the 4 layers"):
            ElasticSession.from_pretrained(folder)
    confident = replace(table, policy={"name": "confidence", "threshold": 0.5})
    confident.save(folder)
    with pytest.raises(ValueError, match="was measured with the exit policy .*'confidence'"):
        ElasticSession.from_pretrained(folder)
