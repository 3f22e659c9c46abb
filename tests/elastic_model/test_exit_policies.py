"""Exit policies: batched answers equal one-by-one answers, nothing overflows, thresholds mean what the papers say."""

import math
import random

import numpy as np
import pytest
import torch

import elastic_model
from elastic_model import ElasticBertConfig
from elastic_model.exit_policies import normalised_entropy, predict, simulate, sweep, top_margin, top_probability

CLASSIFY = [
    {"name": "entropy", "threshold": 0.7},
    {"name": "entropy", "threshold": [0.1, 0.5, 0.8, 0.9, 0.9, 0.0]},
    {"name": "confidence", "threshold": 0.6},
    {"name": "margin", "threshold": 0.3},
    {"name": "learned", "threshold": 0.5},
    {"name": "patience", "patience": 1},
    {"name": "patience", "patience": 3},
    {"name": "voting", "votes": 3},
    {"name": "constant", "layer": 3},
    {"name": "never"},
]
REGRESS = [
    {"name": "patience", "patience": 1, "threshold": 0.4},
    {"name": "patience", "patience": 2, "threshold": [9.0, 0.3, 0.9, 0.5, 0.7, 0.1]},
    {"name": "learned", "threshold": 0.5},
    {"name": "constant", "layer": 2},
]
TASKS = {
    "classification": ("ElasticBertForSequenceClassification", {}, CLASSIFY),
    "multi-label": ("ElasticBertForSequenceClassification", {"problem_type": "multi_label_classification"}, CLASSIFY),
    "regression": ("ElasticBertForSequenceClassification", {"num_labels": 1}, REGRESS),
    "tokens": ("ElasticBertForTokenClassification", {}, CLASSIFY),
    "spans": ("ElasticBertForQuestionAnswering", {}, CLASSIFY),
}
CASES = [(task, policy) for task, (_, _, policies) in TASKS.items() for policy in policies]


def model_of(task):
    torch.manual_seed(3)
    name, overrides, _ = TASKS[task]
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=6, num_attention_heads=4, intermediate_size=48)
    config = ElasticBertConfig(
        **{**sizes, "max_position_embeddings": 40, "initializer_range": 0.3, "num_labels": 3, **overrides},
        learned_exit_head=True,
    )
    return getattr(elastic_model, name)(config).eval()


def rows_of(lengths, seed):
    generator = torch.Generator().manual_seed(seed)
    shape = (len(lengths), max(lengths))
    input_ids, mask = torch.randint(1, 60, shape, generator=generator), torch.zeros(shape, dtype=torch.long)
    for row, length in enumerate(lengths):
        input_ids[row, length:] = 0
        mask[row, :length] = 1
    return input_ids, mask


def answers(output):
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


def exits(output):
    pair = (output.get("exit_start_logits"), output.get("exit_end_logits"))
    return [torch.stack(both, -1) for both in zip(*pair, strict=True)] if pair[0] else output.exit_logits


@pytest.mark.parametrize("lengths", [None, [1.0, 0.7, 0.7, 0.5, 0.3, 0.3]], ids=["full", "dropping"])
@pytest.mark.parametrize("task, policy", CASES, ids=str)
@torch.no_grad()
def test_batched_answers_are_the_one_by_one_answers(task, policy, lengths):
    model = model_of(task)
    chance = random.Random(0)
    sizes = [chance.randint(1, 20) for _ in range(16)]
    input_ids, mask = rows_of(sizes, seed=1)
    alone = [
        model(input_ids[row : row + 1, :size], exit_policy=policy, length_config=lengths)
        for row, size in enumerate(sizes)
    ]
    for _ in range(3):
        order = chance.sample(range(16), chance.randint(2, 16))
        output = model(input_ids[order], mask[order], exit_policy=policy, length_config=lengths)
        for place, row in enumerate(order):
            assert output.exit_layers[place] == alone[row].exit_layers[0]
            expected = answers(alone[row])[0]
            got = answers(output)[place]
            got = got[: sizes[row]] if task in ("tokens", "spans") else got
            torch.testing.assert_close(got, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("task, policy", CASES, ids=str)
@torch.no_grad()
def test_simulation_answers_as_the_model_does(task, policy):
    model = model_of(task)
    input_ids, mask = rows_of([20, 5, 11, 3, 1, 17, 9, 2], seed=2)
    full = model(input_ids, mask, exit_policy={"name": "never"})
    kind = {"tokens": "token_classification", "spans": "question_answering"}.get(task) or model.problem()
    stacked = torch.stack(tuple(exits(full)))
    simulated, left_at = simulate(
        policy, stacked.numpy(), model.exit_layers, kind, mask.bool().numpy(), full.exit_uncertainty.numpy()
    )
    output = model(input_ids, mask, exit_policy=policy)
    assert left_at.tolist() == output.exit_layers.tolist()
    torch.testing.assert_close(answers(output), simulated, atol=1e-5, rtol=0)


SWEEPS = [
    ("classification", [{"name": name, "threshold": t} for t in (0.0, 0.3, [0.2, 0.9, 0.4, 0.9, 0.6, 0.1], 1.0)])
    for name in ("entropy", "confidence", "margin", "learned")
] + [
    ("tokens", [{"name": "entropy", "threshold": t} for t in (0.5, 0.9, 0.97)]),
    ("spans", [{"name": "margin", "threshold": t} for t in (0.01, 0.1)]),
    ("classification", [{"name": "patience", "patience": count} for count in (1, 2, 3)]),
    ("multi-label", [{"name": "voting", "votes": count} for count in (1, 2, 3)]),
    ("regression", [{"name": "patience", "patience": 1, "threshold": t} for t in (0.1, 0.5, 2.0)]),
]


@pytest.mark.parametrize("task, policies", SWEEPS, ids=str)
@torch.no_grad()
def test_a_sweep_is_a_simulation_of_each_setting(task, policies):
    model = model_of(task)
    input_ids, mask = rows_of([20, 5, 11, 3, 1, 17, 9, 2], seed=2)
    full = model(input_ids, mask, exit_policy={"name": "never"})
    kind = {"tokens": "token_classification", "spans": "question_answering"}.get(task) or model.problem()
    arguments = (torch.stack(tuple(exits(full))), model.exit_layers, kind, mask.bool(), full.exit_uncertainty)
    left = sweep(policies, *arguments)
    for policy, places in zip(policies, left, strict=True):
        assert [model.exit_layers[place] for place in places] == simulate(policy, *arguments)[1].tolist()
    assert len(left.unique()) > 1


@torch.no_grad()
def test_an_exit_is_nan_exactly_where_a_row_had_left():
    model = model_of("classification")
    input_ids, mask = rows_of([20, 5, 11, 3, 1, 17], seed=2)
    output = model(input_ids, mask, exit_policy={"name": "entropy", "threshold": 0.7})
    assert len(output.exit_layers.unique()) > 1
    for layer, logits in zip(model.exit_layers, output.exit_logits, strict=True):
        assert torch.equal(logits.isnan().all(-1), output.exit_layers < layer)
        assert torch.equal(logits.isnan().any(-1), output.exit_layers < layer)


@torch.no_grad()
def test_work_shrinks_as_rows_leave():
    model = model_of("classification")
    rows = []
    for layer in model.elasticbert.encoder.layer:
        layer.register_forward_hook(lambda module, args, output: rows.append(len(output[0])))
    input_ids, mask = rows_of([20, 5, 11, 3, 1, 17], seed=2)
    output = model(input_ids, mask, exit_policy={"name": "entropy", "threshold": 0.7})
    expected = [int((output.exit_layers >= layer).sum()) for layer in model.exit_layers]
    assert rows == [count for count in expected if count]


@pytest.mark.parametrize("problem", ["single_label_classification", "multi_label_classification"])
def test_finite_for_huge_logits(problem):
    logits = torch.tensor([[1e4, -1e4, 0.0], [1e4, 1e4, 1e4], [-1e4, -1e4, 1e4], [0.0, 0.0, 0.0]])
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        prediction = predict(logits.to(dtype), problem)
        for score in (normalised_entropy(prediction), top_probability(prediction), top_margin(prediction)):
            assert score.isfinite().all() and (0 <= score).all() and (score <= 1 + 1e-6).all()
    assert simulate({"name": "entropy", "threshold": 0.1}, logits[None].repeat(3, 1, 1), [1, 2, 3], problem)[
        1
    ].tolist() == ([1, 3, 1, 3] if problem == "single_label_classification" else [3, 1, 1, 3])


def test_spans_and_tokens_with_one_real_token_are_certain_or_finite():
    mask = torch.tensor([[True, False, False]])
    spans = predict(torch.tensor([[[1e4, -1e4], [3.0, 3.0], [1e4, 0.0]]]), "question_answering", mask)
    assert normalised_entropy(spans).tolist() == [0.0] and top_probability(spans).tolist() == [1.0]
    tokens = predict(torch.tensor([[[0.0, 0.0], [9.0, 0.0], [1e4, 0.0]]]), "token_classification", mask)
    assert normalised_entropy(tokens).item() == pytest.approx(1.0)


def test_definitions_on_known_distributions():
    p = torch.tensor([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]])
    prediction = predict(p.log(), "single_label_classification")
    entropy = -sum(q * math.log(q) for q in (0.7, 0.2, 0.1)) / math.log(3)
    assert normalised_entropy(prediction).tolist() == pytest.approx([entropy, 1.0])
    assert top_probability(prediction).tolist() == pytest.approx([0.7, 1 / 3])
    assert top_margin(prediction).tolist() == pytest.approx([0.5, 0.0], abs=1e-6)
    worst = predict(torch.tensor([[0.0, 9.0, -9.0]]), "multi_label_classification")
    assert normalised_entropy(worst).item() == pytest.approx(1.0)  # the undecided label counts


def votes(*labels):
    """Exit logits of one row whose answers are `labels`."""
    return np.eye(3, dtype=np.float32)[list(labels)][:, None] * 5


@pytest.mark.parametrize(
    "policy, labels, layer",
    [
        ({"name": "patience", "patience": 1}, (0, 1, 1, 1), 3),
        ({"name": "patience", "patience": 2}, (0, 1, 1, 1), 4),
        ({"name": "patience", "patience": 1}, (0, 0, 0, 0), 2),  # never before patience + 1 layers
        ({"name": "voting", "votes": 2}, (0, 1, 0, 2), 3),
        ({"name": "voting", "votes": 3}, (0, 1, 0, 2), 4),
        ({"name": "voting", "votes": 1}, (0, 1, 0, 2), 1),
    ],
)
def test_patience_and_voting_count_as_their_papers_do(policy, labels, layer):
    assert simulate(policy, votes(*labels), [1, 2, 3, 4], "single_label_classification")[1].tolist() == [layer]


def test_regression_patience_compares_with_the_exit_before():
    values = np.array([0.0, 1.0, 1.05, 1.06, 5.0], dtype=np.float32)[:, None, None]
    leave = lambda patience: simulate(  # noqa: E731
        {"name": "patience", "patience": patience, "threshold": 0.1}, values, [1, 2, 3, 4, 5], "regression"
    )[1].item()
    assert (leave(1), leave(2), leave(3)) == (3, 4, 5)


def test_the_last_threshold_is_never_asked():
    logits = torch.zeros(3, 2, 2)
    _, left_at = simulate(
        {"name": "confidence", "threshold": [0.9, 0.9, 0.0]}, logits, [2, 4, 6], "single_label_classification"
    )
    assert left_at.tolist() == [6, 6]


def test_a_policy_is_ignored_while_training_and_with_labels():
    model = model_of("classification")
    input_ids, mask = rows_of([9, 5], seed=0)
    policy = {"name": "constant", "layer": 1}
    with_labels = model(input_ids, mask, labels=torch.tensor([0, 1]), exit_policy=policy)
    assert with_labels.exit_layers.tolist() == [6, 6]
    assert model.train()(input_ids, mask, exit_policy=policy).exit_layers.tolist() == [6, 6]


@pytest.mark.parametrize("policy", CLASSIFY[:-1], ids=str)
def test_policies_survive_saving(policy, tmp_path):
    model = model_of("classification")
    model.config.exit_policy = policy
    model.save_pretrained(tmp_path)
    again = elastic_model.ElasticBertForSequenceClassification.from_pretrained(tmp_path).eval()
    input_ids, mask = rows_of([9, 5, 14], seed=0)
    with torch.no_grad():
        expected, got = model(input_ids, mask, exit_policy=policy), again(input_ids, mask)
    assert again.config.exit_policy == policy
    assert torch.equal(expected.logits, got.logits) and torch.equal(expected.exit_layers, got.exit_layers)


@pytest.mark.parametrize(
    "task, policy, message",
    [
        ("classification", {"name": "speed", "threshold": 1}, "one of never, constant, entropy"),
        ("classification", {"threshold": 0.1}, "one of never"),
        ("classification", {"name": "entropy"}, "needs .*threshold"),
        ("classification", {"name": "entropy", "threshold": 0.1, "patience": 2}, "needs .*threshold"),
        ("classification", {"name": "entropy", "threshold": 1.5}, "from 0 to 1"),
        ("classification", {"name": "confidence", "threshold": float("nan")}, "from 0 to 1"),
        ("classification", {"name": "entropy", "threshold": [0.1, 0.2]}, "one entry per exit"),
        ("classification", {"name": "patience", "patience": 0}, "at least 1"),
        ("classification", {"name": "patience", "patience": 1.5}, "must be an int"),
        ("classification", {"name": "patience", "patience": 2, "threshold": 0.5}, "for regression only"),
        ("classification", {"name": "constant", "layer": 7}, "must be one of"),
        ("regression", {"name": "entropy", "threshold": 0.5}, "for regression must be one of"),
        ("regression", {"name": "patience", "patience": 2}, "needs a threshold"),
        ("regression", {"name": "patience", "patience": 2, "threshold": -1.0}, "at least 0"),
    ],
)
def test_policies_that_make_no_sense_are_named(task, policy, message):
    with pytest.raises(ValueError, match=message):
        model_of(task)(torch.ones(1, 4, dtype=torch.long), exit_policy=policy)


def test_the_learned_policy_needs_its_head(tiny_model):
    with pytest.raises(ValueError, match="learned_exit_head"):
        tiny_model(torch.ones(1, 4, dtype=torch.long), exit_policy={"name": "learned", "threshold": 0.5})


@torch.no_grad()
def test_choices_of_a_question_leave_together():
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=5, num_attention_heads=4, intermediate_size=48)
    model = elastic_model.ElasticBertForMultipleChoice(ElasticBertConfig(**sizes, initializer_range=0.5)).eval()
    input_ids = torch.randint(1, 60, (6, 3, 8))
    policy = {"name": "entropy", "threshold": 0.9}
    output = model(input_ids, exit_policy=policy)
    assert output.logits.shape == (6, 3) and len(output.exit_layers.unique()) > 1
    for question in range(6):
        alone = model(input_ids[question : question + 1], exit_policy=policy)
        assert alone.exit_layers[0] == output.exit_layers[question]
        torch.testing.assert_close(alone.logits[0], output.logits[question], atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "threshold"), [("entropy", 0.0), ("confidence", 1.0), ("margin", 1.0)])
def test_at_the_strictest_threshold_the_surest_row_stays(name, threshold):
    logits = torch.tensor([[1e4, -1e4, 0.0]]).repeat(3, 1, 1)
    policy = {"name": name, "threshold": threshold}
    assert simulate(policy, logits, [1, 2, 3], "single_label_classification")[1].tolist() == [3]


@torch.no_grad()
def test_a_question_is_as_uncertain_as_its_least_certain_choice():
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 5, "num_attention_heads": 4}
    config = ElasticBertConfig(**sizes, intermediate_size=48, initializer_range=0.5, learned_exit_head=True)
    torch.manual_seed(0)
    model, ids = elastic_model.ElasticBertForMultipleChoice(config).eval(), torch.randint(1, 60, (6, 3, 8))
    alone = model(ids.view(18, 1, 8)).exit_uncertainty.view(5, 6, 3)
    torch.testing.assert_close(model(ids).exit_uncertainty, alone.amax(-1))


@torch.no_grad()
def test_where_the_constant_layer_is_left_out_the_next_exit_answers():
    model = model_of("classification")
    policy = {"name": "constant", "layer": 3}
    output = model(rows_of([9, 5], seed=0)[0], exit_policy=policy, layer_config=[1, 2, 4, 5, 6])
    assert output.exit_layers.tolist() == [4, 4]


def test_votes_are_of_real_tokens():
    """Padding, on which exits need not agree, kept its row inside."""
    logits = torch.zeros(3, 1, 3, 2)
    logits[:, 0, :2, 1], logits[1, 0, 2, 0], logits[0, 0, 2, 1] = 1.0, 5.0, 5.0
    mask = torch.tensor([[True, True, False]])
    for policy in ({"name": "voting", "votes": 2}, {"name": "patience", "patience": 1}):
        assert simulate(policy, logits, [1, 2, 3], "token_classification", mask)[1].tolist() == [2]
        assert simulate(policy, logits, [1, 2, 3], "token_classification")[1].tolist() == [3]


def test_each_row_is_measured_by_its_own_number_of_classes():
    """Of a question with few tokens the entropy is a larger share: rows that stay must keep their number."""
    torch.manual_seed(0)
    mask = torch.arange(6) < torch.tensor([6, 2, 4])[:, None]
    prediction = predict(torch.randn(3, 6, 2), "question_answering", mask)
    stay = torch.tensor([False, True, True])
    torch.testing.assert_close(normalised_entropy(prediction.select(stay)), normalised_entropy(prediction)[stay])
