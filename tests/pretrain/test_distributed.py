"""Real runs of several processes, from the configs that are shipped."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, BertConfig, BertModel

from elastic_model import ElasticBertForPreTraining
from elastic_model.arguments import to_yaml
from pretrain.checkpoint import find_checkpoints
from pretrain.train import train

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "pretrain" / "accelerate"
MODES = ("ddp", "zero1", "zero2", "zero3", "fsdp2")
FLAGS = {
    "dropout": 0.0,
    "num_hidden_layers": 3,
    "exit_groups": 2,
    "micro_batch_size": 2,
    "log_every": 1,
    "save_every": 8,
    "evaluation_examples": 9,  # not a multiple of the processes: they must still meet
}


def launch(mode: str, config, folder: Path, processes: int = 2, start_only: bool = False, **environment: str):
    """`accelerate launch -m pretrain` with the shipped config of `mode`."""
    file = folder / f"{config.output.name}.yaml"
    file.write_text(to_yaml(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{mode}.yaml"]
    command += ["--num_processes", processes, "--main_process_port", 0, "-m", "pretrain", "--config", file]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    log = open(folder / f"{config.output.name}.log", "a")
    process = subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)
    if start_only:
        return process
    process.wait(timeout=300)  # its exit code says little: gloo may abort when everything is done
    return (folder / f"{config.output.name}.log").read_text()


def losses(output: Path) -> list[float]:
    lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    per_line = [line.get("held_out", line) for line in lines]
    return [value for line in per_line for name in ("mlm_loss", "sop_loss") for value in line[name].values()]


def forget_after(output: Path, step: int) -> None:
    """Leave a run as if it had been killed after the checkpoint of `step`."""
    for path in output.iterdir():
        if path.is_dir() and path.name != f"checkpoint-{step}":
            shutil.rmtree(path)
        elif path.name not in (".elastic-model", "metrics.jsonl", f"checkpoint-{step}"):
            path.unlink()


def same_tensors(one: Path, other: Path) -> bool:
    one, other = load_file(one), load_file(other)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The output of one process without a launcher, made by the first test that asks."""
    return tmp_path_factory.mktemp("one") / "run"


@pytest.mark.slow
@pytest.mark.parametrize("mode", MODES)
def test_two_processes_train_save_and_resume_as_one(mode, options, tmp_path, reference):
    """The same losses from the same global batches; a checkpoint that transformers reads, continued bit for bit by two
    processes and within rounding by one without a launcher."""
    if not reference.exists():
        train(options(**FLAGS, output=reference))
    whole = options(**FLAGS, output=tmp_path / mode)
    log = launch(mode, whole, tmp_path)
    assert (whole.output / "evaluation.json").exists(), log[-3000:]
    assert "2 process(es)" in log
    assert losses(whole.output) == pytest.approx(losses(reference), rel=1e-4)

    model, report = ElasticBertForPreTraining.from_pretrained(whole.output, output_loading_info=True)
    assert (
        not report["missing_keys"]
        and type(model).__name__ in json.loads((whole.output / "config.json").read_text())["architectures"]
    )
    expected = load_file(whole.output / "model.safetensors")
    assert load_file(reference / "model.safetensors").keys() == expected.keys()

    again = options(**FLAGS, output=tmp_path / "again", resume=True)
    shutil.copytree(whole.output, again.output)
    forget_after(again.output, 8)
    log = launch(mode, again, tmp_path)
    assert "updates 9 to 12" in log, log[-3000:]
    for file in ("model.safetensors", "checkpoint-12/optimizer.safetensors"):
        assert same_tensors(whole.output / file, again.output / file), file


@pytest.mark.slow
@pytest.mark.parametrize(("mode", "precision"), [("zero2", "bf16"), ("zero3", "no"), ("fsdp2", "no")])
def test_two_processes_start_from_the_weights_given(mode, precision, options, tmp_path):
    """Under ZeRO-3 they were all zero, under FSDP not there; after bf16 the float32 weights were called bfloat16."""
    shape = {"vocab_size": 160, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 64}
    sizes = {"num_hidden_layers": 2, "max_position_embeddings": 32}
    BertModel(BertConfig(**shape, **sizes, initializer_range=0.3)).save_pretrained(tmp_path / "start")
    first = options(steps=1, output=tmp_path / "tokenizer")  # its tokenizer
    assert train(first) == 0
    AutoTokenizer.from_pretrained(first.output).save_pretrained(tmp_path / "start")
    flags = {"init_from": tmp_path / "start", "learning_rate": 1e-12, "precision": precision, "steps": 2}
    config = options(**flags, output=tmp_path / "run", micro_batch_size=2)
    log = launch(mode, config, tmp_path)
    assert (config.output / "evaluation.json").exists(), log[-3000:]
    given, found = (load_file(tmp_path / name / "model.safetensors") for name in ("start", "run"))
    body = {name: value for name, value in given.items() if not name.startswith("pooler")}
    assert all(torch.allclose(found[f"elasticbert.{name}"], value, atol=1e-6) for name, value in body.items())
    assert all(value.isfinite().all() for value in found.values())
    assert json.loads((config.output / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.slow
def test_a_run_goes_on_in_another_mode_with_another_number_of_processes(options, tmp_path, reference):
    """From two processes of ZeRO-2 to one without a launcher, to two of FSDP2: the losses are those of one process."""
    if not reference.exists():
        train(options(**FLAGS, output=reference))
    flags = FLAGS | {"save_every": 4, "keep_checkpoints": 3}
    config = options(**flags, output=tmp_path / "run", resume=True)
    launch("zero2", config, tmp_path)
    forget_after(config.output, 4)
    assert train(config) == 0
    forget_after(config.output, 8)
    launch("fsdp2", config, tmp_path)
    assert losses(config.output) == pytest.approx(losses(reference), rel=1e-4)


@pytest.mark.slow
def test_sigterm_saves_in_all_processes(options, tmp_path):
    config = options(**FLAGS | {"steps": 2000, "save_every": 2000, "evaluate_every": 2000}, output=tmp_path / "run")
    process = launch("ddp", config, tmp_path, start_only=True)
    metrics, deadline = config.output / "metrics.jsonl", time.monotonic() + 120
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 3):
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "run.log").read_text()[-3000:]
        time.sleep(0.1)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on
    process.wait(timeout=120)
    checkpoint = find_checkpoints(config.output)[-1]
    assert f"stopped after update {checkpoint.name.split('-')[1]}" in (tmp_path / "run.log").read_text()
    assert not list(config.output.glob(".*.new"))
