"""What the demo compares: ways to label a passage, each in a process of its own.

`python -m benchmarks.systems NAME FOLDER THREADS` reads lines `START STOP BATCH_SIZE` and answers each with a line of
JSON: labels, exit layers and milliseconds of these test passages, tokenisation included. FOLDER is the demo's.
"""

import csv
import json
import lzma
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ERA = Path(__file__).resolve().parent.parent / "finetune/data/era"
CHECKPOINT, EXPORTED = "era", "exported"  # folders that the demo's stages write
Answer = Callable[[list[str]], tuple[list[str], list[int | None]]]  # texts -> labels, exit layers


def era_rows(split: str) -> tuple[list[str], list[str]]:
    """Texts and labels of a split of the era task."""
    with lzma.open(ERA / f"{split}.tsv.xz", "rt", encoding="utf-8", newline="") as file:
        rows = list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    return [row["text"] for row in rows], [row["label"] for row in rows]


def bag_of_words(folder: Path, threads: int) -> Answer:
    """Logistic regression on TF-IDF of words, its C chosen on dev."""
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    def fit(strength: float) -> Any:
        words = TfidfVectorizer(sublinear_tf=True, min_df=2)
        return make_pipeline(words, LogisticRegression(C=strength, max_iter=2000)).fit(*era_rows("train"))

    best = max(map(fit, (0.1, 1.0, 10.0)), key=lambda model: model.score(*era_rows("dev")))
    return lambda texts: (best.predict(texts).tolist(), [None] * len(texts))


def pytorch(folder: Path, threads: int, padding: str) -> Answer:
    """The fine-tuned checkpoint in PyTorch, float32, every layer for every row."""
    import torch
    import yaml
    from transformers import AutoTokenizer
    from transformers.utils import logging

    from elastic_model import ElasticBertForSequenceClassification

    logging.disable_progress_bar()
    torch.set_num_threads(threads)
    model = ElasticBertForSequenceClassification.from_pretrained(folder / CHECKPOINT).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / CHECKPOINT)
    longest = yaml.safe_load((folder / CHECKPOINT / "finetune.yaml").read_text())["max_length"]
    names, depth = model.config.id2label, model.config.num_hidden_layers

    @torch.inference_mode()
    def answer(texts: list[str]) -> tuple[list[str], list[int | None]]:
        batch = tokenizer(texts, padding=padding, truncation=True, max_length=longest, return_tensors="pt")
        chosen = model(**batch, exit_policy={"name": "never"}).logits.argmax(-1).tolist()
        return [names[one] for one in chosen], [depth] * len(texts)

    return answer


def onnx(folder: Path, threads: int, file: str | None, exits: bool) -> Answer:
    """The exported folder: a file of it (None: the int8 one for this CPU), with exits or at full depth."""
    from elastic_model import ElasticSession

    session = ElasticSession.from_pretrained(folder / EXPORTED, file=file, threads=threads)
    thresholds = session.thresholds if exits else session.never

    def answer(texts: list[str]) -> tuple[list[str], list[int | None]]:
        outputs = session.run(session.tokenizer.encode_batch(texts), thresholds)
        return [session.labels[one] for one in outputs["logits"].argmax(-1)], outputs["exit_layer"].tolist()

    return answer


SYSTEMS: dict[str, Callable[[Path, int], Answer]] = {
    "bag of words, logistic regression": bag_of_words,
    "PyTorch float32, padded to the maximum": lambda folder, threads: pytorch(folder, threads, "max_length"),
    "PyTorch float32, padded to the longest": lambda folder, threads: pytorch(folder, threads, "longest"),
    "ONNX float32, full depth": lambda folder, threads: onnx(folder, threads, "model", exits=False),
    "ONNX int8, full depth": lambda folder, threads: onnx(folder, threads, None, exits=False),
    "ONNX int8, with exits": lambda folder, threads: onnx(folder, threads, None, exits=True),
}


def peak_mib() -> float:
    """Most memory this process has held at once. Not `ru_maxrss`, which starts from the parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        (line,) = [line for line in status.read_text().splitlines() if line.startswith("VmHWM")]
        return int(line.split()[1]) / 1024
    import psutil

    return psutil.Process().memory_info().rss / 2**20


def timed(answer: Answer, texts: list[str], batch_size: int) -> dict[str, Any]:
    """Answers batch by batch; the milliseconds of a batch are shared by its rows."""
    labels: list[str] = []
    layers: list[int | None] = []
    milliseconds: list[float] = []
    for start in range(0, len(texts), batch_size):
        batch = texts[start : start + batch_size]
        begin = time.perf_counter()
        found = answer(batch)
        milliseconds += [(time.perf_counter() - begin) * 1000 / len(batch)] * len(batch)
        labels += found[0]
        layers += found[1]
    return {"labels": labels, "layers": layers, "ms": milliseconds, "peak_mib": peak_mib()}


def serve(name: str, folder: Path, threads: int) -> None:
    """Answer requests until the input ends."""
    answer = SYSTEMS[name](folder, threads)
    texts, _ = era_rows("test")
    answer(texts[:1])  # so that lazy parts are loaded
    print("ready", flush=True)
    for line in sys.stdin:
        start, stop, batch_size = map(int, line.split())
        print(json.dumps(timed(answer, texts[start:stop], batch_size)), flush=True)


class Served:
    """The client of a process that answers lines START STOP BATCH_SIZE, each with a line of JSON, once it has said
    `ready`."""

    def __init__(self, name: str, words: list[str], threads: int) -> None:
        self.name = name
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        while self._line("before it was ready") != "ready\n":
            pass

    def _line(self, when: str) -> str:
        assert self.process.stdout is not None
        if not (line := self.process.stdout.readline()):
            raise ValueError(f"the process of {self.name!r} ended {when}; its error stands above")
        return line

    def ask(self, start: int, stop: int, batch_size: int) -> dict[str, Any]:
        """Answers to the test rows from `start` to `stop`."""
        assert self.process.stdin is not None
        self.process.stdin.write(f"{start} {stop} {batch_size}\n")
        self.process.stdin.flush()
        return json.loads(self._line(f"at rows {start} to {stop}"))

    def close(self) -> None:
        """End the process."""
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


if __name__ == "__main__":
    serve(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]))
