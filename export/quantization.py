"""int8 weights: symmetric, one scale per output channel, and a form that cannot overflow on CPUs without VNNI."""

import numpy as np

LARGEST = 127
# 255 * 128 < 2**15: the largest sum of two neighbours of one sign whose products with uint8 stay within int16
LARGEST_PAIR = 128
BLOCK = 64  # channels at a time: they stay in the cache
SHARES = (
    1.0,
    0.9,
    0.8,
    0.71,
    0.63,
    0.57,
    0.504,
)  # of the range, tried for each channel; 0.504 leaves pairs as they are


OUTLYING = 6.0  # a channel so many times the median one is an outlier, which costs all others their precision


def smoothing(largest: np.ndarray, weight: np.ndarray) -> np.ndarray | None:
    """Factors (inputs,) by which channels of the input are divided and rows of the weight (inputs, channels)
    multiplied, so that no channel outlies; None where none does.

    SmoothQuant (Xiao et al. 2023, eq. 4) with strength 0.5. largest (inputs,): the size that each channel reaches.
    """
    largest = np.maximum(largest, 1e-6)
    if largest.max() < OUTLYING * np.median(largest):
        return None
    factors = np.sqrt(largest / np.maximum(np.abs(weight).max(axis=1), 1e-6))
    return (factors / np.exp(np.log(factors).mean())).astype(np.float32)


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
    if not pairs:
        scale = _scale(weight, axis=0)
        return _rounded(weight, scale), scale
    blocks = range(0, weight.shape[1], BLOCK)
    parts = [_without_overflow(np.ascontiguousarray(weight[:, start : start + BLOCK])) for start in blocks]
    return np.concatenate([part for part, _ in parts], axis=1), np.concatenate([scale for _, scale in parts])


def _without_overflow(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """int8 and scales of some channels, whose pairs cannot overflow."""
    full = _scale(weight, axis=0)
    best, scale, error = np.zeros(weight.shape, np.int8), full, np.full(weight.shape[1], np.inf)
    for share in SHARES:
        tried = _cut_pairs(_rounded(weight, full / np.float32(share)))
        loss = np.square(tried * (full / np.float32(share)) - weight).sum(axis=0)
        better = loss < error
        best[:, better] = tried[:, better]
        scale, error = np.where(better, full / np.float32(share), scale), np.minimum(loss, error)
    return best, scale


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
