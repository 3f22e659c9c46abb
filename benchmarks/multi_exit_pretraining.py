"""Does pre-training with an exit at every layer help the exits of a fine-tuned model? ElasticBERT's claim, small.

Three bodies of all-MiniLM-L6-v2: as it is; pre-trained with the MLM+SOP loss of every exit; pre-trained with the last
exit's loss alone. The two pre-trainings run side by side, one thread each, on the same text in the same order; their
numbers of updates (`UPDATES`) are chosen so that both take the same time. Each body is then fine-tuned on SST-2 (5,000
training sentences) and MRPC with all exits and the same settings over several seeds, and measured at every exit on
the test split.

Every stage is made by the project's own commands, is kept when it is done and continues where it was interrupted:
`python -m benchmarks.multi_exit_pretraining` (about three hours on two cores) writes
`benchmarks/results/multi_exit_pretraining.json` and `.png`.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import matplotlib.pyplot as plt

from benchmarks.checkpoints import ROOT, minilm, python
from elastic_model import ElasticBertModel
from elastic_model.arguments import run
from elastic_model.folders import new_file, new_folder
from finetune.tasks import data_folder

RESULTS = ROOT / "benchmarks" / "results" / "multi_exit_pretraining.json"
TEXTS = ("text/imdb_train_reviews.txt.xz", "text/eltec_eng.txt.xz")
EVERY_EXIT, LAST_EXIT, START = "every_exit", "last_exit", "start"
LABELS = {
    START: "not pre-trained further",
    LAST_EXIT: "pre-trained with the last exit",
    EVERY_EXIT: "pre-trained with every exit",
}
# updates of the same time on one core: an update with exits in two groups costs 1.25 of one with the last exit alone
UPDATES = {EVERY_EXIT: 500, LAST_EXIT: 625}
PRETRAIN = {
    "max_length": 128,
    "short_probability": 0.0,
    "mask_probability": 0.15,
    "dropout": 0.0,  # a small part of one epoch: nothing is learned by heart
    "batch_size": 16,
    "learning_rate": 3e-4,
    "warmup_steps": 50,
    "validation_fraction": 0.01,
    "evaluation_examples": 512,
    "evaluate_every": 100_000,
    "save_every": 50,
    "workers": 0,
}
FINETUNE = {
    "sst2": {"train_rows": 5000, "max_length": 64, "epochs": 2},
    "mrpc": {"max_length": 128, "epochs": 2},
}
SHARED = {"recipe": "joint", "batch_size": 32, "learning_rate": 5e-5}


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of a command."""
    return [word for name, value in settings.items() for word in (f"--{name}", str(value))]


def pretrain(folder: Path) -> dict[str, Path]:
    """Both pre-trainings side by side, one thread each; -> the folder of each."""
    texts = [str(data_folder() / text) for text in TEXTS]
    folders = {name: folder / name for name in UPDATES}
    last = ["--exit_layers", str(ElasticBertModel.config_class.from_pretrained(minilm(folder)).num_hidden_layers)]
    common = ["--text", *texts, "--init_from", str(minilm(folder)), "--cache", str(folder / "cache"), *flags(PRETRAIN)]
    running = [
        subprocess.Popen(
            [sys.executable, "-m", "pretrain", *common, "--output", str(folders[name]), "--steps", str(steps)]
            + (last if name == LAST_EXIT else [])
            + ["--resume"],
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
        for name, steps in UPDATES.items()
    ]
    if codes := [process.returncode for process in running if process.wait()]:
        sys.exit(codes[0])
    return folders


def with_every_exit(source: Path, target: Path) -> Path:
    """The body of a model of one exit, its pooler at every exit: what a stock checkpoint becomes when it is loaded."""
    if not target.is_dir():
        model = ElasticBertModel.from_pretrained(source, exit_layers=None, num_output_layers=None)
        last = model.encoder.pooler.at(model.config.num_hidden_layers).state_dict()
        for layer in model.config.exit_layers:
            model.encoder.pooler.at(layer).load_state_dict(last)
        with new_folder(target) as temporary:
            model.save_pretrained(temporary)
            for file in source.glob("token*.json"):
                (temporary / file.name).write_bytes(file.read_bytes())
    return target


def finetune(folder: Path, bodies: dict[str, Path], seeds: list[int]) -> dict[str, Path]:
    """Every body fine-tuned on every task with every seed; -> "body/task/seed" -> the test split's curves."""
    curves = {}
    for seed in seeds:
        for task, settings in FINETUNE.items():
            for body, model in bodies.items():
                target = folder / "tasks" / f"{body}-{task}-{seed}"
                options = flags({**SHARED, **settings, "seed": seed})
                train = ["finetune", "train", "--task", task, "--model", str(model), *options]
                python(*train, "--output", str(target), "--resume")
                curve = target.with_name(f"{target.name}.test")
                if not curve.is_dir():
                    length = str(settings["max_length"])
                    options = ["--task", task, "--split", "test", "--max_length", length, "--output", str(curve)]
                    python("finetune", "evaluate", "--model", str(target), *options)
                curves[f"{body}/{task}/{seed}"] = curve / "curve.json"
    return curves


def evaluate(folder: Path, bodies: dict[str, Path]) -> dict[str, dict[str, Any]]:
    """MLM and SOP at every exit on held-out documents and WikiText-2, of the start (with new heads) and after."""
    held_out = ["--held_out", str(PRETRAIN["validation_fraction"]), "--examples", "512"]
    texts = {
        "held_out": [*(str(data_folder() / text) for text in TEXTS), *held_out],
        "wikitext2": [str(data_folder() / "wikitext2" / "test.txt"), "--examples", "512"],
    }
    results: dict[str, dict[str, Any]] = {}
    for body, model in bodies.items():
        for text, words in texts.items():
            file = folder / "evaluations" / f"{body}-{text}.json"
            if not file.is_file():
                file.parent.mkdir(exist_ok=True)
                options = ["--cache", str(folder / "cache"), "--output", str(file)]
                python("pretrain", "evaluate", "--model", str(model), "--text", *words, *options)
            results.setdefault(text, {})[body] = json.loads(file.read_text())
    return results


def accuracies(curves: dict[str, Path]) -> dict[str, dict[str, dict[str, list[float]]]]:
    """task -> body -> exit layer -> test accuracy in per cent, a number per seed."""
    collected: dict[str, dict[str, dict[str, list[float]]]] = {}
    for name, file in curves.items():
        body, task, _ = name.split("/")
        for layer, scores in json.loads(file.read_text())["exits"].items():
            accuracy = next(score["value"] for score in scores if score["metric"] == "accuracy")
            collected.setdefault(task, {}).setdefault(body, {}).setdefault(layer, []).append(100 * accuracy)
    return collected


def spread(values: list[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def report(results: dict[str, Any]) -> None:
    """Tables on the terminal, and the plot."""
    for text, by_body in results["pretraining"].items():
        print(f"\n{text}: MLM loss / SOP accuracy by exit")
        for body, one in by_body.items():
            cells = [f"{one['mlm_loss'][k]:.2f}/{100 * one['sop_accuracy'][k]:.0f} %" for k in one["mlm_loss"]]
            print(f"  {LABELS[body]:32} {'  '.join(cells)}")
    tasks = results["test_accuracy"]
    figure, axes = plt.subplots(1, len(tasks), figsize=(5.5 * len(tasks), 4), squeeze=False)
    for axis, (task, by_body) in zip(axes[0], tasks.items(), strict=True):
        print(f"\n{task}: test accuracy by exit, mean ± standard deviation of {len(results['seeds'])} seeds")
        for body, by_layer in by_body.items():
            print(f"  {LABELS[body]:32} {'  '.join(spread(values) for values in by_layer.values())}")
            layers, means = [int(layer) for layer in by_layer], [mean(values) for values in by_layer.values()]
            errors = [stdev(values) if len(values) > 1 else 0.0 for values in by_layer.values()]
            axis.errorbar(layers, means, errors, marker="o", capsize=3, label=LABELS[body])
        axis.set(title=task, xlabel="exit layer", ylabel="test accuracy, %")
        axis.grid(alpha=0.3)
    axes[0][0].legend()
    figure.tight_layout()
    figure.savefig(RESULTS.with_suffix(".png"), dpi=120)


def experiment() -> None:
    """All stages, each kept when it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "multi_exit", help="models and cache")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning")
    arguments = parser.parse_args()
    folder = arguments.folder.resolve()
    (folder / "tasks").mkdir(parents=True, exist_ok=True)
    pretrained = pretrain(folder)
    evaluated = {START: minilm(folder), **pretrained}
    last = pretrained[LAST_EXIT]
    bodies = {**evaluated, LAST_EXIT: with_every_exit(last, folder / "last_exit_body")}
    results = {
        "what": (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "updates": UPDATES,
        "pretrain": PRETRAIN,
        "finetune": {task: {**SHARED, **settings} for task, settings in FINETUNE.items()},
        "seeds": arguments.seeds,
        "pretraining": evaluate(folder, evaluated),
        "test_accuracy": accuracies(finetune(folder, bodies, arguments.seeds)),
    }
    with new_file(RESULTS) as temporary:
        temporary.write_text(json.dumps(results, indent=1) + "\n")
    report(results)


if __name__ == "__main__":
    sys.exit(run(experiment))
