"""What grouped training and gradient equilibrium cost and bring: ElasticBERT's ablation, on the tiny recipe.

Four runs of the same seed, data and updates: with and without each of the two. About ten minutes on two cores that do
nothing else; `python -m benchmarks.pretraining_ablation` writes `benchmarks/results/pretraining_ablation.json`:
seconds per update, held-out losses of every exit. Finished runs are kept, interrupted ones continue.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import ROOT, python
from elastic_model.arguments import run
from elastic_model.folders import write_json

RESULTS = ROOT / "benchmarks" / "results" / "pretraining_ablation.json"
SETTINGS = {
    "two groups, equilibrium": (2, True),
    "two groups": (2, False),
    "one group, equilibrium": (1, True),
    "one group": (1, False),
}


def measure(folder: Path, steps: int) -> dict[str, Any]:
    """Of a finished run: seconds per update, and how well each exit does on held-out documents."""
    evaluation = json.loads((folder / "evaluation.json").read_text())
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    updates = [line for line in lines if "tokens_per_second" in line]
    seconds = updates[-1]["tokens"] / steps / (sum(line["tokens_per_second"] for line in updates) / len(updates))
    names = ("mlm_loss", "mlm_accuracy", "sop_accuracy")
    return {"seconds_per_update": round(seconds, 4), **{name: evaluation[name] for name in names}}


def ablation() -> None:
    """All four runs, one after another."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "pretraining_ablation", help="the runs")
    parser.add_argument("--steps", type=int, default=600, help="updates of each run (default: %(default)s)")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    results: dict[str, Any] = {}
    for name, (groups, equilibrium) in SETTINGS.items():
        output = folder / name.replace(", ", "-").replace(" ", "_")
        flags = ["--exit_groups", str(groups), "--gradient_equilibrium", str(equilibrium).lower()]
        flags += ["--steps", str(arguments.steps), "--evaluate_every", "100000", "--output", str(output), "--resume"]
        python("pretrain", "--config", "pretrain/recipes/tiny.yaml", *flags)
        results[name] = measure(output, arguments.steps)
        losses = "  ".join(f"{loss:.3f}" for loss in results[name]["mlm_loss"].values())
        print(f"{name:26} {results[name]['seconds_per_update']:.3f} s per update; held-out MLM by exit: {losses}")
    record = {"recipe": "pretrain/recipes/tiny.yaml", "updates": arguments.steps, "runs": results}
    write_json(RESULTS, record)


if __name__ == "__main__":
    sys.exit(run(ablation))
