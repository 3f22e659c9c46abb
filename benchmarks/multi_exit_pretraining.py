"""Does pre-training with an exit at every layer help the exits of a fine-tuned model? ElasticBERT's claim, small.

Three bodies of all-MiniLM-L6-v2: as it is; pre-trained with the MLM+SOP loss of every exit; pre-trained with the last
exit's loss alone. The two pre-trainings run side by side, one thread each, on the same text in the same order; their
numbers of updates (`UPDATES`) are chosen so that both take the same time. Each body is then fine-tuned on SST-2 (5,000
training sentences) and MRPC with all exits and the same settings (the learning rate was chosen on dev for the body as
it is) over several seeds, and measured at every exit on the test split: with exits that read [CLS], as the paper's do
and as they were pre-trained, and on SST-2 also with inner exits that read the mean of the tokens.

Every stage is made by the project's own commands, is kept when it is done and continues where it was interrupted:
`python -m benchmarks.multi_exit_pretraining` (about three and a half hours on two cores) writes
`benchmarks/results/multi_exit_pretraining.json` and `.png`.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from benchmarks.answers import answers, logits_of, read_split
from benchmarks.checkpoints import ROOT, minilm
from benchmarks.experiment import (
    LEARNING_RATE,
    Job,
    Size,
    checkpoint,
    fine_tuning,
    flags,
    provenance,
    run_chains,
    working,
)
from elastic_model import ElasticBertModel
from elastic_model.arguments import run
from elastic_model.folders import new_folder, write_json
from finetune.evaluate import scores
from finetune.figures import panels
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
SAID = {"cls": "exits read [CLS]", "mean": "inner exits read the mean of the tokens"}
RUNS = (("sst2", "cls"), ("mrpc", "cls"), ("sst2", "mean"))  # task, what inner exits read
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
SIZES = {"sst2": Size(5_000, 64, 2, tokens=13), "mrpc": Size(3_668, 128, 2, tokens=53)}


def pretraining(folder: Path) -> dict[str, Job]:
    """Both pre-trainings, from the same text in the same order."""
    texts = [str(data_folder() / text) for text in TEXTS]
    start = body(minilm(folder), folder, START, "cls")
    last = ["--exit_layers", str(ElasticBertModel.config_class.from_pretrained(start).num_hidden_layers)]
    common = ["--text", *texts, "--init_from", str(start), "--cache", str(folder / "cache"), *flags(PRETRAIN)]
    jobs = {}
    for name, steps in UPDATES.items():
        words = ["pretrain", *common, "--steps", str(steps), *(last if name == LAST_EXIT else [])]
        output = ["--output", str(folder / name), "--resume"]
        jobs[name] = Job(name, (*words, *output), (folder / name / "evaluation.json",), 0.0)
    return jobs


def body(source: Path, folder: Path, name: str, pooling: str) -> Path:
    """The body of a checkpoint with an exit at every layer; an exit that it lacks gets the pooler of its last one."""
    target = folder / f"{name}-{pooling}"
    if not target.is_dir():
        model, loading = ElasticBertModel.from_pretrained(
            source, exit_layers=None, num_output_layers=None, output_loading_info=True
        )
        layers = model.config.num_hidden_layers
        last = model.encoder.pooler.at(layers).state_dict()
        for layer in model.config.exit_layers:
            if f"encoder.pooler.{layer - 1}.dense.weight" in loading["missing_keys"]:
                model.encoder.pooler.at(layer).load_state_dict(last)
        model.config.exit_pooling = [pooling] * (layers - 1) + ["cls"]
        with new_folder(target) as temporary:
            model.save_pretrained(temporary)
            for file in source.glob("token*.json"):
                (temporary / file.name).write_bytes(file.read_bytes())
    return target


def fine_tunings(
    folder: Path, sources: dict[str, Path], seeds: Sequence[int]
) -> dict[tuple[str, str, str], list[Job]]:
    """{(task, pooling, body): a job a seed}"""
    jobs = {}
    for task, pooling in RUNS:
        for name, source in sources.items():
            start = {"recipe": "joint", "model": body(source, folder, name, pooling)}
            named = folder, "finetune train", f"{name}-{pooling}", task, SIZES[task]
            jobs[task, pooling, name] = [fine_tuning(*named, seed, **start) for seed in seeds]
    return jobs


def evaluations(folder: Path, sources: dict[str, Path]) -> dict[str, dict[str, Job]]:
    """MLM and SOP at every exit on held-out documents and WikiText-2, of the start (with new heads) and after."""
    held_out = ["--held_out", str(PRETRAIN["validation_fraction"]), "--examples", "512"]
    texts = {
        "held_out": [*(str(data_folder() / text) for text in TEXTS), *held_out],
        "wikitext2": [str(data_folder() / "wikitext2" / "test.txt"), "--examples", "512"],
    }
    jobs: dict[str, dict[str, Job]] = {text: {} for text in texts}
    for name, model in sources.items():
        for text, words in texts.items():
            file = folder / f"{name}-{text}.json"
            options = ["--cache", str(folder / "cache"), "--output", str(file)]
            command = ("pretrain", "evaluate", "--model", str(model), "--text", *words, *options)
            jobs[text][name] = Job(file.stem, command, (file,), 0.0)
    return jobs


def measured_of(job: Job) -> dict[str, Any]:
    """What an evaluation found, but for the place of the model on this machine."""
    found: dict[str, Any] = json.loads(job.outputs[0].read_text())
    return {name: value for name, value in found.items() if name != "model"}


def accuracy_by_exit(job: Job, task: str) -> list[float]:
    """Test accuracy in per cent at exits 1 .. n."""
    size = SIZES[task]
    split = read_split(checkpoint(job), task, "test", size.max_length, size.test_rows)
    logits = logits_of(job, "test", size)
    named = [
        {score.metric: score.value for score in scores(one, split.encoded, split.labels, seed=0)} for one in logits
    ]
    return [100 * one["accuracy"] for one in named]


def spread(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds."""
    return f"{mean(values):.1f} ± {stdev(values):.1f}" if len(values) > 1 else f"{values[0]:.1f}"


def report(results: dict[str, Any]) -> None:
    """Tables on the terminal, and the plot."""
    for text, by_body in results["pretraining"].items():
        print(f"\n{text}: MLM loss / SOP accuracy by exit")
        for body, one in by_body.items():
            cells = [f"{one['mlm_loss'][k]:.2f}/{100 * one['sop_accuracy'][k]:.0f} %" for k in one["mlm_loss"]]
            print(f"  {LABELS[body]:32} {'  '.join(cells)}")
    with panels(RESULTS.with_suffix(".png"), len(RUNS), size=(5, 4)) as axes:
        for axis, (task, pooling) in zip(axes[0], RUNS, strict=True):
            title = f"{task}, {SAID[pooling]}"
            print(f"\n{title}: test accuracy by exit, mean ± standard deviation of {len(results['seeds'])} seeds")
            for name, label in LABELS.items():
                by_layer = list(zip(*results["test_accuracy"][pooling][task][name], strict=True))
                print(f"  {label:32} {'  '.join(spread(values) for values in by_layer)}")
                layers, means = range(1, len(by_layer) + 1), [mean(values) for values in by_layer]
                errors = [stdev(values) if len(values) > 1 else 0.0 for values in by_layer]
                axis.errorbar(layers, means, errors, marker="o", capsize=3, label=label)
            axis.set(title=title, xlabel="exit layer", ylabel="test accuracy, %")


def experiment() -> None:
    """All stages, each kept when it is done."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "multi_exit", help="models and cache")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="of the fine-tuning")
    arguments = parser.parse_args()
    arguments.folder = arguments.folder.resolve()
    with working(arguments) as folder:
        carry_out = partial(run_chains, folder=folder, workers=2)
        pretrained = pretraining(folder)
        carry_out([[job] for job in pretrained.values()])
        sources = {START: minilm(folder), **{name: folder / name for name in pretrained}}
        measured = evaluations(folder, sources)
        carry_out([[job] for by_body in measured.values() for job in by_body.values()])
        tuned = fine_tunings(folder, sources, arguments.seeds)
        carry_out([[job, answers(job, one[0], "test", SIZES[one[0]])] for one, jobs in tuned.items() for job in jobs])
    tested: dict[str, Any] = {}
    for (task, pooling, name), jobs in tuned.items():
        tested.setdefault(pooling, {}).setdefault(task, {})[name] = [accuracy_by_exit(job, task) for job in jobs]
    results = {
        "what": (__doc__ or "").split("\n\n")[1].replace("\n", " "),
        "updates": UPDATES,
        "pretrain": PRETRAIN,
        "finetune": {"recipe": "joint", "learning_rate": LEARNING_RATE},
        "sizes": {task: provenance(size) for task, size in SIZES.items()},
        "seeds": arguments.seeds,
        "pretraining": {
            text: {name: measured_of(job) for name, job in by_body.items()} for text, by_body in measured.items()
        },
        "test_accuracy": tested,
    }
    write_json(RESULTS, results)
    report(results)


if __name__ == "__main__":
    sys.exit(run(experiment))
