"""The encoder on packed rows: every matrix product sees real tokens only, and attention alone the padded shape.

Legend of shapes: rows, longest (the longest row's tokens), tokens (all rows' real tokens), width, heads, head.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from elastic_model import ElasticBertConfig
from export.arithmetic import Arithmetic
from export.builder import GraphBuilder
from export.lengths import Inside, Lengths, drop
from export.quantization import smoothing

# config.hidden_act -> (fused operator that adds the bias first, or None; operator without)
ACTIVATIONS = {
    "gelu": ("BiasGelu", "Gelu"),
    "gelu_new": ("FastGelu", "FastGelu"),
    "gelu_pytorch_tanh": ("FastGelu", "FastGelu"),
    "relu": (None, "Relu"),
    "tanh": (None, "Tanh"),
}


REACH = 3.0  # standard deviations that a normalised channel reaches


@dataclass(frozen=True)
class Weights:
    """The checkpoint's configuration and its tensors by name, and how to compute with them."""

    config: ElasticBertConfig
    tensors: Mapping[str, np.ndarray]
    arithmetic: Arithmetic

    def product(
        self, graph: GraphBuilder, tokens: str, *names: str, scale: float | None = None, norm: str | None = None
    ) -> str:
        """tokens (tokens, inputs) times the matrices of linear layers side by side, without bias; `scale` is of the
        first. norm: the LayerNorm whose output `tokens` is."""
        weights = [np.asarray(self.tensors[f"{name}.weight"], np.float32) for name in names]
        if scale is not None:
            weights[0] = weights[0] * np.float32(scale)
        weight = np.concatenate(weights).T if len(weights) > 1 else weights[0].T
        if norm is not None and self.arithmetic.smooth:
            # not into the LayerNorm itself: BERT's residual connection reads its output too
            gain, bias = (
                np.abs(np.asarray(self.tensors[f"{norm}.{part}"], np.float32)) for part in ("weight", "bias")
            )
            factors = smoothing(REACH * gain + bias, weight)
            if factors is not None:
                tokens = graph.op("Mul", tokens, graph.initializer(f"{names[0]}_smoothing", 1 / factors))
                weight = weight * factors[:, None]
        return self.arithmetic.product(graph, tokens, "+".join(names), weight)

    def vector(self, graph: GraphBuilder, name: str) -> str:
        """A bias or a LayerNorm parameter."""
        return graph.initializer(name, np.asarray(self.tensors[name], np.float32))


@dataclass(frozen=True)
class Layout:
    """Where the tokens of packed rows lie: what attention and the exits need to know."""

    longest: str  # scalar
    columns: str  # (longest,) 0, 1, 2, ...
    inside: str  # (rows, longest) booleans, true at tokens
    parts: tuple[str, ...]  # 3 x (longest, rows) places of query, key and value of each slot; a token has three
    tokens: str  # (tokens,) slot of each token, counted through all rows
    mask: str  # (rows, 1, 1, longest) 0 at real tokens, minus infinity elsewhere


def starts_of(graph: GraphBuilder, lengths: str) -> str:
    """Place of each row's first token among the packed ones; (rows,)."""
    return graph.op("Sub", graph.op("CumSum", lengths, graph.constant(0, np.int64)), lengths)


def slots_of(graph: GraphBuilder, lengths: str) -> tuple[str, str, str, str]:
    """The first three of `Layout`, and (rows, longest) the place of the token of each slot, 0 where there is none; of
    rows with these lengths. Without rows a slot stays: onnxruntime's product of matrices without columns divides by
    their number, which ends the process."""
    longest = graph.op("ReduceMax", graph.op("Concat", lengths, graph.integers(1), axis=0), keepdims=0)
    columns = graph.op("Range", graph.constant(0, np.int64), longest, graph.constant(1, np.int64))
    inside = graph.op("Less", columns, graph.op("Unsqueeze", lengths, graph.integers(1)))  # (rows, longest)
    places = graph.op("Add", columns, graph.op("Unsqueeze", starts_of(graph, lengths), graph.integers(1)))
    return longest, columns, inside, graph.op("Where", inside, places, graph.constant(0, np.int64))


def layout_of(graph: GraphBuilder, lengths: str) -> Layout:
    """The layout of rows with these lengths."""
    longest, columns, inside, slots = slots_of(graph, lengths)
    flat = graph.op("NonZero", graph.op("Reshape", inside, graph.integers(-1)))
    tokens = graph.op("Squeeze", flat, graph.integers(0))
    mask = graph.op("Where", inside, graph.constant(0, np.float32), graph.constant(-np.inf, np.float32))
    first = graph.op("Mul", graph.op("Transpose", slots, perm=[1, 0]), graph.constant(3, np.int64))
    parts = (first, *(graph.op("Add", first, graph.constant(part, np.int64)) for part in (1, 2)))
    return Layout(longest, columns, inside, parts, tokens, graph.op("Unsqueeze", mask, graph.integers(1, 2)))


def embeddings(graph: GraphBuilder, weights: Weights, positions: str, ids: str, types: str | None = None) -> str:
    """(tokens,) positions from 0, ids and token types -> (tokens, width)."""
    prefix = "elasticbert.embeddings"
    tables = {
        name: np.asarray(weights.tensors[f"{prefix}.{name}.weight"], np.float32)
        for name in ("word_embeddings", "position_embeddings", "token_type_embeddings")
        if f"{prefix}.{name}.weight" in weights.tensors
    }
    tables["position_embeddings"] = tables["position_embeddings"][weights.config.position_offset :]
    if types is None and "token_type_embeddings" in tables:  # one type: the same for every token
        tables["position_embeddings"] = tables["position_embeddings"] + tables.pop("token_type_embeddings")[0]
    found = [
        weights.arithmetic.lookup(graph, index, f"{prefix}.{name}", tables[name])
        for name, index in zip(tables, [ids, positions, *([types] if types else [])], strict=True)
    ]
    return add_and_norm(graph, weights, f"{prefix}.LayerNorm", *found)


def add_and_norm(graph: GraphBuilder, weights: Weights, name: str, *terms: str) -> str:
    """LayerNorm of the sum of (tokens, width) terms and biases (width,).

    `Sum` and not `Add`: onnxruntime would fuse the latter into SkipLayerNormalization, which on a CPU takes five times
    as long.
    """
    norm = [weights.vector(graph, f"{name}.weight"), weights.vector(graph, f"{name}.bias")]
    total = graph.op("Sum", *terms)
    return graph.op("LayerNormalization", total, *norm, axis=-1, epsilon=weights.config.layer_norm_eps)


def norm_before(layer: int) -> str:
    """The LayerNorm whose output layer `layer` (from 1) reads."""
    below = "embeddings" if layer == 1 else f"encoder.layer.{layer - 2}.output"
    return f"elasticbert.{below}.LayerNorm"


def attention(
    graph: GraphBuilder, weights: Weights, layer: int, inside: Inside, layout: Layout, lengths: Lengths | None
) -> tuple[str, str, Inside]:
    """Self-attention of layer `layer` (from 1), before the output's bias: (tokens, width) of the tokens that stay,
    their rows (tokens,), and what is inside after it.

    Tokens are dropped before the output's projection, so that they cost no more than attention. The factor
    1/sqrt(head) is folded into the query's weights.
    """
    prefix = f"elasticbert.encoder.layer.{layer - 1}.attention"
    heads, head = weights.config.num_attention_heads_per_layer[layer - 1], weights.config.attention_head_size
    names = [f"{prefix}.self.{part}" for part in ("query", "key", "value")]
    biases = [np.asarray(weights.tensors[f"{name}.bias"], np.float32) for name in names]
    biases[0] = biases[0] * np.float32(head**-0.5)
    projected = weights.product(graph, inside.hidden, *names, scale=head**-0.5, norm=norm_before(layer))
    projected = graph.op("Add", projected, graph.initializer("+".join(names) + ".bias", np.concatenate(biases)))
    projected = graph.op("Reshape", projected, graph.integers(-1, heads, head))  # (3 tokens, heads, head)
    # each (longest, rows, heads, head): the products move the first axis to where they need it, without a copy
    query, key, value = (graph.op("Gather", projected, places) for places in layout.parts)
    scores = graph.contrib("FusedMatMul", query, key, transB=1, transBatchA=1, transBatchB=1)
    scores = graph.op("Add", scores, layout.mask)  # (rows, heads, longest, longest)
    probabilities = graph.op("Softmax", scores, axis=-1)
    context = graph.contrib("FusedMatMul", probabilities, value, transBatchB=1)
    context = graph.op("Transpose", context, perm=[0, 2, 1, 3])
    context = graph.op("Reshape", context, graph.integers(-1, heads * head))
    tokens = layout.tokens
    if lengths is not None:
        inside, tokens = drop(graph, lengths, layer, inside, layout, probabilities)
    context = graph.op("Gather", context, tokens)  # packed again
    rows = graph.op("Div", tokens, layout.longest)
    return weights.product(graph, context, f"{prefix}.output.dense"), rows, inside


def activate(graph: GraphBuilder, name: str, tokens: str, bias: str) -> str:
    """activation(tokens + bias); `name` is the configuration's."""
    if name not in ACTIVATIONS:
        raise ValueError(f"no ONNX operator for the activation {name!r}; exported are {', '.join(ACTIVATIONS)}")
    fused, plain = ACTIVATIONS[name]
    if fused is not None:
        return graph.contrib(fused, tokens, bias)
    return graph.op(plain, graph.op("Add", tokens, bias))


def feed_forward(graph: GraphBuilder, weights: Weights, layer: int, hidden: str) -> str:
    """The feed-forward block of layer `layer` (from 1), before the output's bias: (tokens, width) -> (tokens,
    width)."""
    prefix = f"elasticbert.encoder.layer.{layer - 1}"
    norm = f"{prefix}.attention.output.LayerNorm"
    inner = weights.product(graph, hidden, f"{prefix}.intermediate.dense", norm=norm)
    bias = weights.vector(graph, f"{prefix}.intermediate.dense.bias")
    inner = activate(graph, weights.config.hidden_act, inner, bias)
    return weights.product(graph, inner, f"{prefix}.output.dense")


def encoder_layer(
    graph: GraphBuilder, weights: Weights, layer: int, inside: Inside, layout: Layout, lengths: Lengths | None
) -> tuple[Inside, str]:
    """Layer `layer` (from 1) on packed tokens: what is inside after it, and the row of each token (tokens,).

    lengths: None = nothing is ever dropped.
    """
    prefix = f"elasticbert.encoder.layer.{layer - 1}"
    with graph.scope(f"layer_{layer}"):
        context, rows, inside = attention(graph, weights, layer, inside, layout, lengths)
        bias = weights.vector(graph, f"{prefix}.attention.output.dense.bias")
        hidden = add_and_norm(graph, weights, f"{prefix}.attention.output.LayerNorm", context, inside.hidden, bias)
        inner = feed_forward(graph, weights, layer, hidden)
        bias = weights.vector(graph, f"{prefix}.output.dense.bias")
        hidden = add_and_norm(graph, weights, f"{prefix}.output.LayerNorm", inner, hidden, bias)
        return replace(inside, hidden=hidden), rows


def encode(
    graph: GraphBuilder, weights: Weights, layers: range, inside: Inside, lengths: Lengths | None
) -> tuple[Inside, str]:
    """Some layers (from 1) one after another: what is inside after them, and the row of each token (tokens,)."""
    layout = layout_of(graph, inside.lengths)
    rows = ""
    for layer in layers:
        if lengths is not None and layer != layers[0]:
            layout = layout_of(graph, inside.lengths)
        inside, rows = encoder_layer(graph, weights, layer, inside, layout, lengths)
    return inside, rows
