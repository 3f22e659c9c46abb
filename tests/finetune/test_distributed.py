"""Several backward passes an update, in two real processes: the gradient is that of one process and of the mean loss.

Under plain gradient descent what an update changes is its gradient: the same weights after some updates, the same
gradients in each. Processes are judged by the files they leave: gloo may abort when everything is done.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from elastic_model.arguments import to_yaml

ROOT = Path(__file__).resolve().parents[2]
CONFIGS = ROOT / "pretrain" / "accelerate"
RECIPES = {
    "alternating": {"exit_groups": 2},
    "learned": {},
    "self_distillation": {},
    "sandwich": {"exit_groups": 2, "phase_epochs": [1, 2]},
}


def command(run, mode, folder, *more):
    """`python -m finetune train` as a user starts it, in one process or with a shipped config in two."""
    file = folder / f"{Path(run.output).name}.yaml"
    file.write_text(to_yaml(run))
    launcher = []
    if mode != "one":
        launcher = ["-m", "accelerate.commands.launch", "--config_file", CONFIGS / f"{mode}.yaml"]
        launcher += ["--num_processes", 2, "--main_process_port", 0]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    argv = [sys.executable, *launcher, "-m", "finetune", "train", "--config", file, *more]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    return done.stdout + done.stderr


def outcome(output):
    """Weights, and the losses by update, of a run that is finished."""
    log = [json.loads(line) for line in (Path(output) / "metrics.jsonl").read_text().splitlines()]
    return load_file(Path(output) / "model.safetensors"), {
        line["update"]: line["learning_rate"] for line in log if "loss" in line
    }


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("mode", ["ddp", "zero1", "zero2"])
def test_two_processes_train_as_one(options, tmp_path, recipe, mode):
    if mode != "ddp":
        pytest.importorskip("deepspeed")
    settings = {"recipe": recipe, "micro_batch_size": 3, "epochs": 2, "dropout": 0.0, "best_exit": "mean"}
    settings |= {"eval_steps": 1000, "learning_rate": 1e-3, "save_steps": 1000, **RECIPES[recipe]}
    found = {}
    for where in ("one", mode):
        run = options(**settings, output=str(tmp_path / where))
        printed = command(run, where, tmp_path)
        assert (tmp_path / where / "model.safetensors").is_file(), printed[-3000:]
        found[where] = outcome(run.output)
    (one, rates), (two, others) = found["one"], found[mode]
    assert rates == others and one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(
            two[name], tensor, atol=2e-4, rtol=1e-3, msg=lambda text, name=name: f"{name}: {text}"
        )
