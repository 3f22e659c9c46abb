"""A corpus of small documents and a run on it that takes a second."""

import random

import pytest
from accelerate.state import AcceleratorState

from elastic_model.arguments import parse
from pretrain.config import PretrainConfig

NOUNS = "senate treasury harvest treaty army railway school harbor currency frontier navy court budget union".split()
VERBS = "needs approves defends funds improves surveys builds restores inspects reports".split()


def sentence(generator: random.Random) -> str:
    first, second = generator.sample(NOUNS, 2)
    return (
        f"The {first} {generator.choice(VERBS)} the {second} of {generator.choice(NOUNS)} {generator.randint(1, 9)}."
    )


@pytest.fixture(scope="session")
def corpus_text() -> str:
    """40 documents of 12 sentences, two sentences a line."""
    generator = random.Random(0)
    documents = [[sentence(generator) for _ in range(12)] for _ in range(40)]
    return "\n\n".join("\n".join(" ".join(lines[i : i + 2]) for i in range(0, 12, 2)) for lines in documents) + "\n"


@pytest.fixture(scope="session")
def corpus_file(corpus_text, tmp_path_factory):
    path = tmp_path_factory.mktemp("text") / "corpus.txt"
    path.write_text(corpus_text)
    return path


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def options(corpus_file, cache, tmp_path):
    """-> PretrainConfig of a run of 12 updates of a model of 2 x 16, other flags as given."""
    tiny = {
        "text": corpus_file,
        "output": tmp_path / "run",
        "cache": cache,
        "vocab_size": 160,
        "hidden_size": 16,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "max_position_embeddings": 32,
        "max_length": 24,
        "batch_size": 8,
        "steps": 12,
        "warmup_steps": 2,
        "learning_rate": 5e-3,
        "workers": 0,
        "prepare_workers": 1,
        "log_every": 3,
        "evaluate_every": 6,
        "evaluation_examples": 8,
        "save_every": 4,
    }

    def make(**flags) -> PretrainConfig:
        argv = [part for name, value in {**tiny, **flags}.items() for part in (f"--{name}", *map(str, _list(value)))]
        return parse(PretrainConfig, argv)

    return make


def _list(value):
    return value if isinstance(value, list) else [value]


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """accelerate keeps its state for the whole process."""
    yield
    AcceleratorState._reset_state(True)
