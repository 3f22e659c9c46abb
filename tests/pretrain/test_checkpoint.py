import json

import pytest
import torch

from pretrain.checkpoint import (
    check_same_run,
    checkpoint_to_resume,
    find_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from pretrain.prepare import prepare
from pretrain.train import build_model, build_optimizer


@pytest.fixture
def trained(options):
    """A model and an optimizer after two updates, and how to make their like."""
    config = options()
    tokenizer = prepare(config).tokenizer

    def make():
        model = build_model(config, tokenizer, torch.zeros(len(tokenizer)))
        return model, build_optimizer(model, config)

    model, optimizer = make()
    optimizer.param_groups[0]["lr"] = optimizer.param_groups[1]["lr"] = 1e-2
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        optimizer.step()
    return model, optimizer, tokenizer, make


def save(output, trained, step, keep=2):
    model, optimizer, tokenizer, _ = trained
    return save_checkpoint(output, step, model, optimizer, tokenizer, {"progress": {"step": step}}, keep)


def test_weights_and_optimizer_come_back_exactly(trained, tmp_path):
    model, optimizer, _, make = trained
    folder = save(tmp_path, trained, 4)
    again, its_optimizer = make()
    load_checkpoint(folder, again, its_optimizer)
    states = zip(model.named_parameters(), again.named_parameters(), strict=True)
    for (name, one), (_, other) in states:
        assert torch.equal(one, other), name
        for key, value in optimizer.state[one].items():
            assert torch.equal(value, its_optimizer.state[other][key]), (name, key)
    assert its_optimizer.state[other]["step"] == 2


def test_no_decay_on_biases_and_norms(trained):
    model, optimizer, _, _ = trained
    decayed, exempt = ({id(parameter) for parameter in group["params"]} for group in optimizer.param_groups)
    assert optimizer.param_groups[1]["weight_decay"] == 0 < optimizer.param_groups[0]["weight_decay"]
    for name, parameter in model.named_parameters():
        assert id(parameter) in (exempt if parameter.ndim == 1 else decayed), name


def test_the_newest_checkpoints_are_kept_in_the_order_of_their_steps(trained, tmp_path):
    for step in (2, 9, 10, 11):
        save(tmp_path, trained, step, keep=2)
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-10", "checkpoint-11"]
    (tmp_path / "checkpoint-3").mkdir()  # a removal that was cut off
    save(tmp_path, trained, 12, keep=3)
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoint-10", "checkpoint-11", "checkpoint-12"}
    save(tmp_path, trained, 11)
    assert checkpoint_to_resume(tmp_path, previous=False)[1]["step"] == 12
    assert checkpoint_to_resume(tmp_path, previous=True)[1]["step"] == 11


def test_an_unfinished_checkpoint_is_not_one(trained, tmp_path):
    (tmp_path / "checkpoint-9").mkdir()
    assert checkpoint_to_resume(tmp_path, previous=False) is None
    save(tmp_path, trained, 4)
    assert find_checkpoints(tmp_path) == [tmp_path / "checkpoint-4"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_on_request(trained, tmp_path, file, damage):
    for step in (4, 8):
        save(tmp_path, trained, step)
    path = tmp_path / "checkpoint-8" / file
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        del content[len(content) // 2 :]
    else:
        content[0 if file.endswith("json") else -1] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match="checkpoint-8 is damaged .*--resume-previous"):
        checkpoint_to_resume(tmp_path, previous=False)
    assert checkpoint_to_resume(tmp_path, previous=True)[0].name == "checkpoint-4"


def test_there_must_be_one_before(trained, tmp_path):
    save(tmp_path, trained, 4)
    with pytest.raises(ValueError, match="holds 1 checkpoint"):
        checkpoint_to_resume(tmp_path, previous=True)


def test_what_differs_between_two_runs_is_named(tmp_path):
    saved = {"options": {"steps": 10, "hidden_size": 16}, "text": "a" * 64, "tokenizer": "b" * 64}
    check_same_run(tmp_path, saved, json.loads(json.dumps(saved)))
    for change, named in (
        ({"options": {"steps": 10, "hidden_size": 32}}, "hidden_size was 16 in .*, now 32"),
        ({"text": "c" * 64}, "the text is not the one"),
        ({"tokenizer": "c" * 64}, "the tokenizer is not the one"),
    ):
        with pytest.raises(ValueError, match=named):
            check_same_run(tmp_path, saved, {**saved, **change})
