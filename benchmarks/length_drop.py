"""Figure 2 of Kim and Cho (2021): quality against FLOPs when every layer keeps the same share of its tokens.

Two models a task, of one exit as in the paper: fine-tuned in the usual way, and that one trained on with LengthDrop
(sandwich rule, inplace distillation, LayerDrop). FLOPs are given twice: against the padded maximum length, as the
paper counts, and on the real tokens. `sst2-distilbert` starts from a DistilBERT made of every second layer of MiniLM;
`sst2-ablations` trains on with LengthDrop without one of its parts each, on fewer rows. Measured on test.

    ELASTIC_MODEL_DATA=... python -m benchmarks.length_drop [--tasks sst2] [--plan]

writes `benchmarks/results/length_drop.json` and `.png`.
"""

import shutil
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModel, DistilBertConfig, DistilBertModel

from benchmarks.answers import Split, answers, files_of, read_logits, read_split
from benchmarks.checkpoints import minilm
from benchmarks.experiment import (
    SANDWICH,
    Chain,
    Job,
    Size,
    checkpoint,
    fine_tuning,
    make,
    parse,
    provenance,
    record,
    size_of,
    working,
)
from elastic_model.arguments import run
from elastic_model.folders import new_folder
from elastic_model.pretrained import DISTILBERT_LAYER
from elastic_model.subnetworks import constant_rate
from finetune.evaluate import score_of
from finetune.figures import panels
from finetune.metrics import paired_bootstrap

RATES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7, 0.6, 0.5)
SAMPLES = 1000  # of the bootstrap
STANDARD, LENGTH_DROP = "standard", "LengthDrop"


@dataclass(frozen=True)
class Figure:
    """One panel: a task, its size where it is not the usual one, the models trained on from the standard one."""

    task: str
    rows: int | None = None
    distilbert: bool = False
    variants: Mapping[str, dict[str, Any]] = field(default_factory=lambda: {LENGTH_DROP: {}})

    def size(self, arguments: Any) -> Size:
        """How much of the task is read."""
        size = size_of(self.task, arguments)
        return size if self.rows is None or arguments.train_rows else replace(size, rows=self.rows)


ABLATIONS: dict[str, dict[str, Any]] = {
    LENGTH_DROP: {},
    "without LayerDrop": {"layer_drop": 0.0},
    "without the sandwich rule": {"sandwich_rule": "false"},
    "without inplace distillation": {"distillation": "none"},
    "KL(student || teacher)": {"distillation": "reverse"},
}
FIGURES = {
    **{task: Figure(task) for task in ("sst2", "imdb", "sick", "mlqa", "wnut17")},
    "sst2-distilbert": Figure("sst2", distilbert=True),
    "sst2-ablations": Figure("sst2", rows=5_000, variants=ABLATIONS),
}
EXIT_LAYERS = {False: 6, True: 3}  # of MiniLM, and of the DistilBERT made of it


def every_second_layer(folder: Path) -> Path:
    """A DistilBERT made of MiniLM's layers 2, 4 and 6, as DistilBERT starts from BERT (Sanh et al. 2019, section 3).

    It has no token types: the embedding of type 0 goes into the positions.
    """
    target = folder / "distilbert"
    if target.is_dir():
        return target
    source = minilm(folder)
    bert = AutoModel.from_pretrained(source, dtype=torch.float32)
    stock = bert.config
    config = DistilBertConfig(
        vocab_size=stock.vocab_size,
        max_position_embeddings=stock.max_position_embeddings,
        n_layers=stock.num_hidden_layers // 2,
        n_heads=stock.num_attention_heads,
        dim=stock.hidden_size,
        hidden_dim=stock.intermediate_size,
    )
    model, weights = DistilBertModel(config), bert.state_dict()
    tensors = {
        f"embeddings.{name}": weights[f"embeddings.{name}"]
        for name in ("word_embeddings.weight", "LayerNorm.weight", "LayerNorm.bias")
    }
    tensors["embeddings.position_embeddings.weight"] = (
        weights["embeddings.position_embeddings.weight"] + weights["embeddings.token_type_embeddings.weight"][0]
    )
    for layer in range(config.n_layers):
        for theirs, ours in DISTILBERT_LAYER.items():
            for kind in ("weight", "bias"):
                tensors[f"transformer.layer.{layer}.{theirs}.{kind}"] = weights[
                    f"encoder.layer.{2 * layer + 1}.{ours}.{kind}"
                ]
    model.load_state_dict(tensors)
    with new_folder(target) as temporary:
        model.save_pretrained(temporary)
        for file in ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "vocab.txt"):
            shutil.copy(source / file, temporary)
    return target


def jobs_of(folder: Path, figure: Figure, size: Size, seed: int) -> dict[str, list[Job]]:
    """{model: its training and its answers}; all but the standard one go on from that."""
    common = {"exit_layers": EXIT_LAYERS[figure.distilbert]}
    start = {"model": every_second_layer(folder)} if figure.distilbert else {}
    share = 0.5 if figure.distilbert else 1.0
    name = "one_exit_distilbert" if figure.distilbert else "one_exit"
    train, task = "finetune train", figure.task
    standard = fine_tuning(folder, train, name, task, size, seed, cost=share, recipe="joint", **common, **start)
    sandwich = {**common, "recipe": "sandwich", "model": checkpoint(standard), "phase_epochs": [0, size.epochs]}
    made = {STANDARD: standard} | {
        variant: fine_tuning(folder, train, f"{name}-length_drop", task, size, seed, cost=SANDWICH * share, **sandwich,
                               **changes)
        for variant, changes in figure.variants.items()
    }  # fmt: skip
    return {model: [job, answers(job, task, "test", size, RATES)] for model, job in made.items()}


def chains_of(jobs: Mapping[str, list[Job]]) -> tuple[Chain, list[Chain]]:
    """The standard model's training, which comes first; then what goes on from it, and its own answers."""
    training, *asking = jobs[STANDARD]
    return [training], [*(chain for model, chain in jobs.items() if model != STANDARD), asking]


def measure_rate(split: Split, logits: np.ndarray, rate: float, whole: Mapping[str, float]) -> dict[str, Any]:
    """Quality and cost at a rate; whole: FLOPs at full length."""
    score = score_of(split.answers(logits), split.encoded, split.labels, seed=0)
    cost = split.flops(constant_rate(rate, split.config.num_hidden_layers))
    shares = {f"share_{name}": cost[name] / whole[name] for name in cost}
    return {"rate": rate, "quality": score.value, "low": score.low, "high": score.high, "flops": cost, **shares}


def at_half(split: Split, answered: Sequence[np.ndarray], curve: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The rate that comes nearest to half the FLOPs of the real tokens: its quality less that of the full length,
    on the same rows, in points with the 95 % bootstrap interval."""
    place = min(range(len(curve)), key=lambda number: abs(curve[number]["share_real"] - 0.5))
    name, labels = split.labels.metrics[0], split.encoded.labels
    drawn = 100 * paired_bootstrap(name, [answered[place]], [answered[0]], labels, SAMPLES)
    low, high = np.percentile(drawn, [2.5, 97.5])
    return {
        "rate": curve[place]["rate"],
        "share_real": curve[place]["share_real"],
        "points": 100 * (curve[place]["quality"] - curve[0]["quality"]),
        "low": float(low),
        "high": float(high),
    }


def measure(figure: Figure, size: Size, jobs: Mapping[str, list[Job]]) -> dict[str, Any]:
    """Every model's curve over the rates."""
    found: dict[str, Any] = {"metric": None, "models": {}}
    for model, (job, _) in jobs.items():
        split = read_split(checkpoint(job), figure.task, "test", size.max_length, size.test_rows)
        files = files_of(checkpoint(job), "test", size, RATES)
        whole = split.flops()
        logits = [read_logits(file)[-1] for file in files]
        curve = [measure_rate(split, one, rate, whole) for one, rate in zip(logits, RATES, strict=True)]
        half = at_half(split, [split.answers(one) for one in logits], curve)
        found["models"][model] = {"curve": curve, "at_half_the_real_flops": half}
        found |= {"metric": split.labels.metrics[0], "test_rows": len(split.encoded.labels)}
        found["tokens"] = {"real": float(np.mean(split.encoded.lengths)), "padded": size.max_length}
    return found


def plot(results: Mapping[str, Any], image: Path) -> None:
    """A column a figure: against the FLOPs of padded rows above, of real tokens below; both in MFLOPs."""
    with panels(image, len(results), 2, (4.5, 3.75)) as axes:
        for column, (name, by_seed) in zip(axes.T, results.items(), strict=True):
            one = by_seed["seeds"][min(by_seed["seeds"])]
            for axis, counted in zip(column, ("padded", "real"), strict=True):
                for model, found in one["models"].items():
                    curve = found["curve"]
                    cost = [point["flops"][counted] / 1e6 for point in curve]
                    axis.plot(cost, [point["quality"] for point in curve], "o-", markersize=3, label=model)
                    axis.fill_between(cost, *([point[end] for point in curve] for end in ("low", "high")), alpha=0.1)
                axis.set(xlabel=f"MFLOPs a row, {counted} ({one['tokens'][counted]:.0f} tokens)", ylabel=one["metric"])
            column[0].set(title=f"{name}: {by_seed['size']['rows']} train, {one['test_rows']} test rows")


def show(name: str, by_seed: Mapping[str, Any]) -> None:
    """The curves of a figure as tables."""
    for seed, one in by_seed["seeds"].items():
        print(f"{name}, {one['metric']} x 100, {one['test_rows']} test rows, {by_seed['size']['rows']} train rows, "
              f"seed {seed}")  # fmt: skip
        first = next(iter(one["models"].values()))["curve"]
        print(f"  {'rate':32}", "  ".join(f"{point['rate']:5g}" for point in first))
        for counted in ("padded", "real"):
            shares = "  ".join(f"{100 * point[f'share_{counted}']:5.1f}" for point in first)
            print(f"  {'FLOPs, ' + counted + ', %':32}", shares)
        for model, found in one["models"].items():
            half = found["at_half_the_real_flops"]
            print(f"  {model:32}", "  ".join(f"{100 * point['quality']:5.1f}" for point in found["curve"]),
                  f"  at {100 * half['share_real']:.0f} % of the real FLOPs {half['points']:+.1f} "
                  f"({half['low']:+.1f} to {half['high']:+.1f})")  # fmt: skip


def experiment() -> None:
    """Figure by figure; the results of one are kept when it is done."""
    arguments = parse(__doc__, "length_drop", list(FIGURES))
    with working(arguments) as folder:
        for name in arguments.tasks:
            figure, seeds = FIGURES[name], arguments.seeds or [0]
            size = figure.size(arguments)
            jobs = {seed: jobs_of(folder, figure, size, seed) for seed in seeds}
            both = [chains_of(of_seed) for of_seed in jobs.values()]
            phases = [standard for standard, _ in both], [chain for _, others in both for chain in others]
            finished = True
            for chains in phases:
                if finished or arguments.plan:
                    finished = make(name, size, chains, arguments)
            if not finished:
                continue
            found = {seed: measure(figure, size, of_seed) for seed, of_seed in jobs.items()}
            results = record(arguments.output, __doc__, {name: {**provenance(size), "seeds": found}})["tasks"]
            plot(results, arguments.output.with_suffix(".png"))
            show(name, results[name])


if __name__ == "__main__":
    sys.exit(run(experiment))
