"""How a file computes: matrix products and embedding look-ups in float32 or int8. Nothing else differs between the
files."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from export.builder import GraphBuilder
from export.quantization import LARGEST, quantize_channels, quantize_rows

ZERO_POINT = 128  # of uint8 activations: symmetric int8, moved up
SMALLEST_SCALE = 1e-30  # a token of zeros is divided by this instead of by zero


@dataclass(frozen=True)
class Arithmetic:
    """How a file multiplies and looks up: both take (graph, input, name of the weight, weight) and return a value."""

    product: Callable[[GraphBuilder, str, str, np.ndarray], str]
    lookup: Callable[[GraphBuilder, str, str, np.ndarray], str]


def product_float32(graph: GraphBuilder, tokens: str, name: str, weight: np.ndarray) -> str:
    """tokens (tokens, inputs) times weight (inputs, channels)."""
    return graph.op("MatMul", tokens, graph.initializer(name, weight))


def lookup_float32(graph: GraphBuilder, ids: str, name: str, table: np.ndarray) -> str:
    """Rows of a table (entries, width) -> (ids, width)."""
    return graph.op("Gather", graph.initializer(name, table), ids)


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


def lookup_int8(graph: GraphBuilder, ids: str, name: str, table: np.ndarray) -> str:
    """Rows of an int8 table with a scale per entry -> float32 (ids, width)."""
    entries, scale = quantize_rows(table)
    rows = graph.op("Gather", graph.initializer(f"{name}_int8", entries), ids)
    scales = graph.op("Gather", graph.initializer(f"{name}_scale", scale), ids)
    return graph.op("DequantizeLinear", rows, scales, axis=0)


# file name under onnx/ -> its arithmetic; the names are those that users of sentence-transformers know
ARITHMETICS = {
    "model": Arithmetic(product_float32, lookup_float32),
    "model_qint8_avx512_vnni": Arithmetic(partial(product_int8, pairs=False), lookup_int8),
    "model_quint8_avx2": Arithmetic(partial(product_int8, pairs=True), lookup_int8),
}
