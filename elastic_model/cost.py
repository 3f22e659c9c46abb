"""What a sub-network costs, from its configuration alone: parameters, and FLOPs of its matrix products.

One multiply-add counts as 2 FLOPs; matrix products only, as ELUE (Liu et al. 2022) and Kim and Cho
(2021) count. An embedding lookup is no product and costs nothing.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from .checks import Mass, check_layer_config, check_length_config
from .configuration_elasticbert import ElasticBertConfig
from .length_drop import tokens_to_keep

HEADS = ("sequence", "token", "question_answering", "masked_lm", "pretraining", "none")


@dataclass
class Module:
    """One step of a row on its way up: `name` is emb, attention_l, ffn_l or exit_l (l from 1); what it costs, in
    FLOPs."""

    name: str
    tokens: int
    flops: int


def modules(
    config: ElasticBertConfig,
    tokens: int,
    length_config=None,
    layer_config=None,
    exit_layer: int | None = None,
    head: str = "sequence",
    asked: Sequence[int] | None = None,
) -> list[Module]:
    """The modules that one row of `tokens` tokens runs through, with their FLOPs.

    Real tokens give the cost of packed rows; the padded maximum length gives the cost that Kim and Cho state.
    length_config, layer_config: None = the config's, all layers. exit_layer: where the row leaves (None = the last).
    head: a name of HEADS; "none": the bare model, which asks no exit on the way and pools at the one it leaves at.
    asked: the exit layers whose heads are run (None = every exit up to `exit_layer`, as under a policy; one for static
    use).
    """
    exits, top = _exits_to(config, head, exit_layer)
    if tokens < 1:
        raise ValueError(f"tokens must be at least 1, got {tokens}.")
    if asked is not None and not set(asked) <= set(exits):
        raise ValueError(f"asked must be some of the exit layers {exits}, got {asked}.")
    asked = [top] if asked is None and head == "none" else asked
    lengths = _lengths(config, length_config)
    executed = check_layer_config(layer_config, config.num_hidden_layers)
    if top not in executed and top != exits[-1]:
        raise ValueError(f"exit_layer {top}: layer_config {executed} leaves that layer, and its exit, out.")
    inside = tokens
    rows = [Module("emb", tokens, 0)]
    for layer in range(1, top + 1):
        if layer in executed:
            kept = inside
            if lengths is not None:
                kept = min(inside, int(tokens_to_keep(lengths[layer - 1], torch.tensor([tokens]))))
            rows.append(Module(f"attention_{layer}", inside, _attention(config, layer, inside)))
            rows.append(Module(f"ffn_{layer}", kept, _feed_forward(config, layer, kept)))
            inside = kept
        answers = layer in exits and (layer in executed or layer == exits[-1])
        if answers and (asked is None or layer in asked):
            rows.append(Module(f"exit_{layer}", 1, _exit_head(config, head, tokens)))
    return rows


def flops(config: ElasticBertConfig, tokens: int, **sub_network) -> int:
    """FLOPs of one row; arguments as in `modules`."""
    return sum(module.flops for module in modules(config, tokens, **sub_network))


def exit_flops(
    config: ElasticBertConfig,
    tokens: Sequence[int] | torch.Tensor,
    length_config=None,
    head: str = "sequence",
    kept=None,
) -> torch.Tensor:
    """FLOPs of leaving at each exit, every exit below asked: (exits, rows) int64, for rows of `tokens` tokens.

    What `flops` gives row by row, for many rows at once. kept: where rows choose their lengths themselves, how many
    tokens each had left behind each layer, (layers, rows).
    """
    _exits_to(config, head, None)
    inside = torch.as_tensor(tokens, dtype=torch.long)
    if inside.dim() != 1 or not len(inside) or inside.min() < 1:
        raise ValueError("tokens must be a list of at least one count, each at least 1.")
    lengths = None if kept is not None else _lengths(config, length_config)
    kept = None if kept is None else torch.as_tensor(kept)
    real, spent, costs = inside, torch.zeros_like(inside), []
    for layer in range(1, config.num_hidden_layers + 1):
        left = inside if lengths is None else tokens_to_keep(lengths[layer - 1], real).minimum(inside)
        left = left if kept is None else kept[layer - 1]
        spent = spent + _attention(config, layer, inside) + _feed_forward(config, layer, left)
        inside = left
        if layer in (config.exit_layers or ()):
            answered = spent + _exit_head(config, head, real)
            costs.append(answered)
            spent = spent if head == "none" else answered
    return torch.stack(costs)


def mean_flops(
    config: ElasticBertConfig,
    tokens: Sequence[int],
    exit_layers: Sequence[int] | None = None,
    length_config=None,
    head: str = "sequence",
    kept: np.ndarray | torch.Tensor | None = None,
    **others,
) -> float:
    """Mean FLOPs per row of a measured distribution: each row's real tokens and the layer it left at (None = the
    last); the other arguments as of `exit_flops`, or layer_config and asked, as of `modules`."""
    exits = list(config.exit_layers or ())
    leaves = exits[-1:] * len(tokens) if exit_layers is None else [int(layer) for layer in exit_layers]
    if len(leaves) != len(tokens) or not set(leaves) <= set(exits):
        raise ValueError(f"exit_layers must be one of {exits} for each of {len(tokens)} rows, got {exit_layers}.")
    if others and leaves:  # without rows `exit_flops` says what is wrong
        rows = Counter(zip(tokens, leaves, strict=True))
        how = {"length_config": length_config, "head": head, **others}
        return sum(n * flops(config, int(one), exit_layer=at, **how) for (one, at), n in rows.items()) / len(tokens)
    places = [exits.index(layer) for layer in leaves]
    costs = exit_flops(config, tokens, length_config, head, kept)
    return costs[places, torch.arange(len(places))].double().mean().item()


def parameters(config: ElasticBertConfig, head: str = "sequence", exit_layer: int | None = None) -> int:
    """Parameters of the model cut after `exit_layer` (None = the whole model), with the heads of the exits up to
    there.

    Counts what `sum(p.numel() for p in model.parameters())` counts: tied weights once.
    """
    exits, _ = _exits_to(config, head, None)
    width, layers = config.hidden_size, config.num_hidden_layers
    top = layers if exit_layer is None else exit_layer
    if not 1 <= top <= layers:
        raise ValueError(f"exit_layer must be 1 to {layers}, got {exit_layer}.")
    tables = config.vocab_size + config.max_position_embeddings + config.type_vocab_size
    count = (tables + 2) * width  # and the norm
    for index in range(top):
        attention, inner = config.head_sizes[index], (config.intermediate_size_per_layer or ())[index]
        count += 3 * (width + 1) * attention + (attention + 1) * width + 2 * width
        count += (width + 1) * inner + (inner + 1) * width + 2 * width
    return count + _head_parameters(config, head, len([layer for layer in exits if layer <= top]))


def _exits_to(config: ElasticBertConfig, head: str, exit_layer: int | None) -> tuple[list[int], int]:
    """The exit layers, and the one where a row leaves (None = the last); ValueError for one, or a head, that is not
    there."""
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, got {head!r}.")
    exits = list(config.exit_layers or ())
    if exit_layer is not None and exit_layer not in exits:
        raise ValueError(f"exit_layer must be one of {exits}, got {exit_layer}.")
    return exits, exits[-1] if exit_layer is None else exit_layer


def _lengths(config, length_config):
    given = config.length_config if length_config is None else length_config
    lengths = check_length_config(given, config.num_hidden_layers)
    if any(isinstance(length, Mass) for length in lengths or ()):
        raise ValueError(
            f"what {given} costs depends on each row's scores: measure how many tokens rows keep, and give exit_flops "
            "`kept`; or state shares."
        )
    return lengths


def _attention(config, layer: int, tokens):
    heads = config.head_sizes[layer - 1]
    return 2 * (4 * tokens * config.hidden_size * heads + 2 * tokens * tokens * heads)


def _feed_forward(config, layer: int, tokens):
    return 2 * 2 * tokens * config.hidden_size * config.intermediate_size_per_layer[layer - 1]


def _exit_head(config, head: str, tokens):
    width, pooler = config.hidden_size, config.hidden_size**2
    uncertainty = width if config.learned_exit_head else 0
    predictions = tokens * (width * width + width * config.vocab_size)
    products = {
        "none": pooler,
        "sequence": pooler + width * (config.num_labels or 1) + uncertainty,
        "token": tokens * width * (config.num_labels or 1) + uncertainty,
        "question_answering": tokens * width * 2 + uncertainty,
        "masked_lm": predictions,
        "pretraining": predictions + pooler + width * 2,
    }
    return 2 * products[head]


def _head_parameters(config, head: str, exits: int) -> int:
    width, pooler = config.hidden_size, (config.hidden_size + 1) * config.hidden_size
    uncertainty = width + 1 if config.learned_exit_head else 0
    decoder = config.vocab_size * (1 if config.tie_word_embeddings else width + 1)  # tied: its bias alone
    transforms = exits * (pooler + 2 * width) + decoder
    counts = {
        "none": exits * pooler,
        "sequence": exits * (pooler + (width + 1) * (config.num_labels or 1)) + uncertainty,
        "token": exits * (width + 1) * (config.num_labels or 1) + uncertainty,
        "question_answering": exits * (width + 1) * 2 + uncertainty,
        "masked_lm": transforms,
        "pretraining": transforms + exits * (pooler + (width + 1) * 2),
    }
    return counts[head]
