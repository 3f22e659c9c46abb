"""The whole path on real text: pretrain, finetune, export, measure; ends with a table, a plot and the numbers as JSON.

`make demo` runs it in the folder `demo`. A finished stage is not run again while its command and recipe stay the same;
an interrupted one goes on where it was.
"""

import argparse
import fcntl
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.systems import CHECKPOINT, EXPORTED, SYSTEMS, Served, era_rows
from elastic_model.arguments import run
from elastic_model.folders import claim_folder
from elastic_model.operating_points import checkpoint_hash
from elastic_model.processor import available_cores, cpu_name

ROOT = Path(__file__).resolve().parent.parent
PRETRAINED, CACHE, RESULTS, PLOT = "pretrained", "cache", "results.json", "results.png"
PASSAGES_A_TURN = 50  # every system answers these before any answers the next ones: noise of the machine is shared
BATCH = 32  # rows of the batches that the throughput is measured with


class StageError(ValueError):
    """A stage ended before it was done."""


def stages(folder: Path) -> dict[str, tuple[str, list[str]]]:
    """Name -> the folder it writes, and its command; in the order of the path."""
    pretrained, checkpoint, exported = folder / PRETRAINED, folder / CHECKPOINT, folder / EXPORTED
    flags = {
        "pretrain": f"--config pretrain/recipes/tiny.yaml --output {pretrained} --cache {folder / CACHE} --resume",
        "finetune": f"train --config finetune/recipes/era.yaml --model {pretrained} --output {checkpoint} --resume",
        "export": f"{checkpoint} {exported} --rows finetune/data/era/dev.tsv.xz",
    }
    written = {"pretrain": PRETRAINED, "finetune": CHECKPOINT, "export": EXPORTED}
    return {name: (written[name], [sys.executable, "-m", name, *flags[name].split()]) for name in flags}


def fingerprint(command: list[str], before: str) -> str:
    """Changes with the command, the text of the files of ours that it names, and the stages before."""
    digest = hashlib.sha256(before.encode())
    for word in command[1:]:
        digest.update(word.encode() + b"\0")
        if word.startswith(("pretrain/", "finetune/")):
            digest.update(Path(word).read_bytes())
    return digest.hexdigest()


def run_command(command: list[str]) -> None:
    """Run a command that holds the lock of `only_one` with us, and ends with us, saving where it is."""
    process = subprocess.Popen(command, close_fds=False)
    try:
        if process.wait():
            raise StageError(
                f"the command above ended with exit code {process.returncode}; `make demo` goes on from here"
            )
    finally:
        process.terminate()
        process.wait()


def run_stage(folder: Path, name: str, written: str, command: list[str], before: str) -> str:
    """Run the stage unless its record says that it is done; its fingerprint."""
    record = folder / f"{name}.json"
    key = fingerprint(command, before)
    found = json.loads(record.read_text()) if record.exists() else {"key": None, "seconds": None}
    if found["key"] == key and found["seconds"] is not None:
        print(f"== {name}: done before, in {found['seconds']:.0f} s", flush=True)
        return key
    if found["key"] != key:  # made by another recipe, or for another checkpoint
        for path in folder.glob(f"{written}*"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        record.write_text(json.dumps({"key": key, "seconds": None}))
    print(f"== {name}: {' '.join(['python', *command[1:]])}", flush=True)
    started = time.perf_counter()
    run_command(command)
    record.write_text(json.dumps({"key": key, "seconds": time.perf_counter() - started}))
    return key


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """Wilson's 95 % interval of a share (Wilson 1927)."""
    share, spread = right / total, z * z / total
    centre = (share + spread / 2) / (1 + spread)
    half = z / (1 + spread) * (share * (1 - share) / total + spread / (4 * total)) ** 0.5
    return centre - half, centre + half


def scored(predicted: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """Accuracy of the predictions with its interval."""
    right = sum(one == other for one, other in zip(predicted, labels, strict=True))
    low, high = wilson(right, len(labels))
    return {"accuracy": right / len(labels), "low": low, "high": high}


def ask_in_turns(systems: list[Served], total: int, batch_size: int, passages: int) -> dict[str, dict[str, Any]]:
    """Answers of every system to all test passages, in turns of a few passages each."""
    answers: dict[str, dict[str, Any]] = {one.name: {"labels": [], "layers": [], "ms": []} for one in systems}
    for start in range(0, total, passages):
        for system in systems:
            answer = system.ask(start, min(start + passages, total), batch_size)
            for key, values in answers[system.name].items():
                values.extend(answer[key])
    return answers


def measure_systems(folder: Path, labels: list[str], threads: int) -> list[dict[str, Any]]:
    """A row a system: quality, exit layer, milliseconds a passage alone and in batches, memory."""
    systems = [Served(name, ["benchmarks.systems", name, str(folder), str(threads)], threads) for name in SYSTEMS]
    answers = ask_in_turns(systems, len(labels), 1, PASSAGES_A_TURN)
    batched = ask_in_turns(systems, len(labels), BATCH, 2 * BATCH)
    rows = []
    for system in systems:
        alone = answers[system.name]
        layers = [layer for layer in alone["layers"] if layer is not None]
        rows.append(
            {
                "name": system.name,
                **scored(alone["labels"], labels),
                "mean_exit_layer": float(np.mean(layers)) if layers else None,
                "p50_ms": float(np.percentile(alone["ms"], 50)),
                "p95_ms": float(np.percentile(alone["ms"], 95)),
                "batch_ms": float(np.mean(batched[system.name]["ms"])),
                "batch_changes": sum(
                    a != b for a, b in zip(alone["labels"], batched[system.name]["labels"], strict=True)
                ),
                "peak_mib": system.ask(0, 1, 1)["peak_mib"],
                "left_at": {str(layer): layers.count(layer) for layer in sorted(set(layers))},
            }
        )
        system.close()
    return rows


def exit_accuracies(folder: Path, texts: list[str], labels: list[str]) -> list[dict[str, Any]]:
    """A row an exit: the accuracy of the int8 file if every passage left there."""
    from elastic_model import ElasticSession

    session = ElasticSession.from_pretrained(folder / EXPORTED)
    answers = session.exit_logits(texts).argmax(-1)
    return [
        {"layer": layer, **scored([session.labels[one] for one in row], labels)}
        for layer, row in zip(session.exit_layers, answers, strict=True)
    ]


def held_out_losses(folder: Path) -> dict[str, Any]:
    """The last evaluation of pre-training: MLM loss by exit and of the unigram distribution, on held-out speeches."""
    lines = [json.loads(line) for line in (folder / PRETRAINED / "metrics.jsonl").read_text().splitlines()]
    last = [line["held_out"] for line in lines if "held_out" in line][-1]
    return {key: last[key] for key in ("mlm_loss", "unigram_loss", "masked_tokens", "examples")}


def machine(threads: int) -> dict[str, Any]:
    """What the numbers were measured on."""
    packages = ("torch", "transformers", "onnxruntime")
    return {
        "cpu": cpu_name(),
        "threads": threads,
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
    }


def commit() -> str | None:
    """The commit of the checkout, if it is one."""
    done = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True)
    return done.stdout.strip() or None


def measure(folder: Path, key: str) -> dict[str, Any]:
    """All numbers of the demo, on the test split."""
    texts, labels = era_rows("test")
    train_labels = era_rows("train")[1]
    most = max(sorted(set(train_labels)), key=train_labels.count)
    threads = available_cores()
    return {
        "key": key,
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "commit": commit(),
        "checkpoint_sha256": checkpoint_hash(folder / CHECKPOINT),
        "machine": machine(threads),
        "seconds": {name: json.loads((folder / f"{name}.json").read_text())["seconds"] for name in stages(folder)},
        "pretraining": held_out_losses(folder),
        "passages": len(labels),
        "majority": scored([most] * len(labels), labels),
        "systems": measure_systems(folder, labels, threads),
        "exits": exit_accuracies(folder, texts, labels),
    }


def percent(row: dict[str, Any]) -> str:
    return f"{100 * row['accuracy']:5.1f} % ({100 * row['low']:.1f}-{100 * row['high']:.1f})"


def table(results: dict[str, Any]) -> Iterator[str]:
    """The results as lines of text."""
    device, losses = results["machine"], results["pretraining"]
    last, unigram = list(losses["mlm_loss"].values())[-1], losses["unigram_loss"]
    yield "Pre-training: loss on masked tokens of held-out speeches, in nats"
    yield f"  last exit {last:.2f}, unigram distribution {unigram:.2f}: {unigram - last:.2f} better"
    yield ""
    yield f"Era of a passage: {results['passages']} test passages of speakers never seen"
    yield f"  on {device['cpu']}, {device['threads']} threads"
    yield ""
    yield f"{'':38} accuracy (95 % interval)  mean exit  ms a passage, alone   in batches    peak"
    yield f"{'':38} {'':24}      layer      p50      p95          of {BATCH}     MiB"
    yield f"{'majority guess':38} {percent(results['majority'])}"
    for row in results["systems"]:
        layer = f"{row['mean_exit_layer']:5.2f}" if row["mean_exit_layer"] else "    -"
        times = f"{row['p50_ms']:8.2f} {row['p95_ms']:8.2f} {row['batch_ms']:15.2f} {row['peak_mib']:6.0f}"
        yield f"{row['name']:38} {percent(row)}      {layer} {times}"
    yield ""
    yield "Accuracy if every passage left at an exit (int8), and where they leave with the threshold chosen on dev"
    left = results["systems"][-1]["left_at"]
    for row in results["exits"]:
        yield f"  layer {row['layer']}  {percent(row)}   {left.get(str(row['layer']), 0):5} leave"
    yield ""
    yield "Seconds: " + ", ".join(f"{name} {value:.0f}" for name, value in results["seconds"].items())
    yield f"Checkpoint sha256 {results['checkpoint_sha256']}"


def plot(results: dict[str, Any], file: Path) -> None:
    """Accuracy against time for every system, and accuracy and departures by exit."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import LogLocator

    figure, (left, right) = pyplot.subplots(1, 2, figsize=(12, 4.8), width_ratios=(3, 2))
    for number, row in enumerate(results["systems"]):
        spread = [[100 * (row["accuracy"] - row["low"])], [100 * (row["high"] - row["accuracy"])]]
        point = {"fmt": "o", "color": f"C{number}", "capsize": 3, "label": row["name"]}
        left.errorbar([row["p50_ms"]], [100 * row["accuracy"]], yerr=spread, **point)
        left.plot([row["p50_ms"], row["p95_ms"]], [100 * row["accuracy"]] * 2, color=f"C{number}", alpha=0.4)
    left.axhline(100 * results["majority"]["accuracy"], color="grey", linestyle="--", label="majority guess")
    left.set(xscale="log", xlabel="milliseconds a passage, one at a time: p50 (dot) to p95 (line)")
    left.set(ylabel="accuracy on test, % (bar: 95 % interval)", ylim=(20, 100), title="What an answer costs")
    left.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    left.xaxis.set_major_formatter("{x:g}")
    left.legend(fontsize="small", loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    layers = [row["layer"] for row in results["exits"]]
    departures = [results["systems"][-1]["left_at"].get(str(layer), 0) for layer in layers]
    right.bar(layers, [100 * count / results["passages"] for count in departures], color="C5", alpha=0.35)
    values = [100 * row["accuracy"] for row in results["exits"]]
    spread = [
        [100 * (row[a] - row[b]) for row in results["exits"]] for a, b in (("accuracy", "low"), ("high", "accuracy"))
    ]
    right.errorbar(layers, values, yerr=spread, fmt="o-", color="C4", capsize=3)
    right.set(xticks=layers, ylim=(0, 100), xlabel="exit after layer", title="int8, by exit")
    right.set(ylabel="line: accuracy, %; bars: passages that leave, %")
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    pyplot.close(figure)


@contextmanager
def only_one(folder: Path) -> Iterator[None]:
    """Hold the folder; a stage that outlived its `make demo` still holds it, and is waited for."""
    descriptor = os.open(folder / ".lock", os.O_CREAT | os.O_RDWR, 0o644)
    os.set_inheritable(descriptor, True)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another run still works in {folder}: waiting for it", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def demo(folder: Path) -> None:
    """Every stage that is not done yet, then the results."""
    key = ""
    for name, (written, command) in stages(folder).items():
        key = run_stage(folder, name, written, command, key)
    file = folder / RESULTS
    results = json.loads(file.read_text()) if file.exists() else {"key": None}
    if results["key"] != key:
        print(f"== measure: {len(SYSTEMS)} systems on the test split", flush=True)
        results = measure(folder, key)
        plot(results, folder / PLOT)
        file.write_text(json.dumps(results, indent=2) + "\n")
    print("", *table(results), f"Numbers: {file}   Plot: {folder / PLOT}", sep="\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where everything is written")
    folder = Path(os.path.relpath(parser.parse_args().folder, ROOT))
    os.chdir(ROOT)
    claim_folder(folder)
    with only_one(folder):
        demo(folder)


if __name__ == "__main__":
    sys.exit(run(main))
