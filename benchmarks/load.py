"""What one session answers under load, on real texts: the same whatever else is asked, in memory that does not grow.

    python -m benchmarks.load EXPORTED --input rows.tsv.gz --text sentence [--minutes 60] [--output FILE]

1. Mixed load: for `--minutes` batches of 1 to 64 rows of one sentence to as many as fit, in every order; resident
   memory after each tenth of the time.
2. Threads: 8 threads ask one session for `--thread_minutes`, batches and depths at random; answers that are wrong.
3. Batches: rows one by one against random batches of 1 to 64, float32 and int8, with all tokens and with fewer from
   layer to layer: the share of rows with the same label and exit layer, and how far logits are apart.
"""

import argparse
import json
import random
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo import commit, machine
from benchmarks.systems import peak_mib
from elastic_model import ElasticSession
from elastic_model.arguments import run
from elastic_model.folders import write_json
from elastic_model.operating_points import checkpoint_hash
from elastic_model.processor import ONNX_FILES
from export.rows import read_texts

LARGEST, THREADS, ASKED = 64, 8, 2000  # rows of a batch; threads at a time, and the texts that they ask of
STEPS = 10  # times that memory is read


def resident_mib() -> float:
    """Memory that this process holds now."""
    (line,) = [one for one in Path("/proc/self/status").read_text().splitlines() if one.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def random_batches(rows: int, draw: random.Random) -> list[list[int]]:
    """All rows in a random order, in batches of a random size."""
    order, batches = draw.sample(range(rows), rows), []
    while order:
        size = draw.randint(1, LARGEST)
        batches.append(order[:size])
        order = order[size:]
    return batches


def batches_alike(session: ElasticSession, texts: list[str], lowest: float) -> dict[str, float]:
    """Rows one by one against the same rows in random batches, as the file runs by itself; shares of tokens that fall
    from 1 towards `lowest`."""
    encodings = session.encode(texts)
    lengths = [1 - (1 - lowest) * layer / session.layers for layer in range(session.layers)]

    def ask(batches: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
        logits, layers = np.zeros((len(encodings), len(session.labels))), np.zeros(len(encodings), int)
        for rows in batches:
            outputs = session.run([encodings[row] for row in rows], length_config=lengths)
            logits[rows], layers[rows] = outputs["logits"], outputs["exit_layer"]
        return logits, layers

    alone, where = ask([[row] for row in range(len(encodings))])
    together, there = ask(random_batches(len(encodings), random.Random(0)))
    same = (alone.argmax(1) == together.argmax(1)) & (where == there)
    return {
        "same_label_and_exit_layer": float(same.mean()),
        "largest_difference_of_logits": float(np.abs(alone - together)[where == there].max()),
        "mean_exit_layer": float(where.mean()),
    }


def threads_alike(session: ElasticSession, texts: list[Any], minutes: float) -> dict[str, Any]:
    """Answers to many threads at a time against those to one."""
    depths: list[dict[str, Any]] = [{}, {"max_layer": max(1, session.layers // 2)}]
    expected = [session(texts, **depth) for depth in depths]
    counts, wrong, end = [0] * THREADS, [0] * THREADS, time.monotonic() + 60 * minutes

    def ask(thread: int) -> None:
        draw = random.Random(thread)
        while time.monotonic() < end:
            places, depth = draw.sample(range(len(texts)), draw.randint(1, LARGEST)), draw.randrange(len(depths))
            given = session([texts[place] for place in places], batch_size=draw.choice((1, 8, 32)), **depths[depth])
            pairs = zip(places, given, strict=True)
            wrong[thread] += sum(
                any(answer[name] != expected[depth][place][name] for name in ("label", "exit_layer"))
                for place, answer in pairs
            )
            counts[thread] += len(places)

    with ThreadPoolExecutor(THREADS) as threads:
        list(threads.map(ask, range(THREADS)))  # raises what a thread raised
    return {"minutes": minutes, "rows": sum(counts), "wrong": sum(wrong)}


def mixed_load(session: ElasticSession, texts: list[str], minutes: float) -> dict[str, Any]:
    """Batches of all shapes for so long; resident memory as time goes on."""
    draw, rows, batches, seconds = random.Random(0), 0, 0, 60 * minutes
    began, resident = time.monotonic(), [resident_mib()]
    while (spent := time.monotonic() - began) < seconds:
        sentences = 2 ** draw.randint(0, 5)
        batch = [" ".join(draw.choices(texts, k=sentences)) for _ in range(draw.randint(1, LARGEST))]
        session(batch, batch_size=draw.choice((1, 8, 32, LARGEST)))
        rows, batches = rows + len(batch), batches + 1
        if spent > seconds * len(resident) / STEPS:
            resident.append(resident_mib())
    counts = {"minutes": minutes, "rows": rows, "batches": batches}
    return {**counts, "resident_mib": [*resident, resident_mib()], "peak_mib": peak_mib()}


def kept(options: argparse.Namespace, rows: int) -> dict[str, Any]:
    """What was measured of this export before; ValueError where the output holds another one's."""
    own = {"exported": checkpoint_hash(options.exported), "rows": rows}
    if options.output is None or not options.output.exists():
        return {**own, "machine": machine(1), "commit": commit()}
    found: dict[str, Any] = json.loads(options.output.read_text())
    if any(found.get(name) != value for name, value in own.items()):
        raise ValueError(f"{options.output} was measured on another export or other rows; choose another --output")
    return found


def main() -> None:
    """Measure what is missing, print it, keep each part in the JSON as soon as it exists."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("exported", type=Path)
    parser.add_argument(
        "--input", type=Path, required=True, help="texts (.tsv or .csv with a header, .txt; also compressed)"
    )
    parser.add_argument("--text", default="text", help="column that holds the text")
    parser.add_argument("--rows", type=int, default=10_000, help="texts that are read")
    parser.add_argument("--minutes", type=float, default=1.0, help="of the mixed load")
    parser.add_argument("--thread_minutes", type=float, default=1.0, help="of the threads")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    texts = read_texts(options.input, options.text, limit=options.rows)
    result = kept(options, len(texts))

    def measure(name: str, what: Callable[[ElasticSession], dict[str, Any]], file: str | None = None) -> None:
        if name in result:
            return
        result[name] = what(ElasticSession.from_pretrained(options.exported, file, threads=1))
        print(name, json.dumps(result[name]), flush=True)
        if options.output:
            write_json(options.output, result)

    few = texts[:ASKED]  # the mixed load first: before memory has held anything else
    measure("mixed_load", lambda session: mixed_load(session, few, options.minutes))
    measure("threads", lambda session: threads_alike(session, few, options.thread_minutes))
    for file in ONNX_FILES:
        if (options.exported / "onnx" / f"{file}.onnx").is_file():
            for tokens, lowest in (("all", 1.0), ("fewer", 0.5)):
                how = partial(batches_alike, texts=texts, lowest=lowest)
                measure(f"batches, {file}, {tokens} tokens", how, file)


if __name__ == "__main__":
    sys.exit(run(main))
