"""`python -m finetune pipeline DEPLQ --model CHECKPOINT --task NAME --output FOLDER`."""

import json
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from elastic_model.folders import check_no_checkpoint, check_output, working_in, write_json, write_text
from elastic_model.processor import cpu_name
from elastic_model.provenance import versions
from finetune.evaluate import table
from finetune.pipelines.config import PipelineOptions
from finetune.pipelines.letters import letters_of, name_of, parse, prefixes, stage_of
from finetune.pipelines.measure import Measurement, is_current, measure
from finetune.pipelines.stages import RECORD, carry_out, read_record
from finetune.pipelines.work import Work, begin

FORMAT = 1
MEASURED = "measured.json"
REPORT = "report.txt"
MEASURING = ("max_length", "timed_rows", "permitted_loss")  # what a measurement depends on, beside its stage
Known = dict[tuple[str, int], Measurement]  # (pipeline, seed) -> what was measured


def read_measured(file: Path) -> dict[str, Any]:
    """The content of a measured.json, its measurements read; ValueError where it is not one."""
    try:
        content: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, this version reads format {FORMAT}")
        found = [Measurement.from_dict(one) for one in content["measurements"]]
        keys = [(one.pipeline, one.seed) for one in found]
        twice = next((key for key in keys if keys.count(key) > 1), None)
        if twice is not None:
            raise ValueError(f"{twice[0]} of seed {twice[1]} is there twice")
        other = next((one for one in found if one.metric != content["metric"]), None)
        if other is not None:
            raise ValueError(f"{other.pipeline} was measured by {other.metric!r}, the file by {content['metric']!r}")
        content["measurements"] = found
        return {name: content[name] for name in ("task", "metric", "dev", "settings", "machine", "measurements")}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file}: not measurements of pipelines ({error})") from error


def _measuring(work: Work) -> dict[str, Any]:
    return {name: getattr(work.options, name) for name in MEASURING}


def write_measured(file: Path, work: Work, measurements: Iterable[Measurement]) -> None:
    """The measurements with what they hold for, in the place of those before."""
    content = {
        "format": FORMAT,
        "task": work.options.task,
        "metric": work.labels.metrics[0],
        "dev": work.data["dev"],
        "settings": _measuring(work),
        "machine": cpu_name(),
        "versions": versions(),
        "measurements": [one.to_dict() for one in measurements],
    }
    write_json(file, content)


def known_measurements(file: Path, work: Work) -> Known:
    """What was measured before; ValueError where it is of other data or by another metric."""
    if not file.is_file():
        return {}
    content = read_measured(file)
    for name, value in (("dev", work.data["dev"]), ("metric", work.labels.metrics[0])):
        if content[name] != value:
            other = "on other data" if name == "dev" else f"by {content[name]!r}, not {value!r}"
            raise ValueError(f"{file} was measured {other}; choose another --output, or remove the file")
    return {(one.pipeline, one.seed): one for one in content["measurements"]}


def _holds(file: Path, work: Work) -> bool:
    """Whether the times of a file compare with those taken now: the same settings and machine, not asked for again."""
    if work.options.again or not file.is_file():
        return False
    content = read_measured(file)
    return bool(content["settings"] == _measuring(work) and content["machine"] == cpu_name())


def summary(measurements: list[Measurement]) -> str:
    """A line a pipeline, against the first, which is O."""
    nothing = measurements[0]
    rows = [
        [
            one.pipeline,
            f"{one.quality:.4f}",
            f"{(one.quality - nothing.quality) / abs(nothing.quality):+.1%}" if nothing.quality else "-",
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


def against_doubled(measurements: list[Measurement], max_length: int) -> list[str]:
    """A line on what the last saves against O with rows padded further; none where it was not measured."""
    doubled, last = measurements[0].doubled_ms, measurements[-1]
    if doubled is None or last is measurements[0]:
        return []
    saved = 1 - last.ms / doubled
    return [f"O padded to {2 * max_length} tokens: {doubled:.3f} ms a row; {last.pipeline} saves {saved:.1%} of it"]


def measured_together(work: Work, pipelines: list[str], known: Known, file: Path) -> list[Measurement]:
    """What is known of pipelines whose stages are there, of one seed. Where something is missing or was measured under
    other settings, all are timed anew in turns, and with them whatever else was measured in this folder: times of one
    seed always compare. They are kept in `file`."""
    own = {key: one for key, one in known.items() if key[1] == work.options.seed and is_current(work, one)}
    keys = [(name_of(letters), work.options.seed) for letters in pipelines]
    if any(key not in own for key in keys) or not _holds(file, work):
        names = list(dict.fromkeys(name for name, _ in [*own, *keys]))
        print(f"measuring {' '.join(names)}, seed {work.options.seed}, in turns", flush=True)
        for one in measure(work, [letters_of(name) for name in names]):
            key = (one.pipeline, one.seed)
            own[key] = replace(one, settings=own[key].settings) if key in own else one
        write_measured(file, work, own.values())
    return [own[key] for key in keys]


def pipeline(options: PipelineOptions) -> int:
    """Carry out the missing stages, measure all, print the table; exit code 0, or 143 after SIGTERM."""
    letters = parse(options.pipeline)
    root = Path(options.output)
    check_output(root)
    check_no_checkpoint(root)
    if there := next(root.glob(f"seed-*/*/{RECORD}"), None):
        raise ValueError(f"output {root} has the stages of a study ({there.parent}); choose another output")
    work = begin(options, root, letters)
    known, stages = known_measurements(root / MEASURED, work), prefixes(stage_of(letters))
    for stage in stages:  # whatever is there already must be of these data: said before any training
        read_record(work, stage)
    with working_in(root):
        for stage in stages:
            if code := carry_out(work, stage):
                return code
        shown = measured_together(work, prefixes(letters), known, root / MEASURED)
        _report(options, work, shown, root)
    return 0


def _report(options: PipelineOptions, work: Work, shown: list[Measurement], root: Path) -> None:
    """The table, printed and kept beside the stages."""
    lines = [
        f"{len(work.dev)} rows of dev; one row at a time, one thread; without L every row has {options.max_length} "
        "tokens",
        summary(shown),
        *against_doubled(shown, options.max_length),
    ]
    text = "\n".join(lines)
    write_text(root / REPORT, text + "\n")
    print("", text, f"\nstages, {MEASURED} and this table: {root}", sep="\n")
