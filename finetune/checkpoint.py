"""The end of a run: exit policy and operating points chosen on dev, the report, and the folder that holds it all."""

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from elastic_model.arguments import to_yaml
from elastic_model.card import write_card
from elastic_model.cost import mean_flops
from elastic_model.folders import is_ours, new_folder
from elastic_model.operating_points import OperatingPoint, OperatingPoints, checkpoint_hash
from elastic_model.provenance import Data, Metric, append_stage
from finetune.evaluate import (
    Outcome,
    Score,
    exit_table,
    observe,
    outcome,
    outcome_table,
    policy_text,
    score_of,
    scores,
    spread,
)
from finetune.figures import confusion, plot_confusion, plot_exits
from finetune.kinds import kind_of
from finetune.policies import candidates, choose, never, thresholds
from finetune.prepare import rows_hash
from finetune.run import Run, TaskRun
from finetune.state import Progress, agrees, check_settings

SETTINGS = "finetune.json"  # what makes two runs the same
REPORT = "report.txt"
EVALUATION = "evaluation.json"
Scored = dict[str, dict[int, list[Score]]]  # split -> exit layer -> a score a metric
POINTS = 12  # operating points spread over the sweep, beside full depth and the calibrated one


def sweep(run: TaskRun, logits: np.ndarray, uncertainty: np.ndarray | None = None) -> list[Outcome]:
    """What the settings of the exit policy give on dev, from strict to loose; nothing where there is one exit only.

    Of settings that dev cannot tell apart the strictest stands for all: a looser one would go beyond what was seen.
    """
    name = run.policy
    policies = candidates(name, logits, run.labels.problem_type) if len(run.exit_layers) > 1 else []
    outcomes: list[Outcome] = []
    for policy in policies:
        one = outcome(policy, logits, run.exit_layers, run.splits["dev"], run.labels, uncertainty)
        if not outcomes or one.mean_exit_layer != outcomes[-1].mean_exit_layer:
            outcomes.append(one)
    return outcomes


def calibrate(run: TaskRun, full: Outcome, outcomes: list[Outcome]) -> Outcome:
    """The loosest setting that keeps the deciding metric on dev within the permitted loss, else full depth."""
    deciding = run.labels.metrics[0]
    qualities = [one.quality[deciding] for one in outcomes]
    best = choose(qualities, full.quality[deciding], run.options.permitted_loss)
    return full if best is None else outcomes[best]


def _point(run: TaskRun, name: str, one: Outcome) -> OperatingPoint:
    score, dev = score_of(one.answers, run.splits["dev"], run.labels, run.options.seed), run.splits["dev"]
    policy = run.policy
    return OperatingPoint(
        name,
        thresholds(policy, one.policy, len(run.exit_layers), run.labels.problem_type),
        one.mean_exit_layer,
        list(run.model.config.length_config or [1.0] * run.model.config.num_hidden_layers),
        flops=mean_flops(run.model.config, dev.lengths, one.left_at.tolist(), head=dev.head),
        quality={**asdict(score), "split": "dev"},
    )


def operating_points(
    run: TaskRun, weights: str, full: Outcome, chosen: Outcome, outcomes: list[Outcome]
) -> OperatingPoints:
    """Full depth, the calibrated point, and points spread evenly over the mean exit layers of the sweep."""
    name = run.policy
    policy = chosen.policy or never(name, len(run.exit_layers), run.labels.problem_type)
    points = [_point(run, "full", full)]
    if chosen.mean_exit_layer < full.mean_exit_layer:
        points.append(_point(run, "calibrated", chosen))
    others = [
        one
        for one in spread(outcomes, POINTS)
        if one.mean_exit_layer not in (chosen.mean_exit_layer, full.mean_exit_layer)
    ]
    named = {f"mean-exit-{one.mean_exit_layer:.2f}": one for one in others}
    return OperatingPoints(weights, policy, points + [_point(run, name, one) for name, one in named.items()])


def report(run: TaskRun, full: Outcome, chosen: Outcome, test: Outcome | None, scored: Scored) -> str:
    """The text that ends a run: quality by exit on dev (and on test, where that was given), the exit policy chosen."""
    lines = []
    for split, per_exit in scored.items():
        rows = run.splits[split]
        lines += [f"{split}: {rows.size(run.options.max_length)}"]
        lines += [exit_table(per_exit, run.model.config, rows), ""]
    deciding, permitted = run.labels.metrics[0], run.options.permitted_loss
    lines += [
        f"exit policy, chosen on dev: {policy_text(chosen.policy)}",
        f"(the loosest setting before {deciding} on dev first falls more than {permitted} below full depth)",
    ]
    outcomes = {"dev, full depth": full, "dev, with exits": chosen}
    if test is not None:
        outcomes["test, with exits"] = test
    return "\n".join([*lines, outcome_table(outcomes)])


def _record(run: TaskRun, folder: Path, scored: Scored) -> None:
    """The provenance of the checkpoint, and its model card."""
    data = [
        run.task.splits[split].describe(run.task.folder(), run.task.name, split, rows_hash(rows))
        for split, rows in run.splits.items()
    ]
    metrics = [
        Metric(score.metric, score.value, run.task.name, split, layer, score.low, score.high)
        for split, per_exit in scored.items()
        for layer, values in per_exit.items()
        for score in values
    ]
    note(run, folder, run.options.stage, run.options.model, data, metrics)


def _scores_by_exit(run: TaskRun, split: str, logits: np.ndarray) -> dict[int, list[Score]]:
    by_exit = zip(run.exit_layers, logits, strict=True)
    return {layer: scores(one, run.splits[split], run.labels, run.options.seed) for layer, one in by_exit}


def _evaluation(full: Outcome, chosen: Outcome, scored: Scored) -> dict[str, Any]:
    def plain(one: Outcome) -> dict[str, Any]:
        return {"policy": one.policy, "quality": one.quality, "mean_exit_layer": one.mean_exit_layer}

    exits = {
        split: {layer: [asdict(score) for score in values] for layer, values in per_exit.items()}
        for split, per_exit in scored.items()
    }
    return {"exits": exits, "dev": {"full": plain(full), "calibrated": plain(chosen)}}


def write_checkpoint(run: TaskRun, progress: Progress) -> None:
    """The best weights with their exit policy and operating points as the run's output; its folder is removed."""
    run.model.load_state_dict(progress.best_weights)
    held_out = {split: rows for split, rows in run.splits.items() if split != "train"}
    how = (run.tokenizer, run.options.eval_batch_size, run.accelerator)
    # as the checkpoint will be read, whatever the precision of its training
    seen = {split: observe(run.model, rows, *how, autocast=False) for split, rows in held_out.items()}
    logits = {split: one.logits for split, one in seen.items()}
    if not run.accelerator.is_main_process:
        return
    run = replace(run, labels=kind_of(run.labels).tune(logits["dev"][-1], run.splits["dev"], run.labels))
    run.model.config.no_answer_threshold = run.labels.no_answer_threshold
    scored = {split: _scores_by_exit(run, split, values) for split, values in logits.items()}
    full = outcome(None, logits["dev"], run.exit_layers, run.splits["dev"], run.labels)
    outcomes = sweep(run, logits["dev"], seen["dev"].uncertainty)
    chosen = calibrate(run, full, outcomes)
    run.model.config.exit_policy = chosen.policy
    test = None
    if "test" in logits:
        rows = run.splits["test"]
        test = outcome(chosen.policy, logits["test"], run.exit_layers, rows, run.labels, seen["test"].uncertainty)
    text = report(run, full, chosen, test, scored)
    with output_of(run, progress, text) as folder:
        operating_points(run, checkpoint_hash(folder), full, chosen, outcomes).save(folder)
        (folder / EVALUATION).write_text(json.dumps(_evaluation(full, chosen, scored), indent=1))
        _draw(run, folder, scored, full)
        _record(run, folder, scored)


@contextmanager
def output_of(run: Run, progress: Progress, text: str) -> Iterator[Path]:
    """The folder of a finished run with its model, tokenizer, settings, report and logs, for what else belongs there;
    then its own folder is removed, and the report printed."""
    with new_folder(Path(run.options.output)) as folder:
        run.model.save_pretrained(folder)
        run.tokenizer.save_pretrained(folder)
        (folder / SETTINGS).write_text(json.dumps(run.settings, indent=1))
        (folder / "finetune.yaml").write_text(to_yaml(run.options))
        (folder / REPORT).write_text(text + "\n")
        run.copy_logs(folder)
        yield folder
    shutil.rmtree(run.folder)
    print(text, f"checkpoint of update {progress.best_update}: {run.options.output}", sep="\n\n")


def note(
    run: Run, folder: Path, stage: str, parent: str, data: list[Data], metrics: list[Metric], **more: Any
) -> None:
    """The record of provenance and the card of a finished run."""
    options = vars(run.options)
    settings = {name: value for name, value in options.items() if name not in ("output", "resume")}
    how = {"settings": settings, "seed": run.options.seed, "license": run.options.license, **more}
    append_stage(folder, stage, parent=parent, data=data, metrics=metrics, **how)
    write_card(folder, name=Path(run.options.output).name)


def _draw(run: TaskRun, folder: Path, scored: Scored, full: Outcome) -> None:
    """The deciding metric by exit; for classes the confusion matrix of full depth on dev, as a figure and as JSON."""
    by_exit = {
        split: {layer: {run.metric: values[0].value, **asdict(values[0])} for layer, values in per_exit.items()}
        for split, per_exit in scored.items()
    }
    plot_exits(folder / "exits.png", by_exit, run.metric)
    if run.labels.problem_type != "single_label_classification":
        return
    counts = confusion(full.answers, run.splits["dev"].labels, len(run.labels.names))
    matrix = {"split": "dev", "exit_layer": run.exit_layers[-1], "labels": run.labels.names, "counts": counts.tolist()}
    (folder / "confusion.json").write_text(json.dumps(matrix, indent=1))
    plot_confusion(folder / "confusion.png", counts, run.labels.names, f"dev, exit after layer {run.exit_layers[-1]}")


class FinishedOtherwiseError(ValueError):
    """The output holds the checkpoint of a finished run with other settings."""


def is_finished(run: Run) -> bool:
    """Whether the output already holds the checkpoint of a run with the same settings; `FinishedOtherwiseError` where
    it is another run's, and none with these is under way that would replace it."""
    saved = Path(run.options.output) / SETTINGS
    if not saved.is_file():
        return False
    try:
        found = dict(json.loads(saved.read_text()))  # of earlier versions it may say more
    except (ValueError, TypeError) as error:
        raise ValueError(f"{saved} is damaged ({error}); remove {saved.parent}, or choose another output") from error
    if not is_ours(run.state):
        try:
            check_settings(saved.parent, found, run.settings)
        except ValueError as error:
            raise FinishedOtherwiseError(str(error)) from None
    return all(agrees(found, name, value) for name, value in run.settings.items())
