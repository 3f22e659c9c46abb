"""`make gpu-check`: what this machine's GPU does with pre-training, in ten minutes at most.

    python -m benchmarks.gpu_check        # writes benchmarks/results/gpu_check.json

Every section's result is kept as soon as it exists; what did not fit into the time, or failed, is done by the next
call. Steps are forward, backward, clipping and AdamW on random tokens, 15 % of them to predict; the last sections run
the pre-training command itself under FSDP2 and ZeRO in one process, with a checkpoint and a resumption.
`--device cpu --size tiny --output FILE` is for the tests of this script: it says nothing of a GPU, and says so.
"""

import argparse
import importlib.util
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch

from elastic_model import ElasticBertConfig, ElasticBertForPreTraining
from elastic_model.arguments import run
from elastic_model.folders import write_json
from elastic_model.losses import exit_group
from pretrain.metrics import peak_flops, update_flops

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "gpu_check.json"
MODES = ("fsdp2", "zero1", "zero2", "zero3")
# rows x tokens of a step, and the model of each size
SIZES: dict[str, dict[str, Any]] = {
    "base": {
        "shape": (128, 128),
        "model": {},
        "flags": {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "batch_size": 128},
    },
    "tiny": {
        "shape": (4, 16),
        "model": {
            "hidden_size": 16,
            "num_hidden_layers": 12,
            "num_attention_heads": 2,
            "intermediate_size": 32,
            "vocab_size": 200,
        },
        "flags": {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "batch_size": 4},
    },
}


class Check:
    """The machine, the size, and the sections measured so far."""

    def __init__(self, options: argparse.Namespace):
        self.options = options
        self.device = torch.device(options.device)
        self.deadline = time.monotonic() + 60 * options.minutes
        self.rows, self.tokens = SIZES[options.size]["shape"]
        self.about = {
            "device": self.device.type,
            "name": torch.cuda.get_device_name() if self.device.type == "cuda" else platform.machine(),
            "size": options.size,
            "rows": self.rows,
            "tokens": self.tokens,
            "precision": "bf16",
            "torch": torch.__version__,
            "proves_a_gpu_works": self.device.type == "cuda",
        }
        known = json.loads(options.output.read_text()) if options.output.is_file() else {"about": self.about}
        if known["about"] != self.about:
            raise ValueError(
                f"{options.output} was measured on something else ({known['about']}, now {self.about}); "
                "choose another --output, or delete it"
            )
        self.sections: dict[str, dict[str, Any]] = known.get("sections", {})

    def do(self, name: str, measure: Callable[[], dict[str, Any]]) -> None:
        """One section, unless it is there already or the time is up; a failure is kept and tried again next time."""
        if name in self.sections and "error" not in self.sections[name]:
            return
        if time.monotonic() > self.deadline:
            print(f"{name}: left for the next call, the {self.options.minutes} minutes are up")
            return
        try:
            self.sections[name] = measure()
        except Exception as error:  # one section that does not work here must not lose the others
            self.sections[name] = {"error": f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"}
        print(f"{name}: {json.dumps(self.sections[name])}", flush=True)
        self.options.output.parent.mkdir(parents=True, exist_ok=True)
        write_json(self.options.output, {"about": self.about, "sections": self.sections})

    def model(self, attention: str = "sdpa") -> ElasticBertForPreTraining:
        """The same random model every time."""
        torch.manual_seed(0)
        config = ElasticBertConfig(**SIZES[self.options.size]["model"], attn_implementation=attention)
        return ElasticBertForPreTraining(config).to(self.device).train()

    def batch(self, vocabulary: int) -> dict[str, torch.Tensor]:
        """Random tokens, no padding, 15 % of them labelled."""
        generator = torch.Generator().manual_seed(0)
        ids = torch.randint(5, vocabulary, (self.rows, self.tokens), generator=generator)
        masked = torch.rand(ids.shape, generator=generator) < 0.15
        masked[:, 1] = True
        batch = {
            "input_ids": ids,
            "labels": ids.masked_fill(~masked, -100),
            "sentence_order_label": torch.randint(0, 2, (self.rows,), generator=generator),
        }
        return {name: tensor.to(self.device) for name, tensor in batch.items()}

    def steps(self, groups: list[list[int]], attention: str = "sdpa", compiled: bool = False) -> dict[str, Any]:
        """Milliseconds of a training step, averaged over `groups` of exits; tokens/s, MFU and peak memory."""
        model = self.model(attention)
        config, batch = model.config, self.batch(model.config.vocab_size)
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
        called = torch.compile(model) if compiled else model

        def step(exits: list[int]) -> None:
            reduced = torch.autocast(self.device.type, torch.bfloat16) if self.device.type == "cuda" else nullcontext()
            with reduced:
                loss = called(**batch, exits=exits).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            self.wait()

        for _ in range(3):
            for exits in groups:
                step(exits)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times = []
        for _ in range(self.options.rounds):
            began = time.perf_counter()
            for exits in groups:
                step(exits)
            times.append((time.perf_counter() - began) / len(groups))
        seconds, masked = statistics.median(times), float((batch["labels"] != -100).sum())
        sizes = (config, self.rows, self.rows * self.tokens, masked)
        flops = statistics.mean(update_flops(*sizes, exits) for exits in groups)
        peak = peak_flops(None, "bf16", 1)
        return {
            "exits": groups,
            "step_ms": round(1000 * seconds, 3),
            "tokens_per_second": round(self.rows * self.tokens / seconds),
            "model_tflops_per_second": round(flops / seconds / 1e12, 3),
            "model_flops_utilisation": None if peak is None else round(flops / seconds / peak, 4),
            "peak_memory_gib": self.peak_memory(),
        }

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def peak_memory(self) -> float | None:
        return round(torch.cuda.max_memory_allocated() / 2**30, 3) if self.device.type == "cuda" else None

    def launched(self, mode: str) -> dict[str, Any]:
        """The pre-training command in one process under `mode`: trained, then resumed from its first checkpoint."""
        with tempfile.TemporaryDirectory() as name:
            output = Path(name) / "run"
            seconds = self._pretrain(mode, Path(name), output)
            lines = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
            whole = (output / "model.safetensors").read_bytes()
            shutil.rmtree(output / "checkpoint-8")  # as if the run had been killed after the first checkpoint
            for file in ("model.safetensors", "config.json", "evaluation.json"):
                (output / file).unlink()
            self._pretrain(mode, Path(name), output)
            last = [line for line in lines if "mlm_loss" in line][-1]
            return {
                "seconds_with_start": round(seconds, 1),
                "tokens_per_second": last["tokens_per_second"],
                "mlm_loss": last["mlm_loss"],
                "resumed": True,
                "resumed_to_the_same_bytes": (output / "model.safetensors").read_bytes() == whole,
            }

    def _pretrain(self, mode: str, folder: Path, output: Path) -> float:
        flags = SIZES[self.options.size]["flags"] | {
            **{"text": "pretrain/data/state_of_the_union.txt.xz", "output": output, "cache": folder / "cache"},
            **{"vocab_size": 4000, "max_length": 64, "max_position_embeddings": 64, "steps": 8, "warmup_steps": 2},
            **{"log_every": 2, "save_every": 4, "evaluation_examples": 16, "resume": True},
            "precision": "bf16" if self.device.type == "cuda" else "no",
        }
        argv = [part for flag, value in flags.items() for part in (f"--{flag}", str(value))]
        launch = [
            sys.executable,
            "-m",
            "accelerate.commands.launch",
            "--num_processes",
            "1",
            "--main_process_port",
            "0",
        ]
        config = ["--config_file", f"pretrain/accelerate/{mode}.yaml"]
        began = time.perf_counter()
        done = subprocess.run(
            [*launch, *config, "-m", "pretrain", *argv], cwd=ROOT, env=dict(os.environ), capture_output=True, text=True
        )
        if not (output / "evaluation.json").is_file():
            errors = [line for line in done.stderr.splitlines() if "rror" in line]
            raise RuntimeError((errors or done.stderr.splitlines() or ["no message"])[0])
        return time.perf_counter() - began


def sections(check: Check) -> dict[str, Callable[[], dict[str, Any]]]:
    """Name -> what measures it, in the order in which they are done."""
    layers = list(range(1, 13))
    exits = {
        "1 exit": [[12]],
        "6 exits": [layers[1::2]],
        "12 exits": [layers],
        "12 exits, 2 groups": [exit_group(layers, 2, group) for group in range(2)],
        "12 exits, 3 groups": [exit_group(layers, 3, group) for group in range(3)],
    }
    found: dict[str, Callable[[], dict[str, Any]]] = {
        name: lambda groups=groups: check.steps(groups) for name, groups in exits.items()
    }
    found |= {mode: lambda mode=mode: check.launched(mode) for mode in MODES}
    found["torch.compile, 12 exits"] = lambda: check.steps([layers], compiled=True)
    found["eager attention, 12 exits"] = lambda: check.steps([layers], "eager")
    if importlib.util.find_spec("flash_attn"):
        found["flash attention 2, 12 exits"] = lambda: check.steps([layers], "flash_attention_2")
    return found


def gpu_check() -> int:
    """Every section that is not there yet; -> 0 once all are there and none failed, else 1."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: to test this script")
    parser.add_argument("--size", choices=SIZES, default="base", help="of the model (default: %(default)s)")
    parser.add_argument("--only", nargs="*", metavar="SECTION", help="these sections (default: all)")
    parser.add_argument("--rounds", type=int, default=20, help="timed steps (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=9, help="no section begins after (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="result (default: %(default)s)")
    options = parser.parse_args()
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ValueError(
            "no GPU was found (torch.cuda.is_available() is False): nothing was measured and nothing written; "
            f"torch is {torch.__version__}, a build with +cpu knows no GPU"
        )
    if options.device == "cpu" and options.output == RESULTS:
        raise ValueError("--device cpu tests this script and says nothing of a GPU: give its result another --output")
    check = Check(options)
    wanted = sections(check)
    if unknown := set(options.only or ()) - wanted.keys():
        raise ValueError(f"--only: no section {sorted(unknown)[0]!r}; there are {', '.join(wanted)}")
    for name in options.only or wanted:
        check.do(name, wanted[name])
    complete = all("error" not in check.sections.get(name, {"error": ""}) for name in options.only or wanted)
    return 0 if complete else 1


if __name__ == "__main__":
    sys.exit(run(gpu_check))
