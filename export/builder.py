"""A small builder of ONNX graphs: operators as calls, `If` bodies, initializers that every body sees."""

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import onnx
from onnx import helper, numpy_helper

CONTRIB = "com.microsoft"  # operators of onnxruntime's CPU build, beside the standard ones


class GraphBuilder:
    """Collects the nodes of one graph; a value is its name.

    Initializers are kept in the outermost graph: a body reads them from there, so no weight is copied into one.
    """

    def __init__(self, parent: "GraphBuilder | None" = None):
        self.nodes: list[onnx.NodeProto] = []
        self._scope: list[str] = parent._scope[:] if parent else []
        self._numbers: Iterator[int] = parent._numbers if parent else itertools.count()
        self._constants: dict[tuple, str] = parent._constants if parent else {}
        self.initializers: list[onnx.TensorProto] = parent.initializers if parent else []

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
        self.initializers.append(numpy_helper.from_array(np.ascontiguousarray(array).reshape(array.shape), name))
        return name

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
