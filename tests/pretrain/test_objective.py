"""The pre-training objective: students in the same pass, every parameter in every update, one exit in memory."""

import json
import random
import weakref
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch.utils._python_dispatch import TorchDispatchMode

from elastic_model import ElasticBertConfig, ElasticBertForMaskedLM, ElasticBertForPreTraining
from elastic_model.losses import EXIT_LOSSES, exit_group, inplace_distillation, trained_exits
from elastic_model.subnetworks import sandwich
from pretrain.config import EvaluateConfig
from pretrain.evaluate import evaluate_checkpoint
from pretrain.train import train

VOCABULARY = 96


def model_of(kind=ElasticBertForPreTraining, **overrides):
    torch.manual_seed(0)
    sizes = dict(hidden_size=16, num_hidden_layers=4, num_attention_heads=2, intermediate_size=24)
    dropout = dict(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    return kind(ElasticBertConfig(vocab_size=VOCABULARY, initializer_range=0.3, **{**sizes, **dropout, **overrides}))


def batch_of(rows=4, tokens=12):
    """Rows of several lengths; the last one has no order to tell."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(1, VOCABULARY, (rows, tokens), generator=generator)
    mask = (torch.arange(tokens) < torch.randint(6, tokens + 1, (rows, 1), generator=generator)).long()
    predicted = (torch.rand(rows, tokens, generator=generator) < 0.4) & mask.bool()
    order = torch.randint(2, (rows,), generator=generator)
    order[-1] = -100
    return {
        "input_ids": ids,
        "attention_mask": mask,
        "labels": torch.where(predicted, ids, -100),
        "sentence_order_label": order,
    }


def students_of(model, sampled=2, **drops):
    return [vars(one) for one in sandwich(model.config.num_hidden_layers, sampled, random.Random(3), **drops)]


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def student_loss(model, batch, student, exits):
    """The divergence of one student, from plain calls of the model: logits of whole rows, nothing recomputed."""
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    masked, ordered = batch["labels"] != -100, batch["sentence_order_label"] != -100
    with torch.no_grad():
        teacher = model(**inputs)
    learned = model(**inputs, length_config=student["length_config"], layer_config=student["layer_config"])
    computed = [layer for layer in exits if layer in (*student["layer_config"], model.exit_layers[-1])]
    answered = [layer for layer in model.exit_layers if layer in (*student["layer_config"], model.exit_layers[-1])]
    losses = []
    for layer in computed:
        at = answered.index(layer)
        predictions = learned.exit_prediction_logits[at][masked]
        orders = learned.exit_sop_logits[at][ordered]
        losses.append(inplace_distillation(predictions, teacher.prediction_logits[masked], "masked_lm"))
        losses.append(inplace_distillation(orders, teacher.sop_logits[ordered], "single_label_classification"))
    return torch.stack(losses).sum()


def test_students_and_the_full_model_give_the_gradient_of_their_mean_loss():
    model, batch = model_of(gradient_equilibrium=False).train(), batch_of()
    students, exits = students_of(model), [1, 3, 4]
    together = model(**batch, exits=exits, students=students)
    got = gradients(model, together.loss)
    parts = [model(**batch, exits=exits).loss, *(student_loss(model, batch, one, exits) for one in students)]
    torch.testing.assert_close(together.loss, torch.stack(parts).mean())
    torch.testing.assert_close(together.distillation_loss, torch.stack(parts[1:]).mean())
    for name, expected in gradients(model, torch.stack(parts).mean()).items():
        torch.testing.assert_close(got[name], expected, atol=1e-6, rtol=1e-4)


def test_without_length_and_layer_drop_students_have_nothing_to_learn():
    model, batch = model_of().train(), batch_of()
    students = students_of(model, length_drop=0.0, layer_drop=0.0)
    output = model(**batch, exits=[4], students=students)
    assert abs(output.distillation_loss.item()) < 1e-5


def test_students_count_as_the_global_batch_does():
    """Two micro-batches divided by the counts of both give the loss of the whole batch."""
    model, batch = model_of().train(), batch_of()
    students = students_of(model)
    masked, pairs = ((batch[name] != -100).sum() for name in ("labels", "sentence_order_label"))
    whole = gradients(model, model(**batch, students=students).loss)
    halves = [{name: values[rows] for name, values in batch.items()} for rows in (slice(0, 2), slice(2, 4))]
    losses = [model(**half, students=students, mlm_count=masked, sop_count=pairs).loss for half in halves]
    for name, expected in gradients(model, sum(losses)).items():
        torch.testing.assert_close(whole[name], expected, atol=1e-6, rtol=1e-4)


def test_students_need_something_to_learn():
    model = model_of().train()
    with pytest.raises(ValueError, match="labels must be given"):
        model(batch_of()["input_ids"], students=students_of(model))


@pytest.mark.parametrize("exit_loss", sorted(EXIT_LOSSES))
@pytest.mark.parametrize("with_students", [False, True])
def test_every_parameter_takes_part_in_every_update(exit_loss, with_students):
    """Optimizers tell a missing gradient from a zero one, and distributed training waits for every parameter."""
    model, batch = model_of(exit_loss=exit_loss).train(), batch_of()
    for step in range(2):
        model.zero_grad()
        exits = exit_group(model.exit_layers, 2, step)
        model(**batch, exits=exits, students=students_of(model) if with_students else ()).loss.backward()
        assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []
        trained = trained_exits(exit_loss, exits)
        for layer in model.exit_layers:
            own = [
                model.elasticbert.encoder.pooler.at(layer),
                model.predictions.transforms.at(layer),
                model.sop_classifiers.at(layer),
            ]
            moved = any((parameter.grad != 0).any() for module in own for parameter in module.parameters())
            assert moved == (layer in trained)


class LiveLogits(TorchDispatchMode):
    """The most tensors (masked, vocabulary) that were alive at once."""

    def __init__(self, masked):
        super().__init__()
        self.size = masked * VOCABULARY
        self.alive: dict[int, weakref.ref] = {}
        self.most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for one in result if isinstance(result, tuple | list) else [result]:
            if isinstance(one, torch.Tensor) and one.numel() == self.size and one.shape[-1] == VOCABULARY:
                storage = one.untyped_storage()
                self.alive[storage.data_ptr()] = weakref.ref(storage)
        self.alive = {place: reference for place, reference in self.alive.items() if reference() is not None}
        self.most = max(self.most, len(self.alive))
        return result


def most_logits(kind, layers, students=0):
    model, batch = model_of(kind, num_hidden_layers=layers).train(), batch_of()
    arguments = {"students": students_of(model, students - 1)} if students else {}
    if kind is ElasticBertForMaskedLM:
        batch.pop("sentence_order_label")
    masked = int((batch["labels"] != -100).sum())
    assert masked * VOCABULARY != model.predictions.decoder.weight.numel()
    with LiveLogits(masked) as live:
        model(**batch, **arguments).loss.backward()
    return live.most


@pytest.mark.parametrize("kind", [ElasticBertForPreTraining, ElasticBertForMaskedLM])
def test_memory_holds_the_logits_of_one_exit_also_in_the_backward_pass(kind):
    assert most_logits(kind, layers=2) == most_logits(kind, layers=8) > 0


def test_memory_holds_the_logits_of_one_student_beside_the_teachers():
    assert most_logits(ElasticBertForPreTraining, 8, students=4) == most_logits(
        ElasticBertForPreTraining, 2, students=1
    )


def _with_recompute(masked_loss, flag, *arguments, **others):
    return masked_loss(*arguments, **{**others, "recompute": flag})


def test_logits_computed_anew_give_the_same_gradients():
    """Dropout included: recomputing draws nothing."""
    model, batch = model_of(hidden_dropout_prob=0.2).train(), batch_of()
    found, masked_loss = [], model.masked_loss
    for recompute in (True, False):
        torch.manual_seed(7)
        model.masked_loss = partial(_with_recompute, masked_loss, recompute)
        found.append(gradients(model, model(**batch).loss))
    for name, gradient in found[0].items():
        assert torch.equal(gradient, found[1][name]), name


def test_bf16_losses_are_float32():
    model, batch = model_of().train(), batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        output = model(**batch, students=students_of(model, 1))
    losses = (*output.mlm_losses, *output.sop_losses, output.loss, output.distillation_loss)
    assert all(loss.dtype == torch.float32 and loss.isfinite() for loss in losses)
    exact = model(**batch, students=students_of(model, 1))
    torch.testing.assert_close(output.loss, exact.loss, rtol=0.05, atol=0.0)
    assert all(gradient.dtype == torch.float32 for gradient in gradients(model, output.loss).values())


def test_right_predictions_are_counted_per_exit():
    model, batch = model_of().eval(), batch_of()
    logits = model(batch["input_ids"], batch["attention_mask"]).exit_prediction_logits
    output = model(**batch)
    masked = batch["labels"] != -100
    expected = [int((one.argmax(-1) == batch["labels"])[masked].sum()) for one in logits]
    assert [int(right) for right in output.mlm_right] == expected
    assert torch.equal(output.prediction_logits, logits[-1])
    assert model(**batch, mlm_count=1, sop_count=1).prediction_logits is None  # who sums up wants losses only


@pytest.mark.slow
def test_a_sandwich_makes_a_checkpoint_that_bears_shorter_lengths(options, tmp_path, corpus_file, cache):
    """By how much the held-out loss rises when tokens are dropped, with and without LengthDrop in pre-training."""

    def rise(**flags):
        config = options(
            output=tmp_path / f"run{len(flags)}",
            num_hidden_layers=3,
            hidden_size=32,
            steps=200,
            warmup_steps=10,
            learning_rate=1e-2,
            exit_groups=1,
            evaluate_every=1000,
            save_every=1000,
            **flags,
        )
        train(config)
        losses = []
        for lengths in (None, [0.4, 0.2, 0.2]):
            AcceleratorState._reset_state(True)
            written = tmp_path / "evaluation.json"
            held_out = {"text": [str(corpus_file)], "held_out": config.validation_fraction, "max_length": 24}
            evaluate_checkpoint(
                EvaluateConfig(model=config.output, output=written, length_config=lengths, cache=cache, **held_out)
            )
            losses.append(json.loads(written.read_text())["mlm_loss"]["3"])
        AcceleratorState._reset_state(True)
        return losses[1] - losses[0]

    plain, elastic = rise(), rise(length_drop=0.4, layer_drop=0.2, sandwich=1)
    assert elastic < 0.7 * plain  # 0.11 and 0.27 nats
