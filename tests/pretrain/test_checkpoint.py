import json
import resource

import pytest
import torch

from elastic_model.distributed import Replicated, start_accelerator
from pretrain.checkpoint import (
    Checkpoint,
    check_same_run,
    checkpoint_to_resume,
    find_checkpoints,
    load_optimizer_tensors,
    load_weights,
    save_checkpoint,
)
from pretrain.prepare import prepare
from pretrain.train import build_model, build_optimizer


@pytest.fixture
def trained(options):
    """A model and an optimizer after two updates, and how to make their like."""
    config = options()
    tokenizer = prepare(config).tokenizer
    accelerator = start_accelerator(config.precision, config.tracker, config.output)

    def make(checkpoint=None):
        model = build_model(config, tokenizer, torch.zeros(len(tokenizer)))
        if checkpoint:
            load_weights(checkpoint, model)
        return Replicated(accelerator, model, build_optimizer(model, config), config.clip_norm)

    engine = make()
    for seed in range(2):
        generator = torch.Generator().manual_seed(seed)
        for parameter in engine.model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator)
        engine.step(rate=1e-2)
    return engine, tokenizer, make


def save(output, trained, step, keep=2):
    engine, tokenizer, _ = trained
    weights, optimizer = engine.weights(), engine.optimizer_tensors()
    return save_checkpoint(
        output, step, engine.model, tokenizer, weights, optimizer, {"progress": {"step": step}}, keep
    )


def test_weights_and_optimizer_come_back_exactly(trained, tmp_path):
    engine, _, make = trained
    checkpoint = Checkpoint(save(tmp_path, trained, 4), {})
    again = make(checkpoint)
    again.load_optimizer(load_optimizer_tensors(checkpoint))
    states = zip(engine.model.named_parameters(), again.model.named_parameters(), strict=True)
    for (name, one), (_, other) in states:
        assert torch.equal(one, other), name
        for key, value in engine.optimizer.state[one].items():
            assert torch.equal(value, again.optimizer.state[other][key]), (name, key)
    assert again.optimizer.state[other]["step"] == 2


def test_no_decay_on_biases_and_norms(trained):
    model, optimizer = trained[0].model, trained[0].optimizer
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
    assert checkpoint_to_resume(tmp_path, previous=False).state["step"] == 12
    assert checkpoint_to_resume(tmp_path, previous=True).state["step"] == 11
    save(tmp_path, trained, 11, keep=1)  # resumed before 12: what is written is not what is removed
    assert [path.name for path in find_checkpoints(tmp_path)] == ["checkpoint-11", "checkpoint-12"]


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.safetensors", "trainer_state.json"])
@pytest.mark.parametrize("damage", ["truncated", "flipped", "missing"])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used_on_request(trained, tmp_path, file, damage):
    for step in (4, 8):
        save(tmp_path, trained, step)
    path = tmp_path / "checkpoint-8" / file
    if damage == "missing":
        path.unlink()
    else:
        content = path.read_bytes()
        half = len(content) // 2
        path.write_bytes(content[:half] if damage == "truncated" else content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(ValueError, match="checkpoint-8 is damaged .*--resume-previous"):
        checkpoint_to_resume(tmp_path, previous=False)
    assert checkpoint_to_resume(tmp_path, previous=True).folder.name == "checkpoint-4"


def test_a_state_that_says_something_else_is_damage(trained, tmp_path):
    save(tmp_path, trained, 4)
    state = tmp_path / "checkpoint-4" / "trainer_state.json"
    state.write_text(state.read_text().replace('"step": 4', '"step": 5'))
    with pytest.raises(ValueError, match="checkpoint-4 is damaged .trainer_state.json: wrong sha256"):
        checkpoint_to_resume(tmp_path, previous=False)


def test_a_run_of_damaged_checkpoints_alone_does_not_begin_anew(trained, tmp_path):
    save(tmp_path, trained, 4)
    (tmp_path / "checkpoint-4" / "trainer_state.json").unlink()
    with pytest.raises(ValueError, match="checkpoint-4 is damaged"):
        checkpoint_to_resume(tmp_path, previous=False)


def test_there_must_be_one_before(trained, tmp_path):
    save(tmp_path, trained, 4)
    with pytest.raises(ValueError, match="holds 1 checkpoint"):
        checkpoint_to_resume(tmp_path, previous=True)


def test_what_differs_between_two_runs_is_named(tmp_path):
    sources = {"novels": {"text": "a" * 32, "weight": 1.0}, "reviews": {"text": "b" * 32, "weight": 2.0}}
    saved = {"options": {"steps": 10, "hidden_size": 16}, "sources": sources, "tokenizer": "b" * 64}
    checkpoint = Checkpoint(tmp_path, {"run": saved})
    check_same_run(checkpoint, json.loads(json.dumps(saved)))
    for change, named in (
        ({"options": {"steps": 10, "hidden_size": 32}}, "hidden_size was 16 in .*, now 32"),
        ({"sources": {**sources, "novels": {"text": "c" * 32, "weight": 1.0}}}, "text of source 'novels' is not the"),
        ({"sources": {**sources, "novels": {"text": "a" * 32, "weight": 3.0}}}, "of source 'novels' was 1.0 .* now 3"),
        ({"sources": {"novels": sources["novels"]}}, "the sources were novels, reviews in .*, now novels"),
        ({"tokenizer": "c" * 64}, "the tokenizer is not the one"),
    ):
        with pytest.raises(ValueError, match=named):
            check_same_run(checkpoint, {**saved, **change})


def test_a_full_disk_is_named_and_the_checkpoint_before_stays(trained, tmp_path):
    before = save(tmp_path, trained, 4)
    content = {path: path.read_bytes() for path in before.iterdir()}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))  # room for the small files, not for the weights
    try:
        with pytest.raises(OSError, match="checkpoint-8 could not be written: .*earlier checkpoints are intact"):
            save(tmp_path, trained, 8)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert list(tmp_path.iterdir()) == [before] and content == {path: path.read_bytes() for path in before.iterdir()}
