"""A checkpoint folder alone is enough: where the package is not installed its code travels with it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers.dynamic_module_utils import get_relative_import_files

import elastic_model
from elastic_model import modeling_elasticbert
from tests.elastic_model.fresh_process import AUTO_CLASSES, WITH_POLICY, answers, run_here


def model_of(auto_class, config):
    """A model whose exits disagree, so that every policy has something to decide."""
    torch.manual_seed(1)
    model = getattr(elastic_model, AUTO_CLASSES[auto_class])(config).eval()
    for name, parameter in model.named_parameters():
        if "LayerNorm" not in name:
            torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def travelled(tmp_path_factory):
    """What the package answers for each class, and a folder that a process without the package wrote from its
    checkpoints; and one that it wrote from its own."""
    base = tmp_path_factory.mktemp("travelled")
    config = elastic_model.ElasticBertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        num_labels=3,
    )
    expected = {}
    for auto_class in AUTO_CLASSES:
        model_of(auto_class, config).save_pretrained(base / "here" / auto_class)
        loaded = getattr(elastic_model, AUTO_CLASSES[auto_class]).from_pretrained(base / "here" / auto_class)
        expected[auto_class] = answers(loaded.eval(), auto_class)
    for target in ("once", "twice"):
        (base / target).mkdir()
    done = run_here([base / "here", base / "once", base / "twice"], base)
    assert done.returncode == 0, done.stderr[-3000:]
    return base, expected


@pytest.mark.parametrize("times", ["once", "twice"])
@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_a_process_without_the_package_gives_the_same_bits(auto_class, times, travelled):
    base, expected = travelled
    found = load_file(base / times / f"{auto_class}.safetensors")
    assert found.keys() == expected[auto_class].keys()
    for name, value in expected[auto_class].items():
        assert torch.equal(found[name].nan_to_num(7.0), value.nan_to_num(7.0)), name


@pytest.mark.parametrize("auto_class", sorted(WITH_POLICY))
def test_the_exits_that_were_compared_differ_between_rows(auto_class, travelled):
    """Else the comparison above would say nothing of policies."""
    left_at = [values for name, values in travelled[1][auto_class].items() if "exit_layers" in name]
    assert any(len(values.unique()) > 1 for values in left_at)


@pytest.mark.parametrize("auto_class", AUTO_CLASSES)
def test_what_such_a_process_saved_is_read_by_the_package(auto_class, travelled):
    base, expected = travelled
    model_class = getattr(elastic_model, AUTO_CLASSES[auto_class])
    model, info = model_class.from_pretrained(base / "twice" / auto_class, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    for name, value in answers(model.eval(), auto_class).items():
        assert torch.equal(value.nan_to_num(7.0), expected[auto_class][name].nan_to_num(7.0)), name


def test_exactly_the_files_that_the_model_imports_travel(travelled):
    needed = {modeling_elasticbert.__file__, *get_relative_import_files(modeling_elasticbert.__file__)}
    names = {str(file).rsplit("/", 1)[-1] for file in needed}
    for times in ("here", "once", "twice"):
        for auto_class in AUTO_CLASSES:
            folder = travelled[0] / times / auto_class
            assert {file.name for file in folder.glob("*.py")} == names
            assert {file.name for file in folder.iterdir()} - names == {"config.json", "model.safetensors"}


def test_every_folder_names_all_auto_classes(travelled):
    for times in ("here", "twice"):
        config = json.loads((travelled[0] / times / "AutoModel" / "config.json").read_text())
        assert config["auto_map"].keys() == {"AutoConfig", *AUTO_CLASSES}


def test_a_headless_checkpoint_gets_the_head_that_is_asked_for(travelled):
    """The base class's folder through the Auto class of a task, with the package: only the heads are new."""
    loader = elastic_model.ElasticBertForSequenceClassification
    _, info = loader.from_pretrained(travelled[0] / "here" / "AutoModel", output_loading_info=True)
    assert info["missing_keys"] and all(key.startswith("classifiers.") for key in info["missing_keys"])
