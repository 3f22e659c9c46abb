"""A small builder of ONNX graphs: operators as calls, `If` bodies, initializers that every body sees."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

CONTRIB = "com.microsoft"  # operators of onnxruntime's CPU build, beside the standard ones

# numbers of the fields of ModelProto, GraphProto and TensorProto in onnx.proto
GRAPH, INITIALIZER, RAW_DATA = 7, 5, 9


@dataclass(frozen=True)
class Weight:
    """An initializer: an array, which may be a view of the checkpoint's own memory, and the type it is written in
    (bfloat16 as uint16 bits)."""

    name: str
    array: np.ndarray
    kind: int

    def head(self) -> bytes:
        """The serialised TensorProto up to its content."""
        tensor = onnx.TensorProto(name=self.name, data_type=self.kind, dims=self.array.shape)
        return tensor.SerializeToString() + _header(RAW_DATA, self.array.nbytes)


@dataclass(frozen=True)
class OnnxModel:
    """A model whose weights are apart: protobuf would hold a copy of all of them, and another when it writes."""

    proto: onnx.ModelProto
    weights: list[Weight]

    def chunks(self) -> Iterator[bytes]:
        """The serialised ModelProto, a weight at a time."""
        graph = self.proto.graph.SerializeToString()
        heads = [weight.head() for weight in self.weights]
        sizes = [len(head) + weight.array.nbytes for head, weight in zip(heads, self.weights, strict=True)]
        total = len(graph) + sum(len(_header(INITIALIZER, size)) + size for size in sizes)
        yield _without(self.proto, "graph").SerializeToString() + _header(GRAPH, total) + graph
        for head, weight, size in zip(heads, self.weights, sizes, strict=True):
            yield _header(INITIALIZER, size) + head
            yield weight.array.tobytes()

    def save(self, file: Path) -> None:
        """Write the file."""
        with file.open("wb") as output:
            output.writelines(self.chunks())

    def to_bytes(self) -> bytes:
        """The file's content."""
        return b"".join(self.chunks())


def _without(message: Any, left_out: str) -> Any:
    """A copy of a protobuf message without one of its fields."""
    copy = type(message)()
    for field, value in message.ListFields():
        if field.name != left_out:
            copy.MergeFrom(type(message)(**{field.name: value}))
    return copy


def _header(field: int, size: int) -> bytes:
    """The tag and the length before a field of `size` bytes (protobuf encoding, wire type 2)."""
    header = [field << 3 | 2]
    while size >= 0x80:
        header.append(size & 0x7F | 0x80)
        size >>= 7
    return bytes([*header, size])


class GraphBuilder:
    """Collects the nodes of one graph; a value is its name.

    Initializers are kept in the outermost graph: a body reads them from there, so no weight is copied into one.
    """

    def __init__(self, parent: "GraphBuilder | None" = None):
        self.nodes: list[onnx.NodeProto] = []
        self._scope: list[str] = parent._scope[:] if parent else []
        self._numbers: Iterator[int] = parent._numbers if parent else itertools.count()
        self._constants: dict[tuple, str] = parent._constants if parent else {}
        self.weights: list[Weight] = parent.weights if parent else []
        self._outermost: GraphBuilder = parent._outermost if parent else self

    @contextmanager
    def scope(self, name: str) -> Iterator["GraphBuilder"]:
        """Names of the nodes made inside start with `name/`: what a profile or an error message shows."""
        self._scope.append(name)
        yield self
        self._scope.pop()

    def op(self, op_type: str, *inputs: str, output: str | None = None, **attributes) -> str:
        """The one output of a standard operator, under the name `output` where it is one of the graph's."""
        if output is None:
            return self.ops(op_type, *inputs, outputs=1, **attributes)[0]
        self.nodes.append(
            helper.make_node(op_type, inputs, [output], name="/".join([*self._scope, output]), **attributes)
        )
        return output

    def contrib(self, op_type: str, *inputs: str, **attributes) -> str:
        """The one output of an onnxruntime operator."""
        return self.ops(op_type, *inputs, outputs=1, domain=CONTRIB, **attributes)[0]

    def ops(self, op_type: str, *inputs: str, outputs: int, domain: str = "", **attributes) -> list[str]:
        """The outputs of an operator that has several; an input "" is an optional one left out."""
        name = "/".join([*self._scope, f"{op_type}_{next(self._numbers)}"])
        results = [f"{name}:{place}" for place in range(outputs)]
        self.nodes.append(helper.make_node(op_type, inputs, results, name=name, domain=domain, **attributes))
        return results

    def constant(self, value, dtype=None) -> str:
        """A small constant; equal ones are kept once."""
        array = np.asarray(value, dtype)
        key = (array.dtype.str, array.shape, array.tobytes())
        if key not in self._constants:
            self._constants[key] = self.initializer(f"constant_{len(self._constants)}", array)
        return self._constants[key]

    def integers(self, *values: int) -> str:
        """A constant int64 vector."""
        return self.constant(values, np.int64)

    def initializer(self, name: str, array: np.ndarray) -> str:
        """A weight under its own name."""
        self.weights.append(Weight(name, array, helper.np_dtype_to_tensor_dtype(array.dtype)))
        return name

    def half(self, name: str, array: np.ndarray, kind: int) -> str:
        """A weight kept in float16 or bfloat16, as float32: onnxruntime widens it once, when it loads the file."""
        if kind == onnx.TensorProto.FLOAT16:
            kept = array.astype(np.float16)
        else:  # the upper half of float32, rounded to the nearest, even of two as near
            bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
            kept = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
        self.weights.append(Weight(name, kept, kind))
        wide = f"{name}_float32"
        self._outermost.nodes.append(helper.make_node("Cast", [name], [wide], name=wide, to=onnx.TensorProto.FLOAT))
        return wide

    def if_else(
        self, condition: str, then: "GraphBuilder", otherwise: "GraphBuilder", results: list[tuple[str, str]]
    ) -> list[str]:
        """The outputs of an `If`: `results` pairs a value of the body `then` with one of the body `otherwise`."""
        name = "/".join([*self._scope, f"If_{next(self._numbers)}"])
        outputs = [f"{name}:{place}" for place in range(len(results))]
        branches = {
            "then_branch": then.branch(f"{name}/then", [value for value, _ in results]),
            "else_branch": otherwise.branch(f"{name}/else", [value for _, value in results]),
        }
        self.nodes.append(helper.make_node("If", [condition], outputs, name=name, **branches))
        return outputs

    def branch(self, name: str, values: list[str]) -> onnx.GraphProto:
        """This builder's nodes as the body of an `If`; a value from outside, or named twice, becomes an output by
        `Identity`."""
        free = {output for node in self.nodes for output in node.output}
        outputs = []
        for value in values:
            outputs.append(value if value in free else self.op("Identity", value))
            free.discard(value)
        return helper.make_graph(
            self.nodes, name, [], [helper.make_empty_tensor_value_info(output) for output in outputs]
        )
