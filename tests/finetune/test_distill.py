"""Distillation: the map of layers, the loss, a teacher that stays in evaluation mode, students of any width."""

import random
import shutil

import pytest
import torch
from torch.nn.functional import mse_loss

from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification, ElasticBertModel
from elastic_model.provenance import read_provenance
from finetune.__main__ import _command
from finetune.config import DistillOptions
from finetune.distill import (
    Distillation,
    add_projections,
    distill,
    exit_map,
    layer_map,
    load_teacher,
    make_student,
    shallower,
)
from finetune.labels import Labels
from finetune.recipe import Update


@pytest.fixture
def distilled(trained, tmp_path):
    """-> options(**changes): a short run from the trained checkpoint."""
    own = {name: getattr(trained, name) for name in ("dev", "text", "label", "max_length", "batch_size")}
    own |= {"model": trained.output, "output": str(tmp_path / "student"), "learning_rate": 1e-3, "epochs": 1}
    return lambda **changes: DistillOptions(**{**own, "train": trained.train, **changes})


@pytest.fixture
def batch():
    ids = torch.randint(5, 200, (3, 9), generator=torch.Generator().manual_seed(0))
    mask = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
    return {"input_ids": ids, "attention_mask": mask, "labels": torch.tensor([0, 1, 2])}


def update(options):
    return Update(0, random.Random(0), options)


def test_a_student_layer_stands_for_the_teachers_at_the_same_height():
    assert layer_map(6, 12) == {1: 2, 2: 4, 3: 6, 4: 8, 5: 10, 6: 12}  # the paper's 2i
    assert layer_map(4, 6) == {1: 2, 2: 3, 3: 5, 4: 6}
    assert layer_map(3, 3) == {1: 1, 2: 2, 3: 3}
    config = ElasticBertConfig(num_hidden_layers=6, exit_layers=[2, 5, 6])
    assert exit_map(4, config) == {1: 2, 3: 5, 4: 6}
    with pytest.raises(ValueError, match="student of 7 layers cannot learn from a teacher of 6"):
        layer_map(7, 6)


def test_a_shallower_student_starts_as_the_teachers_layers(tiny_model):
    student = shallower(tiny_model, 2, {"exit_layers": [1, 2]})
    ours, theirs = student.state_dict(), tiny_model.state_dict()
    for name in ("elasticbert.encoder.layer.{}.output.dense.weight", "elasticbert.encoder.pooler.{}.dense.weight"):
        for layer, other in ((0, 1), (1, 3)):
            assert torch.equal(ours[name.format(layer)], theirs[name.format(other)])
    assert torch.equal(ours["classifiers.1.weight"], theirs["classifiers.3.weight"])
    assert student.config.id2label == tiny_model.config.id2label


def test_a_shallower_student_pools_as_the_teachers_exits(tiny_config):
    tiny_config.exit_pooling = ["mean", "mean", "mean", "cls"]
    teacher = ElasticBertForSequenceClassification(tiny_config).eval()
    assert shallower(teacher, 2, {"exit_layers": [1, 2]}).config.exit_pooling == ["mean", "cls"]


def test_the_loss_is_soft_cross_entropy_and_squared_errors_of_real_tokens(tiny_model, batch, distilled):
    student = shallower(tiny_model, 2, {"exit_layers": [1, 2]})
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)))
    options = distilled(layers=2, temperature=2.0)
    objective = Distillation(tiny_model, student, {1: 2, 2: 4})
    found = next(objective(student, student.config, batch, update(options)))
    inputs = {name: one for name, one in batch.items() if name != "labels"}
    ours, theirs = (one(**inputs, output_hidden_states=True) for one in (student, tiny_model))
    real = batch["attention_mask"].bool()
    expected = sum(mse_loss(ours.hidden_states[at][real], theirs.hidden_states[at][real]) for at in (0, -1))
    for mine, other in ((0, 1), (1, 3)):
        soft = (theirs.exit_logits[other] / 2).softmax(-1)
        crossed = -(soft * (ours.exit_logits[mine] / 2).log_softmax(-1)).sum(-1).mean()
        entropy = -(soft * soft.log()).sum(-1).mean()
        expected = expected + 4 * (crossed - entropy)
    torch.testing.assert_close(found, expected)
    padded = {**batch, "input_ids": torch.where(real, batch["input_ids"], 7)}
    torch.testing.assert_close(next(objective(student, student.config, padded, update(options))), found)


def test_the_teacher_is_in_evaluation_mode_whatever_was_done_to_it(tiny_config, batch, distilled):
    tiny_config.hidden_dropout_prob = 0.5
    teacher = ElasticBertForSequenceClassification(tiny_config).train()
    student = shallower(teacher, 2, {"exit_layers": [2]}).eval()
    objective = Distillation(teacher, student, {2: 4})
    options = distilled(layers=2)
    first, second = (next(objective(student, student.config, batch, update(options))).item() for _ in range(2))
    assert first == second and not teacher.training
    next(objective(student, student.config, batch, update(options))).backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_a_student_is_not_replaced_by_what_it_becomes(distilled, trained, tmp_path):
    student = shutil.copytree(trained.output, tmp_path / "student")  # of ours: it would have been replaced
    with pytest.raises(ValueError, match=f"output {student} would replace {student}, which is read"):
        distill(distilled(student=str(student)))


def test_a_narrower_student_learns_through_projections(tiny_model, tiny_config, batch, distilled):
    config = ElasticBertConfig(
        **{**tiny_config.to_dict(), "hidden_size": 16, "num_hidden_layers": 2, "exit_layers": [2]}
    )
    student = ElasticBertForSequenceClassification(config)
    add_projections(student, tiny_model)
    objective = Distillation(tiny_model, student, {2: 4})
    next(objective(student, student.config, batch, update(distilled(layers=2)))).backward()
    assert student.projections["last"].weight.shape == (32, 16)
    assert all(parameter.grad is not None for parameter in student.projections.parameters())


def test_a_student_of_half_the_layers_answers_like_its_teacher(trained, distilled):
    assert distill(distilled(layers=2, epochs=3)) == 0
    student = ElasticBertForSequenceClassification.from_pretrained(distilled().output)
    assert (student.config.num_hidden_layers, student.exit_layers) == (2, [1, 2])
    stage = read_provenance(distilled().output)[-1]
    assert stage.stage == "distill" and stage.parent.name == "checkpoint"
    quality = {metric.exit_layer: metric.value for metric in stage.metrics if metric.metric == "accuracy"}
    assert quality[2] > 0.8


def test_another_checkpoint_as_the_student(distilled, tiny_tokenizer, tmp_path):
    sizes = {"hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32}
    ElasticBertModel(ElasticBertConfig(vocab_size=200, max_position_embeddings=64, **sizes)).save_pretrained(
        tmp_path / "small"
    )
    tiny_tokenizer.save_pretrained(tmp_path / "small")
    assert distill(distilled(student=str(tmp_path / "small"))) == 0
    student, loading = ElasticBertForSequenceClassification.from_pretrained(
        distilled().output, output_loading_info=True
    )
    assert student.exit_layers == [1, 2, 3] and not loading["unexpected_keys"] and not loading["missing_keys"]


def test_a_student_that_has_learned_the_task_keeps_what_it_knows(distilled, trained, tiny_tokenizer, tmp_path):
    """Of the same labels in another order it answered one for the other; a head of other labels was taken as it is."""
    model = ElasticBertForSequenceClassification.from_pretrained(trained.output).eval()
    names = [model.config.id2label[number] for number in range(3)]
    batch = tiny_tokenizer(["the treaty and the harvest", "Congress of energy"], padding=True, return_tensors="pt")
    expected = model(**batch, exit_policy={"name": "never"}).exit_logits
    for order, labels in (([1, 2, 0], [names[place] for place in (1, 2, 0)]), ([0, 1, 2], ["a", "b", "c"])):
        other = ElasticBertForSequenceClassification.from_pretrained(trained.output)
        for layer in other.exit_layers:
            head = other.head_at(layer)
            head.load_state_dict({name: value[order] for name, value in head.state_dict().items()})
        other.config.id2label = dict(enumerate(labels))
        other.config.label2id = {name: number for number, name in enumerate(labels)}
        other.save_pretrained(tmp_path / "student")
        tiny_tokenizer.save_pretrained(tmp_path / "student")
        options = distilled(student=str(tmp_path / "student"))
        student = make_student(
            options, Labels("single_label_classification", names, ("accuracy",)), load_teacher(options)
        )
        assert student.config.id2label == dict(enumerate(names))
        found = student.eval()(**batch, exit_policy={"name": "never"}).exit_logits
        pairs = list(zip(found, expected, strict=True))
        assert all(torch.allclose(*pair, atol=1e-6) for pair in pairs) == (labels != ["a", "b", "c"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give the student: --layers N"),
        (["--layers", "4"], "layers must be 1 to 3, fewer than the teacher's, got 4"),
        (["--layers", "2", "--distillation", "none"], "distillation none"),
        (["--layers", "2", "--exit_layers", "1"], r"must be some of \[1, 2\], the last one among them"),
        (["--student", "DEEP"], "student of 6 layers cannot learn from a teacher of 4"),
        (["--student", "BARE"], "bare has no tokenizer that loads"),
    ],
)
def test_bad_input_is_named_before_training(distilled, flags, message, tmp_path, tiny_tokenizer):
    ElasticBertModel(
        ElasticBertConfig(
            vocab_size=200, hidden_size=16, num_hidden_layers=6, num_attention_heads=2, intermediate_size=8
        )
    ).save_pretrained(tmp_path / "deep")
    tiny_tokenizer.save_pretrained(tmp_path / "deep")
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 8}
    ElasticBertModel(ElasticBertConfig(vocab_size=200, **sizes)).save_pretrained(tmp_path / "bare")
    places = {"DEEP": str(tmp_path / "deep"), "BARE": str(tmp_path / "bare")}
    flags = [places.get(flag, flag) for flag in flags]
    own = distilled()
    common = [f"--{name}={getattr(own, name)}" for name in ("model", "train", "dev", "text", "label", "output")]
    with pytest.raises(ValueError, match=message):
        _command(["distill", *common, "--max_length=32", "--batch_size=10", *flags])
    assert not (tmp_path / "student").exists() and not (tmp_path / "student.run").exists()


def test_a_teacher_of_other_labels_is_named(distilled, tmp_path):
    rows = "\n".join(
        ["text\tlabel", *(f"the people of {name}\t{name}" for name in ("north", "south") for _ in range(9))]
    )
    (tmp_path / "other.tsv").write_text(rows + "\n")
    other = str(tmp_path / "other.tsv")
    with pytest.raises(
        ValueError, match="classifier of other labels: .*early.*; a teacher must be a model of the same"
    ):
        distill(distilled(layers=2, train=other, dev=other))


def test_a_student_learns_the_exits_of_an_updates_group(tiny_model, batch, distilled):
    student = shallower(tiny_model, 3, {"exit_layers": [1, 2, 3], "exit_groups": 2})
    objective = Distillation(tiny_model, student, {1: 2, 2: 3, 3: 4})
    next(objective(student, student.config, batch, Update(1, random.Random(0), distilled(layers=3)))).backward()
    assert [bool(student.head_at(layer).weight.grad.any()) for layer in (1, 2, 3)] == [False, True, True]


def test_a_students_divergence_can_be_reversed(tiny_model, batch, distilled):
    student, found = shallower(tiny_model, 2, {"exit_layers": [1, 2]}), []
    objective = Distillation(tiny_model, student, {1: 2, 2: 4})
    for direction in ("forward", "reverse"):
        options = distilled(layers=2, distillation=direction)
        found.append(next(objective(student, student.config, batch, update(options))).item())
    assert found[0] != found[1]
