"""Search: configurations never rise, what they share changes no answer, a kill changes no result."""

import itertools
import random

import numpy as np
import pytest
import torch

from elastic_model import (
    ElasticBertConfig,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
)
from elastic_model.checks import check_length_config
from finetune.candidates import STEPS, constant_ratio, crossover, initial, mutate, offspring, shares
from finetune.explore import explore_batch


def test_configurations_never_rise():
    """Thousands of mutations and crossovers, of each other's children."""
    draw = random.Random(0)
    population = [constant_ratio(12, ratio) for ratio in (0.5, 0.8, 0.95, 1.0)]
    for _ in range(6000):
        child = mutate(draw.choice(population), draw.random(), draw)
        if draw.random() < 0.5:
            child = crossover(child, draw.choice(population))
        assert len(child) == 12 and STEPS >= child[0] and child[-1] >= 1
        assert all(after <= before for before, after in itertools.pairwise(child))
        check_length_config(shares(child), 12)
        population[draw.randrange(len(population))] = child


def test_a_mutation_reaches_every_share_and_leaves_what_it_does_not_touch():
    draw, parent = random.Random(0), (20, 12, 12, 4)
    children = [mutate(parent, 0.5, draw) for _ in range(4000)]
    assert {child[0] for child in children} == set(range(12, 21)) and {child[3] for child in children} >= {1, 2, 3}
    assert mutate(parent, 0.0, draw) == parent
    assert 0.4 < np.mean([child[0] == 20 for child in children]) < 0.7  # half, and draws of what it was


def test_the_first_generation_is_spread_evenly_in_cost():
    def cost(lengths):
        return 1 + sum(lengths[:-1]) / STEPS

    first = initial(6, 20, 0.8, cost)
    assert first[0] == constant_ratio(6, 0.8) and first[-1] == (STEPS,) * 6
    costs = [cost(one) for one in first]
    assert costs == sorted(costs) and max(np.diff(costs)) < 3 * (costs[-1] - costs[0]) / 19


def test_children_are_new_and_drawn_alike():
    parents = [constant_ratio(6, ratio) for ratio in (0.8, 0.9, 1.0)]
    known = set(parents)
    first, second = (offspring(parents, known, 30, 30, 0.5, random.Random(7)) for _ in range(2))
    assert first == second and len(set(first)) == len(first) > 30 and not known & set(first)


MODELS = {
    "sequences": (ElasticBertForSequenceClassification, {}),
    "a learned head": (ElasticBertForSequenceClassification, {"learned_exit_head": True}),
    "[CLS] may be dropped": (ElasticBertForSequenceClassification, {"keep_cls": False}),
    "some exits": (ElasticBertForSequenceClassification, {"exit_layers": [2, 4]}),
    "one exit": (ElasticBertForSequenceClassification, {"num_output_layers": 1}),
    "tokens": (ElasticBertForTokenClassification, {}),
    "spans": (ElasticBertForQuestionAnswering, {}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_sharing_changes_no_answer(kind):
    torch.manual_seed(0)
    model_class, overrides = MODELS[kind]
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = ElasticBertConfig(**sizes, intermediate_size=48, num_labels=3, initializer_range=0.3, **overrides)
    model, draw = model_class(config).eval(), random.Random(1)
    lengths = [(STEPS,) * 4, (12,) * 4, (20, 20, 9, 9), (20, 12, 9, 9), (1, 1, 1, 1)]
    lengths += [mutate(lengths[2], 0.7, draw) for _ in range(20)]
    mask = torch.arange(17)[None] < torch.tensor([17, 9, 12, 3, 1])[:, None]
    batch = {"input_ids": torch.randint(1, 60, (5, 17)) * mask, "attention_mask": mask.long()}
    found = explore_batch(model, batch, lengths)
    assert set(found) == set(lengths)
    for one, (logits, doubt) in found.items():
        with torch.no_grad():
            output = model(**batch, length_config=shares(one), exit_policy={"name": "never"})
        plain = output.get("exit_logits")
        if plain is None:
            pairs = zip(output.exit_start_logits, output.exit_end_logits, strict=True)
            plain = tuple(torch.stack(pair, -1) for pair in pairs)
        place = mask if kind in ("tokens", "spans") else torch.ones(5, dtype=torch.bool)
        torch.testing.assert_close(logits[:, place], torch.stack(plain)[:, place], atol=1e-5, rtol=0)
        if kind == "a learned head":
            torch.testing.assert_close(doubt, output.exit_uncertainty, atol=1e-5, rtol=0)
