"""What an update of each recipe costs beside a plain joint one: time, in one run, on real sentences.

    ELASTIC_MODEL_DATA=... python -m benchmarks.finetune    # minutes; writes benchmarks/results/finetune.json

all-MiniLM-L6-v2 (6 x 384) on SST-2 train sentences. Every round times one update of each recipe on the same rows, in
turn, so that a disturbance meets all of them; a figure is the median over rounds of the ratio to the joint update of
its round. An update of the sandwich rule trains four sub-networks.
"""

import argparse
import os
import platform
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from benchmarks.checkpoints import ROOT, minilm
from elastic_model.arguments import run
from elastic_model.distributed import Engine
from elastic_model.folders import write_json
from finetune.config import TrainOptions
from finetune.run import TaskRun, prepare
from finetune.train import backward, engine_of

RESULTS = Path(__file__).parent / "results" / "finetune.json"
BAR = 3.4  # the sandwich rule's update / a joint one
PHASES = {"joint": ("joint", 0), "sandwich": ("sandwich", 1), "sandwich without LayerDrop": ("sandwich", 1)}
CHANGES: dict[str, dict[str, float]] = {"sandwich without LayerDrop": {"layer_drop": 0.0}}


def prepared(name: str, rows: int, batch_size: int, tokens: int) -> TaskRun:
    """A run of the recipe, in training mode."""
    options = TrainOptions(
        model=str(minilm(ROOT / "checkpoints")),
        task="sst2",
        output=str(Path(tempfile.gettempdir()) / "never-written"),
        recipe=PHASES[name][0],
        train_rows=rows,
        batch_size=batch_size,
        max_length=tokens,
        **CHANGES.get(name, {}),  # type: ignore[arg-type]
    )
    made = prepare(options, Accelerator())
    made.model.train()
    return made


def seconds(made: TaskRun, name: str, number: int, engine: Engine) -> float:
    """One update: its passes, clipping, the optimizer's step."""
    start = time.perf_counter()
    backward(made, made.phases[PHASES[name][1]], engine, number)
    engine.step(made.options.learning_rate)
    return time.perf_counter() - start


def benchmark() -> None:
    """Time the recipes in turn; print the ratios and write them."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--rounds", type=int, default=20, help="updates timed of each recipe (default: %(default)s)")
    parser.add_argument("--batch-size", type=int, default=32, help="rows of an update (default: %(default)s)")
    parser.add_argument("--max-length", type=int, default=64, help="tokens of a row, at most (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file to write (default: %(default)s)")
    arguments = parser.parse_args()
    rows = (arguments.rounds + 2) * arguments.batch_size
    runs = {name: prepared(name, rows, arguments.batch_size, arguments.max_length) for name in PHASES}
    engines = {name: engine_of(made) for name, made in runs.items()}
    times: dict[str, list[float]] = {name: [] for name in PHASES}
    for number in range(arguments.rounds + 2):
        for name, made in runs.items():
            spent = seconds(made, name, number, engines[name])
            if number >= 2:  # the first ones warm up
                times[name].append(spent)
    ratios = {
        name: [one / joint for one, joint in zip(spent, times["joint"], strict=True)] for name, spent in times.items()
    }
    report = {
        "what": "seconds of an update over those of a joint update on the same rows, median and quartiles over rounds",
        "model": "all-MiniLM-L6-v2, 6 x 384, an exit after every layer, float32",
        "rows": f"SST-2 train, batches of {arguments.batch_size}, at most {arguments.max_length} tokens",
        "rounds": arguments.rounds,
        "seconds": {name: round(statistics.median(spent), 4) for name, spent in times.items()},
        "ratios": {name: [round(one, 3) for one in statistics.quantiles(all_, n=4)] for name, all_ in ratios.items()},
        "bar": {"sandwich": BAR, "met": statistics.median(ratios["sandwich"]) <= BAR},
        "machine": {"processor": platform.processor() or platform.machine(), "cpus": os.cpu_count(),
                    "threads": torch.get_num_threads(), "torch": torch.__version__},
    }  # fmt: skip
    write_json(arguments.output, report)
    for name, (low, middle, high) in report["ratios"].items():  # type: ignore[attr-defined]
        print(f"{name:28} {middle:.2f} x a joint update ({low:.2f}-{high:.2f})")


if __name__ == "__main__":
    sys.exit(run(benchmark))
