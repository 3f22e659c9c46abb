"""Length configurations in the graph: tokens dropped inside a layer, physically, and only where a share falls or rows
choose themselves.

Kim and Cho 2021, section 3; the same choice of tokens as `elastic_model.length_drop`. Legend of shapes as in
export/encoder.py.
"""

from dataclasses import dataclass, replace

import numpy as np
from onnx import TensorProto

from export.builder import GraphBuilder

SHARES, MASS = "length_config", "length_mass"  # inputs
FEWEST = 2  # tokens that a row of two or more always keeps


@dataclass(frozen=True)
class Lengths:
    """What the inputs `length_config` and `length_mass` ask for, cleaned; the same for all layers."""

    layers: int
    shares: str  # (layers,) of a row's real tokens
    mass: str  # (layers,) of a row's significance
    chosen: str  # (layers,) booleans: rows choose themselves, the mass is less than all
    drops: str  # (layers,) booleans: that, or the share is less than after the layer before
    real_tokens: str  # (batch,) before any drop
    keep_cls: bool


@dataclass(frozen=True)
class Inside:
    """The rows still inside, packed: hidden (tokens, width); row (rows,), their indices in the batch; lengths (rows,).

    kept (batch, layers): the tokens that each layer left, in layers not reached yet those of the last one. Where
    dropped tokens come back: place (tokens,), each token's slot in the (batch, sequence) input; dropped
    (dropped, width), the last states of what was dropped, and dropped_place (dropped,).
    """

    hidden: str
    row: str
    lengths: str
    place: str | None = None
    dropped: str | None = None
    dropped_place: str | None = None
    kept: str | None = None

    def values(self) -> list[str]:
        """The names of the values, to pass through an `If`."""
        return [value for value in vars(self).values() if value is not None]

    def with_values(self, values: list[str]) -> "Inside":
        """The same with other values, in the order of `values()`."""
        names = [name for name, value in vars(self).items() if value is not None]
        return replace(self, **dict(zip(names, values, strict=True)))

    def everything(self, graph: GraphBuilder) -> tuple[str, str]:
        """Kept and dropped tokens together, in no order: states (tokens, width) and places (tokens,)."""
        assert self.place and self.dropped and self.dropped_place
        states = graph.op("Concat", self.hidden, self.dropped, axis=0)
        return states, graph.op("Concat", self.place, self.dropped_place, axis=0)


def lengths_of(graph: GraphBuilder, layers: int, real_tokens: str, keep_cls: bool) -> Lengths:
    """Reads the inputs: NaN counts as 1, what is above 1 as 1, and a share that rises as the smallest before it."""
    whole = graph.constant(1, np.float32)
    shares, mass = (
        graph.op("Min", graph.op("Where", graph.op("IsNaN", name), whole, name), whole) for name in (SHARES, MASS)
    )
    later = graph.constant(np.triu(np.full((layers, layers), np.inf), 1), np.float32)  # (layer, layers up to it)
    shares = graph.op("ReduceMin", graph.op("Max", graph.op("Unsqueeze", shares, graph.integers(0)), later), axes=[1])
    shares = graph.op("Squeeze", shares, graph.integers(1))
    before = graph.op("Slice", shares, graph.integers(0), graph.integers(layers - 1))
    before = graph.op("Concat", graph.constant([1], np.float32), before, axis=0)
    chosen = graph.op("Less", mass, whole)
    drops = graph.op("Or", graph.op("Less", shares, before), chosen)
    return Lengths(layers, shares, mass, chosen, drops, real_tokens, keep_cls)


def drop(
    graph: GraphBuilder, lengths: Lengths, layer: int, inside: Inside, layout, probabilities: str
) -> tuple[Inside, str]:
    """What layer `layer` (from 1) keeps, and the slots (tokens,) of the kept tokens in the layout.

    probabilities (rows, heads, longest, longest). No significance is computed where nothing is dropped.
    """
    with graph.scope("drop"):
        place = graph.constant(layer - 1, np.int64)
        then, otherwise = GraphBuilder(graph), GraphBuilder(graph)
        scores, ranked = significance(then, lengths.keep_cls, layout, probabilities)
        counts = tokens_to_keep(then, then.op("Gather", lengths.shares, place), lengths.real_tokens, inside)
        chooses, fixed = GraphBuilder(then), GraphBuilder(then)
        covering = tokens_to_cover(chooses, chooses.op("Gather", lengths.mass, place), scores, ranked, layout)
        covering = chooses.op("Min", chooses.op("Max", covering, chooses.constant(FEWEST, np.int64)), counts)
        counts = then.if_else(then.op("Gather", lengths.chosen, place), chooses, fixed, [(covering, counts)])[0]
        kept = most_significant(then, ranked, layout, counts)
        kept = then.op("Gather", then.op("Reshape", kept, then.integers(-1)), layout.tokens)  # (tokens,)
        after = replace(
            inside,
            hidden=then.op("Compress", inside.hidden, kept, axis=0),
            lengths=counts,
            kept=from_layer_on(then, lengths, layer, inside, counts),
        )
        if inside.place and inside.dropped and inside.dropped_place:
            gone = then.op("Not", kept)
            states = then.op("Compress", inside.hidden, gone, axis=0)
            places = then.op("Compress", inside.place, gone, axis=0)
            after = replace(
                after,
                place=then.op("Compress", inside.place, kept, axis=0),
                dropped=then.op("Concat", inside.dropped, states, axis=0),
                dropped_place=then.op("Concat", inside.dropped_place, places, axis=0),
            )
        changed = [(new, old) for new, old in zip(after.values(), inside.values(), strict=True) if new != old]
        tokens = then.op("Compress", layout.tokens, kept, axis=0)
        drops = graph.op("Gather", lengths.drops, place)
        *values, tokens = graph.if_else(drops, then, otherwise, [*changed, (tokens, layout.tokens)])
        result = iter(values)
        return inside.with_values([old if old == inside.row else next(result) for old in inside.values()]), tokens


def from_layer_on(graph: GraphBuilder, lengths: Lengths, layer: int, inside: Inside, counts: str) -> str:
    """What layer `layer` (from 1) leaves of the rows inside, in `kept`, there and in the layers above."""
    assert inside.kept
    reached = graph.constant(np.arange(1, lengths.layers + 1) >= layer)
    before = graph.op("Gather", inside.kept, inside.row)
    after = graph.op("Where", reached, graph.op("Unsqueeze", counts, graph.integers(1)), before)
    return graph.op("ScatterND", inside.kept, graph.op("Unsqueeze", inside.row, graph.integers(1)), after)


def tokens_to_keep(graph: GraphBuilder, share: str, real_tokens: str, inside: Inside) -> str:
    """max(2, ceil(share n)) of each row's n real tokens, at most those it has; (rows,). The product is in float32."""
    real = graph.op("Gather", real_tokens, inside.row)
    product = graph.op("Mul", share, graph.op("Cast", real, to=TensorProto.FLOAT))
    counts = graph.op("Cast", graph.op("Ceil", product), to=TensorProto.INT64)
    return graph.op("Min", graph.op("Max", counts, graph.constant(FEWEST, np.int64)), inside.lengths)


def significance(graph: GraphBuilder, keep_cls: bool, layout, probabilities: str) -> tuple[str, str]:
    """The attention that each token receives over heads and real queries, (rows, longest), 0 where there is none; and
    the same as it ranks them, minus infinity where there is none."""
    real = graph.op("Unsqueeze", graph.op("Cast", layout.inside, to=TensorProto.FLOAT), graph.integers(1))
    received = graph.op("ReduceSum", probabilities, graph.integers(1), keepdims=0)  # (rows, queries, keys)
    scores = graph.op("Squeeze", graph.op("MatMul", real, received), graph.integers(1))
    ranked = graph.op("Where", layout.inside, scores, graph.constant(-np.inf, np.float32))
    if keep_cls:
        first = graph.op("Equal", layout.columns, graph.constant(0, np.int64))
        ranked = graph.op("Where", first, graph.constant(np.inf, np.float32), ranked)
    return graph.op("Where", layout.inside, scores, graph.constant(0, np.float32)), ranked


def tokens_to_cover(graph: GraphBuilder, mass: str, scores: str, ranked: str, layout) -> str:
    """The fewest tokens of each row, the first of `ranked`, whose scores sum to the share `mass` of all; (rows,)."""
    every = graph.op("Reshape", layout.longest, graph.integers(1))
    _, order = graph.ops("TopK", ranked, every, outputs=2, axis=1)
    covered = graph.op("CumSum", graph.op("GatherElements", scores, order, axis=1), graph.constant(1, np.int64))
    wanted = graph.op("Mul", mass, graph.op("ReduceMax", covered, axes=[1]))
    short = graph.op("Cast", graph.op("Less", covered, wanted), to=TensorProto.INT64)
    short = graph.op("ReduceSum", short, graph.integers(1), keepdims=0)
    return graph.op("Add", short, graph.constant(1, np.int64))


def most_significant(graph: GraphBuilder, ranked: str, layout, counts: str) -> str:
    """The `counts` tokens of each row that `ranked` has first, the earlier of equals: booleans (rows, longest)."""
    most = graph.op("ReduceMax", counts, keepdims=0)
    _, order = graph.ops("TopK", ranked, graph.op("Reshape", most, graph.integers(1)), outputs=2, axis=1)
    ranks = graph.op("Range", graph.constant(0, np.int64), most, graph.constant(1, np.int64))
    chosen = graph.op("Less", ranks, graph.op("Unsqueeze", counts, graph.integers(1)))  # (rows, most)
    nobody = graph.op("Expand", graph.constant(False, np.bool_), graph.op("Shape", layout.inside))
    return graph.op("ScatterElements", nobody, order, chosen, axis=1)
