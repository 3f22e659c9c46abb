"""`python -m finetune pipeline DEPLQ --model CHECKPOINT --task NAME --output FOLDER`."""

import json
import platform
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from transformers import logging

from elastic_model.folders import check_output, claim_folder, new_file
from elastic_model.provenance import versions
from finetune.evaluate import table
from finetune.pipelines.config import PipelineOptions
from finetune.pipelines.letters import name_of, parse, prefixes
from finetune.pipelines.measure import Measurement, as_record, is_current, measure
from finetune.pipelines.stages import Work, begin, carry_out, check_targets, read_record

FORMAT = 1
MEASURED = "measured.json"
REPORT = "report.txt"
MEASURING = ("max_length", "timed_rows", "permitted_loss")  # what a measurement depends on, beside its weights


def read_measured(file: Path) -> dict[str, Any]:
    """The content of a measured.json, its measurements read; ValueError where it is not one."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads format {FORMAT}")
        content["measurements"] = [Measurement.from_dict(one) for one in content["measurements"]]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not measurements of pipelines ({error})") from error
    return content


def write_measured(file: Path, work: Work, measurements: Iterable[Measurement]) -> None:
    """The measurements with what they hold for, in the place of those before."""
    options = work.options
    content = {
        "format": FORMAT,
        "task": options.task,
        "metric": work.labels.metrics[0],
        "data": work.data,
        "machine": platform.processor() or platform.machine(),
        "settings": {name: getattr(options, name) for name in MEASURING},
        "versions": versions(),
        "measurements": [as_record(one) for one in measurements],
    }
    with new_file(file) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def known_measurements(file: Path, work: Work) -> dict[tuple[str, int], Measurement]:
    """What was measured before under the same settings, by pipeline and seed; ValueError where it is of other data."""
    if not file.is_file():
        return {}
    content = read_measured(file)
    if content.get("data") != work.data:
        raise ValueError(f"{file} was measured on other data; choose another --output, or remove the file")
    if content.get("settings") != {name: getattr(work.options, name) for name in MEASURING}:
        return {}
    return {(one.pipeline, one.seed): one for one in content["measurements"]}


def summary(measurements: list[Measurement]) -> str:
    """A line a pipeline, against the first, which is O."""
    nothing = measurements[0]
    rows = [
        [
            one.pipeline,
            f"{one.quality:.4f}",
            f"{one.quality / nothing.quality - 1:+.1%}" if nothing.quality else "-",
            f"{one.parameters / 1e6:.2f}",
            f"{one.flops / 1e6:.4g}",
            f"{one.bytes / 1e6:.1f}",
            f"{one.ms:.3f}",
            f"{1 - one.ms / nothing.ms:.1%}",
            f"{one.mean_exit_layer:.2f}",
        ]
        for one in measurements
    ]
    heads = ["pipeline", nothing.metric, "to O", "M parameters", "MFLOPs a row", "MB", "ms a row", "time saved"]
    return table([*heads, "mean exit layer"], rows)


def carried_out(work: Work, letters: str) -> int:
    """The stages of a pipeline, those there already left as they are; exit code 0, or 143 where one was stopped."""
    for stage in prefixes(letters.replace("L", "")):
        if code := carry_out(work, stage):
            return code
    return 0


def pipeline(options: PipelineOptions) -> int:
    """Carry out the missing stages, measure each, print the table; exit code 0, or 143 after SIGTERM."""
    letters = parse(options.pipeline)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    root = Path(options.output)
    check_output(root)
    check_targets(options, letters)
    work = begin(options, root)
    known = known_measurements(root / MEASURED, work)
    for stage in prefixes(letters.replace("L", "")):
        read_record(work, stage)  # whatever is there already must be of these data: said before any training
    claim_folder(root)
    if code := carried_out(work, letters):
        return code
    shown = []
    for one in prefixes(letters):
        key = (name_of(one), options.seed)
        if key not in known or not is_current(work, known[key]):
            print(f"measuring {name_of(one)}", flush=True)
            known[key] = measure(work, one)
            write_measured(root / MEASURED, work, known.values())
        shown.append(known[key])
    text = (
        f"{len(work.dev)} rows of dev; one row at a time, one thread; without L every row has {options.max_length} "
        f"tokens\n{summary(shown)}"
    )
    with new_file(root / REPORT) as file:
        file.write_text(text + "\n", encoding="utf-8")
    print("", text, f"\nstages, {MEASURED} and this table: {root}", sep="\n")
    return 0
