"""Checkpoint folders that are damaged or not checkpoints: one clear error each, from ours and from stock ones."""

import pytest
import transformers

from elastic_model import ElasticBertForSequenceClassification


@pytest.fixture(params=["ours", "stock"])
def folder(request, tiny_model, tmp_path):
    if request.param == "ours":
        tiny_model.save_pretrained(tmp_path)
        return tmp_path
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(tmp_path)
    return tmp_path


@pytest.mark.parametrize(
    "content", [lambda data: data[: len(data) // 2], lambda data: b"garbage" * 50, lambda data: b""]
)
def test_damaged_weights_are_named(content, folder):
    file = folder / "model.safetensors"
    file.write_bytes(content(file.read_bytes()))
    with pytest.raises(OSError, match="are damaged or cut short .*get them again") as caught:
        ElasticBertForSequenceClassification.from_pretrained(folder)
    assert str(folder) in str(caught.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "no weights|no file named model.safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json: it is not a checkpoint"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json' is not a valid JSON file"),
    ],
)
def test_what_is_missing_is_named(change, message, folder):
    change(folder)
    with pytest.raises(OSError, match=message) as caught:
        ElasticBertForSequenceClassification.from_pretrained(folder)
    assert str(folder) in str(caught.value)
