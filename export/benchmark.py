"""`python -m export benchmark`: the files of an exported folder, timed side by side on real rows in one run."""

import json
import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from elastic_model.folders import check_file, write_text
from elastic_model.processor import ONNX_FILES, cpu_flags, cpu_name, fitting_files
from elastic_model.session import ElasticSession
from export.config import BenchmarkOptions
from export.rows import read_texts


@dataclass(frozen=True)
class Timing:
    """One line of the table; milliseconds are per batch, tokenisation left out."""

    file: str
    point: str
    threads: int
    batch: int
    p50_ms: float
    p95_ms: float
    rows_per_second: float
    mean_exit_layer: float


def benchmark_folder(options: BenchmarkOptions) -> None:
    """Time every file that fits this CPU at full depth, at its own default and at each operating point."""
    for name in ("batch_sizes", "threads"):
        if not getattr(options, name) or min(getattr(options, name)) < 1:
            raise ValueError(f"{name} must be at least 1, got {' '.join(map(str, getattr(options, name)))}")
    if not 0 < options.seconds < math.inf:
        raise ValueError(f"seconds must be above 0, got {options.seconds:g}")
    if options.output:
        check_file(options.output, options.input)
    texts = read_texts(options.input, options.text, options.pair, options.max_rows)
    files = [name for name in fitting_files(cpu_flags()) if (options.folder / "onnx" / f"{name}.onnx").is_file()]
    if not files:
        raise ValueError(f"{options.folder}/onnx has none of {', '.join(ONNX_FILES)}")
    timings = []
    for threads in options.threads:
        for file in files:
            session = ElasticSession.from_pretrained(options.folder, file, threads)
            timings += time_session(session, texts, threads, options.batch_sizes, options.seconds)
    print(f"{cpu_name()}, {len(texts)} rows in the order of the file, ms per batch")
    print(f"{'file':26} {'point':12} threads batch    p50    p95   rows/s  mean exit layer")
    for one in timings:
        cells = f"{one.file:26} {one.point:12} {one.threads:7} {one.batch:5} {one.p50_ms:6.2f} {one.p95_ms:6.2f}"
        print(f"{cells} {one.rows_per_second:8.0f}  {one.mean_exit_layer:.2f}")
    if options.output:
        write_text(options.output, json.dumps([asdict(one) for one in timings], indent=2) + "\n")


def time_session(
    session: ElasticSession, texts: list, threads: int, batch_sizes: list[int], seconds: float
) -> list[Timing]:
    """One session at every operating point and batch size."""
    measured = session.points.points if session.points else []
    points = {point.name: session.arguments(point) for point in [session.point("full"), *measured]}
    points["default"] = session.arguments(None)
    encodings = session.encode(texts)
    timings = []
    for name, given in points.items():
        for batch in batch_sizes:
            batches = [encodings[start : start + batch] for start in range(0, len(encodings), batch)]
            spent, layers = _passes(session, batches, given, seconds)
            p50, p95 = np.percentile(spent, [50, 95]) * 1e3
            rate = len(texts) * (len(spent) // len(batches)) / sum(spent)
            timings.append(Timing(session.file.stem, name, threads, batch, float(p50), float(p95), rate, layers))
    return timings


def _passes(
    session: ElasticSession, batches: list, given: dict[str, Any], seconds: float
) -> tuple[list[float], float]:
    """Seconds of each batch over whole passes through the rows, after one unmeasured; mean exit layer. given: what
    `run` takes beside the rows."""
    layers = float(np.concatenate([session.run(batch, **given)["exit_layer"] for batch in batches]).mean())
    spent: list[float] = []
    end = time.perf_counter() + seconds
    while not spent or time.perf_counter() < end:
        for batch in batches:
            start = time.perf_counter()
            session.run(batch, **given)
            spent.append(time.perf_counter() - start)
    return spent, layers
