"""What preparing text costs: seconds, and the peak memory of all processes, on files of growing size.

    ELASTIC_MODEL_DATA=... python -m benchmarks.preparation       # minutes; writes benchmarks/results/preparation.json

Each measurement is a fresh process with an empty cache: first WordPiece is trained on the text and the shards are
made, then the shards alone are made again with other numbers of processes and compared, byte for byte.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from elastic_model.processor import cpu_name

RESULTS = Path(__file__).parent / "results" / "preparation.json"
TEXTS = {
    "sotu": ["sotu.txt.xz"],
    "novels": ["eltec_eng.txt.xz"],
    "novels and reviews": ["eltec_eng.txt.xz", "imdb_train_reviews.txt.xz"],
}
PREPARE = """
if __name__ == "__main__":  # the processes that it starts import nothing of this, as with `python -m pretrain`
    import json, os, time
    from pathlib import Path
    from pretrain.config import PretrainConfig
    from pretrain.prepare import prepare
    given = json.loads(os.environ["PREPARATION"])
    paths = {name: Path(given.pop(name)) for name in ("cache", "output", "tokenizer") if given.get(name)}
    start = time.perf_counter()
    corpus = prepare(PretrainConfig(**given, **paths), quiet=True)
    counts = {name: corpus.total(name) for name in ("documents", "sentences", "tokens")}
    print(json.dumps({"seconds": time.perf_counter() - start, "shards": len(corpus.shards), **counts}))
"""


def measure(folder: Path, **options) -> dict:
    """What a preparation in a process of its own printed, with `peak_mb`: resident memory of it and its
    children."""
    script = folder / "prepare.py"
    script.write_text(PREPARE)
    environment = {**os.environ, "PREPARATION": json.dumps(options), "PYTHONPATH": str(Path.cwd())}
    peak = 0
    with subprocess.Popen([sys.executable, script], env=environment, stdout=subprocess.PIPE, text=True) as process:
        tree = psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, resident(tree))
            time.sleep(0.05)
        printed = process.stdout.read()
    if process.returncode:
        raise SystemExit(process.returncode)
    return {**json.loads(printed), "peak_mb": round(peak / 1e6)}


def resident(tree: psutil.Process) -> int:
    """Bytes of the process and its children; a page that two of them share counts twice."""
    found = 0
    for process in [tree, *tree.children(recursive=True)]:
        try:
            found += process.memory_info().rss
        except psutil.NoSuchProcess:
            pass
    return found


def digest(cache: Path) -> str:
    """Of all shards in a cache."""
    found = hashlib.sha256()
    for path in sorted((cache / "shards").rglob("*")):
        if path.is_file():
            found.update(str(path.relative_to(cache)).encode() + path.read_bytes())
    return found.hexdigest()


def compare(text: list[Path], workers: list[int]) -> dict:
    """Training a tokenizer and making the shards, then the shards alone with each number of processes."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        common = {"text": list(map(str, text)), "output": str(folder)}
        first = measure(folder, **common, cache=str(folder / "first"), prepare_workers=workers[-1])
        (tokenizer,) = (folder / "first" / "tokenizers").iterdir()
        reference = digest(folder / "first")
        measured = {"with a new tokenizer": {"workers": workers[-1], **first}}
        for count in workers:
            cache = folder / f"workers-{count}"
            found = measure(folder, **common, cache=str(cache), prepare_workers=count, tokenizer=str(tokenizer))
            found["same_shards"] = digest(cache) == reference
            measured[f"{count} processes"] = found
    megabytes = sum(characters(path) for path in text) / 1e6
    for found in measured.values():
        found["mb_per_second"] = round(megabytes / found["seconds"], 2)
        found["seconds"] = round(found["seconds"], 1)
    return {"megabytes": round(megabytes, 1), **measured}


def characters(path: Path) -> int:
    """Bytes of the text, unpacked."""
    import lzma

    with lzma.open(path) as stream:
        return sum(len(line) for line in stream)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--texts", nargs="+", choices=TEXTS, default=list(TEXTS))
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2], help="numbers of processes, rising")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    folder = Path(os.environ["ELASTIC_MODEL_DATA"]) / "text"
    results = {"machine": cpu_name(), "cores": os.cpu_count(), "texts": {}}
    if arguments.output.is_file():  # texts that are not measured now keep what they had
        results["texts"] |= json.loads(arguments.output.read_text())["texts"]
    for name in arguments.texts:
        results["texts"][name] = compare([folder / file for file in TEXTS[name]], arguments.workers)
        print(name, json.dumps(results["texts"][name], indent=2), flush=True)
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
