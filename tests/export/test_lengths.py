"""Length configurations and the heads that read tokens: the graph against PyTorch, rows that leave included."""

import math

import numpy as np
import pytest
import torch

from elastic_model import (
    ElasticBertConfig,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertModel,
)
from elastic_model.checks import shares_and_mass
from finetune.by_row import explore_batch_by_row
from tests.export.graphs import batch_of, lively, session_of, torch_output
from tests.export.test_graph import LENGTHS, VARIANTS, config_of

CONFIGURATIONS = {
    "none": [1.0, 1.0, 1.0, 1.0],
    "halves": [0.5, 0.5, 0.25, 0.25],
    "falling": [0.9, 0.77, 0.4, 0.1],
    "late": [1.0, 1.0, 0.5, 0.3],
    "last": [1.0, 1.0, 1.0, 0.2],
    "two tokens": [0.01] * 4,
    "rows choose": {"mass": [0.8, 1.0, 0.7, 0.6]},
    "rows choose two": {"mass": [0.01] * 4},
}
OTHERS = set(VARIANTS) - {"exit subset", "pruned", "mean tokens below", "static"}
EXIT = {"name": "entropy", "threshold": 0.6}


def feed_of(lengths):
    """The graph's inputs for a length configuration."""
    shares, mass = shares_and_mass(lengths, 4)
    return {"length_config": np.array(shares, np.float32), "length_mass": np.array(mass, np.float32)}


def check(model, lengths, policy=None, per_row=LENGTHS, tolerance=1e-4):
    """The graph's outputs equal PyTorch's at every exit, at every real token."""
    batch = batch_of(model.config, per_row)
    expected = torch_output(model, batch, length_config=lengths, exit_policy=policy)
    model.config.exit_policy = policy
    session = session_of(model)
    outputs = session.run(None, {**batch, **feed_of(lengths)})
    found = dict(zip([one.name for one in session.get_outputs()], outputs, strict=True))
    names = {"exit_layer": "exit_layers"}
    for name, value in found.items():
        if name == "kept_tokens":
            continue  # PyTorch does not say
        theirs = expected[names.get(name, name)]
        theirs = torch.stack(theirs).numpy() if isinstance(theirs, tuple) else theirs.numpy()
        if name == "exit_layer":
            assert value.tolist() == theirs.tolist()
            continue
        if value.ndim > 1 and value.shape[-1] == batch["input_ids"].shape[1]:
            value, theirs = (np.where(batch["attention_mask"] == 1, one, 0) for one in (value, theirs))
        elif value.ndim > 2 and value.shape[-2] == batch["input_ids"].shape[1]:
            real = batch["attention_mask"][..., None] == 1
            assert ((value == 0) | np.isnan(value) | real).all()
            value, theirs = (np.where(real, one, 0) for one in (value, theirs))
        np.testing.assert_allclose(value, theirs, atol=tolerance, rtol=1e-5, err_msg=name)
    return found


@pytest.mark.parametrize("lengths", CONFIGURATIONS.values(), ids=CONFIGURATIONS)
@pytest.mark.parametrize("policy", [None, EXIT], ids=["full depth", "exits"])
def test_tokens_fall_away_as_in_pytorch(lengths, policy):
    found = check(lively(config_of()), lengths, policy, LENGTHS * 3)
    assert policy is None or len(set(found["exit_layer"].tolist())) > 1


@pytest.mark.parametrize(
    "variant",
    [
        *("exit subset", "pruned", "mean tokens below"),
        *(pytest.param(name, marks=pytest.mark.slow) for name in VARIANTS if name in OTHERS),
    ],
)
def test_every_kind_of_model_drops_alike(variant):
    check(lively(config_of(**VARIANTS[variant])), CONFIGURATIONS["falling"])


@pytest.mark.parametrize("shape", [[1], [2], [40], [3, 3, 3], [48] * 3 + [1]])
def test_any_shape_of_a_batch(shape):
    check(lively(config_of()), CONFIGURATIONS["falling"], per_row=shape)


@pytest.mark.parametrize("kind", [ElasticBertForTokenClassification, ElasticBertForQuestionAnswering])
@pytest.mark.parametrize("lengths", [pytest.param("none", marks=pytest.mark.slow), "falling", "rows choose"])
@pytest.mark.parametrize(
    "policy",
    [
        None,
        {"name": "entropy", "threshold": 0.93},
        pytest.param({"name": "confidence", "threshold": 0.36}, marks=pytest.mark.slow),
        pytest.param({"name": "margin", "threshold": 0.01}, marks=pytest.mark.slow),
        {"name": "patience", "patience": 1},
        {"name": "voting", "votes": 2},
    ],
    ids=lambda policy: policy and policy["name"],
)
def test_dropped_tokens_come_back_at_the_exits(kind, lengths, policy):
    rows = [1, 2, 3, 2, 30, 17, 4, 5, 4, 3]
    check(lively(config_of(), kind=kind), CONFIGURATIONS[lengths], policy, rows)


def test_token_rows_do_leave():
    """The policies above have something to decide."""
    for kind, threshold in ((ElasticBertForTokenClassification, 0.97), (ElasticBertForQuestionAnswering, 0.93)):
        policy = {"name": "entropy", "threshold": threshold}
        found = check(lively(config_of(), kind=kind), CONFIGURATIONS["falling"], policy, [2, 3, 4, 9, 20, 30])
        assert len(set(found["exit_layer"].tolist())) > 1, kind


@pytest.mark.parametrize(
    "variant",
    [
        "exit subset",
        "pruned",
        *(pytest.param(name, marks=pytest.mark.slow) for name in ("plain", "last exits", "static", "roberta")),
    ],
)
@pytest.mark.parametrize(
    "kind", [ElasticBertForTokenClassification, ElasticBertForQuestionAnswering, ElasticBertModel]
)
def test_every_kind_of_head(kind, variant):
    if kind is ElasticBertModel:
        batch_check(lively(config_of(**VARIANTS[variant]), kind=kind))
    else:
        check(lively(config_of(**VARIANTS[variant]), kind=kind), CONFIGURATIONS["falling"])


def batch_check(model):
    """The bare model at every exit, with and without drops."""
    session, batch = session_of(model), batch_of(model.config, LENGTHS)
    real = batch["attention_mask"][..., None] == 1
    for layer in model.config.exit_layers:
        for lengths in (CONFIGURATIONS["none"], CONFIGURATIONS["falling"], CONFIGURATIONS["rows choose"]):
            policy = {"name": "constant", "layer": layer}
            expected = torch_output(model, batch, length_config=lengths, exit_policy=policy)
            feed = {**batch, **feed_of(lengths), "max_layer": np.array([layer])}
            known = {one.name for one in [*session.get_inputs(), *session.get_overridable_initializers()]}
            feed = {name: value for name, value in feed.items() if name in known}
            states, pooled, left_at = session.run(["last_hidden_state", "pooler_output", "exit_layer"], feed)
            np.testing.assert_allclose(pooled, expected.pooler_output, atol=1e-4)
            np.testing.assert_allclose(states, np.where(real, expected.last_hidden_state, 0), atol=1e-4)
            assert left_at.tolist() == [layer] * len(LENGTHS)


@pytest.mark.parametrize("lengths", [CONFIGURATIONS["falling"], CONFIGURATIONS["rows choose"]])
@pytest.mark.parametrize("kind", [ElasticBertForSequenceClassification, ElasticBertForTokenClassification])
def test_a_first_token_that_may_be_dropped(kind, lengths):
    fields = {} if kind is ElasticBertForSequenceClassification else {"learned_exit_head": True}
    model = lively(config_of(keep_cls=False, **fields), kind=kind)
    policy = {"name": "learned", "threshold": 0.5} if fields else EXIT
    found = check(model, lengths, policy, LENGTHS * 3)
    assert len(set(found["exit_layer"].tolist())) > 1


@pytest.mark.parametrize("lengths", [CONFIGURATIONS["falling"], CONFIGURATIONS["rows choose"]])
def test_the_graph_says_what_it_kept(lengths):
    """Up to the layer that a row left at, beside rows that stayed longer."""
    model = lively(config_of())
    found = check(model, lengths, EXIT, LENGTHS * 3)
    config = model.config
    if isinstance(lengths, list):
        kept = [[max(min(2, row), math.ceil(np.float32(share) * np.float32(row))) for share in lengths]
                for row in LENGTHS * 3]  # fmt: skip
    else:
        batch = {name: torch.from_numpy(value) for name, value in batch_of(config, LENGTHS * 3).items()}
        kept = explore_batch_by_row(model, batch, lengths)[1].T.tolist()
    for ours, theirs, layer in zip(found["kept_tokens"].tolist(), kept, found["exit_layer"], strict=True):
        assert ours[:layer] == theirs[:layer]


@pytest.mark.parametrize("lengths", [CONFIGURATIONS["falling"], CONFIGURATIONS["rows choose"]])
def test_the_configuration_is_the_default(lengths):
    model = lively(config_of(length_config=lengths))
    batch = batch_of(model.config, LENGTHS)
    expected = torch_output(model, batch)
    np.testing.assert_allclose(session_of(model).run(["logits"], batch)[0], expected.logits, atol=1e-4)


@pytest.mark.parametrize(
    ("given", "means"),
    [
        ([np.nan, np.nan, 0.5, 0.5], [1.0, 1.0, 0.5, 0.5]),
        ([0.5, 0.9, 0.7, 0.3], [0.5, 0.5, 0.5, 0.3]),
        ([7.0, 1.5, 0.5, 0.4], [1.0, 1.0, 0.5, 0.4]),
        ([0.0, -3.0, -np.inf, 0.4], [1e-6] * 4),
        ([0.5, np.nan, 0.4, np.inf], [0.5, 0.5, 0.4, 0.4]),
    ],
)
def test_lengths_that_make_no_sense_are_clamped(given, means):
    """As documented: NaN and more than 1 drop nothing, a rise keeps what is left, two tokens always stay."""
    model = lively(config_of())
    session, batch = session_of(model), batch_of(model.config, LENGTHS)
    found, expected = (
        session.run(["exit_logits"], {**batch, "length_config": np.array(lengths, np.float32)})[0]
        for lengths in (given, means)
    )
    np.testing.assert_array_equal(found, expected)


def test_no_significance_is_computed_where_nothing_is_dropped(tmp_path):
    import onnxruntime

    from export.arithmetic import ARITHMETICS
    from export.graph import build_graph
    from export.task import task_of

    model = lively(config_of())
    tensors = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    graph = build_graph(model.config, tensors, task_of(model.config), ARITHMETICS["model"])
    options = onnxruntime.SessionOptions()
    options.enable_profiling, options.profile_file_prefix = True, str(tmp_path / "profile")
    session = onnxruntime.InferenceSession(graph.to_bytes(), options, providers=["CPUExecutionProvider"])
    batch = batch_of(model.config, LENGTHS)
    session.run(None, batch)
    session.run(None, {**batch, "length_config": np.array([1, 1, 0.5, 0.5], np.float32)})
    with open(session.end_profiling()) as file:
        profile = file.read()
    assert "layer_3/drop/TopK" in profile
    assert not any(f"layer_{layer}/drop/TopK" in profile for layer in (1, 2, 4))


def test_lengths_in_tokens_are_refused():
    from export.task import task_of

    with pytest.raises(ValueError, match=r"not tokens, got length_config .30, 20.: state shares in config.json"):
        task_of(ElasticBertConfig(num_hidden_layers=2, length_config=[30, 20]))
