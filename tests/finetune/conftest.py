"""A small task with a signal, and options of a run on it that takes seconds."""

import gzip
import random

import pytest

SIGNAL = {"early": "treaty harvest revenue", "middle": "army ships schools", "late": "energy Congress medicine"}
NOISE = "the of and to every country people this year our".split()


def _lines(rows, seed):
    draw = random.Random(seed)
    for number in range(rows):
        label = list(SIGNAL)[number % 3]
        words = draw.choices(SIGNAL[label].split(), k=2) + draw.choices(NOISE, k=draw.randint(2, 10))
        yield f"{' '.join(draw.sample(words, len(words)))}\t{label}"


@pytest.fixture(scope="session")
def small_task(tmp_path_factory):
    """A folder with train, dev, test and more of train: three labels, with words of their own among words of all."""
    folder = tmp_path_factory.mktemp("task")
    for seed, (split, rows) in enumerate({"train": 60, "dev": 30, "test": 30, "more": 240}.items()):
        (folder / f"{split}.tsv").write_text("\n".join(["text\tlabel", *_lines(rows, seed)]) + "\n")
    return folder


def options_for(small_task, model, output, /, **changes):
    """A run of 12 updates on the small task."""
    from finetune.config import TrainOptions

    own = {split: str(small_task / f"{split}.tsv") for split in ("train", "dev")}
    own |= {"model": str(model), "output": str(output), "text": "text", "label": "label"}
    short = {"max_length": 32, "batch_size": 10, "epochs": 2, "learning_rate": 3e-3, "log_steps": 1}
    return TrainOptions(**{**own, **short, **changes})


@pytest.fixture
def options(small_task, tiny_checkpoint, tmp_path):
    """-> options(**changes): a short run from the tiny checkpoint."""
    return lambda **changes: options_for(small_task, tiny_checkpoint, tmp_path / "out", **changes)


@pytest.fixture(scope="session")
def trained(small_task, tiny_tokenizer, tmp_path_factory):
    """The options of a finished run from random weights, long enough to learn the task."""
    import torch

    from elastic_model import ElasticBertConfig, ElasticBertForPreTraining
    from finetune.train import train

    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4, "intermediate_size": 64}
    config = ElasticBertConfig(vocab_size=200, max_position_embeddings=64, hidden_dropout_prob=0.0, **sizes)
    ElasticBertForPreTraining(config).save_pretrained(folder / "start")
    tiny_tokenizer.save_pretrained(folder / "start")
    more = str(small_task / "more.tsv")
    run = options_for(small_task, folder / "start", folder / "checkpoint", train=more, epochs=6, learning_rate=1e-3)
    assert train(run) == 0
    return run


SIDES = {"0": "treaty harvest revenue", "1": "energy Congress medicine"}


def _sentence(draw, label):
    words = draw.choices(SIDES[label].split(), k=3) + draw.choices(NOISE, k=draw.randint(2, 9))
    return " ".join(draw.sample(words, len(words)))


def _sentiment(rows, seed):
    draw = random.Random(seed)
    lines = [f"{_sentence(draw, label)}\t{label}" for label in draw.choices("01", k=rows)]
    return "\n".join(["sentence\tlabel", *lines, "the treaty\t0", "this medicine\t1"]) + "\n"


def _similarity(rows, seed):
    draw = random.Random(seed)
    lines = []
    for _ in range(rows):
        first, second = draw.choice("01"), draw.choice("01")
        score = 5.0 * (first == second) + draw.uniform(-0.1, 0.1)
        lines.append(f"g\tf\ty\ti\t{score:.2f}\t{_sentence(draw, first)}\t{_sentence(draw, second)}")
    return "\n".join(lines) + "\n"


@pytest.fixture
def elue_data(tmp_path, monkeypatch):
    """A folder of local data sets with small splits of SST-2 and STS-B."""
    (tmp_path / "data" / "sst2").mkdir(parents=True)
    (tmp_path / "data" / "stsb").mkdir()
    for seed, (split, rows) in enumerate({"train": 90, "dev": 30, "test": 40}.items()):
        (tmp_path / "data" / "sst2" / f"{split}.tsv").write_text(_sentiment(rows, seed))
        (tmp_path / "data" / "stsb" / f"sts-{split}.csv").write_text(_similarity(rows, seed))
    train = tmp_path / "data" / "sst2" / "train.tsv"
    (tmp_path / "data" / "sst2" / "train.tsv.gz").write_bytes(gzip.compress(train.read_bytes()))
    monkeypatch.setenv("ELASTIC_MODEL_DATA", str(tmp_path / "data"))
    return tmp_path


@pytest.fixture(scope="session")
def elue_start(tmp_path_factory, tiny_tokenizer):
    """A checkpoint without a head, from random weights."""
    import torch

    from elastic_model import ElasticBertConfig, ElasticBertModel

    folder = tmp_path_factory.mktemp("elue") / "start"
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ElasticBertModel(ElasticBertConfig(vocab_size=200, max_position_embeddings=64, **sizes)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
