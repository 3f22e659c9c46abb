"""What elasticity costs in PyTorch: our encoder against stock BERT, and whether time follows the layers that rows
leave at.

    python -m benchmarks.model            # about five minutes on two cores; writes benchmarks/results/model.json

Random weights: these are questions of time alone, and every figure is a ratio of two things timed in turn in one run.
Rows that leave evenly are made by per-exit confidence thresholds, chosen on the same random batch so that each exit
lets a twelfth go.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import BertConfig, BertModel

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification, ElasticBertModel
from elastic_model.exit_policies import predict, top_probability

RESULTS = Path(__file__).parent / "results" / "model.json"


def seconds(*actions, rounds):
    """Seconds of every call, for each action; timed in turn, so that a disturbance meets all of them."""
    for action in actions:
        action()
    times = [[] for _ in actions]
    for _ in range(rounds):
        for action, spent in zip(actions, times, strict=True):
            start = time.perf_counter()
            action()
            spent.append(time.perf_counter() - start)
    return times


def ratio(ours, stock):
    """Median of the rounds' ratios: each round's two times were taken one after the other."""
    return statistics.median(a / b for a, b in zip(ours, stock, strict=True))


def against_stock_bert(rows, tokens, rounds):
    """Our time / stock time at full depth and length, same weights: forward, and forward with backward."""
    torch.manual_seed(0)
    stock = BertModel(BertConfig())
    model = ElasticBertModel(ElasticBertConfig())
    model.load_state_dict(stock.state_dict(), strict=False)
    input_ids = torch.randint(5, 30000, (rows, tokens))
    mask = (torch.arange(tokens) < torch.randint(tokens // 2, tokens + 1, (rows, 1))).long()

    def forward(one):
        with torch.no_grad():
            one(input_ids, mask)

    def train(one):
        one(input_ids, mask).last_hidden_state.sum().backward()
        one.zero_grad()

    for one in (stock, model):
        one.eval()
    inference = seconds(lambda: forward(model), lambda: forward(stock), rounds=rounds)
    training = seconds(lambda: train(model), lambda: train(stock), rounds=max(3, rounds // 2))
    return {
        "rows": rows,
        "tokens": tokens,
        "forward": round(ratio(*inference), 3),
        "forward_backward": round(ratio(*training), 3),
    }


def even_thresholds(model, input_ids):
    """Thresholds of the confidence policy at which each exit lets the same number of rows go."""
    with torch.no_grad():
        logits = model(input_ids, exit_policy={"name": "never"}).exit_logits
    inside, thresholds = torch.arange(len(input_ids)), []
    for left, exit_logits in zip(range(len(logits), 0, -1), logits, strict=True):
        confidence = top_probability(predict(exit_logits[inside], "single_label_classification"))
        order = confidence.argsort(descending=True)
        leaving = round(len(inside) / left)
        stay = order[leaving:]
        thresholds.append(float((confidence[order[leaving - 1]] + confidence[stay].max()) / 2) if len(stay) else 0.0)
        inside = inside[stay]
    return thresholds


def as_rows_leave(rows, tokens, rounds):
    """(time / full time) / (mean exit layer / layers) when rows leave evenly over the layers."""
    torch.manual_seed(0)
    model = ElasticBertForSequenceClassification(ElasticBertConfig(num_labels=3, initializer_range=0.1)).eval()
    input_ids = torch.randint(5, 30000, (rows, tokens))
    policy = {"name": "confidence", "threshold": even_thresholds(model, input_ids)}

    def run(exit_policy):
        with torch.no_grad():
            return model(input_ids, exit_policy=exit_policy)

    mean_layer = run(policy).exit_layers.float().mean().item()
    times = seconds(lambda: run(policy), lambda: run({"name": "never"}), rounds=rounds)
    share = ratio(*times)
    return {
        "rows": rows,
        "tokens": tokens,
        "mean_exit_layer": round(mean_layer, 2),
        "time_share": round(share, 3),
        "over_layer_share": round(share / (mean_layer / model.config.num_hidden_layers), 3),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9, help="how often each pair is timed")
    parser.add_argument("--threads", type=int, default=2, help="threads of PyTorch")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    result = {
        "torch": torch.__version__,
        "threads": options.threads,
        "rounds": options.rounds,
        "time / stock BertModel": [against_stock_bert(rows, 64, options.rounds) for rows in (1, 8, 32)],
        "rows leaving evenly": [as_rows_leave(32, tokens, options.rounds) for tokens in (32, 64)],
    }
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
