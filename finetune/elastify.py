"""`python -m finetune elastify MODEL --texts FILE`: exits that learn from a fine-tuned model, without labels."""

import json
import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, set_seed

from elastic_model.checks import warn_of_other_texts
from elastic_model.configuration_elasticbert import pooling_with_new_exits
from elastic_model.cost import mean_flops
from elastic_model.folders import check_replaceable
from elastic_model.provenance import Metric, describe_data, file_hash
from finetune.checkpoint import note, output_of
from finetune.config import ElastifyOptions
from finetune.data import Encoded, encode
from finetune.evaluate import stacked_exits, table
from finetune.figures import plot_exits
from finetune.kinds import KINDS, problem_type_of
from finetune.prepare import (
    FAMILIES,
    check_fills_a_batch,
    check_length,
    configured,
    pooling_setting,
    rows_hash,
    weight_files,
)
from finetune.recipe import INNER_EXITS, SANDWICH, Phase
from finetune.run import Run, check_numbers, check_read, phases_that_run, start_accelerator
from finetune.state import Progress
from finetune.tasks import ProblemType
from finetune.teacher import ask, check_name, final_logits, load_stock
from finetune.texts import Texts, read_texts
from finetune.train import run_to_the_end, was_finished

TOLERANCE = 1e-5  # of the last exit's logits to the original's, where the backbone is frozen
HELD_OUT = 0.05  # share of the texts, where no others are given
MOST_HELD_OUT = 2000
SAMPLES = 1000  # bootstrap resamples
RESULT = "elastify.json"


@dataclass(frozen=True)
class ElastifyRun(Run):
    """A run on the answers of the original model; `reference`: its logits (...) for each held-out row."""

    options: ElastifyOptions
    problem_type: str = field(kw_only=True)
    reference: list[np.ndarray] = field(kw_only=True)
    original: str = field(kw_only=True)
    revision: str | None = field(kw_only=True)


def _choices(logits: np.ndarray, problem_type: str) -> np.ndarray:
    """What logits (..., labels) answer: class numbers (...), or 0/1 (labels,)."""
    return logits > 0 if problem_type == "multi_label_classification" else logits.argmax(-1)


def _counts(ours: list[np.ndarray], reference: list[np.ndarray], problem_type: str) -> tuple[np.ndarray, np.ndarray]:
    """How many answers of each row agree, of how many; (rows,). A token is an answer, several labels are one."""
    equal = [
        np.atleast_1d(_choices(one, problem_type) == _choices(other, problem_type))
        for one, other in zip(ours, reference, strict=True)
    ]
    if problem_type == "multi_label_classification":
        equal = [np.atleast_1d(row.all()) for row in equal]
    return np.array([row.sum() for row in equal]), np.array([row.size for row in equal])


def agreement(
    ours: list[np.ndarray], reference: list[np.ndarray], problem_type: str, seed: int | None = None
) -> dict[str, float]:
    """How far the answers of one exit are the original's, from the logits (...) of each row.

    Classes: the share of equal answers (tags: over tokens; several labels: all of a row's). Regression: R^2, and the
    mean absolute difference. With a seed `low` and `high`, the 95 % percentile bootstrap interval over rows.
    """
    draw = np.random.default_rng(seed)
    samples = draw.integers(0, len(ours), (SAMPLES if seed is not None else 0, len(ours)))
    if problem_type == "regression":
        values, truth = np.stack(ours).astype(float), np.stack(reference).astype(float)  # (rows, outputs)

        def fit(rows: np.ndarray) -> float:
            spread = ((truth[rows] - truth[rows].mean(0)) ** 2).sum()
            error = ((values[rows] - truth[rows]) ** 2).sum()
            return float(1 - error / spread) if spread else float(not error)  # of equal rows, as sklearn has it

        everything = np.arange(len(ours))
        found = {"r2": fit(everything), "absolute_difference": float(np.abs(values - truth).mean())}
        drawn = [fit(rows) for rows in samples]
    else:
        equal, of = _counts(ours, reference, problem_type)
        found = {"agreement": float(equal.sum() / of.sum())}
        drawn = [equal[rows].sum() / of[rows].sum() for rows in samples]
    if seed is not None:
        low, high = np.percentile(drawn, [2.5, 97.5])
        found |= {"low": float(low), "high": float(high)}
    return found


def _held_out_logits(run: Run) -> list[np.ndarray]:
    """The logits of every exit, (exits, ...), for each held-out row."""

    def exits(output: Any) -> torch.Tensor:
        return stacked_exits(output).transpose(0, 1)  # (rows, exits, ...)

    return ask(run.model, run.splits["dev"], run.tokenizer, run.options.eval_batch_size, run.accelerator, exits)


def _measure(run: ElastifyRun, seed: int | None = None) -> dict[int, dict[str, float]]:
    logits = _held_out_logits(run)
    return {
        layer: agreement([row[number] for row in logits], run.reference, run.problem_type, seed)
        for number, layer in enumerate(run.exit_layers)
    }


def _check_original(name: str, config: Any, options: ElastifyOptions) -> ProblemType:
    """The problem type of the original; ValueError where it is no classifier or tagger of a family that we know."""
    problem_type = problem_type_of(config)
    if config.model_type not in FAMILIES or problem_type is None or problem_type == "question_answering":
        found = ", ".join(config.architectures or []) or config.model_type
        raise ValueError(
            f"{name} holds {found}; elastify takes a fine-tuned classifier or token tagger of the families "
            f"{', '.join(FAMILIES)}"
        )
    return problem_type


def _load(name: str, problem_type: ProblemType, config: Any, options: ElastifyOptions) -> Any:
    """The original as an elastic model: every inner head starts as its own, unless it has some already."""
    pairs = options.pair is not None
    known = getattr(config, "text_pairs", None)
    warn_of_other_texts(known, pairs)
    settings = configured(options, config.num_hidden_layers) | {"text_pairs": pairs if known is None else known}
    settings |= {"exit_pooling": pooling_with_new_exits(config, options.exit_pooling or "mean")}
    set_seed(options.seed)
    model, loading = KINDS[problem_type].model.from_pretrained(
        name, dtype=torch.float32, output_loading_info=True, **settings
    )
    if len(model.exit_layers) < 2:
        raise ValueError(f"exit_layers {model.exit_layers}: there is no exit below the last one to train")
    model.config.problem_type = None if problem_type == "token_classification" else problem_type
    heads = getattr(model, model.head_name)
    last = heads.at(model.exit_layers[-1]).state_dict()
    for layer in model.exit_layers[:-1]:
        if f"{model.head_name}.{layer - 1}.weight" in loading["missing_keys"]:
            heads.at(layer).load_state_dict(last)
    return model


def _read_splits(options: ElastifyOptions) -> dict[str, Texts]:
    texts = read_texts(Path(options.texts), options.text, options.pair)
    if options.dev is not None:
        splits = {"train": texts, "dev": read_texts(Path(options.dev), options.text, options.pair)}
    else:
        held_out = min(MOST_HELD_OUT, max(1, round(HELD_OUT * len(texts))))
        order = random.Random(options.seed).sample(range(len(texts)), len(texts))
        splits = {"train": texts.select(sorted(order[held_out:])), "dev": texts.select(sorted(order[:held_out]))}
    check_fills_a_batch(len(splits["train"]), options.batch_size, "texts to train on")
    return splits


def phases_of(options: ElastifyOptions) -> tuple[Phase, ...]:
    """The exits on the frozen backbone; then, on request, all of it under the sandwich rule."""
    tuned = replace(SANDWICH, learning_rate=options.backbone_learning_rate)
    return (INNER_EXITS, tuned) if options.train_backbone else (INNER_EXITS,)


def _settings(options: ElastifyOptions, revision: str | None, splits: Mapping[str, Encoded]) -> dict[str, Any]:
    free = ("output", "resume", "model", "texts", "dev", "save_steps", "log_steps", "tracker", "eval_batch_size")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    settings["exit_pooling"] = pooling_setting(options)
    local = Path(options.model).is_dir()
    settings["original"] = [file_hash(file) for file in weight_files(Path(options.model))] if local else revision
    return settings | {f"{split} rows": rows_hash(encoded) for split, encoded in splits.items()}


def prepare(options: ElastifyOptions, accelerator: Accelerator) -> ElastifyRun:
    """Everything read and checked; nothing is written yet."""
    phases = phases_of(options)
    check_numbers(options, phases)
    if options.distillation == "none":
        raise ValueError("distillation none: without labels there is nothing but the original's answers to learn from")
    if not 0 < options.backbone_learning_rate < math.inf:
        raise ValueError(f"backbone_learning_rate must be above 0, got {options.backbone_learning_rate:g}")
    if options.train_backbone and options.phase_epochs and not options.phase_epochs[-1]:
        raise ValueError("train_backbone would do nothing: --phase_epochs gives its phase none")
    check_read(options, phases_that_run(options, phases))
    if not options.train_backbone and options.backbone_learning_rate != ElastifyOptions.backbone_learning_rate:
        raise ValueError("backbone_learning_rate would do nothing: without --train_backbone the backbone is frozen")
    check_replaceable(Path(options.output), options.model, options.texts, options.dev)
    if not Path(options.texts).is_file():
        raise ValueError(f"texts {options.texts} is not a file")
    check_name(options.model)
    config = AutoConfig.from_pretrained(options.model)
    problem_type = _check_original(options.model, config, options)
    texts = _read_splits(options)
    original, model = load_stock(options.model, problem_type), _load(options.model, problem_type, config, options)
    check_length(model.config, options.max_length)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    splits = {split: encode(rows, tokenizer, options.max_length) for split, rows in texts.items()}
    say = partial(ask, original, tokenizer=tokenizer, batch_size=options.eval_batch_size, accelerator=accelerator)
    revision = getattr(config, "_commit_hash", None)
    run = ElastifyRun(
        options,
        accelerator,
        model.to(accelerator.device),
        tokenizer,
        splits,
        phases,
        _settings(options, revision, splits),
        "r2" if problem_type == "regression" else "agreement",
        _measure,
        say(encoded=splits["train"], read=final_logits) if options.train_backbone else None,
        problem_type=problem_type,
        reference=say(encoded=splits["dev"], read=final_logits),
        original=options.model,
        revision=revision,
    )
    check_same(run)
    return run


def largest_difference(run: ElastifyRun) -> float:
    """Of the last exit's logits to the original's, over the held-out rows."""
    ours = [row[-1] for row in _held_out_logits(run)]
    return max(float(np.abs(one - other).max()) for one, other in zip(ours, run.reference, strict=True))


def check_same(run: ElastifyRun) -> float:
    """The largest difference of the last exit to the original; ValueError where it is not the same model."""
    difference = largest_difference(run)
    scale = max(1.0, max(float(np.abs(row).max()) for row in run.reference))
    if not difference <= TOLERANCE * scale:
        raise ValueError(
            f"the last exit differs from {run.original} by {difference:.2g} in a logit, more than {TOLERANCE:g}: "
            "this model computes something that an elastic BERT does not"
        )
    return difference


def report(run: ElastifyRun, exits: dict[int, dict[str, float]], difference: float) -> str:
    """The text that ends a run: agreement with the original by exit."""
    config, lengths = run.model.config, run.splits["dev"].lengths
    head = "token" if run.problem_type == "token_classification" else "sequence"
    rows = []
    for layer, found in exits.items():
        interval = f"{found[run.metric]:.4f} ({found['low']:.4f}-{found['high']:.4f})"
        cost = mean_flops(config, lengths, [layer] * len(lengths), head=head)
        others = [f"{found['absolute_difference']:.4f}"] if "absolute_difference" in found else []
        rows.append([layer, f"{cost / 1e6:.4g}", interval, *others])
    metric = {"r2": "R^2 to the original"}.get(run.metric, "agreement with the original")
    heads = ["exit layer", "MFLOPs a row", f"{metric} (95 % interval)"]
    heads += ["mean absolute difference"] if run.metric == "r2" else []
    kept = "trained" if run.options.train_backbone else "frozen"
    return "\n".join(
        [
            f"{run.original}: {run.problem_type}, {len(run.splits['train'])} texts, {len(lengths)} held out",
            f"backbone {kept}; largest difference of the last exit's logits to the original's: {difference:.2g}",
            table(heads, rows),
        ]
    )


def _write(run: ElastifyRun, progress: Progress) -> None:
    """The model with its exits, the report, the plot and the card as the run's output; its folder is removed."""
    run.model.load_state_dict(progress.best_weights)
    difference = largest_difference(run) if run.options.train_backbone else check_same(run)
    exits = _measure(run, run.options.seed)
    if not run.accelerator.is_main_process:
        return
    options, text = run.options, report(run, exits, difference)
    result: dict[str, Any] = {"original": run.original, "problem_type": run.problem_type, "metric": run.metric}
    result |= {"backbone": "trained" if options.train_backbone else "frozen", "largest_difference": difference}
    result |= {"texts": len(run.splits["train"]), "held_out": len(run.splits["dev"]), "exits": exits}
    with output_of(run, progress, text) as folder:
        (folder / RESULT).write_text(json.dumps(result, indent=1))
        plot_exits(folder / "exits.png", {"held out": exits}, run.metric)
        _record(run, folder, exits)
    rows = "--dev FILE --text COLUMN --label COLUMN" if run.problem_type == "token_classification" else "--texts FILE"
    bound = "--max_disagreement 0.05" + (" --tolerance 0.1" if run.problem_type == "regression" else "")
    print(f"next, exit thresholds: python -m finetune calibrate {quote(options.output)} {rows} {bound}")


def _record(run: ElastifyRun, folder: Path, exits: dict[int, dict[str, float]]) -> None:
    options, name = run.options, Path(run.options.texts).name
    files = {"train": options.texts, "held-out": options.dev or options.texts}
    data = [describe_data(file, Path(file).name, split) for split, file in files.items()]
    metrics = [
        Metric(run.metric, found[run.metric], name, "held-out", layer, found["low"], found["high"])
        for layer, found in exits.items()
    ]
    note(run, folder, "elastify", run.original, data, metrics, revision=run.revision)


def elastify(options: ElastifyOptions) -> int:
    """Train the exits of a fine-tuned model on its own answers; exit code 0, or 143 after SIGTERM (state saved)."""
    accelerator = start_accelerator(options)
    run = prepare(options, accelerator)
    if was_finished(run):
        return 0
    accelerator.print(f"{len(run.splits['train'])} texts, {len(run.splits['dev'])} held out; {run.problem_type}")
    return run_to_the_end(run, _write)
