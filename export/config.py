"""Options of `python -m export`, of `... predict` and of `... benchmark`."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from elastic_model.arguments import option


@dataclass
class ExportOptions:
    """A checkpoint as a folder of ONNX files that answer at every exit, each checked before it is kept. Other
    commands, each with a --help of its own: `python -m export predict` and `benchmark`."""

    checkpoint: Path = option(help="folder of a fine-tuned checkpoint, or of a bare encoder", positional=True)
    output: Path = option(help="folder to write", positional=True)
    files: list[str] = option(
        [],
        help="beside float32: model_qint8_avx512_vnni, model_quint8_avx2, model_qint8_arm64, model_fp16 or model_bf16 "
        "(weights alone, for size); default the int8 file for this CPU",
    )
    at: str | None = option(
        None, help="operating point whose settings are the files' defaults: a name, or speedup=4, max_drop=0.5, ..."
    )
    exit: int | None = option(None, help="a plain graph without control flow, cut after the exit at this layer")
    to: Literal["bert"] | None = option(
        None, help="bert: a stock BERT folder of the layers up to --exit (default: all), which needs no code of ours"
    )
    activations: Literal["token", "tensor", "static"] = option(
        "token", help="scales of int8 activations: one per token, one per tensor, or fixed ones found on --rows"
    )
    rows: Path | None = option(
        None, help="texts to compare int8 with float32 on (.txt, .tsv, .csv, .jsonl; .gz, .xz, .bz2)"
    )
    text: str = option("text", help="column of --rows that holds the text")
    pair: str | None = option(None, help="column of --rows that holds the second text")
    label: str | None = option(None, help="column of --rows that holds the label: quality is measured too")
    max_rows: int = option(256, help="rows of --rows to compare on")
    min_agreement: float = option(0.95, help="share of --rows that int8 must answer like float32")
    emulator: str | None = option(
        None,
        help="command that starts a Python of the other processor, with numpy and onnxruntime: files that this CPU "
        "cannot run are checked with it (default: they are kept unchecked, and marked so)",
    )


@dataclass
class PredictOptions:
    """The answers of an exported folder for a file of texts, as tab-separated lines."""

    folder: Path = option(help="folder that `python -m export` wrote", positional=True)
    input: Path = option(help="texts to answer (.txt, .tsv, .csv, .jsonl; .gz, .xz, .bz2)")
    output: Path | None = option(None, help="file to write (default: the terminal)")
    text: str = option("text", help="column that holds the text")
    pair: str | None = option(None, help="column that holds the second text")
    budget: str | None = option(None, help="operating point, or speedup=4, latency_ms=2, flops=1e9, max_drop=0.5")
    max_layer: int | None = option(None, help="highest layer that a row may reach")
    batch_size: int = option(32, help="rows per batch")
    threads: int | None = option(None, help="threads (default: those this process may use)")
    file: str | None = option(None, help="ONNX file, without .onnx (default: the best for this CPU)")


@dataclass
class BenchmarkOptions:
    """Milliseconds and rows per second of an exported folder's files, side by side in one run."""

    folder: Path = option(help="folder that `python -m export` wrote", positional=True)
    input: Path = option(help="texts to time (.txt, .tsv, .csv, .jsonl; .gz, .xz, .bz2)")
    output: Path | None = option(None, help="JSON file for the numbers")
    text: str = option("text", help="column that holds the text")
    pair: str | None = option(None, help="column that holds the second text")
    max_rows: int = option(256, help="rows to time")
    batch_sizes: list[int] = option([1, 32], help="rows per batch")
    threads: list[int] = option([1], help="threads, each value a line of the table")
    seconds: float = option(2.0, help="time per measurement, after a warm-up")
