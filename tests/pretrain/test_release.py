"""A checkpoint becomes a complete folder for the hub, or nothing."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from elastic_model import ElasticBertForSequenceClassification
from pretrain.__main__ import main
from tests.elastic_model.hub_server import TOKEN, HubServer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def release(tiny_checkpoint, tmp_path, monkeypatch, capsys):
    """-> exit code and stderr of the command for the tiny checkpoint."""

    def call(*flags):
        argv = ["--model", str(tiny_checkpoint), "--output", str(tmp_path / "release"), *flags]
        monkeypatch.setattr(sys, "argv", ["pretrain", "release", *argv])
        return main(), capsys.readouterr().err

    return call


@pytest.mark.slow
def test_a_release_is_complete_and_its_hashes_are_right(release, tiny_checkpoint, tmp_path):
    """It was loaded in a process without the package, else there would be none."""
    (tiny_checkpoint / "optimizer.safetensors").write_bytes(b"of a run")
    (tiny_checkpoint / "trainer_state.json").write_text("{}")
    code, error = release()
    assert code == 0, error
    files = {path.name for path in (tmp_path / "release").iterdir()} - {".elastic-model", "SHA256SUMS"}
    assert {"model.safetensors", "config.json", "tokenizer.json", "README.md", "modeling_elasticbert.py"} <= files
    assert not files & {"optimizer.safetensors", "trainer_state.json"}
    sums = dict(line.split("  ")[::-1] for line in (tmp_path / "release/SHA256SUMS").read_text().splitlines())
    assert sums.keys() == files
    for name, digest in sums.items():
        assert hashlib.sha256((tmp_path / "release" / name).read_bytes()).hexdigest() == digest, name
    assert (
        "AutoModelForSequenceClassification" in json.loads((tmp_path / "release/config.json").read_text())["auto_map"]
    )


def test_a_checkpoint_that_is_not_complete_is_named(release, tiny_checkpoint, tmp_path):
    weights = tiny_checkpoint / "model.safetensors"
    whole = weights.read_bytes()
    weights.unlink()
    code, error = release()
    assert code == 2 and "holds no weights" in error
    weights.write_bytes(whole[:-100])
    assert release()[0] == 2
    weights.write_bytes(whole)
    (tiny_checkpoint / "tokenizer_config.json").unlink()
    code, error = release()
    assert code == 2 and "holds no tokenizer" in error
    assert release("--private")[0] == 2
    assert not (tmp_path / "release").exists()


@pytest.mark.slow
def test_a_release_that_does_not_load_alone_is_not_written(release, tiny_checkpoint, tmp_path, monkeypatch):
    """As if a code file had been forgotten."""
    save = ElasticBertForSequenceClassification.save_pretrained

    def forgetful(model, folder, *arguments, **flags):
        save(model, folder, *arguments, **flags)
        (Path(folder) / "losses.py").unlink()

    monkeypatch.setattr(ElasticBertForSequenceClassification, "save_pretrained", forgetful)
    code, error = release()
    assert code == 2 and "does not load where this package is not installed" in error
    assert not (tmp_path / "release").exists()


@pytest.mark.slow
def test_it_is_uploaded_on_request_only(tiny_checkpoint, tmp_path):
    hub = HubServer()
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_OFFLINE": "0"}
    environment |= {"HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    command = [sys.executable, "-m", "pretrain", "release", "--model", str(tiny_checkpoint), "--output"]
    for flags in ([str(tmp_path / "one")], [str(tmp_path / "two"), "--push", "org/tiny"]):
        done = subprocess.run([*command, *flags], cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-2000:]
        assert ("org/tiny" in hub.repositories) == ("--push" in flags)
    repository = hub.repositories["org/tiny"]
    uploaded = repository.commits[repository.find("main")]
    local = {path.name: path.read_bytes() for path in (tmp_path / "two").iterdir() if path.name != ".elastic-model"}
    assert {name: uploaded.get(name) for name in local} == local
    hub.close()
