"""int8 weights: what they stand for, and that products cannot overflow where the CPU adds pairs in int16."""

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper

from export.arithmetic import product_int8_static
from export.builder import GraphBuilder
from export.quantization import quantize_channels, quantize_rows


@pytest.fixture
def weight():
    return np.random.default_rng(0).normal(0, 0.04, (97, 40)).astype(np.float32)


@pytest.mark.parametrize("pairs", [False, True])
def test_channels_stand_for_the_weight(weight, pairs):
    channels, scale = quantize_channels(weight, pairs=pairs)
    assert channels.dtype == np.int8 and scale.shape == (40,)
    error = np.abs(channels * scale - weight)
    assert error.mean() < (0.012 if pairs else 0.008) * np.abs(weight).max()
    if not pairs:
        assert (error <= scale * 0.5001).all()


def test_a_channel_of_zeros_stays_zero(weight):
    weight[:, 5] = 0
    channels, scale = quantize_channels(weight)
    assert (channels[:, 5] == 0).all() and np.isfinite(scale).all()


def test_rows_have_scales_of_their_own():
    table = np.array([[1.0, -2.0], [100.0, 50.0]], np.float32)
    entries, scale = quantize_rows(table)
    np.testing.assert_allclose(entries * scale[:, None], table, rtol=0.01)


def test_pairs_cannot_overflow(weight):
    """255 (w_i + w_j) of one sign stays within int16 for neighbours i, j, so that `vpmaddubsw` does not saturate."""
    channels, _ = quantize_channels(weight, pairs=True)
    pairs = np.pad(channels, ((0, 1), (0, 0))).astype(int).reshape(-1, 2, 40)
    assert 255 * np.maximum(pairs, 0).sum(axis=1).max() < 2**15
    assert 255 * np.minimum(pairs, 0).sum(axis=1).min() >= -(2**15)


def test_onnxruntime_multiplies_pairs_exactly_on_this_cpu(weight):
    """The worst activations, 0 and 255, with the largest weights: the product is what int32 arithmetic says."""
    channels, _ = quantize_channels(np.sign(weight) * np.abs(weight) ** 0.1, pairs=True)
    tokens = np.random.default_rng(1).choice(np.array([0, 255], np.uint8), (33, 97))
    zero = helper.make_tensor("zero", TensorProto.UINT8, [], [128])
    node = helper.make_node("MatMulInteger", ["tokens", "channels", "zero"], ["product"])
    graph = helper.make_graph(
        [node],
        "product",
        [helper.make_tensor_value_info("tokens", TensorProto.UINT8, [None, 97])],
        [helper.make_tensor_value_info("product", TensorProto.INT32, None)],
        [onnx.numpy_helper.from_array(channels, "channels"), zero],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    expected = (tokens.astype(np.int32) - 128) @ channels.astype(np.int32)
    assert (session.run(None, {"tokens": tokens})[0] == expected).all()


def test_a_fixed_scale_spans_the_range_that_was_seen():
    graph, weight = GraphBuilder(), np.eye(4, dtype=np.float32)
    product_int8_static(graph, "tokens", "w", weight, pairs=False, ranges={"w": (-1.0, 3.0)})
    scales = [float(one.array) for one in graph.weights if one.array.ndim == 0 and one.array.dtype == np.float32]
    assert scales == pytest.approx([4 / 255])
