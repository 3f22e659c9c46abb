"""The models: equal to stock BERT at full depth, exits that do not see what is above them, clear errors."""

import pytest
import torch
from transformers import BertConfig, BertModel

import elastic_model
from elastic_model import ElasticBertConfig, ElasticBertModel

SIZES = dict(
    vocab_size=60,
    hidden_size=32,
    num_hidden_layers=4,
    num_attention_heads=4,
    intermediate_size=48,
    max_position_embeddings=20,
)


def model_of(head="ElasticBertForSequenceClassification", **overrides):
    torch.manual_seed(0)
    return getattr(elastic_model, head)(
        ElasticBertConfig(**{**SIZES, "initializer_range": 0.3, "num_labels": 3, **overrides})
    ).eval()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_full_depth_and_length_are_stock_bert(attention, tmp_path):
    torch.manual_seed(0)
    stock = BertModel(BertConfig(**SIZES, initializer_range=0.3)).eval()
    stock.save_pretrained(tmp_path)
    model = ElasticBertModel.from_pretrained(tmp_path, attn_implementation=attention).eval()
    input_ids, mask = (
        torch.randint(1, 60, (5, 11)),
        (torch.arange(11) < torch.tensor([11, 7, 3, 2, 1])[:, None]).long(),
    )
    expected, got = stock(input_ids, mask), model(input_ids, mask)
    torch.testing.assert_close(got.last_hidden_state, expected.last_hidden_state, atol=1e-5, rtol=0)
    torch.testing.assert_close(got.pooler_output, expected.pooler_output, atol=1e-5, rtol=0)


@torch.no_grad()
def test_an_exit_does_not_see_the_layers_above():
    model, input_ids = model_of(), torch.randint(1, 60, (3, 9))
    before = model(input_ids).exit_logits
    for layer in model.elasticbert.encoder.layer[2:]:
        for parameter in layer.parameters():
            parameter.normal_()
    after = model(input_ids).exit_logits
    assert torch.equal(before[0], after[0]) and torch.equal(before[1], after[1])
    assert not torch.allclose(before[2], after[2])


@torch.no_grad()
def test_a_subset_of_exits_is_the_same_model_with_fewer_heads(tmp_path):
    full = model_of()
    full.save_pretrained(tmp_path)
    some = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path, exit_layers=[2, 4]).eval()
    input_ids = torch.randint(1, 60, (3, 9))
    for per_exit in (some.classifiers, some.elasticbert.encoder.pooler):
        assert [name for name, _ in per_exit.named_children()] == ["1", "3"]
    assert torch.equal(some(input_ids).exit_logits[0], full(input_ids).exit_logits[1])


@torch.no_grad()
def test_an_exit_may_read_the_mean_of_the_tokens_still_kept(tmp_path):
    """Padding and dropped tokens do not count; the choice is the layer's, also where the model is cut there."""
    model = model_of(exit_pooling=["mean", "cls", "mean", "cls"])
    input_ids, mask = torch.randint(1, 60, (2, 9)), torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    states, encoder = [], model.elasticbert.encoder
    for layer in encoder.layer:
        layer.register_forward_hook(lambda module, inputs, output: states.append(output))
    plain = model(input_ids, mask, exit_policy={"name": "never"}).exit_logits
    for layer in (1, 2, 3, 4):
        hidden = states[layer - 1][0]
        state = hidden[:, 0] if layer in (2, 4) else torch.stack([hidden[0].mean(0), hidden[1, :5].mean(0)])
        expected = model.classifiers.at(layer)(encoder.pooler.at(layer)(state))
        torch.testing.assert_close(plain[layer - 1], expected, atol=1e-5, rtol=0)
    states.clear()
    short = model(input_ids, mask, length_config=[1.0, 1.0, 0.5, 0.5], exit_policy={"name": "never"}).exit_logits
    hidden, _, kept = states[2]
    assert kept.sum(1).tolist() == [5, 3]
    expected = model.classifiers.at(3)(encoder.pooler.at(3)((hidden * kept[..., None]).sum(1) / kept.sum(1)[:, None]))
    torch.testing.assert_close(short[2], expected, atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path)
    cut = type(model).from_pretrained(tmp_path, num_hidden_layers=3).eval()
    assert cut.config.exit_pooling == ["mean", "cls", "mean"]
    torch.testing.assert_close(cut(input_ids, mask).logits, plain[2], atol=1e-5, rtol=0)


@torch.no_grad()
def test_skipped_layers_have_no_exit_but_the_last_answers():
    model, input_ids = model_of(), torch.randint(1, 60, (3, 9))
    output = model(input_ids, layer_config=[1, 3])
    assert [bool(logits.isnan().all()) for logits in output.exit_logits] == [False, True, False, False]
    assert output.exit_layers.tolist() == [4, 4, 4]
    states = model.elasticbert(input_ids, layer_config=[1, 3]).last_hidden_state
    pooled = model.elasticbert.encoder.pooler.at(4)(states[:, 0])
    torch.testing.assert_close(output.logits, model.classifiers.at(4)(pooled))


@torch.no_grad()
def test_widths_are_the_layers_own():
    widths = dict(num_attention_heads_per_layer=[4, 3, 2, 1], intermediate_size_per_layer=[48, 40, 24, 8])
    model = model_of(**widths)
    shapes = [tuple(layer.attention.self.query.weight.shape) for layer in model.elasticbert.encoder.layer]
    assert shapes == [(32, 32), (24, 32), (16, 32), (8, 32)]
    assert model(torch.randint(1, 60, (3, 9))).logits.isfinite().all()


@torch.no_grad()
def test_the_bare_model_stops_at_a_constant_layer():
    model, input_ids = model_of("ElasticBertModel"), torch.randint(1, 60, (3, 9))
    states = model(input_ids, output_hidden_states=True).hidden_states
    stopped = model(input_ids, exit_policy={"name": "constant", "layer": 2})
    assert torch.equal(stopped.last_hidden_state, states[2])
    with pytest.raises(ValueError, match="needs a task head"):
        model(input_ids, exit_policy={"name": "entropy", "threshold": 0.5})
    with torch.enable_grad():  # training knows no policy, whoever asks for it
        model.train()(input_ids, exit_policy={"name": "constant", "layer": 2}).last_hidden_state.sum().backward()
    assert all(layer.output.dense.weight.grad is not None for layer in model.encoder.layer)


@torch.no_grad()
def test_pretraining_takes_a_policy_as_the_other_models_do():
    """It knew no argument of the name, and its configuration's was ignored."""
    model, input_ids = model_of("ElasticBertForPreTraining"), torch.randint(1, 60, (3, 9))
    full = model(input_ids, exit_policy={"name": "never"})
    constant = {"name": "constant", "layer": 2}
    stopped = model(input_ids, exit_policy=constant)
    assert stopped.exit_layers.tolist() == [2] * 3 and torch.equal(stopped.sop_logits, full.exit_sop_logits[1])
    assert torch.equal(stopped.prediction_logits, full.exit_prediction_logits[1])
    model.config.exit_policy = constant
    assert model(input_ids).exit_layers.tolist() == [2] * 3
    assert model(input_ids, exit_policy={"name": "never"}).exit_layers.tolist() == full.exit_layers.tolist() == [4] * 3
    assert len(model(input_ids, sentence_order_label=torch.zeros(3, dtype=torch.long)).sop_losses) == 4
    with pytest.raises(ValueError, match="'entropy' needs a task head; this model knows never and constant"):
        model(input_ids, exit_policy={"name": "entropy", "threshold": 0.5})


@torch.no_grad()
def test_prediction_logits_agree_with_the_masked_loss():
    labels = torch.where(torch.arange(18).view(2, 9) % 4 == 0, 7, -100)
    input_ids = torch.randint(1, 60, (2, 9))
    for head, field in (("ElasticBertForMaskedLM", "logits"), ("ElasticBertForPreTraining", "prediction_logits")):
        model = model_of(head)
        output = model(input_ids, labels=labels)
        losses = output.exit_losses if field == "logits" else output.mlm_losses
        by_hand = torch.nn.functional.cross_entropy(output[field].transpose(1, 2), labels)
        torch.testing.assert_close(losses[-1], by_hand)


ONE_ROW = torch.ones(1, 4, dtype=torch.long)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ({}, "exactly one of input_ids and inputs_embeds"),
        ({"input_ids": ONE_ROW, "inputs_embeds": torch.zeros(1, 4, 32)}, "exactly one of"),
        ({"input_ids": ONE_ROW.float()}, "input_ids must be integers, got torch.float32"),
        ({"input_ids": ONE_ROW[0]}, r"shape \(rows, tokens\)"),
        ({"input_ids": ONE_ROW[:, :0]}, "at least one of each"),
        ({"input_ids": ONE_ROW[:0]}, "at least one of each"),
        ({"input_ids": ONE_ROW * 60}, r"input_ids must lie within 0..59"),
        ({"input_ids": -ONE_ROW}, r"input_ids must lie within 0..59"),
        ({"input_ids": torch.ones(1, 21, dtype=torch.long)}, "at most 20 tokens"),
        ({"input_ids": ONE_ROW, "token_type_ids": ONE_ROW * 2}, "token_type_ids must lie within 0..1"),
        ({"input_ids": ONE_ROW, "position_ids": ONE_ROW * 20}, "position_ids must lie within 0..19"),
        ({"input_ids": ONE_ROW, "attention_mask": torch.zeros(1, 4)}, r"rows \[0\] are padding only"),
        ({"input_ids": ONE_ROW, "attention_mask": torch.ones(1, 5)}, "must have the shape of the inputs"),
        ({"input_ids": ONE_ROW, "labels": torch.tensor([3])}, r"labels must lie within 0..2 .*got \[3\]"),
        ({"input_ids": ONE_ROW, "labels": torch.tensor([-1])}, "labels must lie within"),
        ({"input_ids": ONE_ROW, "layer_config": [3, 1]}, "layer_config must be a rising list"),
        ({"input_ids": ONE_ROW, "layer_config": [0, 1]}, "within 1..4"),
        ({"input_ids": ONE_ROW, "layer_config": []}, "layer_config must be a rising list"),
    ],
)
def test_bad_input_gets_a_clear_error(arguments, message):
    with pytest.raises(ValueError, match=message):
        model_of()(**arguments)


def test_bad_labels_of_other_tasks_get_a_clear_error():
    with pytest.raises(ValueError, match="finite"):
        model_of(num_labels=1)(ONE_ROW, labels=torch.tensor([float("nan")]))
    with pytest.raises(ValueError, match="labels must lie within 0..2"):
        model_of("ElasticBertForTokenClassification")(ONE_ROW, labels=ONE_ROW * 5)
    with pytest.raises(ValueError, match="labels must lie within 0..59"):
        model_of("ElasticBertForMaskedLM")(ONE_ROW, labels=ONE_ROW * 60)
    with pytest.raises(ValueError, match="must not be negative"):
        model_of("ElasticBertForQuestionAnswering")(
            ONE_ROW, start_positions=-ONE_ROW[:, 0], end_positions=ONE_ROW[:, 0]
        )
    with pytest.raises(ValueError, match=r"\(questions, choices, tokens\)"):
        model_of("ElasticBertForMultipleChoice")(ONE_ROW)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"exit_layers": [1, 3]}, "end at 4"),
        ({"exit_layers": [2, 1, 4]}, "rising"),
        ({"exit_layers": [0, 4]}, "within 1..4"),
        ({"num_output_layers": 5}, "num_output_layers must be 1 to 4"),
        ({"num_output_layers": 0}, "num_output_layers must be 1 to 4"),
        ({"exit_groups": 0}, "exit_groups must be at least 1"),
        ({"hidden_size": 30}, "multiple of num_attention_heads"),
        ({"intermediate_size_per_layer": [8, 8]}, "one entry of at least 1 per layer"),
        ({"num_hidden_layers": "4"}, "num_hidden_layers"),
        ({"exit_pooling": "max"}, "exit_pooling must be one of cls, mean, .* one entry per layer, 4, got max"),
        ({"exit_pooling": ["mean", "cls"]}, "exit_pooling must be .* got .'mean', 'cls'"),
        ({"exit_policy": {"name": "haste"}}, "name is one of"),
    ],
)
def test_impossible_configurations_are_named(fields, message):
    with pytest.raises(Exception, match=message):
        ElasticBertConfig(**{**SIZES, **fields})


@torch.no_grad()
def test_own_positions_may_count_anew():
    """As of several texts packed in a row: the table need not hold as many."""
    model, longer = model_of(), torch.randint(1, 60, (2, 30))
    positions = (torch.arange(30) % 15)[None].expand(2, -1)
    assert model(longer, position_ids=positions).logits.isfinite().all()


def test_orders_that_do_not_exist_are_named():
    model = model_of("ElasticBertForPreTraining")
    with pytest.raises(ValueError, match=r"labels must lie within 0..1 .*got \[2\]"):
        model(ONE_ROW, labels=ONE_ROW, sentence_order_label=torch.tensor([2]))
