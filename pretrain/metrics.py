"""What is measured while a model trains: losses and accuracies per exit, speed, model FLOPs utilisation, memory."""

import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from accelerate import Accelerator

from elastic_model import ElasticBertConfig
from elastic_model.cost import flops, modules

METRICS = "metrics.jsonl"
PER_EXIT = ("mlm_loss", "sop_loss", "mlm_accuracy", "sop_accuracy")

# dense bf16 TFLOPS of one device, from the makers' data sheets; a name that fits two rows is the upper one's
PEAK_TFLOPS = {
    r"\bB200\b": 2250,
    r"\bH200\b": 989,
    r"\bH100 PCIe\b": 756,
    r"\bH100\b": 989,
    r"\bA100\b": 312,
    r"\bL40S\b": 362,
    r"\bL4\b": 121,
    r"\bA10\b": 125,
    r"\bRTX 4090\b": 165,
}


def _mean(accelerator: Accelerator, values: torch.Tensor) -> torch.Tensor:
    """Over the processes."""
    return accelerator.reduce(values, "mean") if accelerator.num_processes > 1 else values


@dataclass
class Update:
    """What one update computed: exits, students, and (exits, 4) this process's part of what PER_EXIT names."""

    exits: list[int]
    students: list[dict[str, Any]]
    per_exit: torch.Tensor
    distillation: torch.Tensor | None  # a scalar, this process's part; None without students


@dataclass
class Window:
    """Sums over the updates since the last line of the log; per exit layer over those that computed it."""

    started: float = field(default_factory=time.perf_counter)
    tokens: int = 0
    pairs: int = 0
    flops: float = 0.0
    updates: int = 0
    distillation: torch.Tensor | None = None
    per_exit: dict[int, torch.Tensor] = field(default_factory=dict)  # layer -> (4,)
    updates_of: dict[int, int] = field(default_factory=dict)  # layer -> updates that computed its exit

    def add(self, update: Update, tokens: int, pairs: int, flops: float) -> None:
        """tokens, pairs (examples of two segments) and flops: of the global batch"""
        self.tokens += tokens
        self.pairs += pairs
        self.flops += flops
        self.updates += 1
        if update.distillation is not None:
            self.distillation = update.distillation + (0.0 if self.distillation is None else self.distillation)
        for layer, values in zip(update.exits, update.per_exit, strict=True):
            self.per_exit[layer] = self.per_exit.get(layer, 0) + values
            self.updates_of[layer] = self.updates_of.get(layer, 0) + 1

    def means(self, accelerator: Accelerator) -> dict[str, Any]:
        """PER_EXIT as {exit layer: mean over the updates}, with students distillation_loss; of all processes. Without
        a pair nothing is said of their order."""
        layers = sorted(self.per_exit)
        if not layers:
            return {name: {} for name in PER_EXIT}
        values = torch.stack([self.per_exit[layer] / self.updates_of[layer] for layer in layers])
        columns = zip(PER_EXIT, _mean(accelerator, values).T.tolist(), strict=True)
        means: dict[str, Any] = {name: dict(zip(layers, column, strict=True)) for name, column in columns}
        if not self.pairs:
            means |= {"sop_loss": {}, "sop_accuracy": {}}
        if self.distillation is not None:
            means["distillation_loss"] = float(_mean(accelerator, self.distillation / self.updates))
        return means

    def speed(self, peak_flops: float | None) -> dict[str, float | None]:
        """Real tokens and model FLOPs per second of all processes; peak_flops: what their devices could do."""
        seconds = time.perf_counter() - self.started
        return {
            "tokens_per_second": round(self.tokens / seconds, 1),
            "model_tflops_per_second": float(f"{self.flops / seconds / 1e12:.4g}"),
            "model_flops_utilisation": peak_flops and float(f"{self.flops / seconds / peak_flops:.4g}"),
        }


def update_flops(
    config: ElasticBertConfig,
    rows: int,
    tokens: float,
    masked: float,
    exits: list[int],
    students: Sequence[Mapping[str, Any]] = (),
) -> float:
    """Model FLOPs of an update: the forward pass of the exits and students it computes, and twice that for backward.

    rows, real tokens and masked tokens: of the global batch, each row counted as one of the mean length. What is
    computed again to save memory is not counted (Chowdhery et al. 2022, PaLM, appendix B).
    """
    length, predicted = max(1, round(tokens / rows)), max(1, round(masked / rows))
    head = flops(config, predicted, head="pretraining", asked=exits[-1:])
    head -= flops(config, predicted, head="none", asked=exits[-1:])
    forward = 0
    for subnetwork in ({}, *students):
        passed = modules(config, length, head="none", asked=exits, **subnetwork)
        forward += sum(module.flops for module in passed)
        forward += head * sum(module.name.startswith("exit") for module in passed)
    return 3.0 * rows * forward


def peak_flops(given_tflops: float | None, precision: str, processes: int) -> float | None:
    """What the devices of all processes could do: as given, or by the GPU's name in bf16; None where unknown."""
    tflops = given_tflops
    if tflops is None and precision == "bf16" and torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        tflops = next((value for known, value in PEAK_TFLOPS.items() if re.search(known, name)), None)
    return None if tflops is None else tflops * 1e12 * processes


def peak_memory() -> float:
    """GiB that this process held at most: of its GPU where there is one, else of main memory."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
