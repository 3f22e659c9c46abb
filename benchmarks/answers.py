"""`python -m benchmarks.answers CHECKPOINT ...`: what a checkpoint says of every row of a split, kept as arrays.

A file a rate of length reduction: the logits of every exit (of a stock model: of its one head), from which scores,
exit policies and comparisons are computed without running the model again.
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from transformers import AutoConfig, AutoTokenizer

from benchmarks.experiment import Job, Size, checkpoint, row_flops
from elastic_model import ElasticBertConfig
from elastic_model.arguments import run
from elastic_model.cost import mean_flops
from elastic_model.folders import new_file
from elastic_model.jobs import quiet
from elastic_model.subnetworks import constant_rate
from finetune.data import Encoded
from finetune.evaluate import observe
from finetune.examples import read_examples
from finetune.kinds import KINDS, answers_of, problem_type_of
from finetune.labels import Labels
from finetune.prepare import encode_split, load_classifier, some_rows
from finetune.tasks import find_task
from finetune.teacher import ask, final_logits, load_stock

EVALUATED_ROWS = {"sst2": 1_821, "mrpc": 1_725, "stsb": 1_500, "sick": 4_927, "mlqa": 1_400, "wnut17": 1_287}
BATCH = 64


@dataclass(frozen=True)
class Split:
    """The rows of a split as a checkpoint reads them, and what its labels are."""

    encoded: Encoded
    labels: Labels
    config: ElasticBertConfig
    max_length: int

    def answers(self, logits: np.ndarray) -> np.ndarray:
        """What the logits (rows, ...) of one exit say, an answer an example."""
        return answers_of(logits, self.encoded, self.labels)

    def flops(self, lengths: list[float] | None = None, layers: Sequence[int] | None = None) -> dict[str, float]:
        """FLOPs of a row on average: of its real tokens, and with every row padded to the maximum length."""
        how = {"length_config": lengths, "head": self.encoded.head}
        padded = [self.max_length] * len(self.encoded)
        return {
            "real": mean_flops(self.config, self.encoded.lengths, layers, **how),
            "padded": mean_flops(self.config, padded, layers, **how),
        }


@lru_cache(maxsize=4)
def read_split(folder: Path, task_name: str, split: str, max_length: int, rows: int | None) -> Split:
    """The rows of a split (a random subset of `rows`; None: all), in the order of the checkpoint's labels."""
    config, task = AutoConfig.from_pretrained(folder), find_task(task_name)
    problem_type = problem_type_of(config)
    if problem_type is None:
        raise ValueError(f"{folder} has no task head: there is nothing that it answers")
    names = [config.id2label[number] for number in range(config.num_labels)]
    labels = Labels(problem_type, names, task.metrics or KINDS[problem_type].default)
    examples = some_rows(read_examples(task, split), rows, 0)
    encoded = encode_split(examples, split, task, labels, AutoTokenizer.from_pretrained(folder), max_length)
    return Split(encoded, labels, config, max_length)


def files_of(folder: Path, split: str, size: Size, rates: Sequence[float]) -> list[Path]:
    """Where the answers at each rate are kept, beside the checkpoint."""
    rows = f"-{size.test_rows}" if split == "test" and size.test_rows else ""
    return [folder.with_name(f"{folder.name}.{split}{rows}-{rate:g}.npz") for rate in rates]


def answers(job: Job, task: str, split: str, size: Size, rates: Sequence[float] = (1.0,)) -> Job:
    """The job that answers a split with the checkpoint that `job` leaves."""
    folder = checkpoint(job)
    files = files_of(folder, split, size, rates)
    words = ["benchmarks.answers", str(folder), "--task", task, "--split", split]
    words += ["--max-length", str(size.max_length), "--rates", *map(str, rates), "--output", *map(str, files)]
    if split == "test" and size.test_rows:
        words += ["--rows", str(size.test_rows)]
    rows = size.test_rows or EVALUATED_ROWS.get(task, 1_000)
    return Job(f"{job.name}.{split}", tuple(words), tuple(files), len(rates) * rows * row_flops(size))


def read_logits(file: Path) -> np.ndarray:
    """Logits as `main` has kept them: (exits, rows, ...)."""
    with np.load(file, allow_pickle=False) as kept:
        return kept["logits"]


def logits_of(job: Job, split: str, size: Size) -> np.ndarray:
    """What `answers` keeps of a training job's checkpoint at full length: (exits, rows, ...)."""
    return read_logits(files_of(checkpoint(job), split, size, [1.0])[0])


def main() -> None:
    """Answer the split at every rate that has no file yet."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--task", required=True)
    parser.add_argument("--split", default="test")
    parser.add_argument("--rows", type=int, help="a random subset of this size (default: all)")
    parser.add_argument("--max-length", type=int, required=True, help="tokens of a row, at most")
    parser.add_argument("--rates", type=float, nargs="+", default=[1.0], help="share kept from layer to layer")
    parser.add_argument("--output", type=Path, nargs="+", required=True, help="a file (.npz) a rate")
    arguments = parser.parse_args()
    if len(arguments.output) != len(arguments.rates):
        raise ValueError(f"{len(arguments.rates)} rates need as many files, got {len(arguments.output)}")
    quiet()
    folder, accelerator = arguments.checkpoint, Accelerator(cpu=True)
    split = read_split(folder, arguments.task, arguments.split, arguments.max_length, arguments.rows)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    elastic = split.config.model_type == ElasticBertConfig.model_type
    model: Any = (
        load_classifier(folder, arguments.max_length)
        if elastic
        else load_stock(str(folder), split.labels.problem_type)
    )
    for rate, file in zip(arguments.rates, arguments.output, strict=True):
        if file.exists():
            continue
        if elastic:
            lengths = constant_rate(rate, split.config.num_hidden_layers)
            how = (split.encoded, tokenizer, BATCH, accelerator)
            logits = observe(model, *how, length_config=lengths).logits
        else:
            logits = np.stack(ask(model, split.encoded, tokenizer, BATCH, accelerator, final_logits))[None]
        with new_file(file) as temporary, temporary.open("wb") as kept:
            np.savez_compressed(kept, logits=logits)


if __name__ == "__main__":
    sys.exit(run(main))
