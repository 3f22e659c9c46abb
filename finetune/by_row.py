"""Lengths that rows choose themselves: each keeps the tokens that received most of the attention, layer by layer.

Kim and Cho (2021) leave a length of each row's own to later work. Here a layer keeps the fewest tokens that cover one
share of the row's significance, the same share at every layer, fitted so that rows cost what they may on average.
"""

from collections.abc import Mapping
from itertools import count

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from elastic_model.checks import Mass, check_length_config
from elastic_model.cost import mean_flops
from elastic_model.encoder import Flow
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.data import Encoded
from finetune.explore import Observed, Said, Tree, batches_of

FIT_ROWS = 128  # rows that a budget is met on; their labels are not read
STEPS = 9  # of the bisection: shares to a five-hundredth


def by_row(model: ElasticBertExitModel, share: float) -> dict[str, list[float]]:
    """The length configuration in which every layer covers that share of a row's significance."""
    return {"mass": [share] * model.config.num_hidden_layers}


@torch.inference_mode()
def explore_batch_by_row(
    model: ElasticBertExitModel, batch: Mapping[str, torch.Tensor], length_config: dict[str, list[float]]
) -> tuple[Said, torch.Tensor]:
    """What every exit says of a batch, (exits, rows, ...) and uncertainties, and the tokens kept, (layers, rows)."""
    config, tree, exits, kept = model.config, Tree(model), [], []
    lengths = check_length_config(length_config, config.num_hidden_layers) or [None] * config.num_hidden_layers
    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "token_type_ids")}
    flow = Flow(model.elasticbert.embeddings(**inputs), batch["attention_mask"].bool())
    for number, layer, length in zip(count(1), model.elasticbert.encoder.layer, lengths, strict=False):
        flow.through(layer, config, length if isinstance(length, Mass) else None)
        kept.append(flow.real_mask().sum(1))
        if number in model.exit_layers:
            exits.append(tree.head(number, flow))
    return tree.said(exits), torch.stack(kept)


def explore_by_row(
    model: ElasticBertExitModel,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    length_config: dict[str, list[float]],
    some: range | None = None,
) -> tuple[Observed, np.ndarray]:
    """What every exit says of all rows, or of `some`, and how many tokens each row keeps, (layers, rows)."""
    some = range(len(encoded)) if some is None else some
    observed: Observed | None = None
    kept = np.zeros((model.config.num_hidden_layers, len(some)), np.int64)
    for rows, batch in batches_of(model, encoded, tokenizer, batch_size, some):
        said, tokens = explore_batch_by_row(model, batch, length_config)
        observed = observed or Observed.blank(said, len(some), max(encoded.lengths))
        observed.put(rows, said, dict(enumerate(model.exit_layers)))
        kept[:, rows] = tokens.cpu().numpy()
    assert observed is not None
    return observed, kept


def fit_share(
    model: ElasticBertExitModel,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    flops: float,
    known: dict[float, float],
) -> float:
    """The largest share that costs at most `flops` at full depth, on average over the first FIT_ROWS rows.

    known: the costs of shares, which is added to. ValueError where even the smallest costs more.
    """
    some, fits, exceeds = range(min(FIT_ROWS, len(encoded))), 0.0, 1.0
    for _ in range(STEPS):
        share = (fits + exceeds) / 2
        if share not in known:
            _, kept = explore_by_row(model, encoded, tokenizer, batch_size, by_row(model, share), some)
            tokens = [encoded.lengths[row] for row in some]
            known[share] = mean_flops(model.config, tokens, head=encoded.head, kept=kept)
        fits, exceeds = (share, exceeds) if known[share] <= flops else (fits, share)
    if not fits:
        raise ValueError(
            f"rows that choose their own lengths cost at least {min(known.values()):.4g} FLOPs, more than the "
            f"{flops:.4g} asked for; allow more"
        )
    return fits
