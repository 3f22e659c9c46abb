"""What exits give: quality by exit for static use, under entropy and patience policies, and recipe against recipe.

From all-MiniLM-L6-v2 with an exit after every layer, on SST-2, MRPC and STS-B (of the slides of ElasticBERT, Liu et
al. 2022). Thresholds are chosen on dev (the loosest that costs at most a point there), everything reported is test.
The joint recipe runs over all seeds, the other recipes over `--recipe-seeds` (SST-2 unless told otherwise); their
curves of quality against mean exit layer are compared by the area under them, over the layers that all of them reach.

    ELASTIC_MODEL_DATA=... python -m benchmarks.exits [--tasks mrpc] [--plan]

writes `benchmarks/results/exits.json` and `.png`.
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import numpy as np

from benchmarks.answers import Split, answers, logits_of, read_split
from benchmarks.experiment import (
    FROZEN,
    SANDWICH,
    Chain,
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
from finetune.evaluate import outcome, scores, spread
from finetune.figures import panels
from finetune.policies import Policy, candidates, choose

SEEDS = {"sst2": [0], "mrpc": [0, 1, 2], "stsb": [0, 1, 2]}
RECIPE_SEEDS = {"sst2": [0]}  # the others would take an hour each
PERMITTED = 0.01  # of the deciding metric on dev
POINTS = 20  # of a curve
Curve = Sequence[tuple[float, float]]  # (mean exit layer, quality)


def curve_area(points: Curve, low: float, high: float) -> float:
    """Mean quality over mean exit layers from `low` to `high`, linear between the points."""
    layers, quality = np.array(sorted(points)).T
    grid = np.unique(np.concatenate([[low, high], layers[(layers > low) & (layers < high)]]))
    values = np.interp(grid, layers, quality)
    return float(np.sum((values[1:] + values[:-1]) / 2 * np.diff(grid)) / (high - low))


def common_range(curves: Iterable[Curve]) -> tuple[float, float]:
    """The mean exit layers that all curves reach."""
    ends = [(min(layer for layer, _ in curve), max(layer for layer, _ in curve)) for curve in curves]
    return max(low for low, _ in ends), min(high for _, high in ends)


def chains_of(folder: Path, task: str, size: Size, seed: int) -> tuple[list[Chain], dict[str, Job]]:
    """The chains that make every recipe's checkpoint and its answers, and {recipe: its training job}.

    A phase that two recipes begin with is trained once: the last exit of two_stage and self_distillation, and the
    joint one that sandwich goes on from.
    """
    tune = partial(
        fine_tuning, folder, "finetune train", task=task, size=size, seed=seed, exit_loss=size.exit_loss
    )  # fmt: skip
    all_exits, last = joint(folder, task, size, seed), tune("last", recipe="two_stage", phase_epochs=[size.epochs, 0])
    made = {"joint": all_exits, "alternating": tune("alternating", recipe="alternating")}
    for recipe, before, cost in (
        ("two_stage", last, FROZEN),
        ("self_distillation", last, FROZEN),
        ("sandwich", all_exits, SANDWICH),
    ):
        goes_on = {"model": checkpoint(before), "phase_epochs": [0, size.epochs]}
        made[recipe] = tune(recipe, cost=cost, recipe=recipe, **goes_on)
    asked = {
        recipe: [job, *(answers(job, task, one, size) for one in ("dev", "test"))] for recipe, job in made.items()
    }
    chains = [
        [*asked["joint"], *asked["sandwich"]],
        [last, *asked["two_stage"], *asked["self_distillation"]],
        asked["alternating"],
    ]
    return chains, made


class Asked:
    """A checkpoint's answers on dev and test, and what exit policies make of them."""

    def __init__(self, job: Job, task: str, size: Size) -> None:
        splits = ("dev", "test")
        rows = {"dev": None, "test": size.test_rows}
        self.split: dict[str, Split] = {
            name: read_split(checkpoint(job), task, name, size.max_length, rows[name]) for name in splits
        }
        self.logits = {name: logits_of(job, name, size) for name in splits}
        self.metric = self.split["test"].labels.metrics[0]

    def static(self) -> dict[int, dict[str, Any]]:
        """Test quality of every exit with its interval, and the FLOPs of a model that ends there."""
        split = self.split["test"]
        found = {}
        for layer, logits in enumerate(self.logits["test"], start=1):
            score = scores(logits, split.encoded, split.labels, seed=0)[0]
            cost = split.flops(layers=[layer] * len(split.encoded))
            found[layer] = {"quality": score.value, "low": score.low, "high": score.high, "flops": cost}
        return found

    def _outcome(self, policy: Policy | None, name: str) -> Any:
        split, logits = self.split[name], self.logits[name]
        return outcome(policy, logits, list(range(1, len(logits) + 1)), split.encoded, split.labels)

    def _point(self, policy: Policy | None) -> dict[str, Any]:
        one = self._outcome(policy, "test")
        cost = self.split["test"].flops(layers=one.left_at.tolist())
        return {
            "policy": policy,
            "mean_exit_layer": one.mean_exit_layer,
            "quality": one.quality[self.metric],
            "flops": cost,
        }

    def policy(self, name: str) -> dict[str, Any]:
        """Test quality over settings spread over dev's sweep, and at the setting that dev permits."""
        kind = self.split["dev"].labels.problem_type
        swept = [self._outcome(one, "dev") for one in candidates(name, self.logits["dev"], kind)]
        full = self._outcome(None, "dev").quality[self.metric]
        best = choose([one.quality[self.metric] for one in swept], full, PERMITTED)
        curve = [self._point(one.policy) for one in spread(swept, POINTS)]
        chosen = self._point(None if best is None else swept[best].policy)
        return {"curve": [self._point(None), *curve], "chosen_on_dev": chosen}


def policies_of(asked: Asked) -> tuple[str, ...]:
    """The policies that fit the task; the first one compares recipes."""
    regression = asked.split["dev"].labels.problem_type == "regression"
    return ("patience",) if regression else ("entropy", "patience")


def as_curve(found: Mapping[str, Any]) -> Curve:
    """The points of a policy as (mean exit layer, quality)."""
    return [(one["mean_exit_layer"], one["quality"]) for one in found["curve"]]


def compare(found: Mapping[str, Sequence[Mapping[str, Any]]]) -> dict[str, Any]:
    """{recipe: a curve a seed} -> {recipe: areas, a number a seed}, over the range that all of them reach."""
    low, high = common_range(as_curve(one) for curves in found.values() for one in curves)
    if low >= high:  # one of them never leaves early, or always does
        return {"layers": [low, high], "areas": None}
    areas = {recipe: [curve_area(as_curve(one), low, high) for one in curves] for recipe, curves in found.items()}
    return {"layers": [low, high], "areas": areas}


def measure(task: str, size: Size, trained: Sequence[Job], recipes: Sequence[Mapping[str, Job]]) -> dict[str, Any]:
    """Everything that is reported of a task; trained: joint, a checkpoint a seed; recipes: every recipe's, by seed."""
    asked = [Asked(job, task, size) for job in trained]
    names = policies_of(asked[0])
    by_recipe = {
        recipe: [Asked(jobs[recipe], task, size).policy(names[0]) for jobs in recipes]
        for recipe in (recipes[0] if recipes else ())
    }
    compared = {"recipes": {"policy": names[0], "curves": by_recipe, **compare(by_recipe)}} if by_recipe else {}
    return {
        "metric": asked[0].metric,
        "test_rows": len(asked[0].split["test"].encoded),
        "exits": [one.static() for one in asked],
        "policies": {name: [one.policy(name) for one in asked] for name in names},
        **compared,
    }


def plot(results: Mapping[str, Any], image: Path) -> None:
    """A panel a task: exits and policies of the joint recipe; then one for each task whose recipes were compared."""
    compared = {task: one for task, one in results.items() if one.get("recipes")}
    with panels(image, len(results) + len(compared), size=(5.5, 4)) as axes:
        for axis, (task, one) in zip(axes[0], results.items(), strict=False):
            layers = [int(layer) for layer in one["exits"][0]]
            values = np.array([[by_exit[str(layer)]["quality"] for layer in layers] for by_exit in one["exits"]])
            count = f"{len(values)} seed{'s' if len(values) > 1 else ''}"
            axis.errorbar(layers, values.mean(0), values.std(0, ddof=1) if len(values) > 1 else None, fmt="o-",
                          capsize=3, label=f"static use, {count}")  # fmt: skip
            for name, found in one["policies"].items():
                axis.plot(
                    *zip(*sorted(as_curve(found[0])), strict=True), ".-", label=f"{name}, seed {one['seeds'][0]}"
                )
            axis.set(title=f"{task}: joint recipe ({one['size']['rows']:,} train rows)")
        for axis, (task, one) in zip(axes[0, len(results) :], compared.items(), strict=True):
            for recipe, curves in one["recipes"]["curves"].items():
                axis.plot(*zip(*sorted(as_curve(curves[0])), strict=True), ".-", label=recipe)
            axis.set(title=f"{task}: recipes, {one['recipes']['policy']} exits")
        for axis, one in zip(axes[0], [*results.values(), *compared.values()], strict=True):
            axis.set(xlabel="mean exit layer", ylabel=f"{one['metric']} on test")


def spread_text(values: Sequence[float]) -> str:
    """Mean and standard deviation over seeds, in per cent."""
    text = f"{100 * mean(values):.1f}"
    return f"{text} ± {100 * stdev(values):.1f}" if len(values) > 1 else text


def show(task: str, one: Mapping[str, Any]) -> None:
    """The tables of a task."""
    print(f"{task}, {one['metric']}, {one['test_rows']} test rows, {one['size']['rows']} train rows, "
          f"seeds {one['seeds']}, x 100")  # fmt: skip
    by_exit = {layer: [seed[layer]["quality"] for seed in one["exits"]] for layer in one["exits"][0]}
    print("  by exit:", "  ".join(f"{layer}: {spread_text(values)}" for layer, values in by_exit.items()))
    for name, found in one["policies"].items():
        chosen = [seed["chosen_on_dev"] for seed in found]
        layers = mean(point["mean_exit_layer"] for point in chosen)
        print(f"  {name}, chosen on dev: {spread_text([point['quality'] for point in chosen])} "
              f"at mean exit layer {layers:.2f}")  # fmt: skip
    recipes = one.get("recipes", {})
    if recipes.get("areas"):
        low, high = recipes["layers"]
        print(f"  mean quality over mean exit layers {low:.2f} to {high:.2f}, {recipes['policy']} exits:")
        for recipe, areas in recipes["areas"].items():
            print(f"    {recipe:20} {spread_text(areas)}")


def experiment() -> None:
    """Task by task; the results of a task are kept when it is done."""

    def add(parser: Any) -> None:
        parser.add_argument("--recipe-seeds", type=int, nargs="+", help="of the recipes side by side (default: 0 on "
                            "SST-2, none on the others)")  # fmt: skip

    arguments = parse(__doc__, "exits", list(SEEDS), add)
    with working(arguments) as folder:
        for task in arguments.tasks:
            size, seeds = size_of(task, arguments), arguments.seeds or SEEDS[task]
            recipe_seeds = arguments.recipe_seeds or RECIPE_SEEDS.get(task, [])
            every = {seed: chains_of(folder, task, size, seed) for seed in dict.fromkeys([*seeds, *recipe_seeds])}
            chains = [
                chain
                for seed, (of_seed, made) in every.items()
                for chain in (of_seed if seed in recipe_seeds else [of_seed[0][: of_seed[0].index(made["sandwich"])]])
            ]
            if not make(task, size, chains, arguments):
                continue
            made = {seed: jobs for seed, (_, jobs) in every.items()}
            found = measure(task, size, [made[seed]["joint"] for seed in seeds], [made[seed] for seed in recipe_seeds])
            found = {"seeds": seeds, "recipe_seeds": recipe_seeds, **provenance(size), **found}
            results = record(arguments.output, __doc__, {task: found})["tasks"]
            plot(results, arguments.output.with_suffix(".png"))
            show(task, results[task])


if __name__ == "__main__":
    sys.exit(run(experiment))
