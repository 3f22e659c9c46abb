"""`python -m export CHECKPOINT OUTPUT`, `python -m export predict|benchmark FOLDER`: parsed before torch is loaded."""

import sys

from elastic_model.arguments import parse, run
from export.config import BenchmarkOptions, ExportOptions, PredictOptions


def export(argv: list[str]) -> None:
    """Write the artefact and say what was checked."""
    options = parse(ExportOptions, argv, prog="python -m export")
    from export.card import summary
    from export.write import export_checkpoint

    report = export_checkpoint(options)
    for name, result in report["files"].items():
        print(f"{options.output}/onnx/{name}.onnx: {summary(result)}")


def predict(argv: list[str]) -> None:
    """Answer a file of texts."""
    options = parse(PredictOptions, argv, prog="python -m export predict")
    from export.predict import predict_file

    predict_file(options)


def benchmark(argv: list[str]) -> None:
    """Time the files of a folder."""
    options = parse(BenchmarkOptions, argv, prog="python -m export benchmark")
    from export.benchmark import benchmark_folder

    benchmark_folder(options)


def _command(argv: list[str]) -> None:
    commands = {"predict": predict, "benchmark": benchmark}
    if argv and argv[0] in commands:
        commands[argv[0]](argv[1:])
    else:
        export(argv)


def main() -> None:
    """The command that the command line names; bad input ends with one line and exit code 2."""
    sys.exit(run(lambda: _command(sys.argv[1:])))


if __name__ == "__main__":
    main()
