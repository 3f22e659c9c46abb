"""The stages of a pipeline: each a job of its own on the checkpoint of the one before, carried out once, kept."""

import hashlib
import importlib
import json
import shutil
import time
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from accelerate import Accelerator
from transformers import AutoConfig

from elastic_model.folders import new_file, new_folder, write_json, write_text
from elastic_model.jobs import INTERRUPTED
from elastic_model.operating_points import OperatingPoints, checkpoint_hash
from elastic_model.provenance import append_stage, versions
from elastic_model.session import ElasticSession
from export.config import ExportOptions
from export.write import export_checkpoint, patch_config
from finetune.config import DistillOptions, LabelledOptions, PruneOptions, SearchOptions, TaskOptions, TrainOptions
from finetune.distill import load_teacher, settings_of_student, shallower
from finetune.evaluate import observe, quality
from finetune.evolution import JOURNAL
from finetune.explore import observe_graph
from finetune.kinds import answers_of, problem_type_of
from finetune.pipelines.letters import OPERATORS, name_of
from finetune.pipelines.work import PRUNING, Work, pruned_widths, student_layers, training_options
from finetune.prepare import load_classifier, load_tokenizer
from finetune.prune import Widths
from finetune.run import run_folder
from finetune.state import PROGRESS

RECORD = "stage.json"
SPENT = "seconds"  # of a stage that was interrupted
SHARED = ("epochs", "batch_size", "learning_rate", "train_rows", "max_length", "seed")
OF_OPERATOR: dict[str, tuple[str, ...]] = {  # the options that a stage depends on, beside its parent
    "": SHARED,
    "D": (*SHARED, "layers", "student", "temperature"),
    "P": (*SHARED, "heads", "intermediate", "temperature", "multiple_of", *PRUNING),
    "E": SHARED,
    "S": (*SHARED, "search_iterations", "permitted_loss"),
    "Q": ("max_length",),
}
OF_OTHERS = ("student", "multiple_of", "permitted_loss")  # which a training run has by the name, with other values
ANSWERS = "dev.npz"  # what a stage says of every dev row at every exit, kept beside its weights
POINTS = 24  # length configurations of the front that S chooses from
ExitMetrics = dict[int, dict[str, float]]  # exit layer -> metric -> value
Job = Callable[[Work, str, Path, Path], int]  # work, stage, parent folder, folder -> exit code


def _run(job: str, options: Any) -> int:
    """A command of `finetune`, in this process."""
    module = importlib.import_module(f"finetune.{job}")
    return int(getattr(module, job)(options) or 0)


def _config(folder: Path) -> Any:
    return AutoConfig.from_pretrained(folder, local_files_only=True)


def _nothing(work: Work, stage: str, parent: Path, folder: Path) -> int:
    """O: the model given if it is fine-tuned, else fine-tuned with its last exit alone."""
    config = _config(parent)
    kind = LabelledOptions if problem_type_of(config) else TrainOptions
    options = training_options(kind, work.options, parent, folder, exit_layers=[config.num_hidden_layers])
    if kind is TrainOptions:
        return _run("train", options)
    given = load_teacher(options)
    settings = settings_of_student(options, work.labels, given.exit_layers)
    if given.config.no_answer_threshold is not None:  # it is taken as it is; a stock one has none
        settings |= {"no_answer_threshold": given.config.no_answer_threshold}
    with new_folder(folder) as new:
        shallower(given, config.num_hidden_layers, settings).save_pretrained(new)
        load_tokenizer(parent).save_pretrained(new)
        append_stage(new, "last exit", parent=parent)
    return 0


def _distilled(work: Work, stage: str, parent: Path, folder: Path) -> int:
    options, layers = work.options, _config(parent).num_hidden_layers
    student = {"student": options.student} if options.student else {"layers": student_layers(options, layers)}
    more = {"temperature": options.temperature, "exit_policy": work.policy, **student}
    return _run("distill", training_options(DistillOptions, options, parent, folder, **more))


def _pruned(work: Work, stage: str, parent: Path, folder: Path) -> int:
    options = work.options
    more = {name: getattr(options, name) for name in (*PRUNING, "temperature")}
    more |= {"exit_policy": work.policy, **pruned_widths(options, Widths.of(_config(parent)))}
    return _run("prune", training_options(PruneOptions, options, parent, folder, **more))


def _with_exits(work: Work, stage: str, parent: Path, folder: Path) -> int:
    every = list(range(1, _config(parent).num_hidden_layers + 1))
    more = {"exit_layers": every, "exit_policy": work.policy}
    return _run("train", training_options(TrainOptions, work.options, parent, folder, **more))


def _shorter(work: Work, stage: str, parent: Path, folder: Path) -> int:
    """LengthDrop, then the cheapest lengths within the permitted loss (half of it where exits may lose too)."""
    options = work.options
    more = {"recipe": "sandwich", "phase_epochs": [0, options.epochs], "layer_drop": 0.0, "exit_policy": work.policy}
    if code := _run("train", training_options(TrainOptions, options, parent, folder, **more)):
        return code
    given: dict[str, Any] = {one.name: getattr(options, one.name) for one in fields(TaskOptions)}
    given |= {"model": str(folder), "axes": "lengths", "exit_policy": work.policy, "points": POINTS}
    given |= {"resume": _searched(folder)}
    _run("search", SearchOptions(**given, iterations=options.search_iterations))
    points = OperatingPoints.load(folder)
    full = (points.at("full").quality or {})["value"]
    loss = 100 * abs(full) * options.permitted_loss / (2 if "E" in stage else 1)
    patch_config(folder, {"length_config": points.at(max_drop=loss).length_config})
    return 0


def _searched(folder: Path) -> bool:
    """Whether a search of these very weights was begun."""
    journal = Path(f"{folder}.search") / JOURNAL
    try:
        first = json.loads(journal.read_text(encoding="utf-8").partition("\n")[0])
    except (OSError, ValueError):
        return False
    return first.get("checkpoint") == checkpoint_hash(folder)


def _quantized(work: Work, stage: str, parent: Path, folder: Path) -> int:
    """Without exits and lengths there is nothing to decide at run time: a plain graph, which is faster."""
    config = _config(parent)
    last = config.num_hidden_layers if len(config.exit_layers) == 1 and config.length_config is None else None
    export_checkpoint(ExportOptions(parent, folder, exit=last))
    return 0


JOBS: dict[str, Job] = {
    "": _nothing,
    "D": _distilled,
    "P": _pruned,
    "E": _with_exits,
    "S": _shorter,
    "Q": _quantized,
}


def settings_of(work: Work, letters: str) -> dict[str, Any]:
    """What the last operator of a pipeline depends on: options, the weights of a student, the metrics that decide."""
    found = {name: getattr(work.options, name) for name in OF_OPERATOR[letters[-1:]]}
    if found.get("student") is not None:  # wherever it lies
        found["student"] = checkpoint_hash(found["student"])
    return found if letters.endswith("Q") else {**found, "metrics": list(work.labels.metrics)}


def _parent(work: Work, stage: str) -> Path:
    return work.folder(stage[:-1]) if stage else Path(work.options.model)


def stage_hash(folder: Path) -> str:
    """sha256 of a stage's weights and, where S has chosen lengths, of these too: they are its configuration's."""
    weights = checkpoint_hash(folder)
    lengths = json.loads((folder / "config.json").read_text(encoding="utf-8")).get("length_config")
    return weights if lengths is None else hashlib.sha256(f"{weights} {json.dumps(lengths)}".encode()).hexdigest()


def _check_begun(work: Work, stage: str) -> None:
    """ValueError where a stage was begun with other settings than those given now."""
    running = run_folder(str(work.folder(stage)))
    file = running / "state" / PROGRESS
    if not file.is_file():
        return
    try:
        found = dict(json.loads(file.read_text(encoding="utf-8"))["settings"])
    except (ValueError, KeyError, TypeError):
        return  # damaged: the job itself says so, and how
    remedy = f"choose another --output, or remove {running} to begin it anew"
    for name in (*OF_OPERATOR[stage[-1:]], "metrics"):
        given = getattr(work.options, name)
        free = name not in SHARED and (given is None or name not in found)  # the operator's own choice, or S's search
        if name not in OF_OTHERS and not free and found.get(name) != given:
            raise ValueError(f"stage {running} was begun with {name} = {found.get(name)!r}, not {given!r}; {remedy}")
    for split, rows in work.data.items():
        if found.get(f"{split} rows") != rows:
            raise ValueError(f"stage {running} was begun on other data: its {split} rows differ; {remedy}")


def read_record(work: Work, stage: str) -> dict[str, Any] | None:
    """The record of a stage that was carried out; None where it was not, or its parent has been made anew since.

    ValueError where its folder is of other data or settings, or of another model than the one given, or where it was
    begun with other settings.
    """
    folder = work.folder(stage)
    file = folder / RECORD
    if not file.is_file():
        _check_begun(work, stage)
        return None
    remedy = "choose another --output, or remove the folder to make it anew"
    try:
        record: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        found, data, parent = dict(record["settings"]), dict(record["data"]), record["parent"]["sha256"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not the record of a stage ({error}); {remedy}") from error
    for split, rows in work.data.items():
        if data.get(split) != rows:
            raise ValueError(
                f"stage {folder} was made from other data: its {split} rows differ from those given now; {remedy}"
            )
    if record.get("labels", work.labels.names) != work.labels.names:  # noted only since
        raise ValueError(
            f"stage {folder} was made from data with the labels {record['labels']}, those given now have "
            f"{work.labels.names}; {remedy}"
        )
    for name, value in settings_of(work, stage).items():
        if found.get(name) != value and not (name == "metrics" and name not in found):  # noted only since
            raise ValueError(f"stage {folder} was made with {name} = {found.get(name)!r}, not {value!r}; {remedy}")
    if stage and not (_parent(work, stage) / RECORD).is_file():
        return None
    if parent != stage_hash(_parent(work, stage)):
        if not stage:
            raise ValueError(f"stage {folder} was made from other weights than {work.options.model} has; {remedy}")
        return None
    return record


def answer(work: Work, stage: str) -> ExitMetrics:
    """Ask a stage about dev, keep the logits of every exit beside its weights; quality by exit."""
    folder, size = work.folder(stage), work.options.eval_batch_size
    if "Q" in stage:
        session = ElasticSession.from_pretrained(folder)
        exits, seen = session.exit_layers, observe_graph(session, work.dev, size)
        labels = work.labels_of(session.no_answer_threshold)
    else:
        accelerator = Accelerator()
        model = load_classifier(folder, work.options.max_length).to(accelerator.device)
        exits, seen = model.exit_layers, observe(model, work.dev, load_tokenizer(folder), size, accelerator)
        labels = work.labels_of(model.config.no_answer_threshold)
    with new_file(folder / ANSWERS) as file, file.open("wb") as kept:
        np.savez_compressed(kept, logits=seen.logits)
    return {
        layer: quality(answers_of(one, work.dev, labels), work.dev, labels)
        for layer, one in zip(exits, seen.logits, strict=True)
    }


def read_answers(work: Work, stage: str) -> np.ndarray:
    """The logits of every exit on dev, (exits, rows, ..., labels); ValueError for a damaged file."""
    file = work.folder(stage) / ANSWERS
    try:
        with np.load(file, allow_pickle=False) as kept:
            logits: np.ndarray = kept["logits"]
    except (ValueError, KeyError, EOFError, BadZipFile) as error:
        raise ValueError(f"{file} is damaged ({error}); remove {file.parent} to make the stage anew") from error
    return logits


def carry_out(work: Work, stage: str) -> int:
    """Make one stage if it is missing; exit code 0, or 143 where it was interrupted and may be resumed."""
    folder, parent = work.folder(stage), _parent(work, stage)
    running = run_folder(str(folder))
    if read_record(work, stage) is not None:
        print(f"stage {name_of(stage)}: there already ({folder})", flush=True)
        return 0
    if (folder / RECORD).is_file():
        print(f"stage {name_of(stage)}: {name_of(stage[:-1])} is another since it was made; made again", flush=True)
        shutil.rmtree(folder)
        shutil.rmtree(running, ignore_errors=True)
    print(f"stage {name_of(stage)}: {OPERATORS.get(stage[-1:], 'fine-tuned')}", flush=True)
    spent = running / SPENT  # by the processes that were interrupted
    began = time.monotonic() - (float(spent.read_text()) if spent.is_file() else 0.0)
    code = INTERRUPTED
    try:
        code = JOBS[stage[-1:]](work, stage, parent, folder)
    except ValueError as error:
        if not running.is_dir():
            raise
        raise ValueError(f"{error} (of a pipeline: remove {running} to begin the stage anew)") from error
    finally:
        if code and running.is_dir():
            write_text(spent, f"{time.monotonic() - began:.1f}")
    if code:
        return code
    record = {
        "stage": name_of(stage),
        "parent": {"name": name_of(stage[:-1]) if stage else parent.name, "sha256": stage_hash(parent)},
        "checkpoint": stage_hash(folder),
        "data": work.data,
        "labels": work.labels.names,
        "task": work.options.task,
        "seed": work.options.seed,
        "metrics": answer(work, stage),
        "seconds": time.monotonic() - began,
        "settings": settings_of(work, stage),
        "versions": versions(),
    }
    write_json(folder / RECORD, record)
    shutil.rmtree(running, ignore_errors=True)
    return 0
