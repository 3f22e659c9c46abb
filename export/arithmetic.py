"""How a file computes: matrix products and embedding look-ups in float32, int8 or from halved weights. Nothing else
differs between the files."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
from onnx import TensorProto

from export.builder import GraphBuilder
from export.quantization import LARGEST, quantize_channels, quantize_rows

ZERO_POINT = 128  # of uint8 activations: symmetric int8, moved up
SMALLEST_SCALE = 1e-30  # a token of zeros is divided by this instead of by zero


@dataclass(frozen=True)
class Arithmetic:
    """How a file multiplies tokens (tokens, inputs) by a weight (inputs, channels) and looks ids (ids,) up in a table
    (entries, width): both take (graph, input, name of the weight, weight) and return a value.

    smooth: whether products of tokens with outlying channels gain from evening them out.
    """

    product: Callable[[GraphBuilder, str, str, np.ndarray], str]
    lookup: Callable[[GraphBuilder, str, str, np.ndarray], str]
    smooth: bool = False


def quantize_tokens(graph: GraphBuilder, tokens: str) -> tuple[str, str]:
    """Dynamic quantisation with one symmetric scale per token: uint8 (tokens, inputs), scale (tokens,).

    A scale per tensor would make an answer depend on its batch mates; a token's own depends on the token alone.
    """
    largest = graph.op("ReduceMax", graph.op("Abs", tokens), axes=[-1], keepdims=0)
    scale = graph.op("Mul", largest, graph.constant(1 / LARGEST, np.float32))
    scale = graph.op("Max", scale, graph.constant(SMALLEST_SCALE, np.float32))
    zero_point = graph.op("Expand", graph.constant(ZERO_POINT, np.uint8), graph.op("Shape", scale))
    return graph.op("QuantizeLinear", tokens, scale, zero_point, axis=0), scale


def product_int8(graph: GraphBuilder, tokens: str, name: str, weight: np.ndarray, *, pairs: bool) -> str:
    """tokens (tokens, inputs) times weight (inputs, channels): uint8 by int8, summed in int32.

    `MatMulIntegerToFloat` takes one scale for all activations, so it gets 1 and the scales of the channels; the scale
    of each token multiplies its result. Written as Cast and Mul nodes, onnxruntime would fuse both scales and ruin the
    tokens'.
    """
    quantized, scale = quantize_tokens(graph, tokens)
    channels, channel_scale = quantize_channels(weight, pairs=pairs)
    product = graph.contrib(
        "MatMulIntegerToFloat",
        quantized,
        graph.initializer(f"{name}_int8", channels),
        graph.constant(1, np.float32),
        graph.initializer(f"{name}_scale", channel_scale),
        graph.constant(ZERO_POINT, np.uint8),
    )
    return graph.op("Mul", product, graph.op("Unsqueeze", scale, graph.integers(1)))


def product_int8_tensor(graph: GraphBuilder, tokens: str, name: str, weight: np.ndarray, *, pairs: bool) -> str:
    """As `product_int8`, with one scale for all tokens, found when it runs: faster, but a row's answer then depends a
    little on its batch mates."""
    channels, channel_scale = quantize_channels(weight, pairs=pairs)
    return graph.contrib(
        "DynamicQuantizeMatMul",
        tokens,
        graph.initializer(f"{name}_int8", channels),
        graph.initializer(f"{name}_scale", channel_scale),
    )


def product_int8_static(
    graph: GraphBuilder,
    tokens: str,
    name: str,
    weight: np.ndarray,
    *,
    pairs: bool,
    ranges: Mapping[str, tuple[float, float]],
) -> str:
    """As `product_int8`, with one scale for all tokens, fixed from the range seen on sample rows; beyond it values
    are cut."""
    low, high = ranges[name.split("+")[0]]
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / 255, SMALLEST_SCALE)
    scale = graph.constant(step, np.float32)
    zero_point = graph.constant(round(-low / step), np.uint8)
    channels, channel_scale = quantize_channels(weight, pairs=pairs)
    return graph.contrib(
        "MatMulIntegerToFloat",
        graph.op("QuantizeLinear", tokens, scale, zero_point),
        graph.initializer(f"{name}_int8", channels),
        scale,
        graph.initializer(f"{name}_scale", channel_scale),
        zero_point,
    )


def lookup_int8(graph: GraphBuilder, ids: str, name: str, table: np.ndarray) -> str:
    """Rows of an int8 table with a scale per entry -> float32 (ids, width)."""
    entries, scale = quantize_rows(table)
    rows = graph.op("Gather", graph.initializer(f"{name}_int8", entries), ids)
    scales = graph.op("Gather", graph.initializer(f"{name}_scale", scale), ids)
    return graph.op("DequantizeLinear", rows, scales, axis=0)


def _floats(keep: Callable[[GraphBuilder, str, np.ndarray], str]) -> Arithmetic:
    """float32 products and look-ups of weights kept as `keep` puts them into the graph."""
    return Arithmetic(
        lambda graph, tokens, name, weight: graph.op("MatMul", tokens, keep(graph, name, weight)),
        lambda graph, ids, name, table: graph.op("Gather", keep(graph, name, table), ids),
    )


def _int8(pairs: bool) -> Arithmetic:
    return Arithmetic(partial(product_int8, pairs=pairs), lookup_int8, smooth=True)


# file name under onnx/ -> its arithmetic; the names are those that users of sentence-transformers know
ARITHMETICS = {
    "model": _floats(GraphBuilder.initializer),
    "model_qint8_avx512_vnni": _int8(pairs=False),
    "model_quint8_avx2": _int8(pairs=True),
    "model_qint8_arm64": _int8(pairs=False),
    "model_fp16": _floats(partial(GraphBuilder.half, kind=TensorProto.FLOAT16)),
    "model_bf16": _floats(partial(GraphBuilder.half, kind=TensorProto.BFLOAT16)),
}
INT8 = tuple(name for name, arithmetic in ARITHMETICS.items() if arithmetic.smooth)


def arithmetic_of(
    file: str, activations: str = "token", ranges: Mapping[str, tuple[float, float]] | None = None
) -> Arithmetic:
    """How a file computes; activations: "token", "tensor" or "static", which needs the `ranges` of the products'
    inputs by the name of the linear layer."""
    if file not in INT8 or activations == "token":
        return ARITHMETICS[file]
    pairs = file == "model_quint8_avx2"
    if activations == "tensor":
        return Arithmetic(partial(product_int8_tensor, pairs=pairs), lookup_int8, smooth=True)
    assert ranges is not None
    return Arithmetic(partial(product_int8_static, pairs=pairs, ranges=ranges), lookup_int8)
