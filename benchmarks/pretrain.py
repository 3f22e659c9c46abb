"""What exits cost in pre-training: steps with grouped training against a single-exit step of the same model, against
logits at every position, and against making a batch.

    python -m benchmarks.pretrain         # ten minutes on two cores; writes benchmarks/results/pretrain.json

A step is forward, backward and clearing of gradients of one real batch; the optimizer's part is the same with any
number of exits and is left out. Every figure is a ratio of times taken in turn in one run.
"""

import argparse
import json
import platform
import statistics
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch

from benchmarks.model import ratio, seconds
from elastic_model import ElasticBertConfig, ElasticBertForPreTraining
from elastic_model.folders import write_json
from elastic_model.losses import cross_entropy, exit_group
from pretrain.config import PretrainConfig
from pretrain.data import Examples, GlobalBatches, Share
from pretrain.metrics import update_flops
from pretrain.prepare import prepare

RESULTS = Path(__file__).parent / "results" / "pretrain.json"
TEXT = "pretrain/data/state_of_the_union.txt.xz"
BARS = {  # name of a ratio -> what it must not pass
    "2 groups / single exit": ("at most", 1.6),
    "3 groups / single exit": ("at most", 1.4),
    "every position / 3 groups": ("at least", 4.0),
    "making a batch / single exit": ("at most", 0.02),
}


def has_bf16():
    """Whether the CPU multiplies matrices in bf16 itself: elsewhere it is emulated, tens of times slower."""
    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def batches_of(options):
    """Global batches of real text, of the benchmark's rows and tokens."""
    with tempfile.TemporaryDirectory() as folder:
        config = PretrainConfig(
            text=[TEXT],
            output=Path(folder),
            cache=Path(folder),
            vocab_size=min(8000, options.vocabulary),
            max_length=options.tokens,
            short_probability=0.0,
            batch_size=options.rows,
        )
        examples = Examples(prepare(config, quiet=True), config, held_out=False)
        batches = GlobalBatches(examples, options.rows, Share(0, 1, options.rows))
        batches[0]  # pages of the shards that are read for the first time
        began = time.perf_counter()
        made = [batches[step][0] for step in range(20)]
        return made, (time.perf_counter() - began) / len(made)


def steps_of(model, batch, dtype):
    """name -> a step to time: the last exit alone, each group of grouped training, every exit at every position."""
    layers = model.exit_layers

    def step(loss):
        with torch.autocast("cpu", torch.bfloat16) if dtype == "bf16" else nullcontext():
            value = loss()
        value.backward()
        model.zero_grad()

    def everywhere():
        """Every exit's logits at every position, as a model has them that keeps one loss for all tokens."""
        inputs = (batch["input_ids"], batch["attention_mask"], batch["token_type_ids"], None, None, None, None)
        losses = []
        for here in model.walk(inputs, None, {}):
            logits = model.predictions(here.flow.all_tokens(), here.layer)
            losses.append(cross_entropy(logits, batch["labels"]))
            losses.append(cross_entropy(model.sentence_order(here), batch["sentence_order_label"]))
        return torch.stack(losses).sum()

    steps = {"single exit": lambda: step(lambda: model(**batch, exits=layers[-1:]).loss)}
    for groups in (2, 3):
        for group in range(groups):
            exits = exit_group(layers, groups, group)
            steps[f"{groups} groups: {group + 1}"] = lambda exits=exits: step(lambda: model(**batch, exits=exits).loss)
    return {**steps, "every position": lambda: step(everywhere)}


def mean_of_groups(times, groups):
    """Seconds per round, averaged over the groups."""
    return [
        statistics.mean(one) for one in zip(*(times[f"{groups} groups: {g + 1}"] for g in range(groups)), strict=True)
    ]


def model_flops(config, batch):
    """The same ratios in model FLOPs: what the times would be if all work ran equally fast."""
    rows = len(batch["input_ids"])
    sizes = (config, rows, float(batch["attention_mask"].sum()), float((batch["labels"] != -100).sum()))
    layers = config.exit_layers
    single = update_flops(*sizes, layers[-1:])
    found = {}
    for groups in (2, 3):
        mean = statistics.mean(update_flops(*sizes, exit_group(layers, groups, group)) for group in range(groups))
        found[f"{groups} groups / single exit"] = round(mean / single, 3)
    everywhere = update_flops(*sizes[:3], sizes[2], layers)
    return {**found, "every position / 3 groups": round(everywhere / mean, 3)}


def measure(options):
    """The ratios, their bars, and what they were measured on."""
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    dtype = options.dtype or ("bf16" if has_bf16() else "float32")
    batches, seconds_a_batch = batches_of(options)
    batch = max(batches, key=lambda one: int(one["attention_mask"].sum()))
    sizes = {"num_hidden_layers": options.layers, "hidden_size": options.width, "vocab_size": options.vocabulary}
    config = ElasticBertConfig(**sizes, num_attention_heads=options.heads, intermediate_size=4 * options.width)
    model = ElasticBertForPreTraining(config).train()
    steps = steps_of(model, batch, dtype)
    times = dict(zip(steps, seconds(*steps.values(), rounds=options.rounds), strict=True))
    single, two, three = times["single exit"], mean_of_groups(times, 2), mean_of_groups(times, 3)
    ratios = {
        "2 groups / single exit": ratio(two, single),
        "3 groups / single exit": ratio(three, single),
        "every position / 3 groups": ratio(times["every position"], three),
        "making a batch / single exit": seconds_a_batch / statistics.median(single),
    }
    return {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "dtype": dtype,
        "dtype_reason": "asked for" if options.dtype else f"this CPU multiplies in bf16 itself: {has_bf16()}",
        **sizes,
        "rows": options.rows,
        "real_tokens": int(batch["attention_mask"].sum()),
        "masked_tokens": int((batch["labels"] != -100).sum()),
        "rounds": options.rounds,
        "seconds": {name: round(statistics.median(one), 3) for name, one in times.items()},
        "seconds_to_make_a_batch": round(seconds_a_batch, 5),
        "ratios": {name: round(value, 4) for name, value in ratios.items()},
        "ratios_in_model_flops": model_flops(config, batch),
        "bars": {
            name: {"bar": f"{kind} {bar}", "met": value <= bar if kind == "at most" else value >= bar}
            for name, value in ratios.items()
            for kind, bar in [BARS[name]]
        },
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dtype", choices=["bf16", "float32"], help="default: bf16 where the CPU has it")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--vocabulary", type=int, default=30522)
    parser.add_argument("--rows", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3, help="how often each step is timed")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    parser.add_argument("--output", type=Path, default=RESULTS, help="default: %(default)s")
    options = parser.parse_args()
    result = measure(options)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_json(options.output, result)
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
