"""Ways in which users load, compile and train a model that other tests do not take."""

import warnings

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoConfig,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    DistilBertConfig,
    DistilBertForSequenceClassification,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from elastic_model import (
    ElasticBertConfig,
    ElasticBertForMaskedLM,
    ElasticBertForPreTraining,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
    ElasticBertModel,
)
from tests.elastic_model.test_ecosystem import OLD_COMPILER
from tests.export.graphs import lively

POLICIES = [
    {"name": "entropy", "threshold": 0.5},
    {"name": "confidence", "threshold": 0.5},
    {"name": "margin", "threshold": 0.2},
    {"name": "patience", "patience": 1},
    {"name": "voting", "votes": 2},
    {"name": "constant", "layer": 1},
]


@pytest.fixture
def model(tiny_config):
    return lively(tiny_config)


@pytest.fixture
def batch(tiny_config):
    ids = torch.randint(5, tiny_config.vocab_size, (4, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.ones_like(ids)
    mask[1, 5:] = 0
    return {"input_ids": ids, "attention_mask": mask}


@OLD_COMPILER
@pytest.mark.parametrize("policy", [None, *POLICIES], ids=lambda policy: policy["name"] if policy else "none")
@torch.inference_mode()
def test_a_compiled_model_answers_as_the_model(model, batch, policy):
    torch.compiler.reset()
    expected = model(**batch, exit_policy=policy)
    found = torch.compile(model, backend="eager")(**batch, exit_policy=policy)
    torch.testing.assert_close(found.logits, expected.logits)
    assert found.exit_layers.tolist() == expected.exit_layers.tolist()
    torch.compiler.reset()


@pytest.mark.parametrize("how", ["keyword", "config", "auto", "path of a config"])
@torch.inference_mode()
def test_static_use_has_the_head_of_the_last_exit_whoever_loads_it(model, batch, how, tmp_path):
    model.save_pretrained(tmp_path / "model")
    if how == "keyword":
        static = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "model", num_output_layers=1)
    elif how == "auto":
        static = AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", num_output_layers=1)
    else:
        config = AutoConfig.from_pretrained(tmp_path / "model", num_output_layers=1)
        config.save_pretrained(tmp_path / "config")
        given = config if how == "config" else tmp_path / "config"
        static = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "model", config=given)
    expected = model(**batch).logits
    torch.testing.assert_close(static.eval()(**batch).logits, expected)
    static.save_pretrained(tmp_path / "static")
    for settings in ({}, {"num_output_layers": 1}):
        again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "static", **settings).eval()
        torch.testing.assert_close(again(**batch).logits, expected)


def test_static_use_has_one_exit_whatever_exits_there_were(tiny_config):
    config = type(tiny_config).from_dict({**tiny_config.to_dict(), "exit_layers": [2, 4], "num_output_layers": 1})
    assert config.exit_layers == [4]


@pytest.mark.parametrize(
    ("policy", "settings", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4], {"num_hidden_layers": 2}, {"name": "entropy", "threshold": [0.1, 0.2]}),
        ([0.1, 0.2, 0.3, 0.4], {"exit_layers": [2, 4]}, {"name": "entropy", "threshold": [0.2, 0.4]}),
        ([0.1, 0.2, 0.3, 0.4], {"num_output_layers": 1}, {"name": "entropy", "threshold": [0.4]}),
        ([0.1, 0.2, 0.3, 0.4], {"num_hidden_layers": 2, "exit_policy": None}, None),
        (3, {"num_hidden_layers": 2}, {"name": "constant", "layer": 2}),
        (1, {"exit_layers": [2, 4]}, {"name": "constant", "layer": 2}),
    ],
)
@pytest.mark.parametrize("auto", [False, True])
def test_a_calibrated_checkpoint_loads_with_fewer_exits(model, batch, tmp_path, policy, settings, expected, auto):
    constant = {"name": "constant", "layer": policy}
    model.config.exit_policy = {"name": "entropy", "threshold": policy} if isinstance(policy, list) else constant
    model.save_pretrained(tmp_path)
    loader = AutoModelForSequenceClassification if auto else ElasticBertForSequenceClassification
    fewer = loader.from_pretrained(tmp_path, **settings).eval()
    assert fewer.config.exit_policy == expected
    with torch.inference_mode():
        assert set(fewer(**batch).exit_layers.tolist()) <= set(fewer.exit_layers)


def test_a_stock_checkpoint_with_a_stock_config_as_the_examples_of_transformers_load_it(tmp_path):
    config = BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    BertForSequenceClassification(config).save_pretrained(tmp_path)
    for given in (AutoConfig.from_pretrained(tmp_path, num_labels=2), tmp_path):
        model = ElasticBertForSequenceClassification.from_pretrained(tmp_path, config=given, dtype="auto")
        assert (model.config.model_type, model.config.num_labels, model.dtype) == ("elasticbert", 2, torch.float32)


@pytest.mark.parametrize("given", ["config", "path", "elastic", None])
@pytest.mark.parametrize(
    "stock",
    [
        BertForSequenceClassification(
            BertConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
        ),
        RobertaForSequenceClassification(
            RobertaConfig(vocab_size=90, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_labels=3)
        ),
        DistilBertForSequenceClassification(
            DistilBertConfig(vocab_size=90, dim=32, n_layers=2, n_heads=4, hidden_dim=64, num_labels=3)
        ),
    ],
    ids=lambda model: model.config.model_type,
)
def test_a_stock_classifier_answers_the_same_whatever_config_is_given(stock, given, tmp_path):
    stock.eval().save_pretrained(tmp_path / "stock")
    kind = ElasticBertForSequenceClassification
    configs = {
        "config": lambda: AutoConfig.from_pretrained(tmp_path / "stock", num_labels=3),
        "path": lambda: tmp_path / "stock",
        "elastic": lambda: kind.from_pretrained(tmp_path / "stock").config,
    }
    settings = {"config": configs[given]()} if given else {}
    model = kind.from_pretrained(tmp_path / "stock", **settings).eval()
    batch = {"input_ids": torch.arange(2, 18).view(2, 8), "attention_mask": torch.ones(2, 8, dtype=torch.long)}
    with torch.inference_mode():
        torch.testing.assert_close(model(**batch).logits, stock(**batch).logits, rtol=0, atol=1e-5)


def test_stock_checkpoints_that_cannot_become_elastic_are_named(tmp_path):
    sizes = {"vocab_size": 90, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    stock = BertForSequenceClassification(BertConfig(**sizes))
    stock.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="state_dict: the weights of .* are read from its files"):
        ElasticBertForSequenceClassification.from_pretrained(tmp_path, state_dict=stock.state_dict())
    BertModel(BertConfig(**sizes, is_decoder=True)).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="is a decoder"):
        ElasticBertForSequenceClassification.from_pretrained(tmp_path)


class OwnConfig(ElasticBertConfig):
    model_type = "own-elastic"


class OwnModel(ElasticBertForSequenceClassification):
    config_class = OwnConfig


def test_a_class_with_a_model_type_of_its_own_is_loaded_again(tiny_config, batch, tmp_path):
    model = OwnModel(OwnConfig(**{**tiny_config.to_dict(), "model_type": "own-elastic"})).eval()
    model.save_pretrained(tmp_path)
    for settings in ({}, {"num_output_layers": 1}):
        again = OwnModel.from_pretrained(tmp_path, **settings).eval()
        with torch.inference_mode():
            torch.testing.assert_close(again(**batch).logits, model(**batch).logits)


def test_numbers_of_numpy_in_an_operating_point_are_saved(tiny_config, tmp_path):
    tiny_config.exit_policy = {"name": "entropy", "threshold": np.float32(0.5)}
    tiny_config.length_config = [np.float32(1), *np.linspace(1, 0.5, tiny_config.num_hidden_layers - 1)]
    tiny_config.save_pretrained(tmp_path)
    again = ElasticBertConfig.from_pretrained(tmp_path)
    assert again.exit_policy == {"name": "entropy", "threshold": 0.5} and again.length_config[-1] == 0.5


def test_new_exits_of_a_calibrated_checkpoint_leave_its_policy_behind(model, tmp_path):
    model.config.exit_policy = {"name": "entropy", "threshold": [0.1, 0.2, 0.3, 0.4]}
    model.save_pretrained(tmp_path / "all")
    one = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "all", num_output_layers=1)
    one.save_pretrained(tmp_path / "one")
    again = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "one", num_output_layers=None)
    assert again.config.exit_layers == [1, 2, 3, 4] and again.config.exit_policy is None


def test_a_model_of_one_label_trained_on_numbers_says_that_it_is_a_regression(tiny_config, batch):
    tiny_config.num_labels, tiny_config.problem_type = 1, None
    model = ElasticBertForSequenceClassification(tiny_config)
    model(**batch)
    assert model.config.problem_type is None
    model(**batch, labels=torch.rand(4))
    assert model.config.problem_type == "regression"


def test_a_number_of_exits_counts_whichever_the_checkpoint_has(model, tmp_path):
    model.config.exit_layers = [2, 4]
    model.save_pretrained(tmp_path)
    loaded = ElasticBertForSequenceClassification.from_pretrained
    assert loaded(tmp_path).config.exit_layers == [2, 4]
    assert loaded(tmp_path, num_output_layers=2).config.exit_layers == [3, 4]


@pytest.mark.parametrize("kind", [ElasticBertForMaskedLM, ElasticBertForPreTraining])
def test_masked_models_answer_where_the_last_exit_asked_for_is_left_out(kind, tiny_config, batch):
    """They answered nothing."""
    model = kind(tiny_config).eval()
    name = "logits" if kind is ElasticBertForMaskedLM else "prediction_logits"
    found, first = (model(**batch, exits=exits, layer_config=[1, 2, 4])[name] for exits in ([1, 3], [1]))
    assert torch.equal(found, first)
    trained = model(**batch, labels=batch["input_ids"], exits=[1, 3], layer_config=[1, 2, 4])
    assert torch.equal(trained[name], first)


@pytest.mark.parametrize("kind", [ElasticBertForMaskedLM, ElasticBertForPreTraining])
def test_masked_models_answer_from_the_highest_exit_asked_for(kind, tiny_config, batch):
    model = kind(tiny_config).eval()
    name = "logits" if kind is ElasticBertForMaskedLM else "prediction_logits"
    with torch.inference_mode():
        first, second = (model(**batch, labels=batch["input_ids"], exits=exits)[name] for exits in ([2, 4], [4, 2]))
        assert torch.equal(first, second)
        with pytest.raises(ValueError, match=r"labels must be of shape"):
            model(**batch, labels=batch["input_ids"][:, :-1])


def test_the_order_in_which_exits_are_named_does_not_matter(model, batch):
    gradients = []
    for exits in ([2, 4], [4, 2], [2, 2, 4]):
        model.zero_grad()
        model.train()
        torch.manual_seed(0)
        model(**batch, labels=torch.tensor([0, 1, 0, 1]), exits=exits).loss.backward()
        gradients.append(model.elasticbert.encoder.layer[0].output.dense.weight.grad.clone())
    assert all(torch.equal(one, gradients[0]) for one in gradients)


def test_a_learned_exit_head_learns_as_much_from_an_update_in_parts(tiny_config, batch):
    tiny_config.learned_exit_head = True
    tiny_config.hidden_dropout_prob = tiny_config.attention_probs_dropout_prob = 0.0
    model, labels = lively(tiny_config).train(), torch.tensor([0, 1, 0, 1])
    gradients = []
    for size in (4, 1):
        model.zero_grad()
        for start in range(0, 4, size):
            part = {name: value[start : start + size] for name, value in batch.items()}
            model(**part, labels=labels[start : start + size], num_items_in_batch=4).loss.backward()
        gradients.append(model.exit_uncertainty.weight.grad.clone())
    torch.testing.assert_close(gradients[1], gradients[0])


def test_the_bare_model_names_the_layers_that_it_can_end_at(tiny_config, batch):
    with pytest.raises(ValueError, match="layer must be one of .*, got 99"):
        ElasticBertModel(tiny_config).eval()(**batch, exit_policy={"name": "constant", "layer": 99})


HEADS = {
    "sequence": ElasticBertForSequenceClassification,
    "span": ElasticBertForQuestionAnswering,
    "pretraining": ElasticBertForPreTraining,
    "bare": ElasticBertModel,
}


@pytest.mark.parametrize(
    ("head", "wrong"),
    [
        ("sequence", {"exit_polcy": {"name": "entropy", "threshold": 0.5}}),  # answered with the full model
        ("span", {"labels": torch.zeros(4, dtype=torch.long)}),  # trained on nothing: its loss was None
        ("pretraining", {"exit_polcy": {"name": "constant", "layer": 1}}),
        ("bare", {"length_confg": 0.5}),
    ],
)
def test_an_argument_that_there_is_not_is_an_error(tiny_config, batch, head, wrong):
    model = HEADS[head](tiny_config)
    with pytest.raises(TypeError, match=f"unexpected keyword argument '{next(iter(wrong))}'"):
        model(**batch, **wrong)
    model(**batch, output_hidden_states=True, return_dict=True, num_items_in_batch=None)  # what transformers hands on


def test_exits_that_read_the_first_token_say_so_where_it_is_padding(tiny_config, batch):
    turned = {name: values.flip(1) for name, values in batch.items()}
    with pytest.warns(UserWarning, match=r"hides some rows' first token, where exits read \[CLS\]"):
        lively(tiny_config)(**turned)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ElasticBertModel(tiny_config)(**turned)  # whoever takes the tokens' states may pad as he likes
        ElasticBertForTokenClassification(tiny_config)(**turned)
        tiny_config.exit_pooling = "mean"
        lively(tiny_config)(**turned)


def test_a_masked_model_has_no_learned_exit_head(tiny_config, batch):
    tiny_config.learned_exit_head = True
    with pytest.raises(ValueError, match="'learned' needs a model for a task"):
        ElasticBertForMaskedLM(tiny_config).eval()(**batch, exit_policy={"name": "learned", "threshold": 0.5})


@torch.inference_mode()
def test_a_threshold_may_be_a_number_of_numpy(model, batch):
    by_python = model(**batch, exit_policy={"name": "entropy", "threshold": 0.5})
    by_numpy = model(**batch, exit_policy={"name": "entropy", "threshold": np.float32(0.5)})
    assert by_numpy.exit_layers.tolist() == by_python.exit_layers.tolist()
    with pytest.raises(ValueError, match="threshold must be a number from 0 to 1 or a list of them.*tensor"):
        model(**batch, exit_policy={"name": "entropy", "threshold": torch.tensor(0.5)})


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"problem_type": "regresion"}, "problem_type must be one of regression, .* got 'regresion'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be at least 1, got 0"),
    ],
)
def test_a_config_names_what_is_wrong_with_it(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ElasticBertConfig(**fields)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@torch.inference_mode()
def test_attentions_are_those_of_all_layers_or_none(tiny_config, batch, attention):
    """Under sdpa, layers that drop tokens recorded theirs, as if they were the first layers'."""
    tiny_config._attn_implementation = attention
    lengths = [0.8] + [0.5] * (tiny_config.num_hidden_layers - 1)
    recorded = lively(tiny_config)(**batch, length_config=lengths, output_attentions=True).attentions
    assert len(recorded) == (tiny_config.num_hidden_layers if attention == "eager" else 0)


def test_predictions_leave_out_what_no_metric_reads(tiny_config):
    """`Trainer.evaluate` gathers every output that is not named here; those of pre-training have no rows."""
    assert {"mlm_right", "distillation_loss"} <= set(tiny_config.keys_to_ignore_at_inference)


def test_the_modules_of_exits_are_reached_as_in_a_module_dict(tiny_config):
    tiny_config.exit_layers = [2, 4]
    classifiers = ElasticBertForSequenceClassification(tiny_config).classifiers
    assert list(classifiers) == list(classifiers.keys()) == ["1", "3"] and len(classifiers) == 2
    assert classifiers["3"] is classifiers.at(4) is list(classifiers.values())[1] is dict(classifiers.items())["3"]
    assert "1" in classifiers and "2" not in classifiers


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"hidden_act": "foo"}, "hidden_act must be one of .*gelu.* got 'foo'"),
        ({"pooler_act": "tan"}, "pooler_act must be one of .*tanh.* got 'tan'"),
        ({"position_offset": -1}, r"position_offset must be 0 to 511 .* got -1"),
        ({"position_offset": 600}, r"position_offset must be 0 to 511 .* got 600"),
    ],
)
def test_a_config_that_no_model_can_be_made_of_is_refused(fields, message):
    with pytest.raises(StrictDataclassError, match=message):
        ElasticBertConfig(**fields)


def test_a_policy_of_the_configuration_bars_no_training(model, batch, tmp_path):
    """It does not apply there, and was checked against the task all the same."""
    model.config.exit_policy = {"name": "entropy", "threshold": 0.3}
    model.save_pretrained(tmp_path)
    regression = ElasticBertForSequenceClassification.from_pretrained(
        tmp_path, num_labels=1, problem_type="regression", ignore_mismatched_sizes=True
    )
    assert regression.train()(**batch, labels=torch.zeros(4)).loss.isfinite()
    assert regression.eval()(**batch, labels=torch.zeros(4)).loss.isfinite()
    with pytest.raises(ValueError, match="exit_policy for regression must be one of"):
        regression(**batch)


@torch.inference_mode()
def test_logits_beside_a_loss_are_those_of_the_last_exit_asked_for(tiny_config, batch):
    model = ElasticBertForMaskedLM(tiny_config).eval()
    labels = batch["input_ids"]
    asked = model(**batch, labels=labels, exits=[1, 2])
    torch.testing.assert_close(asked.logits, model(**batch, exits=[1, 2]).logits)
    torch.testing.assert_close(model(**batch, labels=labels).logits, model(**batch).logits)
