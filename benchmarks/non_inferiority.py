"""Is the joint recipe's full depth worse than a stock classifier? Side by side, the same rows, updates and seeds.

A stock `BertForSequenceClassification` fine-tuned by transformers' `Trainer` and our model with an exit after every
layer start from all-MiniLM-L6-v2 and are measured on the test split. The difference is paired: both answer the same
rows after the same seeds. It is non-inferior where the lower end of the one-sided 95 % interval lies above minus the
margin. The stock SST-2 classifier is then given exits by `python -m finetune elastify`, without labels.

    ELASTIC_MODEL_DATA=... python -m benchmarks.non_inferiority [--tasks sst2] [--plan]

writes `benchmarks/results/non_inferiority.json` and `.png`.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np
from scipy import stats

from benchmarks.answers import answers, logits_of, read_split
from benchmarks.experiment import (
    Job,
    Size,
    checkpoint,
    fine_tuning,
    joint,
    make,
    parse,
    provenance,
    record,
    size_of,
    working,
)
from elastic_model.arguments import run
from elastic_model.folders import write_text
from finetune.elastify import RESULT, agreement
from finetune.examples import read_examples
from finetune.figures import drawn
from finetune.metrics import of_samples, paired_bootstrap
from finetune.prepare import some_rows
from finetune.tasks import find_task

MARGINS = {"sst2": 0.7, "mrpc": 1.5, "stsb": 1.5, "sick": 0.7}  # points
SEEDS = (0, 1, 2)
SAMPLES = 2000  # of the bootstrap
ELASTIFIED = "sst2"


def lower_bound_over_seeds(differences: Sequence[float]) -> float | None:
    """The lower end of the one-sided 95 % t interval of a mean of paired differences; None for a single one."""
    if len(differences) < 2:
        return None
    count = len(differences)
    return mean(differences) - float(stats.t.ppf(0.95, count - 1)) * stdev(differences) / count**0.5


def jobs_of(folder: Path, task: str, size: Size, seed: int) -> dict[str, list[Job]]:
    """Both sides, each trained and then asked."""
    ours = joint(folder, task, size, seed)
    theirs = fine_tuning(folder, "benchmarks.stock", "stock", task, size, seed)
    return {"joint": [ours, answers(ours, task, "test", size)], "stock": [theirs, answers(theirs, task, "test", size)]}


def compare(task: str, size: Size, sides: dict[str, list[Job]]) -> dict[str, Any]:
    """Quality of both sides by seed, and the paired difference, in points; {side: its training jobs}."""
    split = read_split(checkpoint(sides["joint"][0]), task, "test", size.max_length, size.test_rows)
    given = {side: [split.answers(logits_of(job, "test", size)[-1]) for job in jobs] for side, jobs in sides.items()}
    name, labels = split.labels.metrics[0], split.encoded.labels
    value, once = of_samples(name), np.ones((1, len(labels)))
    points = {side: [100 * float(value(one, labels, once)[0]) for one in answered] for side, answered in given.items()}
    differences = [one - other for one, other in zip(points["joint"], points["stock"], strict=True)]
    drawn = 100 * paired_bootstrap(name, given["joint"], given["stock"], labels, SAMPLES)
    low = float(np.quantile(drawn, 0.05))
    return {
        "metric": name,
        "test_rows": len(labels),
        **points,
        "difference": mean(differences),
        "differences": differences,
        "margin": MARGINS[task],
        "lower_bound": low,
        "lower_bound_over_seeds": lower_bound_over_seeds(differences),
        "non_inferior": low > -MARGINS[task],
    }


def elastify_jobs(folder: Path, stock: Job, size: Size, seed: int) -> list[Job]:
    """Exits for the stock classifier, from the sentences alone; then its answers to the test split."""
    texts = {split: folder / f"{ELASTIFIED}-{split}-{size.rows}.txt" for split in ("train", "dev")}
    for split, file in texts.items():
        rows = some_rows(read_examples(find_task(ELASTIFIED), split), size.rows, 0)
        write_text(file, "\n".join(rows.texts) + "\n")
    output = checkpoint(stock).with_name(f"{stock.name}-elastified")
    words = ["finetune", "elastify", str(checkpoint(stock)), "--texts", str(texts["train"])]
    words += ["--dev", str(texts["dev"]), "--max_length", str(size.max_length), "--epochs", str(size.epochs)]
    words += ["--seed", str(seed), "--output", str(output), "--resume"]
    made = Job(output.name, tuple(words), (output,), stock.flops / 2)
    return [made, answers(made, ELASTIFIED, "test", size)]


def elastified(stock: Job, made: Job, size: Size) -> dict[str, Any]:
    """Agreement of every exit with the original on the test split, and how far the last one's logits are from it."""
    reference = logits_of(stock, "test", size)[-1]
    logits = logits_of(made, "test", size)
    exits = {
        layer: agreement(list(one), list(reference), "single_label_classification", seed=0)
        for layer, one in enumerate(logits, start=1)
    }
    difference = float(np.abs(logits[-1] - reference).max())
    held_out = json.loads((checkpoint(made) / RESULT).read_text())["exits"]
    return {"size": size.words, "largest_difference": difference, "equal": difference <= 1e-5,
            "agreement_on_test": exits, "agreement_on_dev": held_out}  # fmt: skip


def plot(results: dict[str, Any], image: Path) -> None:
    """The difference with its one-sided bound, beside the margin, a line a task."""
    with drawn(image, (7, 1.2 + 0.6 * len(results))) as axes:
        for place, one in enumerate(results.values()):
            axes.plot([one["lower_bound"], one["difference"]], [place, place], color="C0")
            axes.plot(one["differences"], [place] * len(one["differences"]), "o", color="C0", alpha=0.4)
            axes.plot(one["difference"], place, "D", color="C0")
            axes.plot([-one["margin"]] * 2, [place - 0.3, place + 0.3], color="C3")
        axes.axvline(0, color="0.7")
        names = [f"{task}, {len(one['differences'])} seeds" for task, one in results.items()]
        axes.set(yticks=range(len(names)), yticklabels=names, ylim=(-0.6, len(names) - 0.4),
                 xlabel="joint - stock, points (line: to the one-sided 95 % bound; red: the margin)")  # fmt: skip


def show(results: dict[str, Any]) -> None:
    """The comparison side by side."""
    for task, one in results.items():
        sides = "  ".join(
            f"{side} {mean(one[side]):.2f} ({', '.join(f'{value:.2f}' for value in one[side])})"
            for side in ("joint", "stock")
        )
        verdict = "non-inferior" if one["non_inferior"] else "non-inferiority not shown"
        print(f"{task}, {one['metric']}, {one['test_rows']} test rows, {one['size']['rows']} train rows: {sides}")
        ends = f"lower bound {one['lower_bound']:+.2f}, margin -{one['margin']}"
        print(f"  difference {one['difference']:+.2f}, {ends}: {verdict}")
        if "elastify" in one:
            found = one["elastify"]
            by_exit = "  ".join(
                f"{layer}: {100 * exit_['agreement']:.1f} %" for layer, exit_ in found["agreement_on_test"].items()
            )
            print(f"  elastify: last exit {found['largest_difference']:.1e} from the original; agreement {by_exit}")


def experiment() -> None:
    """Task by task; the results of a task are kept when it is done."""
    arguments = parse(__doc__, "non_inferiority", list(MARGINS))
    seeds = arguments.seeds or list(SEEDS)
    with working(arguments) as folder:
        sizes = {task: size_of(task, arguments) for task in arguments.tasks}
        pairs = {task: [jobs_of(folder, task, sizes[task], seed) for seed in seeds] for task in sizes}
        if ELASTIFIED in pairs:
            stock = pairs[ELASTIFIED][0]["stock"]
            stock += elastify_jobs(folder, stock[0], sizes[ELASTIFIED], seeds[0])
        for task, pair in pairs.items():
            chains = [chain for sides in pair for chain in sides.values()]
            if not make(task, sizes[task], chains, arguments):
                continue
            found = compare(task, sizes[task], {side: [one[side][0] for one in pair] for side in ("joint", "stock")})
            if task == ELASTIFIED:
                found["elastify"] = elastified(pair[0]["stock"][0], pair[0]["stock"][2], sizes[task])
            found = {"seeds": seeds, **provenance(sizes[task]), **found}
            results = record(arguments.output, __doc__, {task: found})["tasks"]
            plot(results, arguments.output.with_suffix(".png"))
            show({task: results[task]})


if __name__ == "__main__":
    sys.exit(run(experiment))
