"""Agreement with the reference implementations of ElasticBERT and of the Length-Adaptive Transformer."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from elastic_model import (
    ElasticBertConfig,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertModel,
)


@pytest.fixture
def reference(golden):
    """ElasticBERT's model and its recorded inputs and outputs."""
    config = ElasticBertConfig(**json.loads((golden / "elasticbert_tiny_config.json").read_text()))
    model = ElasticBertForSequenceClassification(config).eval()
    model.load_state_dict(load_file(golden / "elasticbert_tiny.safetensors"))  # strict: the names are the public ones
    return model, load_file(golden / "elasticbert_tiny_io.safetensors")


def inputs(io):
    return {name: io[name] for name in ("input_ids", "attention_mask", "token_type_ids")}


def assert_close(got, expected, tolerance=1e-4):
    torch.testing.assert_close(got, expected, atol=tolerance, rtol=0)


def test_exit_logits(reference):
    model, io = reference
    output = model(**inputs(io))
    assert_close(torch.stack(output.exit_logits), io["exit_logits"])
    assert_close(output.logits, io["exit_logits"][-1])


@pytest.mark.parametrize("nats", ["0.05", "0.2", "0.5", "0.9"])
def test_entropy_exits(reference, nats):
    model, io = reference
    policy = {"name": "entropy", "threshold": float(nats) / math.log(3)}
    output = model(**inputs(io), exit_policy=policy)
    assert_close(output.logits, io[f"entropy_{nats}_logits"])
    assert output.exit_layers.tolist() == io[f"entropy_{nats}_layers"].tolist()


@pytest.mark.parametrize("patience", [1, 2, 3])
def test_patience_exits(reference, patience):
    model, io = reference
    output = model(**inputs(io), exit_policy={"name": "patience", "patience": patience})
    assert_close(output.logits, io[f"patience_{patience}_logits"])
    assert output.exit_layers.tolist() == io[f"patience_{patience}_layers"].tolist()


def test_training_loss_and_gradients_under_gradient_equilibrium(reference, golden):
    model, io = reference
    loss = model.train()(**inputs(io), labels=io["labels"]).loss
    assert_close(loss, io["train_loss"])
    loss.backward()
    gradients = load_file(golden / "elasticbert_tiny_grads.safetensors")
    assert set(gradients) == {name for name, _ in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert_close(parameter.grad, gradients[name], 1e-3)


def test_without_gradient_equilibrium_the_gradients_are_others(reference, golden):
    model, io = reference
    model.config.gradient_equilibrium = False
    model.train()(**inputs(io), labels=io["labels"]).loss.backward()
    gradients = load_file(golden / "elasticbert_tiny_grads.safetensors")
    name = "elasticbert.encoder.layer.0.output.dense.weight"
    assert not torch.allclose(dict(model.named_parameters())[name].grad, gradients[name], atol=1e-3)


@pytest.fixture
def length_adaptive(golden, tmp_path):
    """The Length-Adaptive Transformer's checkpoint (a stock BERT), and its recorded inputs and outputs."""
    config = json.loads((golden / "lat_bert_tiny_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes((golden / "lat_bert_tiny.safetensors").read_bytes())
    return tmp_path, load_file(golden / "lat_bert_tiny_io.safetensors"), config["length_configs"]


@pytest.mark.parametrize("keep_cls", [True, False])
@pytest.mark.parametrize("name", ["a", "b", "c"])
def test_drop_and_restore(length_adaptive, name, keep_cls):
    folder, io, lengths = length_adaptive
    model = ElasticBertModel.from_pretrained(folder, keep_cls=keep_cls).eval()
    states = model(**inputs(io), length_config=lengths[name]).last_hidden_state
    assert_close(states, io[f"restored_{name}_cls{int(keep_cls)}"])
    answers = ElasticBertForQuestionAnswering.from_pretrained(folder, keep_cls=keep_cls).eval()
    output = answers(**inputs(io), length_config=lengths[name])
    assert_close(output.start_logits, io[f"qa_start_{name}_cls{int(keep_cls)}"])
    assert_close(output.end_logits, io[f"qa_end_{name}_cls{int(keep_cls)}"])


def test_no_drop_and_skipped_layers(length_adaptive):
    folder, io, lengths = length_adaptive
    model = ElasticBertModel.from_pretrained(folder).eval()
    assert_close(model(**inputs(io)).last_hidden_state, io["full"])
    skipped = model(**inputs(io), length_config=lengths["a"], layer_config=[1, 3, 4, 6])
    assert_close(skipped.last_hidden_state, io["restored_a_layers0235"])
