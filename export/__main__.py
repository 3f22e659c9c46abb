"""`python -m export CHECKPOINT OUTPUT`, `python -m export predict|benchmark FOLDER`: parsed before torch is loaded."""

import sys
from typing import Any

from elastic_model.arguments import dispatch, run
from export.config import BenchmarkOptions, ExportOptions, PredictOptions

# command -> its options, and the module and function that run it; "" exports
COMMANDS: dict[str, tuple[type[Any], str, str]] = {
    "": (ExportOptions, "export.write", "export"),
    "predict": (PredictOptions, "export.predict", "predict_file"),
    "benchmark": (BenchmarkOptions, "export.benchmark", "benchmark_folder"),
}


def main() -> None:
    """The command that the command line names; bad input ends with one line and exit code 2."""
    sys.exit(run(lambda: dispatch(COMMANDS, sys.argv[1:], "python -m export")))


if __name__ == "__main__":
    main()
