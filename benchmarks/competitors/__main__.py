"""`python -m benchmarks.competitors NAME --model DIR --output DIR`: ELUE's test files of a method from elsewhere.

The flags are those of `python -m finetune elue run` that say what is run on; into the folder of such a run, the
method joins its leaderboard.
"""

import importlib
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from elastic_model.arguments import parse, run
from elastic_model.folders import claim_folder
from elastic_model.jobs import quiet
from finetune.elue.config import LAST_EXIT, SizeOptions


@dataclass(frozen=True)
class Competitor:
    """A method, where it is from, and the settings that matter; the module of its name has the function."""

    paper: str
    settings: str


COMPETITORS = {
    "head_prune": Competitor(
        "Michel et al. 2019, Are Sixteen Heads Really Better than One?",
        "|dL/dgate| per head, l2-normalised by layer; 100 to 20 % of the heads kept; no training after pruning",
    ),
    "dynabert": Competitor(
        "Hou et al. 2020, DynaBERT: Dynamic BERT with Adaptive Width and Depth",
        "width only, no augmentation: heads, FFN nested by importance, 1, 3/4, 1/2, 1/4; KL of logits + MSE of states",
    ),
    "power_bert": Competitor(
        "Goyal et al. 2020, PoWER-BERT: Accelerating BERT Inference via Progressive Word-vector Elimination",
        "lambda 1e-4 to 3e-3, retention rate 1e-2 (3/updates under 300); mass rounded up; trained on at fixed lengths",
    ),
}


def _usage() -> str:
    lines = [f"  {name:12} {one.paper}\n{'':15}{one.settings}" for name, one in COMPETITORS.items()]
    return "\n".join(["usage: python -m benchmarks.competitors NAME --model DIR --output DIR ...", "", *lines])


def _command(argv: list[str]) -> int:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    name, *flags = argv
    if name not in COMPETITORS:
        raise ValueError(f"competitor {name!r} is unknown; allowed: {', '.join(COMPETITORS)}")
    return compete(name, parse(SizeOptions, flags, prog=f"python -m benchmarks.competitors {name}"))


def compete(name: str, options: SizeOptions) -> int:
    """Fine-tune (or take a checkpoint), run the method, write its test files, a task and a seed after the other; what
    is there is not made again. Then its result, and the leaderboard of all that the folder holds."""
    from benchmarks.competitors.start import Start
    from finetune.elue.jobs import (
        check_jobs,
        encoded_train,
        jobs_of,
        subject_of,
        train_checkpoint,
        training_of,
        write_labels,
    )
    from finetune.elue.results import is_made, make, publish, reference_of, result_of

    quiet()
    about = COMPETITORS[name]
    method = getattr(importlib.import_module(f"benchmarks.competitors.{name}"), name)
    jobs = jobs_of(options, trains=True)
    check_jobs(options, jobs)
    reference = reference_of(options, jobs)
    folder = claim_folder(Path(options.output))
    write_labels(jobs, folder / "labels")
    for job in jobs:
        sizes = ("train_rows", "epochs", "learning_rate", "batch_size", "max_length")
        settings = {"method": about.settings, "start": job.start_hash, **{size: getattr(job, size) for size in sizes}}
        settings["rows"] = {split: job.rows_hash(split) for split in ("train", "dev", "test")}
        for seed in job.seeds:
            submission = folder / "submissions" / name / f"seed-{seed}" / job.name
            if is_made(submission, settings):
                continue
            checkpoint = job.checkpoint
            if checkpoint is None:
                training = training_of(options, job, {"exit_layers": LAST_EXIT}, "single_exit", seed)
                code = train_checkpoint(training)
                if code:
                    return code
                checkpoint = training.output
            subject, splits = subject_of(options, job, Path(checkpoint))
            splits["train"] = encoded_train(job, subject, seed)
            make(submission, settings, partial(method, Start(options, job, seed, subject, splits)))
    publish([result_of(name, f"{about.paper}; {about.settings}", jobs, folder)], jobs, folder, reference)
    return 0


if __name__ == "__main__":
    sys.exit(run(lambda: _command(sys.argv[1:])))
