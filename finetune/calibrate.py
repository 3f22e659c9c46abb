"""`python -m finetune calibrate`: exit thresholds that bound, with confidence, how often an answer changes."""

import csv
import json
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerBase

from elastic_model.calibration import Drift, check_rows, drift, fixed_sequence, upper_bound
from elastic_model.checks import check_length_config, policy_kind, warn_of_other_texts
from elastic_model.cost import mean_flops
from elastic_model.exit_policies import sweep
from elastic_model.folders import check_file, check_writable, is_file, write_json
from elastic_model.operating_points import FILE, FULL, OperatingPoint, OperatingPoints, checkpoint_hash
from elastic_model.provenance import read_provenance
from elastic_model.session import ElasticSession
from finetune.config import CalibrateOptions
from finetune.data import Encoded, encode, rows_of
from finetune.evaluate import check_learned, score_of, table
from finetune.evaluate import observe as observed_of
from finetune.examples import read_examples
from finetune.explore import check_finite
from finetune.figures import plot_points
from finetune.kinds import answers_of, problem_type_of
from finetune.labels import Labels
from finetune.policies import Policy, candidates, never, patience_of, policy_name, thresholds
from finetune.prepare import (
    chosen_task,
    encode_split,
    labels_of_model,
    length_for,
    load_classifier,
    load_tokenizer,
    rows_hash,
)
from finetune.tasks import ProblemType
from finetune.teacher import ask, final_logits, label_order, load_stock
from finetune.texts import Texts, read_texts

NAME = "calibrated"  # of the operating point written
SUSPICIOUS = 0.01  # p-value of a drift that is reported as one
SEQUENCES = ("single_label_classification", "multi_label_classification", "regression")
LOOSEST = 4.0  # tolerances: the loosest threshold of a regression's patience that is tried


@dataclass(frozen=True)
class Rows:
    """The calibration rows: as texts, as token ids; `labelled`: whether `encoded` holds their labels."""

    texts: Texts
    encoded: Encoded
    labels: Labels
    labelled: bool


@dataclass(frozen=True)
class Certified:
    """What was found: the setting chosen, where each row leaves under it (rows,), and which rows fail there."""

    policy: Policy
    places: np.ndarray
    failing: np.ndarray
    settings: int


def is_artefact(folder: Path) -> bool:
    """Whether a folder is one that `python -m export` wrote."""
    return (folder / "onnx").is_dir()


def _check(options: CalibrateOptions, problem_type: str) -> None:
    bounds = {name: getattr(options, name) for name in ("max_disagreement", "max_accuracy_loss")}
    given = [name for name, value in bounds.items() if value is not None]
    if len(given) != 1:
        raise ValueError("give one bound: --max-disagreement or --max-accuracy-loss")
    for name in (*given, "confidence"):
        if not 0 < getattr(options, name) < 1:
            raise ValueError(f"{name} must lie between 0 and 1, both left out, got {getattr(options, name)}")
    if options.eval_batch_size < 1:
        raise ValueError(f"eval_batch_size must be at least 1, got {options.eval_batch_size}")
    if (options.tolerance is not None) != (problem_type == "regression"):
        raise ValueError(
            "regression needs --tolerance, the absolute deviation that is allowed"
            if problem_type == "regression"
            else f"--tolerance is for regression, this model is for {problem_type}"
        )
    if options.tolerance is not None and not options.tolerance > 0:
        raise ValueError(f"tolerance must be above 0, got {options.tolerance}")
    without_classes = ("regression", "question_answering")
    if options.max_accuracy_loss is not None and (options.texts or problem_type in without_classes):
        raise ValueError("--max-accuracy-loss needs labels of classes; use --max-disagreement")


def read_rows(options: CalibrateOptions, config: Any, tokenizer: PreTrainedTokenizerBase) -> Rows:
    """The rows of a labelled split, or unlabelled texts."""
    if options.texts is None:
        task = chosen_task(options)
        labels, examples = labels_of_model(options, task, config), read_examples(task, options.split)
        if not len(examples):
            raise ValueError(f"the {options.split} split has no rows to calibrate on")
        encoded = encode_split(examples, options.split, task, labels, tokenizer, options.max_length)
        return Rows(Texts(examples.texts, examples.pairs), encoded, labels, True)
    unread = ("task", "dataset", "dataset_config", "train", "dev", "test", "label", "problem_type", "metrics")
    given = [f"--{name}" for name in unread if getattr(options, name)]
    if given := given + ["--split"] * (options.split != CalibrateOptions.split):
        raise ValueError(f"--texts are calibrated on without a task and its labels: leave {', '.join(given)} away")
    problem_type = problem_type_of(config)
    if problem_type not in SEQUENCES:
        raise ValueError(f"--texts calibrate classifiers and regression; a model for {problem_type} needs a task")
    texts = read_texts(Path(options.texts), options.text, options.pair)
    names = [config.id2label[number] for number in range(config.num_labels)]
    encoded = encode(texts, tokenizer, options.max_length)
    warn_of_other_texts(config.text_pairs, texts.pairs is not None)
    return Rows(texts, encoded, Labels(problem_type, names, ()), False)


@dataclass(frozen=True)
class Served:
    """What is served says of the rows: every exit's logits (exits, rows, ...) at the lengths asked for, the full
    model's (rows, ...), and a learned exit head's uncertainties (exits, rows)."""

    logits: np.ndarray
    full: np.ndarray
    uncertainty: np.ndarray | None = None


def observe(options: CalibrateOptions, rows: Rows, session: ElasticSession | None) -> Served:
    """Pass the rows through the checkpoint or the exported file."""
    lengths = options.length_config or None
    if session is None:
        model = load_classifier(Path(options.model), options.max_length)
        how = (rows.encoded, load_tokenizer(Path(options.model)), options.eval_batch_size, Accelerator())
        check_learned({"name": options.exit_policy}, model.config)
        seen = observed_of(model, *how, length_config=lengths)
        whole = lengths is None and model.config.length_config is None
        full = seen.logits[-1] if whole else observed_of(model, *how, length_config=1.0).logits[-1]
        return Served(seen.logits, full, seen.uncertainty)
    if rows.labels.problem_type not in SEQUENCES:
        raise ValueError("an exported folder is calibrated for classes and numbers; calibrate this on its checkpoint")
    if options.exit_policy == "learned":
        raise ValueError("an exported file does not tell its learned head's uncertainty; calibrate the checkpoint")
    texts: list[Any] = rows.texts.texts
    if rows.texts.pairs:
        texts = list(zip(rows.texts.texts, rows.texts.pairs, strict=True))
    logits, shortened = session.exit_logits(texts, length_config=lengths), lengths or session.lengths
    check_finite(logits, dict(enumerate(session.exit_layers)), "the exported file's")
    if shortened == [1.0] * len(shortened):
        return Served(logits, logits[-1])
    return Served(logits, session.exit_logits(texts, length_config=[1.0] * session.layers)[-1])


def reference_answers(options: CalibrateOptions, rows: Rows, full: np.ndarray) -> np.ndarray:
    """The answers that count: those of the full model as served, or of the reference."""
    if options.reference is None:
        return answers_of(full, rows.encoded, rows.labels)
    labels = rows.labels
    if labels.problem_type not in SEQUENCES:
        raise ValueError(f"--reference is a classifier; this model is for {labels.problem_type}")
    order = label_order(options.reference, labels.names, labels.problem_type)
    tokenizer = AutoTokenizer.from_pretrained(options.reference)
    model = load_stock(options.reference, labels.problem_type)
    length = length_for(model.config, tokenizer, options.max_length)
    encoding = tokenizer(rows.texts.texts, rows.texts.pairs, truncation=True, max_length=length)
    encoded = replace(rows.encoded, rows=rows_of(encoding))
    logits = np.stack(ask(model, encoded, tokenizer, options.eval_batch_size, Accelerator(), final_logits))
    return answers_of(logits if order is None else logits[:, order], rows.encoded, labels)


def differing(answers: np.ndarray, reference: np.ndarray, tolerance: float | None) -> np.ndarray:
    """Which examples are answered otherwise: (examples,) booleans; numbers further apart than the tolerance."""
    if tolerance is not None:
        return ~(np.abs(answers - reference) <= tolerance)  # what is NaN differs
    other = answers != reference
    return other if other.ndim == 1 else other.any(1)


def failures(
    options: CalibrateOptions, rows: Rows, logits: np.ndarray, places: np.ndarray, reference: np.ndarray
) -> np.ndarray:
    """Which examples fail where each row leaves at the exit `places` (rows,): (examples,) booleans."""
    left = logits[places, np.arange(logits.shape[1])]
    wrong = differing(answers_of(left, rows.encoded, rows.labels), reference, options.tolerance)
    if options.max_accuracy_loss is None:
        return wrong
    truth = rows.encoded.labels
    right = reference == truth
    return wrong & (right if right.ndim == 1 else right.all(1))


def certify(
    options: CalibrateOptions, rows: Rows, served: Served, reference: np.ndarray, config: Any, patience: int = 1
) -> Certified:
    """The loosest setting certified in the fixed order; ValueError where not even full depth is.

    patience: the steps that a regression's counts.
    """
    logits, labels, epsilon = served.logits, rows.labels, options.max_disagreement or options.max_accuracy_loss
    assert epsilon is not None  # _check has seen to it
    name, exits = policy_name(options.exit_policy, labels.problem_type), len(logits)
    largest = None if options.tolerance is None else LOOSEST * options.tolerance
    policies = [never(name, exits, labels.problem_type, patience)]
    policies += candidates(name, logits, labels.problem_type, largest, patience) if exits > 1 else []
    how = (config.exit_layers, labels.problem_type, rows.encoded.mask, served.uncertainty)
    places = sweep(policies, logits, *how).numpy()
    failing = np.stack([failures(options, rows, logits, one, reference) for one in places])
    count, failed = failing.shape[1], failing.sum(1)
    best = fixed_sequence(failed, count, epsilon, options.confidence)
    if best is None:
        bound = upper_bound(int(failed[0]), count, options.confidence)
        raise ValueError(
            f"not even full depth can be certified: {failed[0]} of {count} rows fail there (a rate of up to "
            f"{bound:.4f} with confidence {options.confidence:g}); {epsilon:g} was asked"
        )
    while best and (places[best - 1] == places[best]).all():  # of equals the strictest: no further than was seen
        best -= 1
    return Certified(policies[best], places[best], failing[best], len(policies))


def _quality(options: CalibrateOptions, rows: Rows, logits: np.ndarray) -> dict[str, Any] | None:
    """Of the logits (rows, ...) that answer, where there are labels."""
    if not rows.labelled:
        return None
    score = score_of(answers_of(logits, rows.encoded, rows.labels), rows.encoded, rows.labels, options.seed)
    return {**vars(score), "split": options.split}


def full_point(options: CalibrateOptions, rows: Rows, full: np.ndarray, found: Certified, config: Any):
    """Full depth and length on the calibration rows: what the calibrated point is counted against."""
    exits, name = config.exit_layers, found.policy["name"]
    return OperatingPoint(
        FULL,
        thresholds(name, None, len(exits), rows.labels.problem_type),
        float(exits[-1]),
        [1.0] * config.num_hidden_layers,
        flops=mean_flops(config, rows.encoded.lengths, None, 1.0, rows.encoded.head),
        quality=_quality(options, rows, full),
    )


def point_of(options: CalibrateOptions, rows: Rows, logits: np.ndarray, found: Certified, config: Any, file: str):
    """The operating point of a certified setting, with what it promises."""
    layers = np.asarray(config.exit_layers)[found.places]
    lengths = options.length_config or config.length_config or [1.0] * config.num_hidden_layers
    failed, count = int(found.failing.sum()), len(found.failing)
    kind = "disagreement" if options.max_accuracy_loss is None else "accuracy loss"
    promise = {
        "bounds": kind,
        "at_most": options.max_disagreement or options.max_accuracy_loss,
        "confidence": options.confidence,
        "tolerance": options.tolerance,
        "against": Path(options.reference).name if options.reference else "the full model as served",
        "rows": count,
        "failures": failed,
        "upper_bound": upper_bound(failed, count, options.confidence),
        "settings_tried": found.settings,
        "file": file,
        "exit_counts": {str(layer): int(number) for layer, number in sorted(Counter(layers.tolist()).items())},
    }
    exits, problem_type = len(logits), rows.labels.problem_type
    return OperatingPoint(
        NAME,
        thresholds(found.policy["name"], found.policy, exits, problem_type),
        float(layers.mean()),
        list(lengths),
        flops=mean_flops(config, rows.encoded.lengths, layers.tolist(), lengths, rows.encoded.head),
        quality=_quality(options, rows, logits[found.places, np.arange(len(layers))]),
        calibration=promise,
    )


def per_class(rows: Rows, reference: np.ndarray, found: Certified, confidence: float) -> list[dict[str, Any]]:
    """Of each class that the reference answers: rows, failures, and the bound that holds for this class alone."""
    if rows.labels.problem_type != "single_label_classification":
        return []
    lines = []
    for number, name in enumerate(rows.labels.names):
        inside = reference == number
        count, failed = int(inside.sum()), int(found.failing[inside].sum())
        bound = upper_bound(failed, count, confidence) if count else None
        lines.append({"class": name, "rows": count, "failures": failed, "upper_bound": bound})
    return lines


def report(point: OperatingPoint, full_flops: float, classes: list[dict[str, Any]], policy: Policy) -> dict[str, Any]:
    """What is printed and written: the setting, what it promises and what not, and what it saves."""
    promise = point.calibration or {}
    event = "an answer differs from that of" if promise["bounds"] == "disagreement" else "accuracy is lost against"
    return {
        "policy": policy,
        "guarantee": (
            f"P({event} {promise['against']}) <= {promise['at_most']:g} with confidence {promise['confidence']:g} "
            "over the draw of the calibration rows; marginal: a mean over rows that come from where those come from "
            "(exchangeable), not a promise for each class or row"
        ),
        **promise,
        "mean_exit_layer": point.mean_exit_layer,
        "speedup": full_flops / point.flops if point.flops else None,
        "classes": classes,
    }


def chosen_on(
    folder: Path, options: CalibrateOptions, config: Any, tokenizer: PreTrainedTokenizerBase, labelled: bool
) -> str | None:
    """What to say of rows that an earlier stage of the checkpoint was trained or chosen on; None of others.

    A stage has noted its rows as it read them, cut at its own length; those of test training only reports.
    """
    if not labelled:
        return None
    known: dict[int, str] = {}
    split = options.split
    for stage in read_provenance(folder):
        length = stage.settings.get("max_length", options.max_length)
        if length not in known:
            known[length] = rows_hash(read_rows(replace(options, max_length=length), config, tokenizer).encoded)
        read = known[length]
        chose = [data for data in stage.data if data.split != "test"]
        if any(data.sha256 == read or (data.name, data.split) == (options.task, split) for data in chose):
            return (
                f"the stage {stage.stage!r} of this checkpoint was trained or chosen on these rows ({split}): the "
                "guarantee is for rows that chose nothing (another --split, other files, --texts)"
            )
    return None


def points_of(folder: Path) -> OperatingPoints:
    """The operating points of a checkpoint or exported folder; none where it has none of its weights."""
    return OperatingPoints.find(folder) or OperatingPoints(checkpoint_hash(folder), {})


def save(
    folder: Path, points: OperatingPoints, point: OperatingPoint, full: OperatingPoint, policy: Policy
) -> OperatingPoints:
    """Put the calibrated point among the others, which are returned; a checkpoint takes its policy as its default.

    A table has one policy: points of another are left out, and said. Its costs are of the same rows: of the table's
    full depth the calibrated point costs the share that it cost of `full`, full depth on the calibration rows, whose
    quality it notes; where the table has none, `full` is put into it.
    """
    same = not points.policy or policy_kind(points.policy) == policy_kind(policy)
    others = [one for one in points.points if one.name != NAME] if same else []
    if points.points and not same:
        left = ", ".join(one.name for one in points.points)
        print(f"{folder / FILE}: its points ({left}) are of the policy {points.policy['name']!r}, and left out")
    if full.quality:
        point = replace(point, calibration={**(point.calibration or {}), "full_quality": full.quality["value"]})
    there = next((one for one in others if one.name == FULL), None)
    if there is None:
        others = [full, *others]
    elif there.flops and full.flops and point.flops:
        point = replace(point, flops=point.flops * there.flops / full.flops)
    saved = OperatingPoints(points.checkpoint, policy, [*others, point])
    saved.save(folder)
    if not is_artefact(folder):
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        lengths = (
            point.length_config if check_length_config(point.length_config, len(point.length_config or ())) else None
        )
        content |= {"exit_policy": policy, "length_config": lengths}
        write_json(folder / "config.json", content, indent=2)
    return saved


def calibrate(options: CalibrateOptions) -> None:
    """Certify thresholds on held-out rows, print what they promise, and keep them with what was calibrated."""
    folder = Path(options.model)
    if options.output:
        output = Path(options.output)
        for file in (output, output.with_suffix(".png")) if is_file(output) else (output,):
            check_file(file, options.texts, options.drift, options.train, options.dev, options.test)
    if options.drift is not None:
        return check_drift(options)
    tokenizer = load_tokenizer(folder)
    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    problem_type = problem_type_of(config)
    if config.model_type != "elasticbert" or problem_type is None:
        raise ValueError(f"{folder} is neither a task checkpoint of ours nor a folder that `python -m export` wrote")
    _check(options, problem_type)
    check_writable(folder)
    if not options.length_config and isinstance(config.length_config, dict):
        raise ValueError(
            f"{folder}: rows choose their own lengths ({config.length_config}), whose cost is not known beforehand; "
            "calibrate at shares: --length_config, one a layer (1.0: all tokens)"
        )
    points = points_of(folder)
    if options.file and not is_artefact(folder):
        raise ValueError(f"--file names one of an exported folder, and {folder} is a checkpoint: leave it away")
    session = ElasticSession.from_pretrained(folder, options.file, points=False) if is_artefact(folder) else None
    if session is not None and options.max_length != session.max_tokens:
        print(f"note: an exported folder reads up to {session.max_tokens} tokens of a row, whatever --max_length")
        options = replace(options, max_length=session.max_tokens)
    in_force = session.policy if session is not None else points.policy or config.exit_policy
    options = replace(options, exit_policy=_policy(options, in_force, problem_type, session))
    rows = read_rows(options, config, tokenizer)
    epsilon = options.max_disagreement or options.max_accuracy_loss or 0.0
    check_rows(len(rows.encoded.labels), epsilon, options.confidence)
    served = observe(options, rows, session)
    reference = reference_answers(options, rows, served.full)
    found = certify(options, rows, served, reference, config, patience_of(in_force))
    point = point_of(options, rows, served.logits, found, config, session.file.stem if session else "pytorch")
    full = full_point(options, rows, served.full, found, config)
    result = report(point, full.flops or 0.0, per_class(rows, reference, found, options.confidence), found.policy)
    if chosen := chosen_on(folder, options, config, tokenizer, rows.labelled):
        result["warning"] = chosen
    saved = save(folder, points, point, full, found.policy)
    if options.output:
        write_json(Path(options.output), result)
        if is_file(Path(options.output)):
            plot_points(Path(options.output).with_suffix(".png"), saved)
    show(result, folder)


def _policy(
    options: CalibrateOptions, in_force: Policy | None, problem_type: ProblemType, session: ElasticSession | None
) -> str:
    built_in = (in_force or {}).get("name")
    if session is not None and options.exit_policy not in (None, built_in):
        raise ValueError(
            f"{session.file} has the exit policy {built_in!r}, not {options.exit_policy!r}; export one with it"
        )
    return policy_name(options.exit_policy, problem_type, in_force)


def show(result: dict[str, Any], folder: Path) -> None:
    """Print a report."""
    print(f"{result['guarantee']}\n")
    print(f"{result['failures']} of {result['rows']} rows fail: a rate of at most {result['upper_bound']:.4f}")
    print(f"mean exit layer {result['mean_exit_layer']:.2f}, {result['speedup']:.2f} times fewer FLOPs")
    print(f"policy {result['policy']}")
    if "warning" in result:
        print(f"\nwarning: {result['warning']}")
    if result["classes"]:
        lines = [
            [
                one["class"],
                one["rows"],
                one["failures"],
                "-" if one["upper_bound"] is None else f"{one['upper_bound']:.4f}",
            ]
            for one in result["classes"]
        ]
        print("", table(["answered class", "rows", "failures", "bound of this class alone"], lines), sep="\n")
    print(f"\nwritten to {folder / FILE} as the point {NAME!r}")


def served_counts(file: Path) -> dict[int, int]:
    """Rows by exit layer of a file of answers in service; ValueError where it has no such column."""
    with file.open(encoding="utf-8", newline="") as lines:
        rows = list(csv.DictReader(lines, delimiter="\t", quoting=csv.QUOTE_NONE))
    if not rows or "exit_layer" not in rows[0]:
        found = ", ".join(rows[0]) if rows else "no rows"
        raise ValueError(
            f"{file} has no column exit_layer (found: {found}); give what `python -m export predict` writes"
        )
    others = {row["point"] for row in rows if row.get("point") not in (None, NAME)}
    if others:
        raise ValueError(
            f"{file} holds answers at the point {', '.join(sorted(others))}, not {NAME!r}; give those of predict "
            f"--budget {NAME}"
        )
    try:
        return dict(Counter(int(row["exit_layer"]) for row in rows))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file}: an exit_layer is not a whole number: {error}") from error


def check_drift(options: CalibrateOptions) -> None:
    """Print whether the rows in service leave where the calibration rows left."""
    point = points_of(Path(options.model)).at(NAME)
    if point.calibration is None:
        raise ValueError(f"the point {NAME!r} of {options.model} has no guarantee to watch; calibrate it first")
    counts = {int(layer): count for layer, count in point.calibration["exit_counts"].items()}
    found: Drift = drift(counts, served_counts(Path(str(options.drift))), options.seed)
    lines = [[layer, f"{found.calibrated[layer]:.4f}", f"{found.served[layer]:.4f}"] for layer in found.calibrated]
    print(table(["exit layer", "calibrated", "in service"], lines))
    print(f"\n{found.distance:.4f} of the rows leave elsewhere, p-value {found.p_value:.4f}")
    drifted = found.p_value < SUSPICIOUS
    print(
        "the rows have changed: the guarantee does not cover them, calibrate anew" if drifted else "no drift is seen"
    )
    if options.output:
        write_json(Path(options.output), {**vars(found), "drifted": drifted})
