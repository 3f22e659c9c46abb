"""The graph alone, on RANDOM weights: ratios of times within one run, nothing about quality.

python -m benchmarks.graph [--size tiny|small|base] [--threads N] [--output FILE]

1. Full depth: our files (and int8 with one scale per tensor) against the plain graphs that torch.onnx.export and
   onnxruntime's quantize_dynamic (per channel, reduced range, one scale per tensor) make of the same weights in
   BertForSequenceClassification.
2. Rows that leave evenly over the layers: time / full time over mean exit layer / layers; 1 is a cost in proportion.
3. Ragged rows: time over that of as many tokens in rows of one length; 1 is padding that costs nothing.
4. Half of the tokens dropped at a quarter of the depth: the share of the time saved over the share of the FLOPs.
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import torch
from onnxruntime.quantization import QuantType, quantize_dynamic
from transformers import BertConfig, BertForSequenceClassification

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification
from elastic_model.cost import flops
from elastic_model.folders import write_text
from elastic_model.processor import cpu_flags, fitting_files
from elastic_model.session import load_graph
from export.arithmetic import ARITHMETICS, arithmetic_of
from export.graph import build_graph
from export.task import task_of

SIZES = {"tiny": (4, 192, 4), "small": (6, 384, 12), "base": (12, 768, 12)}  # layers, width, heads
VOCABULARY = 8000
SHAPES = [(1, 32), (1, 128), (32, 32), (32, 128)]
PER_TENSOR = "int8, a scale per tensor"
SECONDS = 2.0


def models(size: str) -> tuple[ElasticBertForSequenceClassification, BertForSequenceClassification]:
    """The elastic model and the stock one with the same encoder."""
    layers, width, heads = SIZES[size]
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "intermediate_size": 4 * width,
    }
    torch.manual_seed(0)
    stock = BertForSequenceClassification(BertConfig(**shape, attn_implementation="eager")).eval()
    elastic = ElasticBertForSequenceClassification(ElasticBertConfig(**shape, num_labels=2)).eval()
    encoder = {
        f"elasticbert.{name}": tensor for name, tensor in stock.bert.state_dict().items() if "pooler" not in name
    }
    elastic.load_state_dict(encoder, strict=False)
    with torch.no_grad():
        for name, parameter in elastic.named_parameters():
            if name.startswith("classifiers"):
                parameter.normal_(0, 1)
    return elastic, stock


def plain_graphs(stock: BertForSequenceClassification, folder: Path) -> dict[str, Path]:
    """The stock model as anybody exports it: float32, and int8 by quantize_dynamic."""
    batch = feed(2, [8, 8])
    dynamic = {name: {0: torch.export.Dim("batch"), 1: torch.export.Dim("sequence")} for name in batch}
    inputs = {name: torch.from_numpy(value) for name, value in batch.items()}
    program = torch.onnx.export(
        stock, kwargs=inputs, dynamo=True, dynamic_shapes=dynamic, opset_version=18, verbose=False
    )
    program.save(folder / "plain.onnx")
    model = onnx.load(folder / "plain.onnx")
    del model.graph.value_info[:]  # stale shapes stop the quantiser
    onnx.save(model, folder / "plain.onnx")
    settings = {"weight_type": QuantType.QInt8, "per_channel": True, "reduce_range": True}
    quantize_dynamic(folder / "plain.onnx", folder / "plain_int8.onnx", **settings)
    return {"plain": folder / "plain.onnx", "plain_int8": folder / "plain_int8.onnx"}


def feed(seed: int, lengths: list[int]) -> dict[str, np.ndarray]:
    """Rows of random tokens, right-padded."""
    mask = (np.arange(max(lengths)) < np.array(lengths)[:, None]).astype(np.int64)
    ids = np.random.default_rng(seed).integers(1, VOCABULARY, mask.shape) * mask
    return {"input_ids": ids, "attention_mask": mask, "token_type_ids": np.zeros_like(ids)}


def milliseconds(calls: dict[str, tuple[onnxruntime.InferenceSession, dict]]) -> dict[str, float]:
    """The fastest of many calls of each, taken in turn so that the machine's noise is shared."""
    best = dict.fromkeys(calls, float("inf"))
    for session, inputs in calls.values():
        session.run(None, inputs)
    end, rounds = time.perf_counter() + SECONDS * len(calls), 0
    while rounds < 3 or time.perf_counter() < end:
        rounds += 1
        for name, (session, inputs) in calls.items():
            start = time.perf_counter()
            session.run(None, inputs)
            best[name] = min(best[name], 1e3 * (time.perf_counter() - start))
    return best


def even_thresholds(exit_logits: np.ndarray) -> np.ndarray:
    """One entropy threshold per exit at which rows leave evenly over the exits."""
    shares = torch.from_numpy(exit_logits).softmax(-1)
    entropy = (torch.special.entr(shares).sum(-1) / np.log(shares.shape[-1])).numpy()
    exits, rows = entropy.shape
    inside, thresholds = np.ones(rows, bool), np.zeros(exits, np.float32)
    for number in range(exits - 1):
        leave = inside.sum() - round(rows * (exits - 1 - number) / exits)
        ranked = np.sort(entropy[number, inside])
        thresholds[number] = (ranked[leave - 1] + ranked[min(leave, len(ranked) - 1)]) / 2 if leave else 0
        inside &= entropy[number] >= thresholds[number]
    return thresholds


def proportionality(session: onnxruntime.InferenceSession, layers: int, tokens: int) -> dict[str, float]:
    """time / full time over mean exit layer / layers: for one row over all exits, and for 32 rows that leave
    evenly."""
    one = feed(1, [tokens])
    capped = {str(k): (session, {**one, "max_layer": np.array([k])}) for k in range(1, layers + 1)}
    times = milliseconds(capped)
    alone = np.mean([*times.values()]) / times[str(layers)] / ((layers + 1) / 2 / layers)
    many = feed(2, [tokens] * 32)
    leaving = {**many, "exit_threshold": even_thresholds(session.run(["exit_logits"], many)[0])}
    mean_layer = session.run(["exit_layer"], leaving)[0].mean()
    times = milliseconds({"full": (session, many), "leaving": (session, leaving)})
    return {"batch 1": float(alone), "batch 32": float(times["leaving"] / times["full"] / (mean_layer / layers))}


def saving_of_lengths(session: onnxruntime.InferenceSession, config: ElasticBertConfig) -> dict[str, float]:
    """Time saved over FLOPs saved where half of 128 tokens fall at a quarter of the depth; 1 is all of it."""
    layers = config.num_hidden_layers
    shares = [1.0] * (layers // 4 - 1) + [0.5] * (layers - layers // 4 + 1)
    saved = 1 - flops(config, 128, length_config=shares) / flops(config, 128)
    found = {}
    for rows in (1, 8):
        batch = feed(5, [128] * rows)
        short = {**batch, "length_config": np.array(shares, np.float32)}
        times = milliseconds({"whole": (session, batch), "short": (session, short)})
        found[f"batch {rows}"] = (1 - times["short"] / times["whole"]) / saved
    return found


def measure(size: str, threads: int) -> dict:
    """All four questions for one size."""
    elastic, stock = models(size)
    tensors, task = {name: tensor.numpy() for name, tensor in elastic.state_dict().items()}, task_of(elastic.config)
    files = ["model", *[name for name in fitting_files(cpu_flags()) if name != "model"][:1]]
    with tempfile.TemporaryDirectory() as folder:
        sessions = {name: load_graph(path, threads) for name, path in plain_graphs(stock, Path(folder)).items()}
    for name in files:
        graph = build_graph(elastic.config, tensors, task, ARITHMETICS[name])
        sessions[name] = load_graph(graph.to_bytes(), threads)
    graph = build_graph(elastic.config, tensors, task, arithmetic_of(files[-1], "tensor"))
    sessions[PER_TENSOR] = load_graph(graph.to_bytes(), threads)
    result: dict = {"size": size, "threads": threads, "weights": "random", "full depth, ms": {}}
    for rows, tokens in SHAPES:
        inputs = feed(0, [tokens] * rows)
        calls = {name: (one, inputs) for name, one in sessions.items()}
        result["full depth, ms"][f"{rows} x {tokens}"] = milliseconds(calls)
    result["proportionality"] = {name: proportionality(sessions[name], SIZES[size][0], 32) for name in files}
    lengths = np.random.default_rng(3).integers(8, 57, 32).tolist()
    even = [sum(lengths) // 32] * 32
    result["ragged over even"] = {}
    for name in files:
        times = milliseconds({"ragged": (sessions[name], feed(4, lengths)), "even": (sessions[name], feed(4, even))})
        result["ragged over even"][name] = times["ragged"] / times["even"]
    config = elastic.config
    result["time saved over FLOPs saved"] = {name: saving_of_lengths(sessions[name], config) for name in files}
    by_shape = result["full depth, ms"].items()
    result["per tensor over quantize_dynamic"] = {
        shape: times[PER_TENSOR] / times["plain_int8"] for shape, times in by_shape
    }
    result["per token over per tensor"] = {shape: times[files[-1]] / times[PER_TENSOR] for shape, times in by_shape}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path, help="JSON file for the numbers")
    options = parser.parse_args()
    text = json.dumps(measure(options.size, options.threads), indent=2)
    print(text)
    if options.output:
        write_text(options.output, text + "\n")


if __name__ == "__main__":
    main()
