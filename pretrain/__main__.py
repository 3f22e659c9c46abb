"""`python -m pretrain [COMMAND] --config RECIPE.yaml [--flag value ...]`: options are parsed before anything slow is
imported."""

import sys
from typing import Any

from elastic_model.arguments import dispatch, run
from elastic_model.jobs import ended
from pretrain.config import EvaluateConfig, PrepareConfig, PretrainConfig, ReleaseConfig

# command -> its options, and the module and function that run it; "" trains
COMMANDS: dict[str, tuple[type[Any], str, str]] = {
    "": (PretrainConfig, "pretrain.train", "train"),
    "prepare": (PrepareConfig, "pretrain.statistics", "prepare_text"),
    "evaluate": (EvaluateConfig, "pretrain.evaluate", "evaluate_checkpoint"),
    "release": (ReleaseConfig, "pretrain.release", "release"),
}


def main() -> int:
    """The exit code of the command that the command line names; bad input ends with one line and code 2."""
    return ended(run(lambda: dispatch(COMMANDS, sys.argv[1:], "python -m pretrain")))


if __name__ == "__main__":
    sys.exit(main())
