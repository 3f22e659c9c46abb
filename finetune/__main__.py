"""`python -m finetune COMMAND ...`: options are parsed before anything slow is imported."""

import importlib
import sys
from typing import Any

from elastic_model.arguments import parse, run
from elastic_model.jobs import ended, quiet
from finetune.config import (
    CalibrateOptions,
    DistillOptions,
    ElastifyOptions,
    EvaluateOptions,
    PruneOptions,
    SearchOptions,
    TrainOptions,
)
from finetune.elue.config import LeaderboardOptions, RunOptions, ScoreOptions
from finetune.pipelines.config import EstimateOptions, PipelineOptions, StudyOptions

# command -> its options, and the module whose function of the command's name runs it
COMMANDS: dict[str, tuple[type[Any], str]] = {
    "train": (TrainOptions, "finetune.train"),
    "elastify": (ElastifyOptions, "finetune.elastify"),
    "distill": (DistillOptions, "finetune.distill"),
    "prune": (PruneOptions, "finetune.prune"),
    "evaluate": (EvaluateOptions, "finetune.evaluate"),
    "search": (SearchOptions, "finetune.search"),
    "calibrate": (CalibrateOptions, "finetune.calibrate"),
    "pipeline": (PipelineOptions, "finetune.pipelines.pipeline"),
    "estimate": (EstimateOptions, "finetune.pipelines.estimate"),
    "study": (StudyOptions, "finetune.pipelines.study"),
    "elue run": (RunOptions, "finetune.elue.run"),
    "elue score": (ScoreOptions, "finetune.elue.score"),
    "elue leaderboard": (LeaderboardOptions, "finetune.elue.leaderboard"),
}
SHORT = {"elue": "elue run"}


def _usage() -> str:
    lines = [f"  {name:16} {(options.__doc__ or '').splitlines()[0]}" for name, (options, _) in COMMANDS.items()]
    return "\n".join(["usage: python -m finetune COMMAND [--config RECIPE.yaml] [--flag value ...]", "", *lines])


def _command(argv: list[str]) -> int | None:
    if not argv or argv[0] in ("-h", "--help"):
        print(_usage())
        return 0 if argv else 2
    words = 2 if " ".join(argv[:2]) in COMMANDS else 1
    name, flags = " ".join(argv[:words]), argv[words:]
    name = SHORT.get(name, name)
    if name not in COMMANDS:
        raise ValueError(f"command {name!r} is unknown; allowed: {', '.join(COMMANDS)}")
    options, module = COMMANDS[name]
    parsed = parse(options, flags, prog=f"python -m finetune {name}")
    quiet()
    return getattr(importlib.import_module(module), name.split()[-1])(parsed)


def main() -> None:
    """Run the command that the command line names; bad input ends with one line and exit code 2."""
    sys.exit(ended(run(lambda: _command(sys.argv[1:]))))


if __name__ == "__main__":
    main()
