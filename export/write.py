"""The artefact: one folder that `from_pretrained`, onnxruntime and ElasticSession understand, kept only if it
passes."""

import ctypes
import gc
import json
import math
import shutil
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import onnx
from tokenizers import Tokenizer

from elastic_model import ElasticBertConfig, ElasticBertModel
from elastic_model.card import write_card
from elastic_model.folders import check_replaceable, new_folder
from elastic_model.operating_points import FILE, OperatingPoints, checkpoint_hash
from elastic_model.processor import ONNX_FILES, cpu_flags, fitting_files
from elastic_model.provenance import append_stage, file_hash, versions
from elastic_model.session import (
    REPORT,
    ElasticSession,
    Text,
    check_text,
    load_tokenizer,
    with_short_questions,
    without_truncation,
)
from export.arithmetic import ARITHMETICS, INT8, Arithmetic, arithmetic_of
from export.card import card_notes, stock_card, summary
from export.check import (
    Answers,
    Reference,
    answers_of,
    check_against_float32,
    check_float32,
    matrix_products,
    quality,
    random_rows,
    references,
)
from export.checkpoint import Checkpoint, load_checkpoint
from export.config import ExportOptions
from export.emulated import EmulatedSession
from export.graph import REQUIRES, build_graph, build_plain_graph
from export.predict import read_budget
from export.ranges import input_ranges
from export.rows import read_column, read_texts
from export.stock import write_stock
from export.task import QUESTIONS, REGRESSION, SINGLE_LABEL, Task, cut_config, metadata, task_of

FLOAT32 = "model"
OF_ROWS = ("text", "pair", "label", "max_rows", "min_agreement")  # options that say how --rows are used


@dataclass(frozen=True)
class Sample:
    """Rows to compare files on; labels: None where they are not known."""

    texts: list[Text]
    labels: list[str] | None


@dataclass(frozen=True)
class Written:
    """What is known of the ONNX files before they are checked: the task, what PyTorch says, what to compare on, and
    of each file its matrix products."""

    task: Task
    expected: list[Reference]
    rows: list[Any]
    products: dict[str, dict[str, Any]]


def export_checkpoint(options: ExportOptions) -> dict[str, Any]:
    """Write the artefact of a checkpoint to `options.output` and return its report; ValueError, and nothing written,
    where an option or a check fails."""
    check_replaceable(options.output, options.checkpoint, options.rows)
    files = chosen_files(options)
    sample = read_sample(options)
    with new_folder(options.output) as folder:
        (folder / "onnx").mkdir()
        written, report = write_all(options, files, sample, folder)  # PyTorch's copy of the weights ends with it
        release_memory()
        report |= {
            "versions": versions(),
            "requires": REQUIRES,
            "policy": written.task.policy,
            "thresholds": written.task.thresholds,
            "length_config": written.task.lengths,
            "files": check_files(options, written, files, sample, folder),
        }
        (folder / REPORT).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        append_stage(folder, "export", parent=options.checkpoint, settings={"files": files})
        name = options.output.resolve().name
        if options.to is None:
            write_card(folder, name=name, notes=card_notes(report))
        else:
            (folder / "README.md").write_text(stock_card(name, report), encoding="utf-8")
    return report


def export(options: ExportOptions) -> None:
    """Write the artefact and say what was checked."""
    report = export_checkpoint(options)
    for name, result in report["files"].items():
        print(f"{options.output}/onnx/{name}.onnx: {summary(result)}")


def release_memory() -> None:
    """Give freed weights back to the system: glibc keeps blocks below 32 MiB for itself."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def chosen_files(options: ExportOptions) -> list[str]:
    """The float32 file and those asked for, by default the int8 one for this CPU; ValueError for options that do not
    go together."""
    unknown = [name for name in options.files if name not in ARITHMETICS]
    if unknown:
        raise ValueError(f"--files {' '.join(unknown)}: unknown; allowed: {', '.join(ARITHMETICS)}")
    if not 0 <= options.min_agreement <= 1:
        raise ValueError(f"min_agreement must be from 0 to 1, got {options.min_agreement:g}")
    of_rows = [one for one in fields(ExportOptions) if one.name in OF_ROWS]
    given = [f"--{one.name}" for one in of_rows if getattr(options, one.name) != one.default]
    given += ["--activations static"] if options.activations == "static" else []
    if given and options.rows is None:
        raise ValueError(f"{given[0]} needs --rows, a file of texts")
    if options.at and (options.exit or options.to):
        raise ValueError("--at chooses defaults of a file with exits; a plain file (--exit, --to) has none")
    if options.exit is not None and options.exit < 1:
        raise ValueError(f"--exit must be a layer from 1, got {options.exit}")
    best = options.files or [name for name in fitting_files(cpu_flags()) if name in INT8][:1]
    if options.activations != "token" and not set(best) & set(INT8):
        raise ValueError(f"--activations {options.activations} is of int8 files; --files names {' '.join(best)}")
    files = list(dict.fromkeys([FLOAT32, *best]))
    if options.emulator is not None and not any(map(_missing, files)):
        raise ValueError(f"--emulator {options.emulator} would do nothing: this CPU runs {' and '.join(files)} itself")
    return files


def _missing(file: str) -> frozenset[str]:
    """The features of which a file needs one, where this CPU has none of them."""
    needed = frozenset(ONNX_FILES[file])
    return frozenset() if needed & cpu_flags() else needed


def read_sample(options: ExportOptions) -> Sample | None:
    """The rows to compare on, where they are given."""
    if options.rows is None:
        return None
    texts = read_texts(options.rows, options.text, options.pair, options.max_rows)
    labels = read_column(options.rows, options.label, options.max_rows) if options.label else None
    return Sample(texts, labels)


def write_all(
    options: ExportOptions, files: list[str], sample: Sample | None, folder: Path
) -> tuple[Written, dict[str, Any]]:
    """The checkpoint's files and the ONNX files, not yet checked; and what the report says of the checkpoint."""
    checkpoint = load_checkpoint(options.checkpoint)
    config = checkpoint.config
    points = OperatingPoints.load(checkpoint.folder) if (checkpoint.folder / FILE).is_file() else None
    plain = plain_layer(options, config)
    if options.at:
        apply_point(config, points, options.at)
    task = task_of(config, points.policy if points else None, checkpoint.architecture)
    if sample and sample.labels and task.problem_type not in (SINGLE_LABEL, REGRESSION):
        raise ValueError(f"--label: quality is measured for classification and regression, not {task.problem_type}")
    if sample and sample.labels:
        check_labels(sample.labels, task, config)
    report = {"activations": options.activations, **write_checkpoint(options, checkpoint, plain, folder)}
    if points is not None and plain is None:
        points.save(folder)
    expected = references(checkpoint, task, config.exit_layers if plain is None else [plain])
    reads = checkpoint.max_tokens, task.problem_type, checkpoint.truncation_side
    tokenizer = load_tokenizer(options.checkpoint / "tokenizer.json", *reads)
    rows = sample_rows(checkpoint, task, sample, tokenizer)
    ranges = input_ranges(checkpoint, rows) if options.activations == "static" else None
    products = {}
    for name in files:
        arithmetic = arithmetic_of(name, options.activations, ranges)
        products[name] = write_graph(checkpoint, task, arithmetic, plain, points, folder / "onnx" / f"{name}.onnx")
    return Written(task, expected, rows, products), report


def check_labels(labels: list[str], task: Task, config: ElasticBertConfig) -> None:
    """ValueError for labels of the rows that the model cannot answer."""
    if task.problem_type == SINGLE_LABEL:
        names = set((config.id2label or {}).values())
        unknown = sorted(set(labels) - names)
        expected = f"its labels are {', '.join(sorted(names))}"
    else:
        unknown = sorted({label for label in labels if not _is_number(label)})
        expected = "a regression's are numbers"
    if unknown:
        raise ValueError(f"--label: the model answers no {', '.join(map(repr, unknown[:5]))}; {expected}")


def _is_number(text: str) -> bool:
    try:
        return math.isfinite(float(text))
    except ValueError:
        return False


def write_checkpoint(
    options: ExportOptions, checkpoint: Checkpoint, plain: int | None, folder: Path
) -> dict[str, Any]:
    """What is not ONNX: the checkpoint's own files, or stock BERT's, set to run as the ONNX files do."""
    for file in checkpoint.files():
        if options.to is None or file.name.startswith(("tokenizer", "vocab", "merges", "special", "provenance")):
            shutil.copyfile(file, folder / file.name)
    if options.to is not None and plain is not None:
        return {"exit": plain, "stock_difference": write_stock(checkpoint, plain, folder)}
    if plain is not None and checkpoint.architecture == "ElasticBertModel":
        cut_encoder(checkpoint, plain).save_pretrained(folder)
        return {"exit": plain}
    if plain is not None:
        patch_config(folder, {"exit_policy": {"name": "constant", "layer": plain}, "length_config": None})
        return {"exit": plain}
    if options.at:
        chosen = {name: getattr(checkpoint.config, name) for name in ("exit_policy", "length_config")}
        patch_config(folder, chosen)
        return {"at": options.at}
    return {}


def cut_encoder(checkpoint: Checkpoint, layer: int) -> ElasticBertModel:
    """The bare model's layers up to an exit: it has no policy that would end there."""
    model = ElasticBertModel(cut_config(checkpoint.config, layer))
    weights = checkpoint.model.state_dict()
    model.load_state_dict({name: weights[name] for name in model.state_dict()})
    return model


def write_graph(
    checkpoint: Checkpoint,
    task: Task,
    arithmetic: Arithmetic,
    plain: int | None,
    points: OperatingPoints | None,
    file: Path,
) -> dict[str, Any]:
    """One ONNX file with its metadata; what its matrix products are, and what goes in and comes out."""
    config = checkpoint.config if plain is None else cut_config(checkpoint.config, plain)
    if plain is None:
        model = build_graph(config, checkpoint.tensors, task, arithmetic)
    else:
        model = build_plain_graph(config, checkpoint.tensors, task, arithmetic, plain)
    own = {"max_tokens": checkpoint.max_tokens, "truncation_side": checkpoint.truncation_side}
    own |= {"checkpoint": checkpoint_hash(checkpoint.folder)}
    entries = metadata(config, task, own, versions(), REQUIRES, plain)
    if points is not None and plain is None:
        entries["elastic_operating_points"] = json.dumps(points.to_dict())
    onnx.helper.set_model_props(model.proto, entries)
    model.save(file)
    graph = model.proto.graph
    names = {"inputs": [one.name for one in graph.input], "outputs": [one.name for one in graph.output]}
    return {**matrix_products(model), **names}


def sample_rows(checkpoint: Checkpoint, task: Task, sample: Sample | None, tokenizer: Tokenizer) -> list[Any]:
    """Encodings of the sample's texts, windows beyond the first left out; without one, rows of random tokens.
    ValueError for texts of another kind than the task reads."""
    if sample is None:
        return [row for rows in random_rows(checkpoint) for row in rows]
    texts = sample.texts
    for number, text in enumerate(texts):
        check_text(text, number, task.problem_type)
    if task.problem_type == QUESTIONS:
        texts = with_short_questions(without_truncation(tokenizer), texts, checkpoint.max_tokens)
    return tokenizer.encode_batch(texts)


def check_files(
    options: ExportOptions, written: Written, files: list[str], sample: Sample | None, folder: Path
) -> dict[str, Any]:
    """What was found of every file, one after another, so that one is in memory at a time; ValueError where a check
    fails."""
    checks: dict[str, Any] = {}
    float32: Answers | None = None
    for name in files:
        path = folder / "onnx" / f"{name}.onnx"
        onnx.checker.check_model(path)  # first: it takes twice the file's size
        missing = _missing(name)
        if missing and options.emulator is None:
            checks[name] = {"unchecked": f"this CPU has none of {', '.join(sorted(missing))}"}
        else:
            session = open_session(path, folder / "tokenizer.json", options.emulator if missing else None)
            if name == FLOAT32:
                checks[name] = check_float32(session, written.task, written.expected)
            answers = answers_of(session, written.rows)
            if float32 is None:
                float32 = answers
            else:
                checks[name] = check_against_float32(
                    session, answers, float32, sample is not None, options.min_agreement
                )
            if sample and sample.labels:
                checks[name]["quality"] = quality(session, answers, sample.labels)
            if isinstance(session, EmulatedSession):
                checks[name]["emulated"] = session.machine
                session.close()
            del session
        release_memory()
        checks[name] |= written.products[name] | {"bytes": path.stat().st_size}
        checks[name]["sha256"] = file_hash(path)
    return checks


def open_session(file: Path, tokenizer: Path, emulator: str | None) -> ElasticSession:
    """A file's session, of one thread; under an emulator where one is given."""
    return (
        ElasticSession(file, tokenizer, threads=1) if emulator is None else EmulatedSession(emulator, file, tokenizer)
    )


def plain_layer(options: ExportOptions, config: ElasticBertConfig) -> int | None:
    """The exit that a plain file is cut after, or None; ValueError where there is no such exit."""
    if options.exit is None:
        return config.num_hidden_layers if options.to else None
    if options.exit not in config.exit_layers:
        raise ValueError(f"--exit {options.exit}: the exits are after layers {config.exit_layers}")
    return options.exit


def apply_point(config: ElasticBertConfig, points: OperatingPoints | None, at: str) -> None:
    """Make an operating point the configuration's default."""
    if points is None:
        raise ValueError(f"--at {at}: the checkpoint has no {FILE}; measure some first (python -m finetune search)")
    budget = read_budget(at, "--at")
    assert budget is not None
    config.exit_policy, config.length_config = points.at(budget)


def patch_config(folder: Path, fields: dict[str, Any]) -> None:
    """Set fields of config.json, so that the PyTorch model runs as the ONNX files do."""
    file = folder / "config.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps({**content, **fields}, indent=2) + "\n", encoding="utf-8")
