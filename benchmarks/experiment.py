"""What the experiments on real data share: how much of a task they read, and jobs that are kept as soon as they exist.

A job is a command of the project and what it leaves. Chains of jobs run side by side, a thread each; a job whose
outputs are there is not run again, so an experiment that was cut off, or given so many `--minutes`, goes on where it
was. Folders are named after the settings: two experiments that need the same checkpoint share it.
"""

import argparse
import hashlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import logging

from benchmarks.checkpoints import ROOT, minilm
from benchmarks.demo import commit, machine, only_one
from elastic_model import ElasticBertConfig
from elastic_model.cost import flops
from elastic_model.folders import write_json
from finetune.tasks import data_folder

RESULTS = ROOT / "benchmarks" / "results"
# chosen on SST-2's dev split with 5,000 sentences: exit 4 answers 81 % right after an epoch and full depth 83 %; at
# 5e-5 exit 4 answers 60 % after two, at 5e-4 full depth 81 %. On few pairs of sentences one seed of three does not
# train at it: MRPC's dev answers 62 % right; at half of it 83 %
LEARNING_RATE, OF_PAIRS = 2e-4, 1e-4
# exits 1 and 2 cannot compare sentences, and what they ask of the layers costs full depth: on SICK's dev split, two
# seeds, it answers 84.6 % right after training on the plain sum, 85.0 with these weights, which favour upper exits
EXIT_LOSS_OF_PAIRS = "cumulative"
SANDWICH, FROZEN = 3.1, 0.5  # cost of an update beside a joint one (benchmarks.finetune); exits on a frozen backbone
REACHED = 0.5  # share of the speed of one matrix product that a whole update reaches
LOG_LINES = 5  # of a job that failed


@dataclass(frozen=True)
class Size:
    """How much of a task an experiment reads, and how fast it learns. rows: of train, at most; tokens: of such a row,
    for the plan alone."""

    rows: int
    max_length: int
    epochs: int
    tokens: int
    test_rows: int | None = None
    learning_rate: float = LEARNING_RATE
    exit_loss: str = "sum"

    @property
    def words(self) -> str:
        """The size as a table states it."""
        test = f", {self.test_rows:,} test rows" if self.test_rows else ""
        return f"{self.rows:,} train rows, {self.epochs} epochs, {self.max_length} tokens{test}"


PAIRS = partial(Size, learning_rate=OF_PAIRS, exit_loss=EXIT_LOSS_OF_PAIRS)
SIZES = {
    "sst2": Size(10_000, 64, 2, tokens=13),
    "mrpc": PAIRS(3_668, 128, 3, tokens=53),
    "stsb": PAIRS(5_749, 128, 3, tokens=31),
    "sick": PAIRS(4_500, 64, 3, tokens=25),
    "imdb": Size(2_000, 256, 2, tokens=218, test_rows=1_000),
    "mlqa": Size(1_000, 256, 3, tokens=190),
    "wnut17": Size(3_394, 128, 3, tokens=25),
}


@dataclass(frozen=True)
class Job:
    """`python -m COMMAND`, the files or folders that it leaves (each whole or not at all), and its FLOPs, roughly."""

    name: str
    command: tuple[str, ...]
    outputs: tuple[Path, ...]
    flops: float

    @property
    def done(self) -> bool:
        return all(output.exists() for output in self.outputs)


Chain = list[Job]  # each needs those before it


def flags(settings: dict[str, Any]) -> list[str]:
    """Settings as arguments of a command; a list becomes several words."""
    return [
        word
        for name, value in settings.items()
        for word in (f"--{name}", *map(str, value if isinstance(value, list) else [value]))
    ]


def row_flops(size: Size) -> float:
    """FLOPs of the forward pass of a row of the task through MiniLM."""
    return flops(ElasticBertConfig.from_pretrained(minilm(ROOT)), size.tokens)


def fine_tuning(
    folder: Path, module: str, name: str, task: str, size: Size, seed: int, *, cost: float = 1.0, **settings: Any
) -> Job:
    """`python -m MODULE` with the flags of `finetune train`, from MiniLM unless `settings` has another `model`.

    cost: of an update beside a joint one.
    """
    shared = {"task": task, "train_rows": size.rows, "max_length": size.max_length, "epochs": size.epochs}
    shared |= {"learning_rate": size.learning_rate, "seed": seed, "model": minilm(folder)}
    words = [*module.split(), *flags(shared | settings)]
    digest = hashlib.sha256(" ".join(words).encode()).hexdigest()[:8]
    output = folder / f"{task}-{name}-{seed}-{digest}"
    rows = size.rows * sum(settings.get("phase_epochs", [size.epochs]))
    total = 3 * rows * cost * row_flops(size)  # a backward pass is two forward ones
    return Job(output.name, (*words, "--output", str(output), "--resume"), (output,), total)


def joint(folder: Path, task: str, size: Size, seed: int) -> Job:
    """The joint recipe on MiniLM, which several experiments measure."""
    return fine_tuning(folder, "finetune train", "joint", task, size, seed, recipe="joint", exit_loss=size.exit_loss)


def checkpoint(job: Job) -> Path:
    """The checkpoint that a training job leaves."""
    return job.outputs[0]


def _thread_speed() -> float:
    """FLOPs a second of one thread, of its own time: a matrix product of MiniLM's size, the fastest of some."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right, spent = torch.randn(512, 384), torch.randn(384, 1536), []
    for _ in range(30):
        began = time.thread_time()
        left @ right
        spent.append(time.thread_time() - began)
    torch.set_num_threads(before)
    return 2 * 512 * 384 * 1536 / min(spent)


def print_plan(chains: Sequence[Chain], workers: int) -> None:
    """What is done and what is to do, with the minutes expected on this machine."""
    speed = REACHED * _thread_speed()
    minutes = [[0.0 if job.done else job.flops / speed / 60 for job in chain] for chain in chains]
    for chain, expected in zip(chains, minutes, strict=True):
        for job, one in zip(chain, expected, strict=True):
            print(f"  {job.name:50} {'done' if job.done else f'{one:.1f} minutes'}")
    totals = [sum(one) for one in minutes]
    longest = max(max(totals, default=0.0), sum(totals) / workers)
    print(f"expected: {longest:.0f} minutes with {workers} jobs side by side, a thread each", flush=True)


class _Jobs:
    """The jobs that run now, which end with us."""

    def __init__(self, logs: Path) -> None:
        logs.mkdir(parents=True, exist_ok=True)
        self.logs, self.stopped, self.running = logs, threading.Event(), set[subprocess.Popen]()

    def run(self, job: Job) -> None:
        """Run a job unless it is done; ValueError with the end of its log where it fails."""
        if job.done or self.stopped.is_set():
            return
        began, log = time.monotonic(), self.logs / f"{job.name}.log"
        print(f"{datetime.now():%H:%M} {job.name}: begins, log {log}", flush=True)
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
        command = [sys.executable, "-m", *job.command]
        with log.open("ab") as file:  # open files are inherited: a job that outlives us holds our lock
            process = subprocess.Popen(
                command, cwd=ROOT, env=environment, stdout=file, stderr=file, close_fds=False
            )  # fmt: skip
        self.running.add(process)
        if self.stopped.is_set():  # it was begun in the same moment
            process.terminate()
        code = process.wait()
        self.running.discard(process)
        if self.stopped.is_set():
            return
        if code or not job.done:
            end = " | ".join(log.read_text(errors="replace").splitlines()[-LOG_LINES:])
            raise ValueError(f"{job.name} ended with exit code {code}: {end} (log: {log})")
        print(f"{datetime.now():%H:%M} {job.name}: done in {(time.monotonic() - began) / 60:.1f} minutes", flush=True)

    def stop(self) -> None:
        """End what runs; a fine-tuning saves where it is."""
        self.stopped.set()
        for process in list(self.running):
            process.terminate()


def run_chains(chains: Sequence[Chain], folder: Path, workers: int, minutes: float | None = None) -> bool:
    """Run the chains side by side, each in its order; the first failure ends all. False where the time was over before
    all was done."""
    jobs = _Jobs(folder / "logs")
    clock = threading.Timer(60 * (minutes or 0), jobs.stop)
    if minutes is not None:
        clock.start()
    before = signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))  # or the jobs outlive us

    def follow(chain: Chain) -> None:
        for job in chain:
            jobs.run(job)

    with ThreadPoolExecutor(workers) as pool:
        futures = [pool.submit(follow, chain) for chain in chains]
        try:
            for future in as_completed(futures):
                future.result()
        except BaseException:
            jobs.stop()
            pool.shutdown(wait=False, cancel_futures=True)
            raise
        finally:
            clock.cancel()
            signal.signal(signal.SIGTERM, before)
    done = all(job.done for chain in chains for job in chain)
    if not done:
        print(f"{minutes:g} minutes are over; the same command goes on", flush=True)
    return done


def parse(doc: str | None, name: str, tasks: Sequence[str], add: Callable[[Any], None] | None = None) -> Any:
    """The options that every experiment has, checked; `add` adds its own to the parser."""
    parser = argparse.ArgumentParser(description=(doc or "").split("\n\n")[0])
    parser.add_argument("--tasks", nargs="+", default=list(tasks), choices=tasks, metavar="TASK",
                        help=f"any of {', '.join(tasks)} (default: all)")  # fmt: skip
    parser.add_argument("--seeds", type=int, nargs="+", help="of the fine-tuning (default: the experiment's)")
    parser.add_argument("--train-rows", type=int, help="rows of train (default: the task's, as the plan says)")
    parser.add_argument("--epochs", type=int, help="passes over them, in each phase (default: the task's)")
    parser.add_argument("--test-rows", type=int, help="rows of test that are answered (default: all, of IMDb 1,000)")
    parser.add_argument("--folder", type=Path, default=ROOT / "checkpoints" / "experiments", help="checkpoints, logs")
    parser.add_argument("--minutes", type=float, help="stop after so many; the next run goes on (default: to the end)")
    parser.add_argument("--workers", type=int, default=2, help="jobs side by side, a thread each")
    parser.add_argument("--output", type=Path, default=RESULTS / f"{name}.json", help="results; the plot lies beside")
    parser.add_argument("--plan", action="store_true", help="print what would run and how long, and end")
    if add:
        add(parser)
    arguments = parser.parse_args()
    for option in ("train_rows", "epochs", "test_rows", "workers"):
        if (value := getattr(arguments, option)) is not None and value < 1:
            raise ValueError(f"--{option.replace('_', '-')} must be at least 1, got {value}")
    data_folder()
    logging.set_verbosity_error()
    arguments.folder = arguments.folder.resolve()
    return arguments


def size_of(task: str, arguments: argparse.Namespace) -> Size:
    """The task's size with what the command line changes."""
    given = {"rows": arguments.train_rows, "epochs": arguments.epochs, "test_rows": arguments.test_rows}
    return replace(SIZES[task], **{name: value for name, value in given.items() if value is not None})


@contextmanager
def working(arguments: argparse.Namespace) -> Iterator[Path]:
    """The experiment's folder, held by this run alone."""
    arguments.folder.mkdir(parents=True, exist_ok=True)
    with only_one(arguments.folder):
        yield arguments.folder


def make(title: str, size: Size, chains: Sequence[Chain], arguments: argparse.Namespace) -> bool:
    """Print the plan and carry it out; false where the plan was all that was asked for, or time was over."""
    print(f"{title}: {size.words}")
    print_plan(chains, arguments.workers)
    return not arguments.plan and run_chains(chains, arguments.folder, arguments.workers, arguments.minutes)


def provenance(size: Size) -> dict[str, Any]:
    """What stands beside every number: the size, where and from which code it was made."""
    device = machine(1)
    return {"size": asdict(size), "date": datetime.now(UTC).date().isoformat(), "commit": commit(), "machine": device}


def record(file: Path, what: str | None, found: dict[str, Any]) -> dict[str, Any]:
    """Put the results of some tasks into the file, beside those of other tasks; what it then holds."""
    known = json.loads(file.read_text()) if file.is_file() else {"tasks": {}}
    results = {"what": (what or "").split("\n\n")[0], "model": "all-MiniLM-L6-v2"}
    results |= {"tasks": {**known["tasks"], **json.loads(json.dumps(found))}}
    file.parent.mkdir(parents=True, exist_ok=True)
    write_json(file, results)
    return results
