"""Fine-tuning in two real processes, from the configs that are shipped.

Processes are judged by the files they leave: gloo may abort when everything is done.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file

from elastic_model.arguments import to_yaml
from finetune.config import ElastifyOptions, PruneOptions
from finetune.data import collate
from finetune.elastify import elastify
from finetune.prune import prune
from finetune.recipe import Update
from finetune.run import prepare
from finetune.train import train
from tests.finetune.test_elastify import stock_model

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "pretrain" / "accelerate"
RECIPES = {
    "joint": {},
    "learned": {"exit_groups": 2},
    "self_distillation": {},
    "sandwich": {"exit_groups": 2, "phase_epochs": [1, 2]},
}


def launch(mode, folder, *argv):
    """`accelerate launch` with the shipped config of `mode`, in two processes; what they print goes to FOLDER/log."""
    if mode.startswith("zero"):
        pytest.importorskip("deepspeed")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{mode}.yaml"]
    command += ["--num_processes", 2, "--main_process_port", 0, *argv]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with open(folder / "log", "a") as log:
        return subprocess.Popen(list(map(str, command)), cwd=ROOT, env=environment, stdout=log, stderr=log)


def train_in(mode, folder, run, command="train"):
    """`python -m finetune train`, or another command, in two processes, to its end; -> what was printed."""
    file = folder / "run.yaml"
    file.write_text(to_yaml(run))
    launch(mode, folder, "-m", "finetune", command, "--config", file).wait(timeout=300)
    return (folder / "log").read_text()


def weights_of(output):
    return load_file(Path(output) / "model.safetensors")


def assert_close(found, expected, **tolerance):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def moments_of_mean_loss(run, updates=2, beta=0.9):
    """What AdamW's first moments must be: all rows at once, the losses of an update summed, one backward pass."""
    found = {}
    run.model.train()
    for number, phase in enumerate(run.phases):
        for name, parameter in run.model.named_parameters():
            parameter.requires_grad_(phase.trains(name, run.model.config))
            parameter.grad = None
        for update in range(updates):
            draw = random.Random(f"{run.options.seed} {update}")
            batch = collate(run.splits["train"], run.plan.rows(update), run.tokenizer, torch.device("cpu"))
            told = Update(update, draw, run.options)
            sum(phase.objective(run.model, run.model.config, batch, told)).backward()
            for name, parameter in run.model.named_parameters():
                if parameter.grad is not None:
                    before = found.get(f"{number}.{name}", torch.zeros_like(parameter))
                    found[f"{number}.{name}"] = beta * before + (1 - beta) * parameter.grad
                    parameter.grad = None
    return found


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero1", "zero2"])
def test_the_gradient_of_an_update_is_that_of_the_mean_loss(options, tmp_path, mode):
    """Dealt out unevenly to two processes, in micro-batches and several backward passes."""
    settings = {"batch_size": 7, "dropout": 0.0, "max_grad_norm": 1e9}
    runs = [options(recipe=recipe, **settings, **own) for recipe, own in RECIPES.items()]
    (tmp_path / "runs.json").write_text(json.dumps([vars(run) | {"micro_batch_size": 3} for run in runs]))
    worker = Path(__file__).with_name("gradients.py")
    launch(mode, tmp_path, worker, tmp_path / "runs.json", tmp_path).wait(timeout=300)
    for run in runs:
        file = tmp_path / f"{run.recipe}.safetensors"
        assert file.exists(), (tmp_path / "log").read_text()[-3000:]
        found, expected = load_file(file), moments_of_mean_loss(prepare(run, Accelerator()))
        assert max(float(tensor.abs().max()) for tensor in expected.values()) > 1e-2
        assert_close(found, expected, atol=1e-6, rtol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_a_stopped_run_goes_on_in_its_mode_and_in_one_process(options, tmp_path, mode):
    """SIGTERM in the second phase; then bit for bit in two processes, within rounding in one without a launcher."""
    settings = {"recipe": "sandwich", "phase_epochs": [1, 6], "dropout": 0.0, "micro_batch_size": 3}
    settings |= {"best_exit": "mean", "save_steps": 1000, "learning_rate": 1e-3}
    whole = options(**settings, output=str(tmp_path / "whole"))
    printed = train_in(mode, tmp_path, whole)
    assert Path(whole.output).exists(), printed[-3000:]

    again = options(**settings, output=str(tmp_path / "again"), resume=True)
    (tmp_path / "run.yaml").write_text(to_yaml(again))
    process = launch(mode, tmp_path, "-m", "finetune", "train", "--config", tmp_path / "run.yaml")
    metrics, deadline = tmp_path / "again.run" / "metrics.jsonl", time.monotonic() + 200
    while not (metrics.exists() and len(metrics.read_text().splitlines()) > 9):  # 6 updates and 1 dev a phase's epoch
        assert time.monotonic() < deadline and process.poll() is None, (tmp_path / "log").read_text()[-3000:]
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)  # the launcher passes it on
    process.wait(timeout=120)
    printed = (tmp_path / "log").read_text()
    assert "stopped at update" in printed and not Path(again.output).exists(), printed[-3000:]

    alone = options(**settings, output=str(tmp_path / "alone"), resume=True)
    shutil.copytree(tmp_path / "again.run", tmp_path / "alone.run")
    printed = train_in(mode, tmp_path, again)
    assert "resuming at update" in printed, printed[-3000:]
    assert_close(weights_of(again.output), weights_of(whole.output), atol=0, rtol=0)
    assert train(alone) == 0
    assert_close(weights_of(alone.output), weights_of(whole.output), atol=2e-4, rtol=1e-3)


@pytest.mark.slow
def test_a_model_is_pruned_and_distilled_in_two_processes_as_in_one(options, tiny_checkpoint, tmp_path):
    """The same parts are removed; losses are near, since means over tokens are taken in each micro-batch."""
    run = options(epochs=1, learning_rate=1e-3)
    names = ("train", "dev", "text", "label", "max_length", "batch_size", "epochs", "learning_rate")
    own = {name: getattr(run, name) for name in names} | {"share": 0.5, "rounds": 2, "micro_batch_size": 3}
    two, one = (
        PruneOptions(model=str(tiny_checkpoint), output=str(tmp_path / name), **own) for name in ("two", "one")
    )
    printed = train_in("ddp", tmp_path, two, command="prune")
    assert Path(two.output).exists(), printed[-3000:]
    assert prune(one) == 0
    kept = [json.loads((Path(each.output) / "pruning.json").read_text())["kept"] for each in (two, one)]
    assert kept[0] == kept[1] and [len(layer) for layer in kept[0]["heads"]] == [2] * 4
    logs = [(Path(each.output) / "metrics.jsonl").read_text().splitlines() for each in (two, one)]
    losses = [[line["loss"] for line in map(json.loads, log) if "loss" in line] for log in logs]
    assert losses[0] == pytest.approx(losses[1], rel=1e-2)
    assert weights_of(two.output).keys() == weights_of(one.output).keys()


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_a_stock_model_gets_exits_in_two_processes_as_in_one(small_task, tiny_tokenizer, tmp_path, mode):
    """Phases on a frozen backbone, then with lengths."""
    original = stock_model(tmp_path / "stock", tiny_tokenizer, "bert", "single_label_classification")
    lines = (small_task / "more.tsv").read_text().splitlines()[1:100]
    (tmp_path / "texts.txt").write_text("".join(line.split("\t")[0] + "\n" for line in lines))
    own = {
        "model": str(original),
        "texts": str(tmp_path / "texts.txt"),
        "max_length": 32,
        "batch_size": 24,
        "epochs": 1,
    }
    own |= {"dropout": 0.0, "train_backbone": True, "backbone_learning_rate": 1e-4}
    two, one = (ElastifyOptions(**own, output=str(tmp_path / name)) for name in ("two", "one"))
    printed = train_in(mode, tmp_path, two, command="elastify")
    assert Path(two.output).exists(), printed[-3000:]
    assert elastify(one) == 0
    assert_close(weights_of(two.output), weights_of(one.output), atol=2e-4, rtol=1e-3)
    found = [json.loads((Path(each.output) / "elastify.json").read_text())["exits"] for each in (two, one)]
    assert found[0].keys() == found[1].keys() == {"1", "2", "3"}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["ddp", "zero2"])
def test_bf16_trains_nearly_as_float32(options, tmp_path, mode):
    own = {"recipe": "sandwich", "dropout": 0.0, "epochs": 1, "log_steps": 1, "learning_rate": 1e-3}
    rough, exact = (options(**own, output=str(tmp_path / name), precision=name) for name in ("bf16", "no"))
    printed = train_in(mode, tmp_path, rough)
    assert Path(rough.output).exists(), printed[-3000:]
    assert train(exact) == 0
    logs = [(Path(each.output) / "metrics.jsonl").read_text().splitlines() for each in (rough, exact)]
    losses = [[line["loss"] for line in map(json.loads, log) if "loss" in line] for log in logs]
    assert losses[0] != losses[1] and losses[0] == pytest.approx(losses[1], rel=3e-2)
    assert {tensor.dtype for tensor in weights_of(rough.output).values()} == {torch.float32}


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["zero3", "fsdp2"])
def test_modes_that_spread_the_model_are_refused(options, tmp_path, mode):
    run = options()
    assert "not under ZeRO-3 or FSDP: every process evaluates with the whole model" in train_in(mode, tmp_path, run)
    assert not Path(run.output).exists() and not Path(f"{run.output}.run").exists()
