"""What the export tests share: a tiny classifier whose exits disagree, as a model and as a folder."""

import pytest

from tests.export.graphs import lively


@pytest.fixture
def lively_model(tiny_config):
    return lively(tiny_config)


@pytest.fixture
def lively_checkpoint(lively_model, tiny_tokenizer, tmp_path):
    folder = tmp_path / "lively"
    lively_model.save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder
