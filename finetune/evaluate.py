"""Quality of a task checkpoint at every exit, and what an exit policy makes of it."""

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from transformers import PreTrainedTokenizerBase

from elastic_model import ElasticBertConfig
from elastic_model.arguments import check_at_least
from elastic_model.checks import check_length_config
from elastic_model.cost import exit_flops, mean_flops
from elastic_model.exit_policies import simulate
from elastic_model.folders import check_replaceable, new_folder
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.subnetworks import constant_rate
from finetune.by_row import explore_by_row
from finetune.config import EvaluateOptions
from finetune.data import Encoded, collate, inputs_of, sorted_batches
from finetune.examples import read_examples
from finetune.explore import Observed
from finetune.figures import plot_front
from finetune.kinds import answers_of, text_of
from finetune.labels import Labels
from finetune.metrics import interval, metric
from finetune.policies import Policy, candidates, never, patience_of, policy_name
from finetune.prepare import chosen_task, draw_rows, encode_split, labels_of_model, load_classifier, load_tokenizer

LINES = 20  # of a sweep that are printed
TIMED = 4  # of the thresholds given that are run for their wall time; the others have theirs from stored logits


@dataclass(frozen=True)
class Score:
    """A metric's value with its 95 % bootstrap interval."""

    metric: str
    value: float
    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.value:.4f} ({self.low:.4f}-{self.high:.4f})"


@dataclass(frozen=True)
class Outcome:
    """What a policy gives on a split: the rows' answers, the layers, from 1, that they leave at, and every metric."""

    policy: Policy | None
    answers: np.ndarray
    left_at: np.ndarray
    quality: dict[str, float]

    @property
    def mean_exit_layer(self) -> float:
        """The layer that a row leaves at, on average."""
        return float(self.left_at.mean())


@torch.no_grad()
def observe(
    model: ElasticBertExitModel,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    accelerator: Accelerator,
    autocast: bool = True,
    **sub_network: Any,
) -> Observed:
    """What every exit says of all rows; each process computes its share of the batches. autocast: in the precision of
    the accelerator, else as the weights are. sub_network: length_config and layer_config as `forward` takes them, by
    default the checkpoint's own; exits of layers that are left out say NaN."""
    was_training = model.training
    model.eval()
    parts = []
    for rows in sorted_batches(encoded.lengths, batch_size)[accelerator.process_index :: accelerator.num_processes]:
        batch = inputs_of(collate(encoded, rows, tokenizer, accelerator.device))
        with accelerator.autocast() if autocast else nullcontext():
            output = model(**batch, exit_policy={"name": "never"}, **sub_network)
        doubt = output.exit_uncertainty
        parts.append((rows, (stacked_exits(output).cpu(), None if doubt is None else doubt.cpu())))
    model.train(was_training)
    gathered = gather_object(parts)
    observed = Observed.blank(gathered[0][1], len(encoded), max(encoded.lengths))
    layers = sub_network.get("layer_config") or model.exit_layers
    computed = {
        place: layer
        for place, layer in enumerate(model.exit_layers)
        if layer in layers or layer == model.exit_layers[-1]
    }
    for rows, said in gathered:
        observed.put(rows, said, computed)
    return observed


def stacked_exits(output: Any) -> torch.Tensor:
    """What the exits of one forward pass said: (exits, rows, ..., labels); of a span model, start and end last."""
    if "exit_start_logits" in output:
        return torch.stack([torch.stack(output[f"exit_{side}_logits"]) for side in ("start", "end")], dim=-1)
    return torch.stack(output.exit_logits)


def quality(answers: np.ndarray, encoded: Encoded, labels: Labels) -> dict[str, float]:
    """Every metric of the task on the rows' answers."""
    return {name: metric(name)(answers, encoded.labels) for name in labels.metrics}


def score_of(answers: np.ndarray, encoded: Encoded, labels: Labels, seed: int, name: str | None = None) -> Score:
    """One metric, by default the deciding one, with its interval."""
    name = name or labels.metrics[0]
    return Score(name, metric(name)(answers, encoded.labels), *interval(name, answers, encoded.labels, seed))


def scores(logits: np.ndarray, encoded: Encoded, labels: Labels, seed: int) -> list[Score]:
    """Every metric of the task on logits (rows, labels), with intervals."""
    answers = answers_of(logits, encoded, labels)
    return [score_of(answers, encoded, labels, seed, name) for name in labels.metrics]


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Text in columns, each as wide as its widest cell."""
    cells = [[str(cell) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in cells)


def exit_table(
    per_exit: dict[int, list[Score]],
    config: ElasticBertConfig,
    encoded: Encoded,
    lengths: list[float] | None = None,
    kept: np.ndarray | None = None,
) -> str:
    """Quality by exit layer, a line an exit, with the cost of stopping there; kept: as `exit_flops` takes it."""
    metrics = [score.metric for score in next(iter(per_exit.values()))]
    flops = exit_flops(config, encoded.lengths, lengths, encoded.head, kept).double().mean(1).tolist()
    cost = dict(zip(config.exit_layers or (), flops, strict=True))
    rows = [[layer, f"{cost[layer] / 1e6:.4g}", *scored] for layer, scored in per_exit.items()]
    return table(["exit layer", "MFLOPs a row", *(f"{name} (95 % interval)" for name in metrics)], rows)


def outcome(
    policy: Policy | None,
    logits: np.ndarray,
    exit_layers: list[int],
    encoded: Encoded,
    labels: Labels,
    uncertainty: np.ndarray | None = None,
) -> Outcome:
    """What a policy gives, from the logits of all exits (exits, rows, ..., labels), and `learned` from uncertainty
    (exits, rows)."""
    chosen, left_at = simulate(policy, logits, exit_layers, labels.problem_type, encoded.mask, uncertainty)
    answers = answers_of(chosen.numpy(), encoded, labels)
    return Outcome(policy, answers, left_at.numpy(), quality(answers, encoded, labels))


def spread(outcomes: list[Outcome], count: int) -> list[Outcome]:
    """At most `count` of the outcomes of a sweep from strict to loose, evenly over their mean exit layers."""
    if not outcomes:
        return []
    layers = [one.mean_exit_layer for one in outcomes]
    targets = np.linspace(max(layers), min(layers), count)
    nearest = [int(np.abs(np.array(layers) - target).argmin()) for target in targets]
    return [outcomes[number] for number in dict.fromkeys(nearest)]


def _policies(options: EvaluateOptions, logits: np.ndarray, labels: Labels, saved: Policy | None) -> list[Policy]:
    name, patience = policy_name(options.exit_policy, labels.problem_type, saved), patience_of(saved)
    if not options.thresholds and len(logits) == 1:  # nothing to choose
        return [never(name, 1, labels.problem_type, patience)]
    if not options.thresholds:
        return candidates(name, logits, labels.problem_type, patience=patience)
    counted = {"voting": "votes"} if labels.problem_type == "regression" else {"voting": "votes", "patience": name}
    if name in counted:
        if wrong := [value for value in options.thresholds if not (value >= 1 and value.is_integer())]:
            raise ValueError(
                f"--thresholds of {name} are whole numbers of at least 1, {counted[name]}, got {wrong[0]:g}"
            )
        return [{"name": name, counted[name]: int(value)} for value in options.thresholds]
    steps = {"patience": patience} if name == "patience" else {}
    return [{"name": name, **steps, "threshold": value} for value in options.thresholds]


def check_learned(policy: Policy, config: ElasticBertConfig) -> None:
    """ValueError where a policy asks a learned exit head of a model that has none."""
    if policy["name"] == "learned" and not config.learned_exit_head:
        raise ValueError(
            "exit policy 'learned' asks a learned exit head, which this model has not: train it with --recipe learned "
            "or --learned_exit_head"
        )


def policy_text(policy: Policy | None) -> str:
    """A policy in words: `entropy, threshold 0.3`."""
    if policy is None:
        return "never (full depth)"
    return ", ".join([policy["name"], *(f"{name} {value}" for name, value in policy.items() if name != "name")])


def outcome_table(outcomes: dict[str, Outcome], more: Mapping[str, Mapping[str, str]] | None = None) -> str:
    """A line an outcome: what it is, the mean exit layer, every metric; `more`: {column: {outcome: cell}}."""
    more = more or {}
    rows = [
        [name, f"{one.mean_exit_layer:.2f}", *(f"{value:.4f}" for value in one.quality.values())]
        + [cells.get(name, "-") for cells in more.values()]
        for name, one in outcomes.items()
    ]
    return table(["", "mean exit layer", *next(iter(outcomes.values())).quality, *more], rows)


def lengths_of(options: EvaluateOptions, config: ElasticBertConfig) -> list[float] | None:
    """The shares asked for, one a layer: as given, or a constant rate from layer to layer; None: the checkpoint's."""
    if options.length_config and options.length_rate is not None:
        raise ValueError("give --length_config or --length_rate, not both")
    if options.length_rate is None:
        check_length_config(options.length_config or None, config.num_hidden_layers)
        return options.length_config or None
    if not 0 < options.length_rate <= 1:
        raise ValueError(f"length_rate must lie above 0 and at most be 1, got {options.length_rate}")
    return constant_rate(options.length_rate, config.num_hidden_layers)


@torch.no_grad()
def milliseconds(
    model: ElasticBertExitModel,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    options: EvaluateOptions,
    policy: Policy | None,
    lengths: list[float] | None,
) -> float:
    """Wall time of a row, in batches of rows of like length, rows leaving as the policy says."""
    rows = list(range(min(options.timed_rows, len(encoded))))
    order = sorted_batches([encoded.lengths[row] for row in rows], options.eval_batch_size)
    batches = [inputs_of(collate(encoded, one, tokenizer, model.device)) for one in order]
    how = {"exit_policy": policy or {"name": "never"}, "length_config": lengths}
    model(**batches[0], **how)  # warm-up
    began = time.perf_counter()
    for batch in batches:
        model(**batch, **how)
    return (time.perf_counter() - began) * 1e3 / len(rows)


def costs_of(
    one: Outcome,
    options: EvaluateOptions,
    config: ElasticBertConfig,
    encoded: Encoded,
    lengths: list[float] | None,
    kept: np.ndarray | None,
) -> dict[str, float]:
    """FLOPs of a row on average, on its real tokens and, unless rows choose what is kept, if all were padded to the
    maximum length."""
    tokens = {"flops": encoded.lengths}
    if kept is None:
        tokens["padded_flops"] = [options.max_length] * len(encoded)
    left_at = one.left_at.tolist()
    return {name: mean_flops(config, counts, left_at, lengths, encoded.head, kept) for name, counts in tokens.items()}


def _write_predictions(file: Path, places: list[int], encoded: Encoded, own: Outcome, labels: Labels) -> None:
    """places: of the examples in the split."""
    columns = (places, own.answers, encoded.labels, encoded.per_example(own.left_at))
    with file.open("w", encoding="utf-8") as lines:
        lines.write("index\tprediction\tlabel\texit_layer\n")
        for place, answer, label, layer in zip(*columns, strict=True):
            lines.write(f"{place}\t{text_of(answer, labels)}\t{text_of(label, labels)}\t{layer}\n")


def _curve(
    options: EvaluateOptions,
    lengths: list[float] | None,
    exits: dict[int, list[Score]],
    outcomes: dict[str, Outcome],
    costs: dict[str, dict[str, float]],
) -> dict[str, Any]:
    """What is printed, as JSON holds it."""
    return {
        "split": options.split,
        "length_config": lengths,
        "exits": {layer: [asdict(score) for score in scored] for layer, scored in exits.items()},
        "policies": {
            name: {
                "policy": one.policy,
                "mean_exit_layer": one.mean_exit_layer,
                "quality": one.quality,
                **costs[name],
            }
            for name, one in outcomes.items()
        },
    }


def _cells(costs: dict[str, dict[str, float]]) -> dict[str, dict[str, str]]:
    """Costs as columns of a table."""
    units = {"flops": ("MFLOPs a row", 1e6), "padded_flops": ("MFLOPs, padded", 1e6), "ms": ("ms a row", 1.0)}
    return {
        head: {name: f"{one[key] / unit:.4g}" for name, one in costs.items() if key in one}
        for key, (head, unit) in units.items()
    }


def _plot(image: Path, outcomes: dict[str, Outcome], costs: dict[str, dict[str, float]], metric: str) -> None:
    """The deciding metric of the outcomes against their FLOPs."""
    points = [(costs[name]["flops"], one.quality[metric]) for name, one in outcomes.items()]
    plot_front(image, {"exit policy": points}, max(cost for cost, _ in points), metric)


def evaluate(options: EvaluateOptions) -> None:
    """Print (with --output also write) quality per exit, a sweep of the exit policy, the checkpoint's own policy."""
    check_at_least(1, options, "rows", "eval_batch_size")
    check_at_least(0, options, "timed_rows")
    if options.output:
        check_replaceable(Path(options.output), *options.sources)
    accelerator = Accelerator()
    model = load_classifier(Path(options.model), options.max_length).to(accelerator.device)
    task, tokenizer = chosen_task(options), load_tokenizer(Path(options.model))
    labels = labels_of_model(options, task, model.config)
    examples = read_examples(task, options.split)
    places = draw_rows(len(examples), options.rows, options.seed)
    encoded = encode_split(examples.select(places), options.split, task, labels, tokenizer, options.max_length)
    lengths = lengths_of(options, model.config)
    seen = observe(model, encoded, tokenizer, options.eval_batch_size, accelerator, length_config=lengths)
    logits, doubts = seen.logits, seen.uncertainty
    layers, saved, kept = list(model.config.exit_layers), model.config.exit_policy, None
    if lengths is None and isinstance(model.config.length_config, dict):
        _, kept = explore_by_row(model, encoded, tokenizer, options.eval_batch_size, model.config.length_config)
    exits = {layer: scores(one, encoded, labels, options.seed) for layer, one in zip(layers, logits, strict=True)}
    policies = _policies(options, logits, labels, saved)
    check_learned(policies[0], model.config)
    swept = [outcome(policy, logits, layers, encoded, labels, doubts) for policy in policies]
    own = outcome(saved, logits, layers, encoded, labels, doubts)
    outcomes = {policy_text(one.policy): one for one in (swept if options.thresholds else spread(swept, LINES))}
    outcomes |= {"full depth": outcome(None, logits, layers, encoded, labels), "the checkpoint's own": own}
    costs = {name: costs_of(one, options, model.config, encoded, lengths, kept) for name, one in outcomes.items()}
    for name in [*list(outcomes)[: TIMED if options.thresholds else 0], "full depth", "the checkpoint's own"]:
        if options.timed_rows and accelerator.is_main_process:
            how = (options, outcomes[name].policy, lengths)
            costs[name]["ms"] = milliseconds(model, encoded, tokenizer, *how)
    accelerator.print(f"{task.name}, {options.split}: {encoded.size(options.max_length)}")
    shown = exit_table(exits, model.config, encoded, lengths, kept), outcome_table(outcomes, _cells(costs))
    accelerator.print(*shown, sep="\n\n")
    if options.output and accelerator.is_main_process:
        with new_folder(Path(options.output)) as folder:
            (folder / "curve.json").write_text(json.dumps(_curve(options, lengths, exits, outcomes, costs), indent=1))
            _plot(folder / "curve.png", outcomes, costs, labels.metrics[0])
            _write_predictions(folder / "predictions.tsv", places, encoded, own, labels)
