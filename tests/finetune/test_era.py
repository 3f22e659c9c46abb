"""From nothing to a task checkpoint on real text: the embedded passages, a model of random weights, one command."""

import pytest
import torch
from transformers import BertTokenizer

from elastic_model import ElasticBertConfig, ElasticBertForPreTraining
from elastic_model.operating_points import OperatingPoints
from finetune.__main__ import _command
from finetune.examples import read_examples
from finetune.tasks import TASKS

GUESS = 0.25  # four eras, as many passages of each


@pytest.fixture
def random_start(tmp_path):
    """Two layers of width 64, never trained, with a vocabulary of the train passages."""
    texts = read_examples(TASKS["era"], "train").texts
    tokenizer = BertTokenizer(model_max_length=64).train_new_from_iterator([texts], vocab_size=3000)
    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 256}
    torch.manual_seed(0)
    config = ElasticBertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, **sizes)
    ElasticBertForPreTraining(config).save_pretrained(tmp_path / "start")
    tokenizer.save_pretrained(tmp_path / "start")
    return tmp_path / "start"


@pytest.mark.slow
def test_the_era_of_a_passage_is_learned_from_its_words(random_start, tmp_path):
    recipe = ["--config", "finetune/recipes/era.yaml", "--learning_rate", "2e-3", "--max_length", "64"]
    assert _command(["train", *recipe, "--model", str(random_start), "--output", str(tmp_path / "out")]) == 0
    full = OperatingPoints.load(tmp_path / "out").at("full")
    assert full.quality["metric"] == "accuracy" and full.quality["low"] > GUESS + 0.1
