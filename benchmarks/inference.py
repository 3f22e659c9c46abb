"""Serving side by side: the exported file at its operating points and what else one could run, on real test rows.

    python -m benchmarks.inference RESULTS --task sst2 --checkpoint DIR --exported DIR [--systems ...]

Each system has a process of its own; pieces of the test rows, in the order of the file or sorted by length, go to all
systems in turn, so that the machine's noise is shared. Every piece is a file in RESULTS: a run that was cut off goes
on where it stopped. Each of `--systems` is a name of SYSTEMS, `point:BUDGET` (a measured operating point, by name or
as max_drop=0.5), `onnx:FILE` (a file with BERT's inputs, as optimum-onnx exports it), `openvino:FILE`, `folder:DIR` or
`folder:DIR@BUDGET` (another export, a distilled student's say); all with the labels of the checkpoint in its order;
`NAME=` before one of them is what it is called. At the end: a table, the JSON of `--output` and a plot beside it,
quality against latency. Differences in quality are paired, against the first system.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.demo import commit, machine
from benchmarks.systems import Served, peak_mib
from elastic_model.arguments import run
from elastic_model.folders import write_json, write_text
from elastic_model.operating_points import checkpoint_hash
from elastic_model.provenance import file_hash
from elastic_model.session import REPORT
from export.predict import read_budget

Answer = Callable[[list], np.ndarray]  # texts -> class numbers, or the numbers of a regression
System = tuple[Answer, Path | None]  # the file with its weights
SURE = 0.9  # the probability at which the cascade's first stage answers
PIECE = 320  # rows that a system answers before it is the next one's turn
SAMPLES = 1000  # of the bootstrap of differences
MARKERS = "os^D"  # of the systems in the plot, ten colours each


@dataclass(frozen=True)
class Rows:
    """Texts or pairs of a split, what they should be answered, and the metric that decides."""

    texts: list
    truth: np.ndarray
    metric: str


def read_rows(options: argparse.Namespace, split: str, rows: int | None = None) -> Rows:
    """A split of the task as the checkpoint's labels have it; rows: a random subset of that many."""
    from transformers import AutoConfig

    from finetune.examples import read_examples
    from finetune.kinds import KINDS, problem_type_of
    from finetune.labels import encode_labels
    from finetune.prepare import some_rows
    from finetune.tasks import find_task

    task, config = find_task(options.task), AutoConfig.from_pretrained(options.checkpoint)
    kind = problem_type_of(config)
    if kind not in ("single_label_classification", "regression"):
        raise ValueError(f"{options.checkpoint} is for {kind}; classes and numbers are served here")
    examples = some_rows(read_examples(task, split), rows, 0)
    names = [config.id2label[number] for number in range(config.num_labels)]
    texts = list(zip(examples.texts, examples.pairs, strict=True)) if examples.pairs else examples.texts
    return Rows(texts, encode_labels(task, examples, names, kind), (task.metrics or KINDS[kind].default)[0])


def keep_rows(options: argparse.Namespace) -> None:
    """The rows as JSON, so that no system's process loads what reads them: its memory is measured."""
    counts = {"test": options.max_rows, "train": options.train_rows}
    for split in ("test", "train") if {"tfidf", "cascade"} & set(options.systems) else ("test",):
        rows = read_rows(options, split, counts[split])
        content = json.dumps({"texts": rows.texts, "truth": rows.truth.tolist(), "metric": rows.metric})
        kept = options.results / f"{split}.json"
        if kept.exists() and kept.read_text() != content:
            raise ValueError(f"{options.results} holds answers to other {split} rows; choose another folder")
        write_text(kept, content)


def check_same(options: argparse.Namespace) -> None:
    """ValueError where the folder holds the answers of another checkpoint, export or length."""
    served = {"checkpoint": checkpoint_hash(options.checkpoint), "max_length": options.max_length}
    served["exported"] = file_hash(options.exported / REPORT)
    kept = options.results / "served.json"
    for name, value in (json.loads(kept.read_text()) if kept.exists() else served).items():
        if served[name] != value:
            raise ValueError(f"{options.results} holds answers of another {name}; choose another folder")
    write_text(kept, json.dumps(served))


def kept_rows(options: argparse.Namespace, split: str) -> Rows:
    """The rows of `keep_rows`; those of test in the order of the file or by length."""
    content = json.loads((options.results / f"{split}.json").read_text())
    texts = [text if isinstance(text, str) else tuple(text) for text in content["texts"]]
    places = list(range(len(texts)))
    if split == "test" and options.order == "length":
        places.sort(key=lambda place: len(joined(texts[place])))
    return Rows([texts[place] for place in places], np.array(content["truth"])[places], content["metric"])


def decided(logits: np.ndarray) -> np.ndarray:
    """Class numbers of logits (rows, labels), the number itself where there is one."""
    return logits[:, 0] if logits.shape[1] == 1 else logits.argmax(axis=1)


def pytorch(options: argparse.Namespace, threads: int, padding: str) -> System:
    """The checkpoint in PyTorch, float32, every layer for every row."""
    import torch
    from transformers import AutoTokenizer

    from elastic_model import ElasticBertForSequenceClassification

    torch.set_num_threads(threads)
    model = ElasticBertForSequenceClassification.from_pretrained(options.checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(options.checkpoint)

    @torch.inference_mode()
    def answer(texts: list) -> np.ndarray:
        batch = tokenizer(texts, padding=padding, truncation=True, max_length=options.max_length, return_tensors="pt")
        return decided(model(**batch, exit_policy={"name": "never"}, length_config=1.0).logits.numpy())

    return answer, options.checkpoint / "model.safetensors"


def ours(
    options: argparse.Namespace, threads: int, folder: Path, point: str | None, file: str | None = None
) -> System:
    """An exported folder at a measured operating point; None: full depth, all tokens."""
    from elastic_model import ElasticSession

    session = ElasticSession.from_pretrained(folder, file, threads)
    session.tokenizer.enable_truncation(options.max_length)
    budget = "full" if point is None else read_budget(point) or point
    places = {label: place for place, label in enumerate(session.labels)}

    def answer(texts: list) -> np.ndarray:
        answers = session(texts, budget, batch_size=len(texts))
        regression = session.problem_type == "regression"
        return np.array([one["score"] if regression else places[one["label"]] for one in answers])

    return answer, session.file


def stock_file(options: argparse.Namespace, threads: int, file: Path, openvino: bool = False) -> System:
    """A file with BERT's inputs, padded to the longest row of a batch, in onnxruntime or OpenVINO."""
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(options.checkpoint / "tokenizer.json"))
    tokenizer.enable_truncation(options.max_length)
    tokenizer.enable_padding()
    if openvino:
        import openvino as ov  # type: ignore[import-not-found]

        model = ov.Core().compile_model(file, "CPU", {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY"})
        names = {one.any_name for one in model.inputs}
        infer: Callable[[dict], np.ndarray] = lambda feed: model(feed)[0]  # noqa: E731
    else:
        import onnxruntime

        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = threads
        session = onnxruntime.InferenceSession(file, settings, providers=["CPUExecutionProvider"])
        names = {one.name for one in session.get_inputs()}
        infer = lambda feed: session.run(["logits"], feed)[0]  # noqa: E731

    def answer(texts: list) -> np.ndarray:
        rows = tokenizer.encode_batch(texts)
        feed = {
            "input_ids": np.array([row.ids for row in rows]),
            "attention_mask": np.array([row.attention_mask for row in rows]),
            "token_type_ids": np.array([row.type_ids for row in rows]),
        }
        return decided(infer({name: value for name, value in feed.items() if name in names}))

    return answer, file.with_suffix(".bin") if openvino else file


def bag_of_words(options: argparse.Namespace) -> Any:
    """Logistic (of numbers: ridge) regression on TF-IDF of words and pairs of words, fitted on the training rows."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.pipeline import make_pipeline

    rows = kept_rows(options, "train")
    words = TfidfVectorizer(sublinear_tf=True, min_df=2, ngram_range=(1, 2))
    regression = np.issubdtype(rows.truth.dtype, np.floating)
    model = Ridge() if regression else LogisticRegression(C=10.0, max_iter=2000)
    return make_pipeline(words, model).fit([joined(text) for text in rows.texts], rows.truth)


def joined(text: Any) -> str:
    """A text, or the two of a pair in one."""
    return text if isinstance(text, str) else " ".join(text)


def cascade(options: argparse.Namespace, threads: int) -> System:
    """Bag of words where it is sure, the int8 file at full depth elsewhere."""
    first, (second, file) = bag_of_words(options), ours(options, threads, options.exported, None)

    def answer(texts: list) -> np.ndarray:
        shares = first.predict_proba([joined(text) for text in texts])
        answers = first.classes_[shares.argmax(axis=1)]
        unsure = np.flatnonzero(shares.max(axis=1) < SURE)
        if len(unsure):
            answers[unsure] = second([texts[one] for one in unsure])
        return answers

    return answer, file


def words_alone(options: argparse.Namespace, threads: int) -> System:
    """Bag of words for every row."""
    model = bag_of_words(options)
    return lambda texts: model.predict([joined(text) for text in texts]), None


SYSTEMS: dict[str, Callable[[argparse.Namespace, int], System]] = {
    "pytorch-padded": lambda options, threads: pytorch(options, threads, "max_length"),
    "pytorch-dynamic": lambda options, threads: pytorch(options, threads, "longest"),
    "ours-float32": lambda options, threads: ours(options, threads, options.exported, None, "model"),
    "ours-int8": lambda options, threads: ours(options, threads, options.exported, None),
    "tfidf": words_alone,
    "cascade": cascade,
}


def named(system: str) -> tuple[str, str]:
    """What one of `--systems` is called, and what it is."""
    name, equals, what = system.partition("=")
    return (name, what) if equals and ":" not in name else (system, system)


def system(name: str, options: argparse.Namespace, threads: int) -> System:
    """One of `--systems`; ValueError where there is none."""
    name = named(name)[1]
    kind, colon, value = name.partition(":")
    if not colon and name in SYSTEMS:
        return SYSTEMS[name](options, threads)
    if kind == "point":
        return ours(options, threads, options.exported, value)
    if kind == "folder":
        folder, _, point = value.partition("@")
        return ours(options, threads, Path(folder), point or None)
    if kind in ("onnx", "openvino"):
        return stock_file(options, threads, Path(value), kind == "openvino")
    known = [*SYSTEMS, "point:BUDGET", "folder:DIR[@BUDGET]", "onnx:FILE", "openvino:FILE"]
    raise ValueError(f"--systems {name}: unknown; allowed: {', '.join(known)}")


def serve(name: str, options: argparse.Namespace, threads: int) -> None:
    """Answer lines START STOP BATCH_SIZE until the input ends, each with a line of JSON."""
    rows = kept_rows(options, "test").texts
    answer, weights = system(name, options, threads)
    size = None if weights is None else weights.stat().st_size / 2**20
    answer(rows[:1])
    print("ready", flush=True)
    for line in sys.stdin:
        start, stop, batch_size = map(int, line.split())
        answers: list[float] = []
        spent: list[float] = []
        for place in range(start, stop, batch_size):
            batch = rows[place : min(place + batch_size, stop)]
            begin = time.perf_counter()
            said = answer(batch)
            spent.append((time.perf_counter() - begin) * 1e3)
            answers += said.tolist()
        served = {"answers": answers, "ms": spent, "peak_mib": peak_mib(), "file_mib": size}
        print(json.dumps(served), flush=True)


def measure(options: argparse.Namespace, threads: int, batch: int) -> None:
    """All systems on all pieces that are not there yet, one after another piece by piece."""
    rows = len(kept_rows(options, "test").texts)
    wanted = [
        (name, start, piece_file(options, name, threads, batch, start))
        for start in range(0, rows, PIECE)
        for name in options.systems
    ]
    missing = [one for one in wanted if not one[2].exists()]
    served: dict[str, Served] = {}
    try:
        for name, start, file in missing:
            if name not in served:
                words = ["benchmarks.inference", *sys.argv[1:], "--serve", name, str(threads)]
                served[name] = Served(name, words, threads)
            answer = served[name].ask(start, min(start + PIECE, rows), batch)
            write_text(file, json.dumps(answer) + "\n")
    finally:
        for one in served.values():
            one.close()


def piece_file(options: argparse.Namespace, name: str, threads: int, batch: int, start: int) -> Path:
    """Where the answers of a system to one piece are kept."""
    folder = options.results / f"{options.order}-threads{threads}-batch{batch}" / named(name)[0].replace("/", "_")
    folder.mkdir(parents=True, exist_ok=True)
    return folder / f"{start}.json"


def summary(options: argparse.Namespace, threads: int, batch: int) -> list[dict[str, Any]]:
    """One entry per system: quality, its interval and difference, latency per batch, rows per second, memory."""
    from finetune.metrics import interval, metric

    rows, first, entries = kept_rows(options, "test"), None, []
    for name in options.systems:
        files = [piece_file(options, name, threads, batch, start) for start in range(0, len(rows.texts), PIECE)]
        pieces = [json.loads(file.read_text()) for file in files]
        answers = np.concatenate([piece["answers"] for piece in pieces]).astype(rows.truth.dtype)
        spent = np.concatenate([piece["ms"] for piece in pieces])
        low, high = interval(rows.metric, answers, rows.truth)
        p50, p95, p99 = np.percentile(spent, [50, 95, 99])
        first = answers if first is None else first
        entry = {
            "system": named(name)[0],
            "order": options.order,
            "threads": threads,
            "batch": batch,
            "rows": len(answers),
        }
        entry |= {"metric": rows.metric, "quality": metric(rows.metric)(answers, rows.truth), "low": low, "high": high}
        entry |= {"difference": difference(rows, answers, first)}
        entry |= {"p50_ms": float(p50), "p95_ms": float(p95), "p99_ms": float(p99)}
        entry |= {"rows_per_second": 1e3 * len(answers) / float(spent.sum())}
        entry |= {"peak_mib": max(piece["peak_mib"] for piece in pieces), "file_mib": pieces[0]["file_mib"]}
        entries.append(entry)
    return entries


def difference(rows: Rows, answers: np.ndarray, others: np.ndarray) -> dict[str, float]:
    """Of two systems' quality on the same rows, with its 95 % percentile bootstrap interval."""
    from finetune.metrics import metric, paired_bootstrap

    quality = metric(rows.metric)
    value = quality(answers, rows.truth) - quality(others, rows.truth)
    low, high = np.percentile(paired_bootstrap(rows.metric, [answers], [others], rows.truth, SAMPLES), [2.5, 97.5])
    return {"value": value, "low": float(low), "high": float(high)}


def plot(entries: list[dict[str, Any]], file: Path) -> None:
    """Quality against time per row, a panel per number of threads and batch size."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    panels = sorted({(one["threads"], one["batch"]) for one in entries})
    names = list(dict.fromkeys(one["system"] for one in entries))
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels) + 2, 4.5), squeeze=False, sharey=True)
    for axis, panel in zip(axes[0], panels, strict=True):
        for one in [one for one in entries if (one["threads"], one["batch"]) == panel]:
            place = names.index(one["system"])
            error = [[one["quality"] - one["low"]], [one["high"] - one["quality"]]]
            how = {"color": f"C{place % 10}", "fmt": MARKERS[place // 10 % len(MARKERS)], "label": one["system"]}
            axis.errorbar(1e3 / one["rows_per_second"], one["quality"], yerr=error, capsize=2, **how)
        axis.set(xscale="log", xlabel="ms per row", title=f"threads {panel[0]}, batch {panel[1]}")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.grid(alpha=0.3, which="both")
    axes[0, 0].set(ylabel=entries[0]["metric"])
    axes[0, -1].legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.02, 1))
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def parsed() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", type=Path, help="folder for the pieces")
    parser.add_argument("--output", type=Path, help="JSON file, the plot beside it (default: RESULTS/summary.json)")
    parser.add_argument("--task", required=True, help="of the table: its test rows are answered")
    for name in ("checkpoint", "exported"):
        parser.add_argument(f"--{name}", type=Path, required=True)
    parser.add_argument("--max_length", type=int, default=128)
    parser.add_argument("--max_rows", type=int, help="test rows, a random subset (default: all)")
    parser.add_argument("--train_rows", type=int, help="train rows that TF-IDF is fitted on (default: all)")
    parser.add_argument("--order", choices=("file", "length"), default="file")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--systems", nargs="+", default=list(SYSTEMS))
    parser.add_argument("--serve", nargs=2, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> None:
    """Measure what is missing, then say what was found."""
    options = parsed()
    if options.serve:
        serve(options.serve[0], options, int(options.serve[1]))
        return
    options.results.mkdir(parents=True, exist_ok=True)
    keep_rows(options)
    check_same(options)
    entries = []
    for threads in options.threads:
        for batch in options.batch_sizes:
            measure(options, threads, batch)
            entries += summary(options, threads, batch)
    output = options.output or options.results / "summary.json"
    found = {"task": options.task, "machine": machine(max(options.threads)), "commit": commit(), "systems": entries}
    write_json(output, found)
    plot(entries, output.with_suffix(".png"))
    for one in entries:
        print(
            f"{one['system']:24} {one['threads']} threads, batch {one['batch']:2}: {one['quality']:.2%} "
            f"({one['low']:.2%}-{one['high']:.2%}; {one['difference']['value']:+.2%}), "
            f"{one['p50_ms']:.2f}/{one['p95_ms']:.2f} ms, {one['rows_per_second']:.0f} rows/s, "
            f"{one['peak_mib']:.0f} MiB"
        )


if __name__ == "__main__":
    sys.exit(run(main))
