"""Efficiency pipelines on real data: do operators commute, do their savings multiply, what do L and Q leave of time?

The experiment of Xin et al. (2022) from all-MiniLM-L6-v2: every order of D (6 to 3 layers), P (12 to 8 heads, 1536 to
768 FFN neurons) and E over several seeds, then L, Q and S on top, as `python -m finetune study` carries it out, seeds
side by side. Pruning in eight rounds is compared with pruning at once, right after it and after training. Times are
measured last, when nothing else of this runs: minutes, to be repeated with `--again` where the machine was not idle.

    ELASTIC_MODEL_DATA=... python -m benchmarks.pipelines [--tasks sst2] [--minutes 55] [--plan]

writes `benchmarks/results/pipelines.json` and, a task, two plots beside it. What was measured of a seed is kept in
`benchmarks/results/pipelines/`, which later runs of other seeds take as it is: the stages themselves may be gone.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from benchmarks.checkpoints import ROOT, minilm
from benchmarks.experiment import (
    OF_PAIRS,
    Chain,
    Job,
    Size,
    flags,
    parse,
    print_plan,
    provenance,
    record,
    row_flops,
    run_chains,
    working,
)
from elastic_model import ElasticBertConfig
from elastic_model.arguments import run
from elastic_model.folders import write_json
from elastic_model.provenance import read_provenance
from finetune.evaluate import table
from finetune.pipelines.estimate import read_parts
from finetune.pipelines.letters import name_of
from finetune.pipelines.pipeline import MEASURED
from finetune.pipelines.stages import RECORD
from finetune.pipelines.study import (
    RELATIVE,
    REPORT,
    RESULT,
    SMALLER,
    all_orders,
    expected_seconds,
    interval,
    stages_of,
    summarise,
)

SIZES = {"sst2": Size(5_000, 128, 2, tokens=13), "mrpc": Size(3_668, 128, 2, tokens=53, learning_rate=OF_PAIRS)}
SEEDS = (0, 1, 2)
ROUNDS = 8
IMPORTANCE_ROWS, OF_TRAIN = 500, 4  # in each round: so many rows, at most a quarter of train
PRUNED = {"heads": 8, "intermediate": 768, "multiple_of": 8}
# Xin et al. (2022), tables 1 and 2: RoBERTa-base, distances in points, shares of time in %
PUBLISHED: dict[str, dict[str, dict[str, tuple]]] = {
    "mrpc": {
        "table_1": {
            "D+E": ("1.57±0.69", "1.74±0.40"),
            "P+E": ("2.31±0.85", "4.12±1.10"),
            "D+P+E": ("1.53±0.62", "2.59±0.97"),
        },
        "table_2": {
            "O": (-0.2, 50, 83, 94),
            "D": (-0.4, 49, 82, 94),
            "P": (-2.2, 64, 86, 94),
            "DP": (-1.1, 62, 84, 94),
        },
    },
    "sst2": {
        "table_1": {
            "D+E": ("1.30±0.39", "1.48±0.46"),
            "P+E": ("1.64±0.46", "1.84±0.62"),
            "D+P+E": ("1.49±0.53", "1.98±0.82"),
        },
        "table_2": {
            "O": (-0.2, 50, 86, 97),
            "D": (0.0, 49, 86, 97),
            "P": (-0.8, 66, 89, 97),
            "DP": (-1.2, 65, 88, 97),
        },
    },
}
SAVED = {"sst2": {"LQ": 0.94, "ESLQ": 0.965}, "mrpc": {"LQ": 0.89, "ESLQ": 0.93}}  # of O's time, to be reached
TIME_ERROR, QUALITY_ERROR = 0.1, 0.01  # of estimates, medians, at most


@dataclass(frozen=True)
class Experiment:
    """One task: where its stages lie and the options of its study."""

    task: str
    size: Size
    folder: Path

    @property
    def options(self) -> dict[str, Any]:
        """What a training job of it is given."""
        own = {"task": self.task, "train_rows": self.size.rows, "max_length": self.size.max_length}
        return {**own, "epochs": self.size.epochs, "learning_rate": self.size.learning_rate}

    @property
    def rows_of_o(self) -> int:
        """O is fine-tuned on all rows of the task: smaller sizes are those of the stages after it."""
        return SIZES[self.task].rows

    @property
    def output(self) -> Path:
        """The folder of its study."""
        return self.folder / f"pipelines-{self.task}-{self.size.rows}x{self.size.epochs}"

    @property
    def pruned(self) -> dict[str, Any]:
        """What P leaves, and what it measures."""
        return {**PRUNED, "importance_rows": min(IMPORTANCE_ROWS, self.size.rows // OF_TRAIN)}

    def fine_tuned(self, seed: int) -> Path:
        """The folder of the model that the study of a seed begins with."""
        return self.folder / f"pipelines-{self.task}-O-{self.rows_of_o}x{self.size.epochs}" / f"seed-{seed}"

    def study(self, seed: int, **more: Any) -> list[str]:
        """`python -m` these words: the study of a seed."""
        own = {"model": self.fine_tuned(seed), "rounds": ROUNDS, "seeds": seed, "output": self.output}
        return ["finetune", "study", *flags({**self.options, **self.pruned, **own, **more})]

    def measured(self, results: Path, seed: int | str) -> Path:
        """The file with what was measured of a seed, beside the results."""
        return results.with_suffix("") / f"{self.output.name}-seed-{seed}.json"

    def stage(self, seed: int, name: str) -> Path:
        """The folder of a stage."""
        return self.output / f"seed-{seed}" / name

    def cut(self, seed: int, rounds: int, distill: bool) -> Path:
        """The folder of a pruned O."""
        if distill and rounds == ROUNDS:
            return self.stage(seed, "P")
        return self.stage(seed, f"pruned-{rounds}{'' if distill else '-not-trained'}")

    def chain(self, seed: int) -> Chain:
        """O and every stage of a seed; then its O pruned at once, and both ways without training."""
        stages = stages_of(all_orders())
        row = 3 * row_flops(self.size)  # a backward pass is two forward ones
        whole, measuring = row * self.size.rows * self.size.epochs, row * self.pruned["importance_rows"]
        total = sum(expected_seconds(stage, whole, ROUNDS * measuring) for stage in stages if "Q" not in stage)
        outputs = tuple(self.stage(seed, name_of(stage)) / RECORD for stage in stages)
        first, last = self.fine_tuned(seed), ElasticBertConfig.from_pretrained(minilm(self.folder)).num_hidden_layers
        own = {"model": minilm(self.folder), "train_rows": self.rows_of_o, "exit_layers": last}
        own |= {"gradient_equilibrium": "false", "seed": seed, "output": first}
        words = ("finetune", "train", *flags({**self.options, **own}), "--resume")
        jobs = [
            Job(f"{first.parent.name}-{seed}", words, (first,), row * self.rows_of_o * self.size.epochs),
            Job(f"{self.output.name}-{seed}", tuple(self.study(seed, measure="false")), outputs, total),
        ]
        for rounds, distill in ((1, True), (1, False), (ROUNDS, False)):
            output = self.cut(seed, rounds, distill)
            own = {"model": self.stage(seed, "O"), "rounds": rounds, "distill": str(distill).lower(), **self.pruned}
            own |= {"seed": seed, "gradient_equilibrium": "false", "exit_policy": "confidence", "output": output}
            words = ("finetune", "prune", *flags({**self.options, **own}), "--resume")
            cost = rounds * measuring * SMALLER["P"] + (whole * RELATIVE["P"] if distill else 0)
            jobs.append(Job(f"{self.output.name}-{seed}-{output.name}", words, (output,), cost))
        return jobs


def quality_of(folder: Path, metric: str) -> float:
    """A pruned model's quality on dev at full depth."""
    last = read_provenance(folder)[-1]
    found = [one for one in last.metrics if one.metric == metric and one.split == "dev"]
    return max(found, key=lambda one: one.exit_layer or 0).value


def pruning_of(one: Experiment, seed: int, metric: str) -> dict[str, dict[str, float]]:
    """Quality on dev, in points, after pruning at once and in rounds, by what follows."""
    return {
        name: {
            way: 100 * quality_of(one.cut(seed, rounds, distill), metric)
            for way, rounds in (("at_once", 1), ("in_rounds", ROUNDS))
        }
        for name, distill in (("not trained", False), ("trained", True))
    }


def pruning(found: Sequence[dict[str, dict[str, float]]]) -> dict[str, Any]:
    """Points that pruning in rounds is ahead of pruning at once, paired over seeds, by what follows."""
    result: dict[str, Any] = {}
    for name in found[0]:
        pairs = {way: [one[name][way] for one in found] for way in ("at_once", "in_rounds")}
        differences = [after - before for before, after in zip(*pairs.values(), strict=True)]
        result[name] = {**pairs, "difference": interval(differences)}
    return result


def bars(task: str, result: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What was to be reached, what was found, and whether it is enough."""
    found = {
        f"{name} saves of O's time": (result["against_O"][name]["saved"], bar) for name, bar in SAVED[task].items()
    }
    drop, published = result["table_2"]["O"]["relative_change_with_Q"], PUBLISHED[task]["table_2"]["O"][0] / 100
    found["relative change of quality by Q"] = (drop, published)
    found["pruning in rounds, points ahead of at once"] = (result["pruning"]["trained"]["difference"]["mean"], 0.0)
    least = {name: {"found": value, "at_least": bar, "met": value >= bar} for name, (value, bar) in found.items()}
    most = {
        f"error of estimates, {key}": {"found": result["cumulative"][key], "at_most": bar,
                                       "met": result["cumulative"][key] <= bar}
        for key, bar in (("time", TIME_ERROR), ("quality", QUALITY_ERROR))
    }  # fmt: skip
    return least | most


def measure(one: Experiment, seed: int, file: Path, again: bool) -> None:
    """Measure a seed, all its stages being there, on one thread and nothing beside it; keep what was found."""
    load = os.getloadavg()[0]
    command = [sys.executable, "-m", *one.study(seed, again=str(again).lower())]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True)
    content = json.loads((one.output / MEASURED).read_text())
    rows = json.loads((one.output / RESULT).read_text())["rows"]
    own = {"run": {**provenance(one.size), "load_before": load}, "rows": rows}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, {**content, **own, "pruning": pruning_of(one, seed, content["metric"])}, indent=None)


def combined(one: Experiment, files: Sequence[Path]) -> dict[str, Any]:
    """The study's tables and plots over all the seeds that were measured."""
    _, measured = read_parts([str(file) for file in files])
    contents = [json.loads(file.read_text()) for file in files]
    about = {"task": one.task, "rows": contents[0]["rows"], "padded_to": one.size.max_length}
    one.output.mkdir(parents=True, exist_ok=True)
    summarise(one.output, about, [found for seeds in measured.values() for found in seeds.values()])
    result: dict[str, Any] = json.loads((one.output / RESULT).read_text())
    result |= {"size": asdict(one.size), "rows_of_O": one.rows_of_o}
    result["pruning"] = pruning([content["pruning"] for content in contents])
    result["runs"] = {content["measurements"][0]["seed"]: content["run"] for content in contents}
    return {**result, "published": PUBLISHED[one.task], "bars": bars(one.task, result)}


def show(one: Experiment, result: dict[str, Any]) -> None:
    """The study's own report, the paper's figures, pruning, the bars."""
    published, metric = result["published"], result["metric"]
    seeds = ", ".join(map(str, result["seeds"]))
    print(f"\n{one.task}, O {one.rows_of_o:,} train rows, stages {one.size.words}, seeds {seeds}\n")
    print((one.output / REPORT).read_text())
    print("Xin et al. (2022), RoBERTa-base: distance of curves")
    print(
        table(
            ["operators", "same order", "different order"],
            [[name, *two] for name, two in published["table_1"].items()],
        )
    )
    print("\nXin et al. (2022): % of accuracy with Q, % of time saved")
    print(
        table(["pipeline", "with Q", "Q", "L", "QL"], [[name, *four] for name, four in published["table_2"].items()])
    )
    for name, pruned in result["pruning"].items():
        ahead = pruned["difference"]
        ends = f" ({ahead['low']:+.2f} to {ahead['high']:+.2f})" if "low" in ahead else ""
        print(f"\npruned in {ROUNDS} rounds against at once, {name}: {ahead['mean']:+.2f} points of {metric}{ends}")
    rows = []
    for name, bar in result["bars"].items():
        limit = f"at least {bar['at_least']:g}" if "at_least" in bar else f"at most {bar['at_most']:g}"
        rows.append([name, f"{bar['found']:.4f}", limit, "met" if bar["met"] else "missed"])
    print(f"\n{table(['', 'found', 'bar', ''], rows)}")


def experiment() -> None:
    """The stages of all tasks, then the measurements of each."""
    arguments = parse(
        __doc__, "pipelines", list(SIZES),
        lambda parser: parser.add_argument("--again", action="store_true", help="measure all times anew"),
    )  # fmt: skip
    given = {"rows": arguments.train_rows, "epochs": arguments.epochs}
    changed = {name: value for name, value in given.items() if value is not None}
    seeds = tuple(arguments.seeds or SEEDS)
    results = arguments.output
    with working(arguments) as folder:
        tasks = [Experiment(task, replace(SIZES[task], **changed), folder) for task in arguments.tasks]
        missing = [
            (one, seed)
            for one in tasks
            for seed in seeds
            if arguments.again or not one.measured(results, seed).is_file()
        ]
        chains = [one.chain(seed) for one, seed in missing]
        print_plan(chains, arguments.workers)
        if arguments.plan or not run_chains(chains, folder, arguments.workers, arguments.minutes):
            return
        for one, seed in missing:
            measure(one, seed, one.measured(results, seed), arguments.again)
        for one in tasks:
            files = one.measured(results, "*")
            found = combined(one, sorted(files.parent.glob(files.name)))
            record(results, __doc__, {one.task: found})
            for plot in ("curves", "estimates"):
                shutil.copyfile(one.output / f"{plot}.png", results.with_name(f"{results.stem}-{one.task}-{plot}.png"))
            show(one, found)


if __name__ == "__main__":
    sys.exit(run(experiment))
