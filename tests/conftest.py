"""What the tests share: a tiny configuration, model and checkpoint, and no way to a network."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch and onnxruntime read it: pytest workers share the cores
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import socket
from pathlib import Path

import pytest

CORPUS = """\
Fellow citizens, the harvest of this year has been plentiful in every part of the country.
The revenue has met the expenses of the Government, and the debt has been reduced.
A treaty of commerce was signed in the spring, and it is laid before the Senate.
The mails now reach every county of the western States within a fortnight.

Our schools and our hospitals must be within the reach of every family in America.
We will invest in new energy, in new roads, and in the people who build them.
I ask this Congress to send me a bill that lowers the cost of medicine.
Tonight the state of our Union is strong because our people are strong.

The army has been kept at the strength that the law allows.
Two ships of the line were finished, and a third is on the stocks.
The Indian tribes on the frontier have kept the peace since the last session.
It remains for the wisdom of the legislature to provide for the public lands.
"""


def _refuse(sock, address):
    if sock.family in (socket.AF_INET, socket.AF_INET6) and address[0] not in ("127.0.0.1", "::1", "localhost"):
        raise OSError(f"a test tried to reach {address}: tests use loopback only")
    return _connect(sock, address)


_connect = socket.socket.connect


@pytest.fixture(autouse=True)
def loopback_only(monkeypatch):
    """No test reaches a network: it would pass or fail with the weather."""
    monkeypatch.setattr(socket.socket, "connect", _refuse)


@pytest.fixture
def tiny_config():
    """Four layers, an exit after each, three named labels; wide enough for heads, small enough for milliseconds."""
    from elastic_model import ElasticBertConfig

    return ElasticBertConfig(
        vocab_size=200,
        hidden_size=32,
        num_hidden_layers=4,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        id2label={0: "early", 1: "middle", 2: "late"},
        label2id={"early": 0, "middle": 1, "late": 2},
    )


@pytest.fixture
def tiny_model(tiny_config):
    """A classifier of `tiny_config` with weights from a fixed seed, in eval mode."""
    import torch

    from elastic_model import ElasticBertForSequenceClassification

    torch.manual_seed(0)
    return ElasticBertForSequenceClassification(tiny_config).eval()


@pytest.fixture(scope="session")
def tiny_tokenizer():
    """WordPiece trained on a few sentences, 200 entries, the same in every process."""
    from pretrain.tokenizer import train_wordpiece

    twice = 2 * CORPUS.splitlines()  # a merge is made of what occurs twice
    tokenizer = train_wordpiece(iter(twice), vocab_size=200, lowercase=True)
    tokenizer.model_max_length = 64
    return tokenizer


@pytest.fixture
def tiny_checkpoint(tiny_model, tiny_tokenizer, tmp_path):
    """A folder with the tiny classifier and its tokenizer, as `from_pretrained` reads it."""
    folder = tmp_path / "checkpoint"
    tiny_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def golden():
    """The folder of the reference implementations' numbers."""
    return Path(__file__).parent / "golden"
