"""Sampled sub-networks: lengths never rise and stay within LengthDrop's bounds, layers are left out as often as due"""

import random

import pytest

from elastic_model.checks import check_layer_config, check_length_config
from elastic_model.subnetworks import constant_rate, sample_layers, sample_lengths, sandwich


def test_sampled_lengths_stay_between_the_smallest_and_full():
    draw = random.Random(0)
    for _ in range(200):
        lengths = sample_lengths(12, draw)
        assert check_length_config(lengths, 12) == lengths
        steps = zip([1.0, *lengths], lengths, strict=False)
        assert all(0.8 * before <= after <= before for before, after in steps)
        assert all(low <= length for low, length in zip(constant_rate(0.8, 12), lengths, strict=True))


def test_the_smallest_lengths_fall_by_a_constant_share():
    assert constant_rate(0.8, 3) == pytest.approx([0.8, 0.64, 0.512])


def test_layers_are_left_out_as_often_as_said():
    draw = random.Random(0)
    kept = [sample_layers(12, draw) for _ in range(2000)]
    assert sum(map(len, kept)) / (12 * 2000) == pytest.approx(0.8, abs=0.01)
    assert all(check_layer_config(layers, 12) == layers for layers in kept)


def test_one_layer_is_always_left():
    assert all(len(sample_layers(3, random.Random(seed), drop=1.0)) == 1 for seed in range(20))


def test_the_sandwich_is_a_function_of_the_draw():
    first, second = (sandwich(6, 2, random.Random("0 7")) for _ in range(2))
    assert first == second and len(first) == 3 and first[0].length_config == constant_rate(0.8, 6)
    assert sandwich(6, 2, random.Random("0 8")) != first


def test_without_the_sandwich_rule_all_are_sampled():
    students = sandwich(6, 2, random.Random(1), smallest=False, layer_drop=0.0)
    assert len(students) == 3 and constant_rate(0.8, 6) not in [student.length_config for student in students]
    assert all(student.layer_config == [1, 2, 3, 4, 5, 6] for student in students)
    only_layers = sandwich(6, 2, random.Random(1), length_drop=0.0)
    assert all(student.length_config == [1.0] * 6 for student in only_layers)


def test_the_samples_of_a_sandwich_are_drawn_one_by_one():
    students = sandwich(12, 2, random.Random(1))
    assert len({tuple(one.layer_config) for one in students}) == 3


def test_lengths_are_drawn_from_the_whole_range():
    """r_(l+1) / r_l is uniform over (1 - p, 1)."""
    draw = random.Random(3)
    ratios = [after / before for _ in range(500) for before, after in _steps(sample_lengths(6, draw, 0.4))]
    assert min(ratios) < 0.605 and max(ratios) > 0.995 and sum(ratios) / len(ratios) == pytest.approx(0.8, abs=0.01)
    drawn = [after / before for one in sandwich(6, 300, draw)[1:] for before, after in _steps(one.length_config)]
    assert sum(drawn) / len(drawn) == pytest.approx(0.9, abs=0.005)


def _steps(lengths):
    return zip([1.0, *lengths], lengths, strict=False)
