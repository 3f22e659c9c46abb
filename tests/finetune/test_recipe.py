"""Recipes: what an update's gradient is, which exits take part, what the teacher's answers change."""

import json
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from transformers import AutoTokenizer, BertConfig

from elastic_model import ElasticBertConfig
from elastic_model.losses import inplace_distillation
from finetune.config import TrainOptions
from finetune.data import collate, encode, inputs_of
from finetune.examples import Examples
from finetune.prepare import exit_pooling_of
from finetune.recipe import RECIPES, SANDWICH, Update, as_labels, exits_of, find_recipe
from finetune.run import prepare
from finetune.train import backward, engine_of

CPU = torch.device("cpu")


def prepared(options, **changes):
    """A run whose model draws no dropout, and its gradient of an update of one phase."""
    run = prepare(options(**changes), Accelerator())
    run.model.eval()

    def gradient(phase, number):
        run.model.zero_grad()
        backward(run, run.phases[phase], engine_of(run), number)
        return {name: one.grad.clone() for name, one in run.model.named_parameters() if one.grad is not None}

    return run, gradient


def assert_close(first, second):
    assert first.keys() == second.keys()
    for name, one in first.items():
        torch.testing.assert_close(one, second[name], atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize(
    ("recipe", "phase", "changes"),
    [
        ("joint", 0, {"exit_loss": "linear"}),
        ("alternating", 0, {}),
        ("learned", 0, {"exit_groups": 2}),
        ("self_distillation", 1, {"learned_exit_head": True}),
        ("sandwich", 1, {"exit_groups": 2, "layer_drop": 0.5}),
    ],
)
def test_micro_batches_sum_to_the_gradient_of_the_batch(options, recipe, phase, changes):
    """Whatever the recipe: what alternates does so by update, sub-networks are the same in every micro-batch."""
    for number in (0, 1):
        whole, parts = (
            prepared(options, recipe=recipe, micro_batch_size=size, **changes)[1](phase, number) for size in (None, 3)
        )
        assert_close(whole, parts)


@pytest.mark.parametrize("recipe", ["two_stage", "self_distillation"])
def test_there_are_no_more_groups_than_exits_to_deal(options, recipe):
    """An update whose group was empty had no loss: the second phase of a run stopped with an error of torch's."""
    run, gradient = prepared(options, recipe=recipe, exit_groups=9)
    below = set(run.exit_layers[:-1])
    trained = [below & set(trained_exits(gradient(1, number))) for number in range(9)]
    assert all(trained) and set().union(*trained) == below


def test_the_last_exit_teaches_without_dropout(options):
    """FastBERT's teacher is a model in evaluation mode: each pass gives the same answers."""
    run = prepare(options(recipe="self_distillation", dropout=0.5), Accelerator())
    batch = collate(run.splits["train"], list(range(8)), run.tokenizer, CPU)
    losses = []
    for _ in range(2):
        run.model.train()
        (loss,) = run.phases[1].objective(run.model, run.model.config, batch, Update(0, random.Random(0), run.options))
        losses.append(loss.item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize("recipe", ["two_stage", "self_distillation"])
def test_a_phase_without_anything_to_train_is_named(options, recipe):
    with pytest.raises(ValueError, match=f"recipe '{recipe}' has a phase for the exits below the last, of which"):
        prepare(options(recipe=recipe, exit_layers=[4]), Accelerator())


def trained_exits(gradient):
    return [layer for layer in (1, 2, 3, 4) if gradient[f"classifiers.{layer - 1}.weight"].abs().sum() > 0]


def test_alternating_trains_the_last_exit_then_all_and_every_group_gets_its_turn(options):
    _, gradient = prepared(options, recipe="alternating")
    assert [trained_exits(gradient(0, number)) for number in range(3)] == [[4], [1, 2, 3, 4], [4]]
    _, gradient = prepared(options, recipe="alternating", exit_groups=2)
    assert [trained_exits(gradient(0, number)) for number in (1, 3)] == [[1, 3, 4], [2, 4]]


def test_every_parameter_takes_part_in_every_update(options):
    """Optimizers treat a missing gradient and a zero one differently; so does the exchange between processes."""
    for recipe, row in RECIPES.items():
        run, gradient = prepared(options, recipe=recipe, exit_groups=2)
        for phase, one in enumerate(row.phases):
            trained = {name for name, _ in run.model.named_parameters() if one.trains(name, run.model.config)}
            for number in (0, 1):
                assert trained <= gradient(phase, number).keys(), (recipe, phase, number)


def test_the_learned_exit_head_learns_from_the_inner_exits(options):
    run, gradient = prepared(options, recipe="learned")
    assert run.model.config.learned_exit_head
    last, everything = gradient(0, 0), gradient(0, 1)
    assert last["exit_uncertainty.weight"].abs().sum() == 0 < everything["exit_uncertainty.weight"].abs().sum()


def sandwich_losses(run, teacher=None):
    batch = collate(run.splits["train"], list(range(8)), run.tokenizer, CPU)
    update = Update(0, random.Random(0), run.options, teacher)
    return batch, [loss.item() for loss in SANDWICH.objective(run.model, run.model.config, batch, update)]


def test_what_an_ablation_changes(options):
    """The drop rates, the direction of the divergence and labels in its place; 1 + smallest + sampled passes."""
    runs = {
        name: prepared(options, recipe="sandwich", **changes)[0]
        for name, changes in {
            "paper": {},
            "reverse": {"distillation": "reverse"},
            "labels": {"distillation": "none"},
            "whole": {"length_drop": 0.0, "layer_drop": 0.0},
            "more": {"sampled": 4},
        }.items()
    }
    losses = {name: sandwich_losses(run)[1] for name, run in runs.items()}
    batch = sandwich_losses(runs["whole"])[0]
    full = runs["whole"].model(**batch)
    task = full.loss.item() / 4
    assert [len(one) for one in losses.values()] == [4, 4, 4, 4, 6]
    assert losses["paper"][0] == losses["reverse"][0] == pytest.approx(task)
    assert losses["more"][0] == pytest.approx(task * 4 / 6)
    assert losses["paper"][1] != losses["reverse"][1] and losses["paper"][1] != losses["labels"][1]
    teacher = full.logits.detach()
    same = sum(inplace_distillation(one, teacher, "single_label_classification").item() for one in full.exit_logits)
    assert losses["whole"][1:] == pytest.approx([same / 4] * 3)


def test_a_teacher_is_everybodys(options, tiny_checkpoint):
    taught = {"recipe": "sandwich", "teacher": str(tiny_checkpoint)}
    run, _ = prepared(options, **taught, hard_weight=0.0)
    teacher = torch.randn(8, 3)
    batch, losses = sandwich_losses(run, teacher)
    exits = run.model(**inputs_of(batch), exit_policy={"name": "never"}).exit_logits
    soft = sum(inplace_distillation(one, teacher, "single_label_classification").item() for one in exits)
    assert losses[0] == pytest.approx(soft / 4, rel=1e-5)
    run, _ = prepared(options, **taught, hard_weight=1.0)
    assert sandwich_losses(run, teacher)[1][0] == pytest.approx(run.model(**batch).loss.item() / 4, rel=1e-5)


def test_temperature_softens_both_sides(options, tiny_checkpoint):
    run, _ = prepared(options, teacher=str(tiny_checkpoint), temperature=2.0, hard_weight=0.0)
    teacher, batch = torch.randn(8, 3), collate(run.splits["train"], list(range(8)), run.tokenizer, CPU)
    update = Update(0, random.Random(0), run.options, teacher)
    (loss,) = run.phases[0].objective(run.model, run.model.config, batch, update)
    exits = run.model(**inputs_of(batch), exit_policy={"name": "never"}).exit_logits
    soft = [inplace_distillation(one / 2, teacher / 2, "single_label_classification") for one in exits]
    assert loss.item() == pytest.approx(4 * sum(soft).item(), rel=1e-5)


def test_a_teachers_answers_as_labels():
    mask = torch.tensor([[True, True, False]])
    tags = as_labels(torch.tensor([[[0.0, 1.0], [2.0, 1.0], [0.0, 9.0]]]), "token_classification", mask)
    assert tags.tolist() == [[1, 0, -100]]
    spans = as_labels(torch.tensor([[[0.0, 2.0], [1.0, 1.0], [9.0, 9.0]]]), "question_answering", mask)
    assert spans.tolist() == [[1, 0]]
    assert as_labels(torch.tensor([[-1.0, 2.0]]), "multi_label_classification", None).tolist() == [[0.0, 1.0]]


def test_phases_have_epochs_of_their_own(options):
    run = prepare(options(recipe="sandwich", phase_epochs=[1, 2]), Accelerator())
    assert run.plan.ends == [6, 18]
    with pytest.raises(
        ValueError, match=r"phase_epochs must have a number of at least 0 for each phase .2 here., not all 0"
    ):
        prepare(options(recipe="sandwich", phase_epochs=[3]), Accelerator())


def test_an_unknown_recipe_is_named():
    with pytest.raises(ValueError, match="recipe 'jont' is unknown; allowed: joint, two_stage, alternating, learned"):
        find_recipe("jont")


def test_teacher_logits_are_asked_in_evaluation_mode_and_in_our_order(options, tiny_checkpoint, tmp_path):
    """The teacher has the labels in another order; its logits come back in ours, the same at every asking."""
    from elastic_model import ElasticBertForSequenceClassification
    from finetune.teacher import ask, final_logits, label_order

    model = ElasticBertForSequenceClassification.from_pretrained(tiny_checkpoint, hidden_dropout_prob=0.5).train()
    run = prepare(options(), Accelerator())
    first, second = (
        ask(model, run.splits["train"], run.tokenizer, size, run.accelerator, final_logits) for size in (7, 64)
    )
    assert model.training and all(np.allclose(one, other, atol=1e-5) for one, other in zip(first, second, strict=True))
    assert label_order(str(tiny_checkpoint), ["late", "early", "middle"], "single_label_classification") == [2, 0, 1]
    with pytest.raises(ValueError, match="has the labels early, middle, late; the task has a, b"):
        label_order(str(tiny_checkpoint), ["a", "b"], "single_label_classification")
    config = json.loads((tiny_checkpoint / "config.json").read_text())
    (tiny_checkpoint / "config.json").write_text(json.dumps({**config, "problem_type": "multi_label_classification"}))
    with pytest.raises(ValueError, match="is a model for multi_label_classification, the task is single_label"):
        label_order(str(tiny_checkpoint), ["late", "early", "middle"], "single_label_classification")


KINDS = {  # a model class and the targets of four rows of five tokens
    "ElasticBertForTokenClassification": lambda: {"labels": torch.tensor([[-100, 0, 1, 2, -100]] * 4)},
    "ElasticBertForQuestionAnswering": lambda: {
        "start_positions": torch.tensor([1, 2, 0, 3]),
        "end_positions": torch.tensor([1, 3, 0, 3]),
    },
}


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_every_recipe_trains_models_that_answer_per_token(tiny_config, options, name, recipe):
    """Losses are finite, every parameter that a phase trains takes part; for tags, padding changes no gradient (the
    loss of spans is over all tokens of the batch, as the stock model's is)."""
    import elastic_model

    torch.manual_seed(0)
    for setting, value in find_recipe(recipe).config.items():
        setattr(tiny_config, setting, value)
    model = getattr(elastic_model, name)(tiny_config)
    ids = torch.randint(5, 200, (4, 5))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids), **KINDS[name]()}
    padded = {key: pad_tokens(key, tensor) for key, tensor in batch.items()}
    for phase in find_recipe(recipe).phases:
        gradients = []
        for one in (batch, padded):
            model.zero_grad()
            model.eval()
            update = Update(1, random.Random(0), options(recipe=recipe))
            for loss in phase.objective(model, tiny_config, one, update):
                assert loss.isfinite()
                loss.backward()
            gradients.append(
                {key: tensor.grad for key, tensor in model.named_parameters() if phase.trains(key, tiny_config)}
            )
        assert all(gradient is not None for gradient in gradients[0].values())
        for key, gradient in gradients[0].items() if "Token" in name else ():
            torch.testing.assert_close(gradients[1][key], gradient, atol=1e-5, rtol=1e-3)


def pad_tokens(name, tensor):
    """Two tokens of padding behind every row."""
    if tensor.dim() == 1:
        return tensor
    return torch.nn.functional.pad(tensor, (0, 2), value=-100 if name == "labels" else 0)


@pytest.mark.parametrize(
    ("head", "settings", "expected"),
    [
        ("BertModel", {}, ["mean", "mean", "mean"]),  # nothing has trained its last exit
        ("BertForSequenceClassification", {}, ["mean", "mean", "cls"]),
        ("BertModel", {"exit_layers": [3]}, ["mean", "mean", "cls"]),  # BERT's own, the others are not there
        ("BertModel", {"exit_layers": [3], "exit_pooling": "mean"}, ["mean", "mean", "mean"]),  # unless it is asked
        ("BertModel", {"exit_pooling": "cls"}, ["cls", "cls", "cls"]),
        ("BertForSequenceClassification", {"exit_pooling": "cls"}, ["cls", "cls", "cls"]),
    ],
)
def test_exits_that_learn_together_read_the_same(head, settings, expected):
    """A last exit on [CLS] above exits on the mean of the tokens learned less: 1.6 points on SICK's dev split."""
    config = BertConfig(num_hidden_layers=3, architectures=[head])
    options = TrainOptions(model="", output="", **settings)
    assert exit_pooling_of(config, options.exit_layers, options) == expected


def test_sub_networks_learn_the_teachers_answers_too(options, tiny_checkpoint):
    whole = {"recipe": "sandwich", "length_drop": 0.0, "layer_drop": 0.0}  # as the full model: all answer the same
    run, _ = prepared(options, **whole, teacher=str(tiny_checkpoint), hard_weight=0.0)
    losses = sandwich_losses(run, torch.randn(8, 3))[1]
    assert losses[1:] == pytest.approx([losses[0]] * 3, rel=1e-5)


def test_layers_are_dropped_at_the_rate_of_layers(options):
    some, none = (prepared(options, recipe="sandwich", length_drop=0.0, layer_drop=rate)[0] for rate in (0.9, 0.0))
    assert sandwich_losses(some)[1][1] != sandwich_losses(none)[1][1]


def test_the_weight_of_the_labels_divides_the_loss(options, tiny_checkpoint):
    teacher, losses = torch.randn(8, 3), []
    for weight in (0.0, 0.25, 1.0):
        run, _ = prepared(options, recipe="sandwich", teacher=str(tiny_checkpoint), hard_weight=weight)
        losses.append(sandwich_losses(run, teacher)[1][0])
    assert losses[1] == pytest.approx(0.25 * losses[2] + 0.75 * losses[0], rel=1e-5)


def test_the_learned_head_beside_a_teacher_learns_the_mean_over_exits(options, tiny_checkpoint):
    taught = {"teacher": str(tiny_checkpoint), "hard_weight": 0.0}
    run, _ = prepared(options, learned_exit_head=True, **taught)
    teacher, batch = torch.randn(8, 3), collate(run.splits["train"], list(range(8)), run.tokenizer, CPU)
    update = Update(0, random.Random(0), run.options, teacher)
    (loss,) = run.phases[0].objective(run.model, run.model.config, batch, update)
    output = run.model(**inputs_of(batch), exit_policy={"name": "never"})
    soft = sum(inplace_distillation(one, teacher, "single_label_classification") for one in output.exit_logits)
    wrong = torch.stack(output.exit_logits[:-1]).argmax(-1) != teacher.argmax(-1)
    doubt = ((output.exit_uncertainty[:-1] - wrong.float()) ** 2).mean()
    assert loss.item() == pytest.approx((soft + doubt).item(), rel=1e-5)


def test_the_inner_exits_alone_learn_from_the_last(options):
    """Weighted among themselves: the last exit, which differs from itself by nothing, took a share of the mean."""
    run = prepare(options(recipe="self_distillation", exit_loss="mean"), Accelerator())
    batch = collate(run.splits["train"], [0, 1, 2], run.tokenizer, CPU)
    (loss,) = (
        RECIPES["self_distillation"]
        .phases[1]
        .objective(run.model, run.model.config, batch, Update(0, random.Random(0), run.options))
    )
    with torch.no_grad():
        exits = run.model(**inputs_of(batch)).exit_logits
    apart = [inplace_distillation(one, exits[-1], "single_label_classification") for one in exits[:-1]]
    torch.testing.assert_close(loss.detach(), sum(apart) / 3)


def test_one_label_without_a_problem_type_is_a_number():
    config = ElasticBertConfig(num_labels=1, num_hidden_layers=2)
    output = SimpleNamespace(exit_logits=[torch.zeros(3, 1)] * 2, exit_uncertainty=None)
    batch = {"attention_mask": torch.ones(3, 4)}
    one = Class(output)
    assert exits_of(one, config, batch, [1, 2]).problem_type == "regression"


class Class(dict):
    """A model's output: a mapping with attributes."""

    def __init__(self, fields):
        super().__init__(vars(fields))
        self.__dict__.update(vars(fields))


def test_a_teacher_with_exits_answers_at_full_depth(tiny_checkpoint):
    from elastic_model import ElasticBertForSequenceClassification
    from finetune.teacher import ask, final_logits

    model = ElasticBertForSequenceClassification.from_pretrained(tiny_checkpoint).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_checkpoint)
    rows = encode(Examples(["the army", "a treaty"], None, [0, 0], ["", ""]), tokenizer, 16)
    expected = ask(model, rows, tokenizer, 2, Accelerator(), final_logits)
    model.config.exit_policy, model.config.length_config = {"name": "constant", "layer": 1}, [0.5] * 4
    for one, other in zip(ask(model, rows, tokenizer, 2, Accelerator(), final_logits), expected, strict=True):
        np.testing.assert_array_equal(one, other)
