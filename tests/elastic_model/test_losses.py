"""Weightings, gradient equilibrium, grouped exits, distillation: formulas on known numbers, gradients against their
definition."""

import pytest
import torch

import elastic_model
from elastic_model import ElasticBertConfig, modeling_elasticbert
from elastic_model.losses import (
    EXIT_LOSSES,
    cross_entropy,
    exit_group,
    exit_task_loss,
    exit_weights,
    gradient_equilibrium,
    inplace_distillation,
    uncertainty_loss,
    weighted_loss,
    wrong_answers,
)

HEADS = {
    "ElasticBertForSequenceClassification": {"labels": torch.tensor([0, 2, 1])},
    "ElasticBertForTokenClassification": {"labels": torch.arange(30).view(3, 10) % 3},
    "ElasticBertForQuestionAnswering": {
        "start_positions": torch.tensor([1, 0, 9]),
        "end_positions": torch.tensor([3, 0, 9]),
    },
    "ElasticBertForMaskedLM": {"labels": torch.where(torch.arange(30) % 4 == 0, 7, -100).view(3, 10)},
    "ElasticBertForPreTraining": {
        "labels": torch.where(torch.arange(30) % 4 == 0, 7, -100).view(3, 10),
        "sentence_order_label": torch.tensor([0, 1, 1]),
    },
}


def model_of(head="ElasticBertForSequenceClassification", **overrides):
    torch.manual_seed(0)
    sizes = dict(vocab_size=60, hidden_size=32, num_hidden_layers=4, num_attention_heads=4, intermediate_size=48)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    config = ElasticBertConfig(**{**sizes, **dropout, "initializer_range": 0.3, "num_labels": 3, **overrides})
    return getattr(elastic_model, head)(config).train()


def ids():
    return torch.randint(1, 60, (3, 10), generator=torch.Generator().manual_seed(1))


def gradients(model):
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


@pytest.mark.parametrize(
    "name, expected",
    [
        ("sum", [1, 1, 1]),
        ("last", [0, 0, 1]),
        ("mean", [1 / 3] * 3),
        ("linear", [1 / 6, 2 / 6, 3 / 6]),
        ("cumulative", [1 / 10, 3 / 10, 6 / 10]),
        ("sqrt", [1 / 4.14626, 2**0.5 / 4.14626, 3**0.5 / 4.14626]),
        ("inverse", [6 / 11, 3 / 11, 2 / 11]),
        ("inverse_sqrt", [1 / 2.28446, 0.70711 / 2.28446, 0.57735 / 2.28446]),
    ],
)
def test_weightings(name, expected):
    assert exit_weights(name, [1, 2, 3]) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("name", sorted(set(EXIT_LOSSES) - {"last"}))
def test_a_subset_of_exits_keeps_their_ratios(name):
    all_of_them, some = exit_weights(name, list(range(1, 13))), exit_weights(name, [4, 9, 12])
    assert some[1] / some[0] == pytest.approx(all_of_them[8] / all_of_them[3])
    assert some[2] / some[1] == pytest.approx(all_of_them[11] / all_of_them[8])


def test_unknown_weightings_are_named():
    with pytest.raises(ValueError, match="exit_loss must be one of sum, last"):
        exit_weights("harmonic", [1])
    with pytest.raises(Exception, match="exit_loss must be one of"):
        model_of(exit_loss="harmonic")


def test_a_model_sums_its_exits_as_the_weighting_says():
    for name in EXIT_LOSSES:
        output = model_of(exit_loss=name)(ids(), labels=torch.tensor([0, 2, 1]))
        expected = weighted_loss(dict(enumerate(output.exit_losses, start=1)), name)
        torch.testing.assert_close(output.loss, expected)
        by_hand = torch.nn.functional.cross_entropy(output.exit_logits[1], torch.tensor([0, 2, 1]))
        torch.testing.assert_close(output.exit_losses[1], by_hand)


def test_groups_deal_out_the_exits_and_share_the_last():
    assert [exit_group(list(range(1, 13)), 2, step) for step in (0, 1, 2)] == [
        [1, 3, 5, 7, 9, 11, 12],
        [2, 4, 6, 8, 10, 12],
        [1, 3, 5, 7, 9, 11, 12],
    ]
    assert exit_group([2, 5, 6], 5, 4) == [6] and exit_group([6], 3, 1) == [6]
    with pytest.raises(ValueError, match="at least 1"):
        exit_group([1, 2], 0, 0)


def test_gradient_equilibrium_scales_only_gradients():
    hidden = torch.ones(3, requires_grad=True)
    branch, upward = gradient_equilibrium(hidden, 4)
    assert torch.equal(branch, hidden) and torch.equal(upward, hidden)
    (branch.sum() * 10 + upward.sum() * 100).backward()
    assert hidden.grad.tolist() == pytest.approx([10 / 4 + 300 / 4] * 3)


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("exits", [[1, 2, 3, 4], [2, 4], [1, 4], [4], [1, 2]])
def test_the_backbone_sees_the_mean_over_the_trained_exits_above(head, exits):
    """By definition: dL/dh_l = 1/n_l dL_l/dh_l + (n_l - 1)/n_l J^T dL/dh_{l+1}, for any subset; heads get theirs in
    full."""
    arguments = {"input_ids": ids(), **HEADS[head]}
    model = model_of(head)
    model(**arguments, exits=exits).loss.backward()
    balanced = gradients(model)
    losses = []
    for exit_layer in exits:  # each exit alone, unscaled
        alone = model_of(head, gradient_equilibrium=False)
        alone(**arguments, exits=[exit_layer]).loss.backward()
        losses.append(gradients(alone))
    for name, gradient in balanced.items():
        if ".encoder.layer." not in name:
            continue
        layer = int(name.split(".layer.")[1].split(".")[0]) + 1
        seen = sum(losses[i][name] for i in range(len(exits)) if exits[i] >= layer and name in losses[i])
        if isinstance(seen, int):
            continue  # no trained exit above: no gradient of any kind
        count = sum(exit_layer >= layer for exit_layer in exits)
        torch.testing.assert_close(gradient, seen / count, atol=1e-5, rtol=1e-4)
    for i, exit_layer in enumerate(exits):  # an exit's own parameters
        own = [
            name
            for name in balanced
            if name.startswith((f"classifiers.{exit_layer - 1}.", f"qa_outputs.{exit_layer - 1}."))
        ]
        for name in own:
            torch.testing.assert_close(balanced[name], losses[i][name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("head", HEADS)
def test_exits_outside_the_group_take_part_with_zero_gradients(head):
    model = model_of(head)
    model(ids(), **HEADS[head], exits=[2, 4]).loss.backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    idle = [
        p.grad
        for n, p in model.named_parameters()
        if any(f"{m}.0." in n for m in ("classifiers", "pooler", "transforms", "qa_outputs"))
    ]
    assert idle and all((gradient == 0).all() for gradient in idle)


@pytest.mark.parametrize("exits", [[], [5], [0, 4]])
def test_exits_that_do_not_exist_are_named(exits):
    with pytest.raises(ValueError, match="exits must be some of the exit layers"):
        model_of()(ids(), exits=exits)


def test_distillation_is_the_divergence_from_the_teacher():
    teacher, student = torch.randn(5, 3), torch.randn(5, 3, requires_grad=True)
    p, q = teacher.softmax(-1), student.log_softmax(-1)
    expected = (p * (p.log() - q)).sum(-1).mean()
    torch.testing.assert_close(inplace_distillation(student, teacher, "single_label_classification"), expected)
    zero = inplace_distillation(teacher, teacher, "single_label_classification")
    assert zero.abs() < 1e-6
    squared = inplace_distillation(torch.tensor([[1.0]]), torch.tensor([[3.0]]), "regression")
    assert squared.item() == 4.0


def test_distillation_of_tokens_and_spans_sees_real_tokens_only():
    mask = torch.tensor([[True, True, False]])
    teacher, student = torch.randn(1, 3, 2), torch.randn(1, 3, 2)
    for problem in ("token_classification", "question_answering"):
        loss = inplace_distillation(student, teacher, problem, mask)
        student[0, 2], teacher[0, 2] = 50.0, torch.tensor([-3.0, 8.0])
        torch.testing.assert_close(inplace_distillation(student, teacher, problem, mask), loss)


def test_no_gradient_reaches_the_teacher():
    teacher, student = (torch.randn(2, 3, requires_grad=True) for _ in range(2))
    inplace_distillation(student, teacher, "single_label_classification").backward()
    assert teacher.grad is None and student.grad is not None


def test_masked_losses_count_what_they_are_told_to():
    model, arguments = model_of("ElasticBertForPreTraining"), HEADS["ElasticBertForPreTraining"]
    own = model(ids(), **arguments)
    shared = model(ids(), **arguments, mlm_count=16, sop_count=6)
    torch.testing.assert_close(shared.mlm_losses[0], own.mlm_losses[0] * 8 / 16)
    torch.testing.assert_close(shared.sop_losses[0], own.sop_losses[0] * 3 / 6)
    torch.testing.assert_close(own.loss, sum(own.mlm_losses) + sum(own.sop_losses))


def test_the_learned_exit_head_learns_who_is_wrong():
    model = model_of(learned_exit_head=True)
    labels = torch.tensor([0, 2, 1])
    output = model(ids(), labels=labels)
    wrong = torch.stack(output.exit_logits)[:-1].argmax(-1) != labels
    error = ((output.exit_uncertainty[:-1] - wrong.float()) ** 2).mean()
    torch.testing.assert_close(output.loss, sum(output.exit_losses) + error)


def test_labels_in_a_column_are_labels():
    """Against (rows,) answers they made a table, in which nearly every row was wrong."""
    logits = torch.tensor([[2.0, 0.0], [0.0, 2.0], [2.0, 0.0]])
    for labels in (torch.tensor([0, 1, 1]), torch.tensor([[0], [1], [1]])):
        assert wrong_answers(logits, labels, "single_label_classification").tolist() == [False, False, True]


def test_what_is_computed_again_draws_the_same_dropout(monkeypatch):
    """Adapters put dropout into what the backward pass computes anew: their gradients were of another mask."""
    model = model_of("ElasticBertForMaskedLM").train()
    for transform in model.predictions.transforms.values():
        transform.dense = torch.nn.Sequential(transform.dense, torch.nn.Dropout(0.5))
    gradients = []
    for kept in (False, True):
        if kept:
            monkeypatch.setattr(modeling_elasticbert, "checkpoint", lambda loss, states, **how: loss(states))
        model.zero_grad()
        torch.manual_seed(0)
        model(ids(), labels=ids()).loss.backward()
        gradients.append([one.grad.clone() for one in model.parameters() if one.grad is not None])
    for again, once in zip(*gradients, strict=True):
        torch.testing.assert_close(again, once)


def test_padding_answers_no_question():
    logits = torch.zeros(1, 4, 2)
    logits[0, 2], logits[0, 3] = 5.0, 6.0  # the right token, and padding, which has a logit too
    span, mask = torch.tensor([[2, 2]]), torch.tensor([[True, True, True, False]])
    assert wrong_answers(logits, span, "question_answering").tolist() == [True]
    assert wrong_answers(logits, span, "question_answering", mask).tolist() == [False]
    model = model_of("ElasticBertForQuestionAnswering", learned_exit_head=True)
    mask = torch.tensor([[1] * 10, [1] * 3 + [0] * 7, [1] * 3 + [0] * 7])
    output = model(ids(), mask, start_positions=torch.tensor([1, 2, 0]), end_positions=torch.tensor([1, 2, 0]))
    logits = torch.stack([torch.stack(output.exit_start_logits), torch.stack(output.exit_end_logits)])
    answers = logits.masked_fill(mask == 0, -torch.inf).argmax(-1)  # (start and end, exits, rows)
    wrong = (answers != torch.tensor([1, 2, 0])).any(0)[:-1].float()
    error = ((output.exit_uncertainty[:-1] - wrong) ** 2).mean()
    torch.testing.assert_close(output.loss, sum(output.exit_losses) + error)


def test_the_direction_of_the_divergence_can_be_reversed():
    torch.manual_seed(0)
    student, teacher = torch.randn(5, 3), torch.randn(5, 3)
    expected = (student.softmax(-1) * (student.log_softmax(-1) - teacher.log_softmax(-1))).sum(-1).mean()
    problem = "single_label_classification"
    torch.testing.assert_close(inplace_distillation(student, teacher, problem, reverse=True), expected)
    assert not torch.isclose(inplace_distillation(student, teacher, problem), expected)


def test_the_divergence_of_spans_is_the_mean_of_their_sides():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 2, 5, 2)
    sides = [
        inplace_distillation(student[..., side], teacher[..., side], "single_label_classification") for side in (0, 1)
    ]
    torch.testing.assert_close(inplace_distillation(student, teacher, "question_answering"), sum(sides) / 2)
    mask = torch.tensor([[True, True, True, False, False]] * 2)
    expected = inplace_distillation(student[:, :3], teacher[:, :3], "question_answering")
    torch.testing.assert_close(inplace_distillation(student, teacher, "question_answering", mask), expected)


def test_the_divergence_of_several_labels_is_that_of_each():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 4, 3)
    cross = torch.nn.functional.binary_cross_entropy_with_logits
    expected = cross(student, teacher.sigmoid()) - cross(teacher, teacher.sigmoid())
    torch.testing.assert_close(inplace_distillation(student, teacher, "multi_label_classification"), expected)


def test_what_is_wrong_of_several_labels_and_of_numbers():
    """One wrong label of a row is enough; of numbers tanh of the distance, as BERxiT has it."""
    logits, labels = torch.tensor([[1.0, -1.0], [1.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]])
    assert wrong_answers(logits, labels, "multi_label_classification").tolist() == [False, True]
    far = wrong_answers(torch.tensor([[3.0], [1.0]]), torch.tensor([1.0, 1.0]), "regression")
    torch.testing.assert_close(far, torch.tensor([2.0, 0.0]).tanh())


def test_losses_of_nothing_and_of_several_labels():
    assert cross_entropy(torch.zeros(2, 3), torch.tensor([-100, -100])).item() == 0.0
    torch.manual_seed(0)
    logits, labels = torch.randn(4, 3), torch.randint(2, (4, 3)).float()
    loss = exit_task_loss(logits, labels, "multi_label_classification")
    torch.testing.assert_close(loss, torch.nn.functional.binary_cross_entropy_with_logits(logits, labels))


def test_gradients_are_in_equilibrium_where_tokens_are_dropped():
    """Each layer sees the mean of the gradients of the exits above it, also of tokens that have left."""
    head = "ElasticBertForTokenClassification"
    arguments = {"input_ids": ids(), **HEADS[head], "length_config": [1.0, 0.7, 0.5, 0.3]}
    model = model_of(head)
    model(**arguments).loss.backward()
    balanced, alone = gradients(model), []
    for layer in (1, 2, 3, 4):
        one = model_of(head, gradient_equilibrium=False)
        one(**arguments, exits=[layer]).loss.backward()
        alone.append(gradients(one))
    for name in (name for name in balanced if ".layer.0." in name):
        mean = sum(one[name] for one in alone) / 4
        torch.testing.assert_close(balanced[name], mean, atol=1e-5, rtol=1e-4)


def test_an_exit_without_weight_takes_no_share_of_the_gradient():
    found = []
    for on in (True, False):
        model = model_of(exit_loss="last", gradient_equilibrium=on)
        model(ids(), labels=torch.tensor([0, 2, 1])).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)


def test_the_loss_of_spans_is_the_mean_of_their_sides():
    head = "ElasticBertForQuestionAnswering"
    model, spans = model_of(head), HEADS[head]
    output = model(ids(), **spans)
    pairs = (
        (output.exit_start_logits[1], spans["start_positions"]),
        (output.exit_end_logits[1], spans["end_positions"]),
    )
    expected = sum(torch.nn.functional.cross_entropy(*pair) for pair in pairs) / 2
    torch.testing.assert_close(output.exit_losses[1], expected)
    beyond = torch.tensor([1, 10, 11])  # answers outside the window are not learned
    inside = model(ids()[:1], start_positions=beyond[:1], end_positions=beyond[:1])
    found = model(ids(), start_positions=beyond, end_positions=beyond)
    torch.testing.assert_close(found.loss, inside.loss, atol=1e-5, rtol=0)


def test_heads_have_a_dropout_of_their_own():
    model = model_of(classifier_dropout=0.5)
    first, second = (torch.stack(model(ids()).exit_logits) for _ in range(2))
    assert not torch.allclose(first, second)
    model = model_of("ElasticBertForPreTraining")
    model.dropout.p = 0.5
    first, second = (model(ids()).sop_logits for _ in range(2))
    assert not torch.allclose(first, second)


def test_evaluation_leaves_gradients_as_they_are():
    """Equilibrium is the training's: importance is measured in evaluation mode."""
    found = []
    for on in (True, False):
        model = model_of(gradient_equilibrium=on).eval()
        model(ids(), labels=torch.tensor([0, 2, 1])).loss.backward()
        found.append(gradients(model))
    for name, gradient in found[1].items():
        torch.testing.assert_close(found[0][name], gradient)


def test_every_place_with_a_dropout_draws():
    config = model_of(hidden_dropout_prob=0.1, attention_probs_dropout_prob=0.2, classifier_dropout=0.3)
    assert {one.p for one in config.elasticbert.modules() if isinstance(one, torch.nn.Dropout)} == {0.1}
    model = model_of()
    places = [one for one in model.modules() if isinstance(one, torch.nn.Dropout)]
    places += [layer.attention.self for layer in model.elasticbert.encoder.layer]
    assert len(places) == 2 + 3 * 4  # embeddings, head; attention, its output and the feed-forward's of each layer
    for place in places:
        rate = "p" if hasattr(place, "p") else "attention_dropout"
        setattr(place, rate, 0.5)
        for lengths in (None, [1.0, 0.9, 0.9, 0.9]) if rate == "attention_dropout" else (None,):
            first, second = (torch.stack(model(ids(), length_config=lengths).exit_logits) for _ in range(2))
            assert not torch.equal(first, second), (place, lengths)
        setattr(place, rate, 0.0)


def test_padding_learns_nothing():
    model = model_of(pad_token_id=0)
    padded = torch.cat([ids(), torch.zeros(3, 2, dtype=torch.long)], dim=1)
    model(padded, labels=torch.tensor([0, 2, 1])).loss.backward()
    rows = model.get_input_embeddings().weight.grad.abs().sum(1)
    assert rows[0] == 0 and rows[padded[0, 0]] > 0


@pytest.mark.parametrize("problem", ["regression", "multi_label_classification", "single_label_classification"])
def test_parts_of_a_batch_add_up_to_its_mean(problem):
    torch.manual_seed(0)
    logits = torch.randn(6, 1 if problem == "regression" else 3)
    labels = torch.randint(3, (6,)) if problem.startswith("single") else torch.rand(logits.shape)
    whole = exit_task_loss(logits, labels, problem)
    parts = [exit_task_loss(logits[part], labels[part], problem, labels.numel()) for part in (slice(2), slice(2, 6))]
    torch.testing.assert_close(sum(parts), whole)


def test_what_is_wrong_is_no_function_of_the_weights():
    """In regression it is made of the answer itself: without that the answers would learn to look certain."""
    answer = torch.tensor([[0.5], [2.0]], requires_grad=True)
    doubt = torch.tensor([0.1, 0.2], requires_grad=True)
    uncertainty_loss(doubt, wrong_answers(answer, torch.zeros(2), "regression")).backward()
    assert answer.grad is None and doubt.grad is not None


def test_ignored_tokens_are_not_wrong():
    logits = torch.tensor([[[2.0, 0.0], [0.0, 2.0]]])
    assert wrong_answers(logits, torch.tensor([[0, -100]]), "token_classification").tolist() == [False]
    assert wrong_answers(logits, torch.tensor([[-100, 0]]), "token_classification").tolist() == [True]


def test_no_number_of_items_scales_two_losses():
    """The Trainer's one number, of masked tokens, must not divide the order of sentences, too."""
    assert not elastic_model.ElasticBertForPreTraining.accepts_loss_kwargs
