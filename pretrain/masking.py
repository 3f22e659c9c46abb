"""Dynamic masking for masked language modelling (Devlin et al. 2019, section 3.1)."""

import numpy as np

IGNORED = -100  # the label of a token that is not predicted


def mask_tokens(
    tokens: np.ndarray,
    starts: np.ndarray,
    probability: float,
    mask_token: int,
    replacements: np.ndarray,
    generator: np.random.Generator,
) -> tuple[np.ndarray, np.ndarray]:
    """-> inputs, labels: a share of `tokens` is predicted; of those 80 % become [MASK], 10 % another token, 10 % stay.

    tokens (tokens,): ids without special tokens; starts (tokens,): true where a unit starts that is masked as a whole
    (a word, or every token); replacements: the ids that a random token may be. At least one token is predicted.
    """
    wanted = max(1, round(probability * len(tokens)))
    unit = starts.cumsum()  # a first token that continues a word belongs to unit 0
    order = generator.permutation(unit[-1] + 1)
    reached = np.bincount(unit, minlength=len(order))[order].cumsum()
    chosen = np.zeros(len(order), dtype=bool)
    chosen[order[: reached.searchsorted(wanted) + 1]] = True
    predicted = chosen[unit]

    labels = np.where(predicted, tokens, IGNORED)
    places = np.flatnonzero(predicted)
    fate = generator.random(len(places))
    inputs = tokens.copy()
    inputs[places[fate < 0.8]] = mask_token
    changed = places[fate >= 0.9]
    inputs[changed] = replacements[generator.integers(len(replacements), size=len(changed))]
    return inputs, labels
