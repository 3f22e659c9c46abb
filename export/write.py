"""The artefact: one folder that `from_pretrained`, onnxruntime and ElasticSession understand, kept only if it
passes."""

import json
import shutil
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx

from elastic_model.card import write_card
from elastic_model.folders import check_output, new_folder
from elastic_model.operating_points import FILE, OperatingPoints, checkpoint_hash
from elastic_model.processor import ONNX_FILES, cpu_flags, fitting_files
from elastic_model.provenance import append_stage
from elastic_model.session import ElasticSession, Text
from export.arithmetic import ARITHMETICS
from export.card import card_notes
from export.check import check_float32, check_int8, check_model_file
from export.checkpoint import Checkpoint, load_checkpoint
from export.config import ExportOptions
from export.graph import REQUIRES, Task, build_graph, metadata, task_of
from export.rows import read_texts

FLOAT32 = "model"


def export_checkpoint(options: ExportOptions) -> dict[str, Any]:
    """Write the artefact of a checkpoint to `options.output` and return its report; ValueError, and nothing written,
    where a check fails."""
    check_output(options.output)
    files = chosen_files(options.files)
    checkpoint = load_checkpoint(options.checkpoint)
    texts = read_texts(options.rows, options.text, options.pair, options.max_rows) if options.rows else None
    with new_folder(options.output) as folder:
        for file in checkpoint.files():
            shutil.copyfile(file, folder / file.name)
        points = carry_points(checkpoint, folder)
        report = write_files(checkpoint, files, folder, points, texts, options.min_agreement)
        (folder / "export_report.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        append_stage(folder, "export", parent=checkpoint.folder, settings={"files": files})
        write_card(folder, name=options.output.resolve().name, notes=card_notes(report))
    return report


def chosen_files(names: list[str]) -> list[str]:
    """The float32 file and the int8 files asked for, by default the one for this CPU."""
    unknown = [name for name in names if name not in ARITHMETICS]
    if unknown:
        raise ValueError(f"--files {' '.join(unknown)}: unknown; allowed: {', '.join(ARITHMETICS)}")
    best = names or [name for name in fitting_files(cpu_flags()) if name != FLOAT32][:1]
    return list(dict.fromkeys([FLOAT32, *best]))


def carry_points(checkpoint: Checkpoint, folder: Path) -> OperatingPoints | None:
    """The checkpoint's operating points, copied; ValueError where they were measured on other weights."""
    if not (checkpoint.folder / FILE).is_file():
        return None
    points = OperatingPoints.load(checkpoint.folder)
    if points.checkpoint != checkpoint_hash(checkpoint.folder):
        raise ValueError(
            f"{checkpoint.folder / FILE} belongs to other weights; evaluate the checkpoint again, or delete the file"
        )
    points.save(folder)
    return points


def write_files(
    checkpoint: Checkpoint,
    files: list[str],
    folder: Path,
    points: OperatingPoints | None,
    texts: list[Text] | None,
    min_agreement: float,
) -> dict[str, Any]:
    """Build, write and check each ONNX file; the report."""
    task = task_of(checkpoint.config, points.policy if points else None)
    (folder / "onnx").mkdir()
    for name in files:
        write_graph(checkpoint, task, name, folder / "onnx" / f"{name}.onnx", points)
    float32 = ElasticSession.from_pretrained(folder, FLOAT32, threads=1)
    checks = {FLOAT32: check_float32(float32, checkpoint, task)}
    for name in files[1:]:
        missing = ONNX_FILES[name] and not ONNX_FILES[name] & cpu_flags()
        if missing:
            checks[name] = {"unchecked": f"this CPU has none of {', '.join(sorted(ONNX_FILES[name]))}"}
        else:
            session = ElasticSession.from_pretrained(folder, name, threads=1)
            checks[name] = check_int8(session, float32, checkpoint, texts, min_agreement)
    for name in files:
        checks[name] |= check_model_file(folder / "onnx" / f"{name}.onnx")
    return {
        "versions": versions(),
        "requires": REQUIRES,
        "policy": task.policy,
        "thresholds": task.thresholds,
        "files": checks,
    }


def write_graph(checkpoint: Checkpoint, task: Task, name: str, file: Path, points: OperatingPoints | None) -> None:
    """One ONNX file with its metadata."""
    model = build_graph(checkpoint.config, checkpoint.tensors, task, ARITHMETICS[name])
    entries = metadata(checkpoint.config, task, checkpoint.max_tokens, versions())
    if points is not None:
        entries["elastic_operating_points"] = json.dumps(points.to_dict())
    onnx.helper.set_model_props(model, entries)
    onnx.save(model, file)


def versions() -> dict[str, str]:
    """Of what wrote the file."""
    return {name: version(name) for name in ("elastic-model", "onnx", "onnxruntime", "torch", "transformers")}
