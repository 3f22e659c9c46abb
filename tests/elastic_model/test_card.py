"""The record of provenance and the model card made from it: what is stated is there, what is not says so."""

import json
import re

import pytest
import torch
import transformers
from huggingface_hub import ModelCard

import elastic_model
from elastic_model import OperatingPoint, OperatingPoints, cost
from elastic_model.card import TASKS, write_card
from elastic_model.operating_points import checkpoint_hash
from elastic_model.provenance import Data, Metric, append_stage, describe_data, file_hash, read_provenance

EXITS = [Metric("accuracy", 0.5 + layer / 10, "era", "dev", layer, 0.4, 0.95) for layer in (1, 2, 3, 4)]


def card_of(folder, **arguments):
    """The card as the hub reads it: metadata and text."""
    write_card(folder, **arguments)
    card = ModelCard.load(folder / "README.md")
    return card.data.to_dict(), card.text


def change_weights(folder):
    model = elastic_model.ElasticBertForSequenceClassification.from_pretrained(folder)
    with torch.no_grad():
        model.elasticbert.embeddings.word_embeddings.weight.add_(1.0)
    model.save_pretrained(folder)


@pytest.fixture
def recorded(tiny_checkpoint, tmp_path):
    """A checkpoint with two stages on record and an operating point."""
    corpus = tmp_path / "corpus.txt"
    corpus.write_text("Some text.\n")
    (tmp_path / "PROVENANCE.md").write_text("---\nlicense: cc0-1.0\nlanguage: en\n---\n# Where it comes from\n")
    append_stage(tiny_checkpoint, "pretrain", data=[describe_data(corpus, "corpus.txt", "train")], seed=1)
    data = [Data("era", "train", hub_id="org/era"), Data("era", "dev", hub_id="org/era")]
    settings = {"learning_rate": 1e-4, "output": tmp_path / "out"}
    append_stage(
        tiny_checkpoint, "finetune", data=data, metrics=EXITS, settings=settings, seed=2, license="apache-2.0"
    )
    quality = {"metric": "accuracy", "value": 0.81, "low": 0.75, "high": 0.86, "split": "dev"}
    latency = {"value": 1.25, "batch": 1, "threads": 2, "machine": "some CPU"}
    point = OperatingPoint("fast", [0.3] * 4, 2.25, flops=1e6, quality=quality, latency_ms=latency)
    OperatingPoints(checkpoint_hash(tiny_checkpoint), {"name": "entropy"}, [point]).save(tiny_checkpoint)
    return tiny_checkpoint


def test_the_metadata_is_what_the_record_states(recorded):
    metadata, _ = card_of(recorded, repo_id="org/name", tags=["mine"])
    assert metadata["license"] == "apache-2.0"
    assert metadata["datasets"] == ["org/era"]
    assert metadata["language"] == ["en"]
    assert metadata["library_name"] == "transformers" and metadata["pipeline_tag"] == "text-classification"
    assert "mine" in metadata["tags"] and metadata["metrics"] == ["accuracy"]
    assert "base_model" not in metadata
    (index,) = metadata["model-index"]
    assert index["name"] == "name"
    (result,) = index["results"]
    assert result["dataset"] == {"name": "era", "type": "org/era", "split": "dev"}
    assert [one["value"] for one in result["metrics"]] == [one.value for one in EXITS]
    assert [one["args"]["exit_layer"] for one in result["metrics"]] == [1, 2, 3, 4]


def test_the_text_has_exits_points_data_and_settings(recorded, tmp_path):
    _, text = card_of(recorded)
    config = elastic_model.ElasticBertConfig.from_pretrained(recorded)
    for layer in (1, 2, 3, 4):
        flops = cost.flops(config, 64, exit_layer=layer)
        assert f"| {layer} | {0.5 + layer / 10:.4g} (0.4 to 0.95) | {flops:.4g} |" in text
    assert (
        "| fast | 2.25 | accuracy 0.81 (0.75 to 0.86) dev | 1e+06 | 1.25 (batch 1, threads 2, machine some CPU) |"
        in text
    )
    digest = file_hash(tmp_path / "corpus.txt")[:16]
    assert f"| pretrain | corpus.txt | train | cc0-1.0 | `{digest}` |" in text
    assert "| finetune | era | dev | not stated |" in text
    assert "none, trained from random weights" in text and "seed 2" in text and "learning_rate: 0.0001" in text
    assert str(tmp_path) not in text and str(tmp_path) not in (recorded / "provenance.json").read_text()


def test_without_a_record_nothing_is_claimed(tiny_checkpoint):
    metadata, text = card_of(tiny_checkpoint)
    assert not metadata.keys() & {"license", "base_model", "datasets", "language", "metrics", "model-index"}
    for line in (
        "License: not stated",
        "Base model: not stated",
        "Data sets of the hub: not stated",
        "Language: not stated",
    ):
        assert f"- {line}\n" in text
    assert "What the model was trained on: not stated" in text and "Quality by exit: not stated" in text


def test_metrics_and_points_of_other_weights_are_left_out(recorded):
    change_weights(recorded)
    metadata, text = card_of(recorded)
    assert "model-index" not in metadata and "Operating points" not in text and "0.4 to 0.95" not in text
    assert "What was done to the weights after the last stage below: not stated" in text
    assert metadata["datasets"] == ["org/era"]  # they did read it


@pytest.mark.parametrize("model_class", TASKS)
@pytest.mark.parametrize("has_tokenizer", [True, False])
def test_the_code_example_runs(model_class, has_tokenizer, tiny_config, tiny_tokenizer, tmp_path, monkeypatch, capsys):
    torch.manual_seed(0)
    getattr(elastic_model, model_class)(tiny_config).save_pretrained(tmp_path)
    if has_tokenizer:
        tiny_tokenizer.save_pretrained(tmp_path)
    write_card(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (tmp_path / "README.md").read_text(), flags=re.S)
    assert ("AutoTokenizer" in code) == has_tokenizer
    monkeypatch.chdir(tmp_path)
    capsys.readouterr()
    exec(code, {})
    shown = capsys.readouterr().out
    assert "tensor(" in shown or "torch.Size([2, " in shown or "torch.Size([1, " in shown


def stock(folder, card=None):
    config = transformers.BertConfig(
        vocab_size=200, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    transformers.BertModel(config).save_pretrained(folder)
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder


def converted(parent, folder):
    elastic_model.ElasticBertForSequenceClassification.from_pretrained(parent).save_pretrained(folder)
    append_stage(folder, "convert", parent=parent)
    return folder


def test_a_local_parent_is_no_base_model_unless_its_card_names_one(tmp_path):
    metadata, text = card_of(converted(stock(tmp_path / "org-model"), tmp_path / "silent"))
    assert not metadata.keys() & {"base_model", "license"}
    assert "Base model: not stated" in text and "**convert** from org-model" in text
    card = "---\nlicense: other\nlicense_name: own\nlicense_link: LICENSE\nbase_model: org/base\nlanguage: de\n---\n"
    metadata, _ = card_of(converted(stock(tmp_path / "named", card), tmp_path / "speaking"))
    assert metadata["base_model"] == "org/base" and metadata["language"] == ["de"]
    assert (metadata["license"], metadata["license_name"], metadata["license_link"]) == ("other", "own", "LICENSE")


def test_a_stage_inherits_its_parents_record(recorded, tmp_path):
    child = tmp_path / "child"
    elastic_model.ElasticBertForSequenceClassification.from_pretrained(recorded).save_pretrained(child)
    append_stage(child, "distil", parent=recorded, seed=3)
    stages = read_provenance(child)
    assert [stage.stage for stage in stages] == ["pretrain", "finetune", "distil"]
    assert stages[2].parent.sha256 == checkpoint_hash(recorded) and stages[2].checkpoint == checkpoint_hash(child)
    assert stages[:2] == read_provenance(recorded)
    assert card_of(child)[0]["license"] == "apache-2.0"


def test_a_parents_card_that_cannot_be_read_is_left_out_with_a_warning(tmp_path, caplog):
    parent = stock(tmp_path / "parent", "---\nlicense: [mit\n: broken\n---\n")
    metadata, text = card_of(converted(parent, tmp_path / "child"))
    assert "license" not in metadata and "License: not stated" in text
    assert "parent/README.md cannot be read as a model card" in caplog.text


def test_a_card_by_hand_is_not_replaced_and_ours_is(recorded):
    write_card(recorded)
    write_card(recorded, notes="## Checks\n\nAll passed.")
    assert "All passed." in (recorded / "README.md").read_text()
    (recorded / "README.md").write_text("# My own words\n")
    with pytest.raises(ValueError, match="README.md was not written by elastic-model and is left as it is"):
        write_card(recorded)
    assert (recorded / "README.md").read_text() == "# My own words\n"


def test_text_of_a_record_cannot_leave_its_place(tiny_checkpoint):
    evil = "a | b\n---\nlicense: mit\n---\n<script>"
    data = [Data(evil, license=evil)]
    append_stage(
        tiny_checkpoint, evil, data=data, settings={"note": "```\n# Heading\n```"}, license="a: b\nlanguage: xx"
    )
    metadata, text = card_of(tiny_checkpoint)
    assert metadata["license"] == "a: b\nlanguage: xx" and "language" not in metadata
    assert (
        "<script>" not in text
        and "\nlicense: mit" not in text
        and "\n# Heading" not in text.replace("  # Heading", "")
    )
    rows = [line for line in text.splitlines() if line.startswith("| a \\|")]
    assert len(rows) == 1 and len(re.split(r"(?<!\\)\|", rows[0])) == 7


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no weights .*safetensors"),
        (lambda folder: (folder / "config.json").unlink(), "has no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json is not JSON"),
        (
            lambda folder: (folder / "config.json").write_text(json.dumps({"model_type": "gpt2"})),
            "model_type must be 'elasticbert' for a card, got 'gpt2'",
        ),
        (
            lambda folder: (folder / "config.json").write_text(
                json.dumps({"model_type": "elasticbert", "architectures": ["Other"]})
            ),
            "architectures must name one of ElasticBertModel, .*got .'Other'.",
        ),
        (lambda folder: (folder / "provenance.json").write_text("{}"), "provenance.json: not a record of provenance"),
        (
            lambda folder: (folder / "provenance.json").write_text(json.dumps({"format": 9, "stages": []})),
            "format 9, this version reads format 1",
        ),
        (
            lambda folder: (folder / "provenance.json").write_text(
                json.dumps({"format": 1, "stages": [{"stage": 3, "parent": None, "data": [], "metrics": []}]})
            ),
            "expected str, got int",
        ),
        (lambda folder: (folder / "operating_points.json").write_text("[]"), "not a table of operating points"),
    ],
)
def test_a_folder_that_is_no_checkpoint_gets_one_clear_line(change, message, tiny_checkpoint):
    change(tiny_checkpoint)
    with pytest.raises(ValueError, match=message) as caught:
        write_card(tiny_checkpoint)
    assert "\n" not in str(caught.value) and str(tiny_checkpoint) in str(caught.value)
    assert not (tiny_checkpoint / "README.md").exists()


def test_a_parent_that_is_neither_folder_nor_hub_id_is_refused(tiny_checkpoint):
    with pytest.raises(ValueError, match="checkpoint runs/gone/away is neither a folder nor a hub id"):
        append_stage(tiny_checkpoint, "finetune", parent="runs/gone/away")
    assert not (tiny_checkpoint / "provenance.json").exists()


def test_a_hub_id_that_nothing_was_read_from_is_no_base_model(tiny_checkpoint):
    append_stage(tiny_checkpoint, "finetune", parent="org/never-downloaded")  # the tests are offline
    assert "base_model" not in card_of(tiny_checkpoint)[0]
