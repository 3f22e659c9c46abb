"""int8 weights: symmetric, one scale per output channel, and a form that cannot overflow on CPUs without VNNI."""

import numpy as np

LARGEST = 127
# 255 * 128 < 2**15: the largest sum of two neighbours of one sign whose products with uint8 stay within int16
LARGEST_PAIR = 128
SHARES = (
    1.0,
    0.9,
    0.8,
    0.71,
    0.63,
    0.57,
    0.504,
)  # of the range, tried for each channel; 0.504 leaves pairs as they are


def quantize_rows(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An embedding table (entries, width) as int8 with one scale per entry: table is about int8 * scale[:, None]."""
    scale = _scale(table, axis=1)
    return _rounded(table, scale[:, None]), scale


def quantize_channels(weight: np.ndarray, *, pairs: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """A matrix (inputs, channels) as int8 with one scale per channel: weight is about int8 * scale.

    `pairs`: x86 CPUs without VNNI multiply uint8 by int8 with `vpmaddubsw`, which adds the products of two
    neighbouring inputs in a saturating int16. Pairs are then cut so that no activation can overflow, at the scale that
    loses least.
    """
    full = _scale(weight, axis=0)
    if not pairs:
        return _rounded(weight, full), full
    best, scale = np.zeros(weight.shape, np.int8), full
    error = np.full(weight.shape[1], np.inf)
    for share in SHARES:
        tried = _cut_pairs(_rounded(weight, full / share))
        loss = np.square(tried * (full / share) - weight).sum(axis=0)
        better = loss < error
        best = np.where(better, tried, best)
        scale, error = np.where(better, full / share, scale), np.minimum(loss, error)
    return best, scale.astype(np.float32)


def _scale(weight: np.ndarray, axis: int) -> np.ndarray:
    """Largest absolute value over 127; 1 for a channel of zeros."""
    scale = np.abs(weight).max(axis=axis).astype(np.float32) / np.float32(LARGEST)
    return np.where(scale > 0, scale, np.float32(1))


def _rounded(weight: np.ndarray, scale: np.ndarray) -> np.ndarray:
    return np.clip(np.rint(weight / scale), -LARGEST, LARGEST).astype(np.int8)


def _cut_pairs(weight: np.ndarray) -> np.ndarray:
    """The excess of each pair (inputs 2i and 2i + 1) of one sign, taken from both alike."""
    odd = len(weight) % 2
    pairs = np.pad(weight, ((0, odd), (0, 0))).astype(np.int16).reshape(-1, 2, weight.shape[1])
    for sign in (1, -1):
        size = np.maximum(sign * pairs, 0)
        excess = np.maximum(size.sum(axis=1) - LARGEST_PAIR, 0)
        from_second = np.minimum(excess // 2, size[:, 1])
        from_first = np.minimum(excess - from_second, size[:, 0])
        from_second = excess - from_first
        pairs[:, 0] -= sign * from_first
        pairs[:, 1] -= sign * from_second
    return pairs.reshape(-1, weight.shape[1])[: len(weight)].astype(np.int8)
