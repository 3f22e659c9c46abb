import numpy as np
import pytest

from pretrain.masking import IGNORED, mask_tokens

MASK = 4
REPLACEMENTS = np.arange(5, 100)


def mask(tokens, starts=None, probability=0.15, seed=0):
    starts = np.ones(len(tokens), dtype=bool) if starts is None else starts
    return mask_tokens(tokens, starts, probability, MASK, REPLACEMENTS, np.random.default_rng(seed))


def test_of_the_predicted_tokens_80_10_10_are_masked_replaced_kept():
    tokens = np.full(100_000, 50)
    inputs, labels = mask(tokens)
    predicted = labels != IGNORED
    assert predicted.sum() == 15_000 and (inputs[~predicted] == 50).all()
    shares = [(inputs[predicted] == MASK).mean(), (inputs[predicted] == 50).mean()]
    # of the 10 % replaced tokens 1/95 happen to stay what they were
    assert shares == pytest.approx([0.8, 0.1 + 0.1 / 95], abs=0.01)
    assert np.isin(inputs, [MASK, *REPLACEMENTS]).all()


@pytest.mark.parametrize("count", [1, 2, 3, 7, 20, 125])
def test_the_number_of_predicted_tokens_is_the_share_and_at_least_one(count):
    tokens = np.arange(5, 5 + count) % 95 + 5
    _, labels = mask(tokens)
    assert (labels != IGNORED).sum() == max(1, round(0.15 * count))
    assert (labels[labels != IGNORED] == tokens[labels != IGNORED]).all()


def test_every_place_is_predicted_equally_often():
    counts = sum((mask(np.arange(5, 45), seed=seed)[1] != IGNORED).astype(int) for seed in range(4000))
    assert counts / 4000 == pytest.approx(np.full(40, 0.15), abs=0.03)


def test_whole_words_are_predicted_whole():
    generator = np.random.default_rng(0)
    for seed in range(200):
        starts = generator.random(60) < 0.5
        _, labels = mask(np.arange(5, 65), starts, seed=seed)
        predicted = labels != IGNORED
        word = np.cumsum(starts)
        assert all(len(set(predicted[word == number])) == 1 for number in set(word))
        assert predicted.sum() >= 9


def test_masking_is_a_function_of_the_generator():
    tokens = np.arange(5, 95)
    assert all((a == b).all() for a, b in zip(mask(tokens, seed=3), mask(tokens, seed=3), strict=True))
    assert (mask(tokens, seed=3)[1] != mask(tokens, seed=4)[1]).any()
