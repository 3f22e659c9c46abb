"""Sub-networks of one model, the layers that run and the lengths that remain: LengthDrop, LayerDrop, the sandwich."""

import random
from dataclasses import dataclass

LENGTH_DROP = 0.2  # Kim and Cho 2021, section 4: at most this share of the tokens is dropped from layer to layer
LAYER_DROP = 0.2  # Fan et al. 2019: each layer is left out with this probability


@dataclass(frozen=True)
class Subnetwork:
    """The arguments of `forward`: what remains after each layer's attention, as shares, and the layers executed."""

    length_config: list[float]
    layer_config: list[int]


def sample_lengths(layers: int, draw: random.Random, drop: float = LENGTH_DROP) -> list[float]:
    """LengthDrop: r_(l+1) ~ U((1 - p) r_l, r_l) with r_0 = 1 (Kim and Cho 2021, section 3.1)."""
    lengths, before = [], 1.0
    for _ in range(layers):
        before = draw.uniform((1 - drop) * before, before)
        lengths.append(before)
    return lengths


def constant_rate(rate: float, layers: int) -> list[float]:
    """Lengths of which every layer keeps this share of what reaches it (Kim and Cho 2021, section 5.1): r_l = rate^l.
    The shortest that LengthDrop samples are those of the rate 1 - p."""
    return [rate**layer for layer in range(1, layers + 1)]


def sample_layers(layers: int, draw: random.Random, drop: float = LAYER_DROP) -> list[int]:
    """LayerDrop: every layer, from 1, is left out with probability `drop`; one is always left."""
    kept = [layer for layer in range(1, layers + 1) if draw.random() >= drop]
    return kept or [draw.randint(1, layers)]


def sandwich(
    layers: int,
    sampled: int,
    draw: random.Random,
    *,
    smallest: bool = True,
    length_drop: float = LENGTH_DROP,
    layer_drop: float = LAYER_DROP,
) -> list[Subnetwork]:
    """The students of an update of the sandwich rule: the smallest sub-network and `sampled` others.

    Yu and Huang 2019; Kim and Cho 2021, section 3.2. The full model, their teacher, is not among them. Without
    `smallest` one more is sampled in its place, so that an update costs as much.
    """
    lengths = [sample_lengths(layers, draw, length_drop) for _ in range(sampled + 1)]
    if smallest:
        lengths[0] = constant_rate(1 - length_drop, layers)
    return [Subnetwork(one, sample_layers(layers, draw, layer_drop)) for one in lengths]
