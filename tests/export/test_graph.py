"""The graph against PyTorch, and against itself: padding, batch mates, rows that leave, work that is skipped."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from elastic_model import ElasticBertConfig
from elastic_model.exit_policies import simulate
from export.arithmetic import ARITHMETICS
from export.graph import IR_VERSION, OPSET, build_graph
from export.task import task_of
from tests.export.graphs import batch_of, lively, session_of, torch_output

LENGTHS = [9, 2, 30, 17, 5, 30, 11, 3]
SHAPE = {"vocab_size": 150, "hidden_size": 32, "num_attention_heads": 4, "max_position_embeddings": 48}

VARIANTS = {
    "plain": {},
    "exit subset": {"exit_layers": [2, 4]},
    "last exits": {"num_output_layers": 2},
    "static": {"num_output_layers": 1},
    "pruned": {
        "num_attention_heads_per_layer": [4, 2, 3, 1],
        "intermediate_size_per_layer": [64, 33, 48, 16],
        "attention_head_size": 8,
    },
    "roberta": {"position_offset": 2, "type_vocab_size": 1},
    "distilbert": {"type_vocab_size": 0, "pooler_act": "relu", "hidden_act": "gelu_new"},
    "mean tokens below": {"exit_pooling": ["mean", "mean", "mean", "cls"]},
    "mean tokens": {"exit_pooling": "mean"},
    "regression": {"num_labels": 1},
    "two labels": {"num_labels": 2, "problem_type": "multi_label_classification"},
    "multi-label": {"num_labels": 5, "problem_type": "multi_label_classification"},
}


def config_of(**fields):
    base = {"num_hidden_layers": 4, "intermediate_size": 64, "num_labels": 3}
    return ElasticBertConfig(**{**SHAPE, **base, **fields})


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_exit_equals_pytorch(variant):
    model = lively(config_of(**VARIANTS[variant]))
    session, batch = session_of(model), batch_of(model.config, LENGTHS)
    expected = torch_output(model, batch)
    logits, layers, exit_logits = session.run(["logits", "exit_layer", "exit_logits"], batch)
    np.testing.assert_allclose(exit_logits, torch.stack(expected.exit_logits), atol=1e-4, rtol=1e-5)
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=1e-5)
    assert (layers == 4).all()


POLICIES = [
    ("plain", {"name": "entropy", "threshold": 0.6}),
    ("plain", {"name": "entropy", "threshold": [0.0, 0.9, 0.5, 0.1]}),
    ("plain", {"name": "confidence", "threshold": 0.6}),
    ("plain", {"name": "margin", "threshold": 0.4}),
    ("plain", {"name": "patience", "patience": 1}),
    ("plain", {"name": "patience", "patience": 2}),
    ("plain", {"name": "voting", "votes": 2}),
    ("plain", {"name": "constant", "layer": 3}),
    ("exit subset", {"name": "entropy", "threshold": 0.85}),
    ("mean tokens below", {"name": "entropy", "threshold": 0.85}),
    ("regression", {"name": "patience", "patience": 1, "threshold": [0.1, 0.4, 0.8, 0.2]}),
    ("regression", {"name": "patience", "patience": 2, "threshold": 0.9}),
    ("multi-label", {"name": "entropy", "threshold": 0.95}),
    ("multi-label", {"name": "confidence", "threshold": 0.55}),
    ("multi-label", {"name": "margin", "threshold": 0.1}),
    ("two labels", {"name": "patience", "patience": 1}),
    ("two labels", {"name": "voting", "votes": 2}),
]


@pytest.mark.parametrize(("variant", "policy"), POLICIES)
def test_rows_leave_as_in_pytorch(variant, policy):
    model = lively(config_of(**VARIANTS[variant], exit_policy=policy))
    batch = batch_of(model.config, LENGTHS * 4)
    expected = torch_output(model, batch)
    logits, layers, exit_logits = session_of(model).run(["logits", "exit_layer", "exit_logits"], batch)
    assert layers.tolist() == expected.exit_layers.tolist()
    assert policy["name"] == "constant" or len(set(layers.tolist())) > 1  # the policy has something to decide
    np.testing.assert_allclose(logits, expected.logits, atol=1e-4, rtol=1e-5)
    for position, exit_layer in enumerate(model.config.exit_layers):
        gone = layers < exit_layer
        assert np.isnan(exit_logits[position][gone]).all() and np.isfinite(exit_logits[position][~gone]).all()


def test_the_learned_exit_head_decides():
    model = lively(config_of(learned_exit_head=True, exit_policy={"name": "learned", "threshold": 0.5}))
    batch = batch_of(model.config, LENGTHS * 4)
    layers = session_of(model).run(["exit_layer"], batch)[0]
    assert layers.tolist() == torch_output(model, batch).exit_layers.tolist()
    assert len(set(layers.tolist())) > 1


@pytest.mark.parametrize("file", ["model", "model_quint8_avx2"])
def test_a_row_does_not_depend_on_its_batch(lively_model, file):
    """Compaction, padding and quantisation: every row as if it were alone, at every exit that it passes."""
    session, batch = session_of(lively_model, file), batch_of(lively_model.config, LENGTHS)
    threshold = {"exit_threshold": np.full(4, 0.6, np.float32)}
    together = session.run(["logits", "exit_layer", "exit_logits"], {**batch, **threshold})
    assert len(set(together[1].tolist())) > 1
    for row, length in enumerate(LENGTHS):
        alone = {name: value[row : row + 1, :length] for name, value in batch.items()}
        logits, layer, exit_logits = session.run(["logits", "exit_layer", "exit_logits"], {**alone, **threshold})
        np.testing.assert_allclose(logits[0], together[0][row], atol=1e-5)
        np.testing.assert_allclose(exit_logits[:, 0], together[2][:, row], atol=1e-5)
        assert layer[0] == together[1][row]


def test_outputs_come_in_the_order_that_is_documented(lively_model):
    outputs = [one.name for one in session_of(lively_model).get_outputs()]
    assert outputs == ["logits", "exit_layer", "exit_logits", "kept_tokens"]


def test_padding_on_either_side_is_the_same(lively_model):
    """Positions count from the first column, so a left-padded row is compared with the tokens at those positions."""
    session, batch = session_of(lively_model), batch_of(lively_model.config, [7, 12])
    wider = {name: np.pad(value, ((0, 0), (0, 9))) for name, value in batch.items()}
    for narrow, wide in zip(session.run(None, batch), session.run(None, wider), strict=True):
        np.testing.assert_allclose(narrow, wide, atol=1e-6)


def test_a_row_of_padding_only_is_answered_and_harms_nobody(lively_model):
    session, batch = session_of(lively_model), batch_of(lively_model.config, [7, 12])
    empty = {name: np.concatenate([value, np.zeros((1, 12), np.int64)]) for name, value in batch.items()}
    logits = session.run(["logits"], empty)[0]
    assert np.isfinite(logits).all()
    np.testing.assert_allclose(logits[:2], session.run(["logits"], batch)[0], atol=1e-6)


def test_an_empty_batch_is_answered(lively_model):
    batch = {name: value[:0] for name, value in batch_of(lively_model.config, [7]).items()}
    logits, layers, exit_logits = session_of(lively_model).run(["logits", "exit_layer", "exit_logits"], batch)
    assert (logits.shape, layers.shape, exit_logits.shape) == ((0, 3), (0,), (4, 0, 3))


@pytest.mark.parametrize(("name", "threshold"), [("entropy", 0.0), ("confidence", 1.0), ("margin", 1.0)])
def test_a_threshold_at_the_edge_lets_nobody_leave(name, threshold):
    """Not even rows whose probabilities round to 0 and 1, logits up to 1e4 apart."""
    model = lively(config_of(exit_policy={"name": name, "threshold": threshold}))
    with torch.no_grad():
        for number, scale in enumerate((1, 30, 1e3, 1e4)):
            getattr(model.classifiers, str(number)).weight.mul_(scale)
    logits, layers = session_of(model).run(["exit_logits", "exit_layer"], batch_of(model.config, LENGTHS * 8))
    assert (layers == 4).all() and np.isfinite(logits).all()


@pytest.mark.parametrize(("cap", "layer"), [(1, 2), (2, 2), (3, 2), (4, 4)])
def test_max_layer_is_the_last_exit_that_is_not_above_it(cap, layer):
    model = lively(config_of(exit_layers=[2, 4]))
    layers = session_of(model).run(["exit_layer"], {**batch_of(model.config, LENGTHS), "max_layer": np.array([cap])})[
        0
    ]
    assert (layers == layer).all()


def test_a_threshold_that_is_not_a_number_lets_nobody_leave(lively_model):
    batch = {**batch_of(lively_model.config, LENGTHS), "exit_threshold": np.full(4, np.nan, np.float32)}
    assert (session_of(lively_model).run(["exit_layer"], batch)[0] == 4).all()


def test_skipped_layers_do_no_work(lively_model, tmp_path):
    """The profile of a run in which every row leaves after layer 2 shows no node of layer 3 or 4."""
    tensors = {name: tensor.numpy() for name, tensor in lively_model.state_dict().items()}
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.enable_profiling = 3, True
    options.profile_file_prefix = str(tmp_path / "profile")
    graph = build_graph(lively_model.config, tensors, task_of(lively_model.config), ARITHMETICS["model"]).to_bytes()
    session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
    session.run(None, {**batch_of(lively_model.config, LENGTHS), "max_layer": np.array([2])})
    with open(session.end_profiling()) as file:
        profile = file.read()
    assert "layer_2/" in profile
    assert "layer_3/" not in profile and "layer_4/" not in profile


@pytest.mark.parametrize("file", ARITHMETICS)
def test_the_file_is_valid_onnx_and_states_its_versions(lively_model, file):
    tensors = {name: tensor.numpy() for name, tensor in lively_model.state_dict().items()}
    graph = build_graph(lively_model.config, tensors, task_of(lively_model.config), ARITHMETICS[file])
    model = onnx.load_from_string(graph.to_bytes())
    onnx.checker.check_model(model)
    assert model.ir_version == IR_VERSION
    assert {one.domain: one.version for one in model.opset_import} == {"": OPSET, "com.microsoft": 1}
    assert [one.name for one in model.graph.input][:3] == ["input_ids", "attention_mask", "token_type_ids"]


@pytest.mark.parametrize("level", ["ORT_DISABLE_ALL", "ORT_ENABLE_BASIC", "ORT_ENABLE_EXTENDED", "ORT_ENABLE_ALL"])
def test_int8_is_right_at_every_optimisation_level(lively_model, level):
    """onnxruntime's fusions have ruined scales per token before (they take the activations' scale for a scalar)."""
    batch = batch_of(lively_model.config, LENGTHS)
    level = getattr(onnxruntime.GraphOptimizationLevel, level)
    found = session_of(lively_model, "model_quint8_avx2", level).run(["exit_logits"], batch)[0]
    unoptimised = onnxruntime.GraphOptimizationLevel.ORT_DISABLE_ALL
    expected = session_of(lively_model, "model_quint8_avx2", unoptimised).run(["exit_logits"], batch)[0]
    np.testing.assert_allclose(found, expected, atol=2e-2)  # a rounding may fall the other way
    assert np.abs(found - torch.stack(torch_output(lively_model, batch).exit_logits).numpy()).mean() < 0.1


def test_simulated_policies_agree_with_the_graph(lively_model):
    """What calibration simulates on `exit_logits` is what the graph then does."""
    session, batch = session_of(lively_model, "model_quint8_avx2"), batch_of(lively_model.config, LENGTHS * 4)
    exit_logits = session.run(["exit_logits"], batch)[0]
    _, expected = simulate(
        {"name": "entropy", "threshold": 0.6}, exit_logits, [1, 2, 3, 4], "single_label_classification"
    )
    layers = session.run(["exit_layer"], {**batch, "exit_threshold": np.full(4, 0.6, np.float32)})[0]
    assert layers.tolist() == expected.tolist()
