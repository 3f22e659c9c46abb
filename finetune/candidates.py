"""Length configurations as a search has them: whole steps of a share, never rising; how new ones are made.

Kim and Cho (2021), section 3.3. Steps rather than any share: rows of some tens of tokens cannot tell finer ones apart,
and configurations that agree up to a layer share what was computed up to there.
"""

import random
from collections.abc import Callable

STEPS = 20  # a share is a whole number of twentieths
TRIES = 20  # draws for one child before it is left out: near its end a search knows most of what it proposes
Lengths = tuple[int, ...]  # steps kept after each layer


def shares(lengths: Lengths) -> list[float]:
    """A configuration as `length_config` takes it."""
    return [steps / STEPS for steps in lengths]


def constant_ratio(layers: int, ratio: float) -> Lengths:
    """What stays where every layer keeps `ratio` of the tokens that it is given."""
    return tuple(max(1, round(STEPS * ratio**layer)) for layer in range(1, layers + 1))


def initial(layers: int, count: int, smallest: float, cost: Callable[[Lengths], float]) -> list[Lengths]:
    """Constant-ratio configurations spread evenly in cost, from the ratio `smallest` to full length, both included.

    Fewer than `count` where steps cannot tell them apart.
    """
    low, high = cost(constant_ratio(layers, smallest)), cost(constant_ratio(layers, 1.0))
    targets = [low + (high - low) * number / max(count - 1, 1) for number in range(count)]
    chosen = [_near(layers, target, smallest, cost) for target in targets[1:-1]]
    return list(dict.fromkeys([constant_ratio(layers, smallest), *chosen, constant_ratio(layers, 1.0)]))


def _near(layers: int, target: float, smallest: float, cost: Callable[[Lengths], float]) -> Lengths:
    low, high = smallest, 1.0
    for _ in range(20):
        middle = (low + high) / 2
        low, high = (middle, high) if cost(constant_ratio(layers, middle)) < target else (low, middle)
    return constant_ratio(layers, high)


def mutate(parent: Lengths, probability: float, draw: random.Random) -> Lengths:
    """Each layer anew with `probability`, between the parent's next layer and the child's one before."""
    child: list[int] = []
    for layer, steps in enumerate(parent):
        before = child[-1] if child else STEPS
        after = parent[layer + 1] if layer + 1 < len(parent) else 1
        child.append(draw.randint(after, before) if draw.random() < probability else steps)
    return tuple(child)


def crossover(first: Lengths, second: Lengths) -> Lengths:
    """The mean of two parents, layer by layer, halves rounded up."""
    return tuple((one + other + 1) // 2 for one, other in zip(first, second, strict=True))


def offspring(
    parents: list[Lengths],
    known: set[Lengths],
    mutations: int,
    crossovers: int,
    probability: float,
    draw: random.Random,
) -> list[Lengths]:
    """New configurations, none of them known: at most so many mutations and crossovers of the parents."""
    makers = [lambda: mutate(draw.choice(parents), probability, draw)] * mutations
    if len(parents) > 1:
        makers += [lambda: crossover(*draw.sample(parents, 2))] * crossovers
    children: dict[Lengths, None] = {}
    for make in makers:
        for _ in range(TRIES):
            child = make()
            if child not in known and child not in children:
                children[child] = None
                break
    return list(children)
