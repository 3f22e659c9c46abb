import importlib.util
import json
import math
import os
import random
import shutil
import signal
import time

import pytest
import torch
from accelerate import Accelerator
from safetensors.torch import load_file
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoTokenizer, BertConfig, BertModel

from elastic_model import ElasticBertConfig, ElasticBertForPreTraining, ElasticBertForSequenceClassification
from elastic_model.distributed import start_accelerator
from elastic_model.folders import is_ours
from export.write import patch_config
from pretrain.checkpoint import find_checkpoints
from pretrain.evaluate import Evaluation
from pretrain.metrics import Update, Window, peak_flops, update_flops
from pretrain.prepare import prepare
from pretrain.train import Run, build_model, build_optimizer, learning_rate, train


def weights(output):
    return load_file(output / "model.safetensors")


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def metrics(output):
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def in_a_child(config, until=None):
    """Train in a forked process; `until(pid)` may stop it. -> its exit code, or minus the signal that killed it."""
    pid = os.fork()
    if pid == 0:
        try:
            os._exit(train(config))
        finally:
            os._exit(99)
    if until:
        until(pid)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def test_a_run_leaves_a_checkpoint_that_transformers_reads(options):
    config = options(dropout=0.1)
    assert train(config) == 0
    output = config.output
    model = ElasticBertForPreTraining.from_pretrained(output)
    assert model.config.exit_layers == [1, 2] and model.config.exit_groups == 2
    tokenizer = AutoTokenizer.from_pretrained(output)
    assert tokenizer.model_max_length == 32 and len(tokenizer) == model.config.vocab_size
    _, report = ElasticBertForSequenceClassification.from_pretrained(output, num_labels=3, output_loading_info=True)
    assert all(name.startswith("classifiers.") for name in report["missing_keys"])
    assert is_ours(output) and (output / "losses.png").stat().st_size > 10_000
    assert [path.name for path in find_checkpoints(output)] == ["checkpoint-8", "checkpoint-12"]
    assert same(weights(output), weights(output / "checkpoint-12"))
    card = (output / "README.md").read_text()
    assert "mlm_loss" in card and "12 updates of 8 examples" in card and "0 updates skipped" in card


def test_the_log_tells_both_losses_of_every_exit(options):
    config = options()
    train(config)
    lines = metrics(config.output)
    training = [line for line in lines if "mlm_loss" in line]
    held_out = [line["held_out"] for line in lines if "held_out" in line]
    assert [line["step"] for line in training] == [3, 6, 9, 12] and len(held_out) == 2
    assert all(line["mlm_loss"].keys() == line["sop_loss"].keys() == {"1", "2"} for line in training)
    assert training[-1]["mlm_loss"]["2"] < training[0]["mlm_loss"]["2"]
    evaluation = json.loads((config.output / "evaluation.json").read_text())
    assert evaluation.pop("step") == 12 and evaluation == held_out[-1]
    assert all(0 <= accuracy <= 1 for accuracy in evaluation["sop_accuracy"].values())


def test_the_log_tells_accuracies_and_speed(options):
    config = options(peak_tflops=0.001, steps=6)
    train(config)
    (first, second) = [line for line in metrics(config.output) if "mlm_loss" in line]
    for line in (first, second):
        assert line.keys() == first.keys() and "distillation_loss" not in line
        assert all(0 <= value <= 1 for name in ("mlm_accuracy", "sop_accuracy") for value in line[name].values())
        assert line["tokens_per_second"] > 0 and line["peak_memory_gib"] > 0.01 and line["gradient_norm"] > 0
        share = line["model_tflops_per_second"] / line["model_flops_utilisation"]
        assert share == pytest.approx(0.001, rel=1e-2)
    assert second["tokens"] > first["tokens"]


def test_a_sandwich_is_in_the_log_and_in_the_parameters(options, tmp_path):
    plain, elastic = (
        options(output=tmp_path / name, steps=4, log_every=2, **flags)
        for name, flags in (("plain", {}), ("elastic", {"length_drop": 0.3, "layer_drop": 0.3, "sandwich": 1}))
    )
    for config in (plain, elastic):
        train(config)
    lines = [line for line in metrics(elastic.output) if "mlm_loss" in line]
    assert len(lines) == 2 and all(line["distillation_loss"] > 0 for line in lines)
    assert not same(weights(plain.output), weights(elastic.output))


def test_students_are_functions_of_seed_and_step(options):
    config = options(length_drop=0.2, num_hidden_layers=3, exit_groups=1)
    runs = [
        Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
        for _ in range(2)
    ]
    drawn = []
    for step in range(3):
        for run in runs:
            run.progress.step = step
        (exits, students), again = (run._subnetworks() for run in runs)
        assert (exits, students) == again and exits == [1, 2, 3] and len(students) == 1 + config.sandwich
        assert all(student["layer_config"] == [1, 2, 3] for student in students)  # no LayerDrop
        drawn.append(students[1])
    assert drawn[0] != drawn[1] != drawn[2]


def test_a_weighting_of_the_last_exit_computes_no_other(options):
    config = options(exit_loss="last", steps=3)
    train(config)
    (line,) = [line for line in metrics(config.output) if "mlm_loss" in line]
    assert list(line["mlm_loss"]) == ["2"]
    (evaluation,) = [line["held_out"] for line in metrics(config.output) if "held_out" in line]
    assert list(evaluation["mlm_loss"]) == ["1", "2"]


def test_model_flops_are_those_of_the_exits_computed(options):
    """Against the matrix products that PyTorch counts; attention in the form that it can count."""
    config = options(num_hidden_layers=4, short_probability=0.0, batch_size=4)
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    model = run.plain_model
    model.set_attn_implementation("eager")
    (batch,) = run.batches[0]
    rows, length = batch["input_ids"].shape
    real = int(batch["attention_mask"].sum())
    masked = int((batch["labels"] != -100).sum())
    for exits in ([4], [1, 3, 4]):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**batch, exits=exits, mlm_count=1, sop_count=1)
        expected = update_flops(model.config, rows, rows * length, masked, exits)
        assert expected == pytest.approx(3 * counter.get_total_flops(), rel=0.1)  # masked tokens a row are rounded
        assert update_flops(model.config, rows, real, masked, exits) <= expected
    students = [{"length_config": [0.5] * 4, "layer_config": [1, 2]}]
    one, both = (update_flops(model.config, rows, real, masked, [4], taught) for taught in ((), students))
    assert 1.2 < both / one < 1.9


def test_a_tracker_gets_the_numbers(options):
    pytest.importorskip("tensorboardX")
    config = options(tracker="tensorboard", steps=3)
    assert train(config) == 0
    events = b"".join(path.read_bytes() for path in config.output.rglob("events.out.tfevents*"))
    assert all(name in events for name in (b"mlm_loss/2", b"sop_accuracy/1", b"tokens_per_second"))


def test_a_tracker_that_is_not_there_is_named(options):
    missing = next(name for name in ("aim", "comet_ml", "clearml") if importlib.util.find_spec(name) is None)
    config = options(tracker=missing)
    with pytest.raises(ValueError, match=f"tracker '{missing}' is not installed"):
        train(config)
    assert not config.output.exists()


def test_training_learns_more_than_frequencies(options):
    config = options(steps=150, warmup_steps=10, hidden_size=32, exit_groups=1, learning_rate=1e-2, save_every=1000)
    train(config)
    evaluation = json.loads((config.output / "evaluation.json").read_text())
    losses = list(evaluation["mlm_loss"].values())
    assert losses[-1] < evaluation["unigram_loss"] - 0.3


def test_a_new_model_starts_at_the_unigram_distribution(options):
    config = options()
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    counts = run.train_examples.token_counts() + 1
    assert run.plain_model.predictions.decoder.bias.detach().exp().numpy() == pytest.approx(
        counts / counts.sum(), rel=1e-4
    )


@pytest.mark.parametrize("sandwich", [{}, {"length_drop": 0.2, "layer_drop": 0.2}], ids=["plain", "sandwich"])
def test_the_loss_of_an_update_does_not_depend_on_micro_batches(options, sandwich):
    """Sums are divided by the counts of the global batch: gradients agree however the batch is dealt out."""
    gradients = []
    for micro in (8, 4, 1):
        config = options(micro_batch_size=micro, dropout=0.0, exit_groups=1, **sandwich)
        run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
        batches = run.batches[0]
        masked, pairs, *_ = run._global_counts(batches)
        run._backward(batches, masked, pairs)
        gradients.append({name: parameter.grad.clone() for name, parameter in run.plain_model.named_parameters()})
    for name, gradient in gradients[0].items():
        for other in gradients[1:]:
            assert torch.allclose(gradient, other[name], atol=2e-6), name


def test_grouped_training_computes_the_groups_in_turn(options):
    config = options(num_hidden_layers=4, exit_groups=3, log_every=1, steps=4)
    train(config)
    computed = [list(line["mlm_loss"]) for line in metrics(config.output) if "mlm_loss" in line]
    assert computed == [["1", "4"], ["2", "4"], ["3", "4"], ["1", "4"]]


@pytest.mark.parametrize("workers", [0, 1])
def test_sigterm_saves_and_resume_is_bit_for_bit(options, tmp_path, workers):
    flags = {"dropout": 0.1, "workers": workers, "steps": 40, "save_every": 7}
    whole = options(**flags, output=tmp_path / "whole")
    train(whole)
    stopped = options(**flags, output=tmp_path / "stopped", resume=True)

    def stop_at_some_update(pid):
        _wait_for(lambda: (stopped.output / "metrics.jsonl").exists() and len(metrics(stopped.output)) >= 2)
        os.kill(pid, signal.SIGTERM)

    assert in_a_child(stopped, stop_at_some_update) == 143
    at = int(find_checkpoints(stopped.output)[-1].name.split("-")[1])
    assert 3 < at < 40 and not (stopped.output / "model.safetensors").exists()
    assert train(stopped) == 0
    assert same(weights(whole.output), weights(stopped.output))
    optimizers = (
        load_file(path / "checkpoint-40" / "optimizer.safetensors") for path in (whole.output, stopped.output)
    )
    assert same(*optimizers)
    assert [line["step"] for line in metrics(whole.output)] == [line["step"] for line in metrics(stopped.output)]


def _wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.005)


@pytest.mark.parametrize("kills", [3, pytest.param(20, marks=pytest.mark.slow)])
def test_killed_at_random_moments_it_ends_as_if_never_killed(options, tmp_path, kills):
    flags = {"dropout": 0.1, "steps": 30, "save_every": 1}
    whole = options(**flags, output=tmp_path / "whole")
    started = time.monotonic()
    train(whole)
    seconds = time.monotonic() - started
    killed = options(**flags, output=tmp_path / "killed", resume=True)
    generator = random.Random(kills)
    for _ in range(kills):

        def kill(pid):
            time.sleep(generator.uniform(0.1, 0.6) * seconds)
            os.kill(pid, signal.SIGKILL)

        assert in_a_child(killed, kill) in (-signal.SIGKILL, 0)
    assert train(killed) == 0
    assert same(weights(whole.output), weights(killed.output))
    assert not list(killed.output.glob(".*.new"))


def test_a_finished_run_ends_at_once(options):
    config = options()
    train(config)
    stamps = {path: path.stat().st_mtime_ns for path in config.output.rglob("*.safetensors")}
    assert train(options(resume=True)) == 0
    assert stamps == {path: path.stat().st_mtime_ns for path in config.output.rglob("*.safetensors")}


def test_a_finished_run_without_its_checkpoints_is_left_as_it_is(options):
    config = options()
    train(config)
    for folder in config.output.glob("checkpoint-*"):
        shutil.rmtree(folder)
    before = {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}
    assert train(options(resume=True)) == 0 == train(options(resume=True, hidden_size=32))
    assert before == {path: path.read_bytes() for path in config.output.rglob("*") if path.is_file()}


def test_a_finished_run_keeps_its_last_evaluation(options):
    config = options()
    train(config)
    before = (config.output / "metrics.jsonl").read_bytes()
    assert train(options(resume_previous=True)) == 0
    assert (config.output / "metrics.jsonl").read_bytes() == before


def test_a_resumed_run_has_the_shape_of_its_warm_start(options, tmp_path):
    for heads in (2, 4):
        train(options(output=tmp_path / f"heads-{heads}", num_attention_heads=heads, steps=2))
    train(options(init_from=tmp_path / "heads-2", steps=4))
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    with pytest.raises(ValueError, match="resume: the model's num_attention_heads was 2 in .*checkpoint-4, now 4"):
        train(options(init_from=tmp_path / "heads-4", steps=4, resume=True))
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}


def test_new_heads_of_a_warm_start_have_the_deviation_asked_for(options, tmp_path):
    train(options(output=tmp_path / "first", steps=2, initializer_range=0.05))
    config = options(init_from=tmp_path / "first")
    tokenizer = prepare(config).tokenizer
    assert build_model(config, tokenizer, torch.zeros(len(tokenizer))).config.initializer_range == 0.05
    config = options(init_from=tmp_path / "first", initializer_range=0.5, max_length=32, max_position_embeddings=16)
    assert build_model(config, tokenizer, torch.zeros(len(tokenizer))).config.initializer_range == 0.5


def test_a_loss_that_is_not_finite_is_skipped_and_counted(options):
    config = options(max_skipped=3)
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    run.update(run.batches[0])
    before = {name: parameter.clone() for name, parameter in run.plain_model.named_parameters()}
    broken = run.plain_model.elasticbert.embeddings.LayerNorm.bias
    value = broken.detach().clone()
    broken.data.fill_(math.inf)
    run.update(run.batches[1])
    broken.data.copy_(value)
    assert (run.progress.skipped, run.progress.step) == (1, 2)
    assert all(torch.equal(parameter, before[name]) for name, parameter in run.plain_model.named_parameters())
    run.update(run.batches[2])
    assert run.progress.skipped_in_a_row == 0 and run.progress.skipped == 1
    broken.data.fill_(math.nan)
    with pytest.raises(ValueError, match="not finite in 3 updates in a row, up to update 6; start in another output"):
        for step in range(3, 6):
            run.update(run.batches[step])


def test_mixed_precision_keeps_float32_weights(options):
    config = options(precision="bf16", steps=3)
    assert train(config) == 0
    assert all(value.dtype == torch.float32 and value.isfinite().all() for value in weights(config.output).values())


def test_learning_rate_warms_up_and_decays(options):
    rates = {
        schedule: [
            learning_rate(step, options(steps=10, warmup_steps=4, learning_rate=1.0, schedule=schedule))
            for step in range(10)
        ]
        for schedule in ("linear", "cosine", "constant")
    }
    assert all(values[:5] == [0.25, 0.5, 0.75, 1.0, 1.0] for values in rates.values())
    assert rates["linear"][5:] == pytest.approx([5 / 6, 4 / 6, 3 / 6, 2 / 6, 1 / 6])
    assert rates["cosine"][7] == pytest.approx(0.5) and rates["constant"][9] == 1.0


def test_biases_and_norms_are_not_decayed(options):
    config = options(weight_decay=0.1)
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    names = {parameter: name for name, parameter in run.plain_model.named_parameters()}
    optimizer = build_optimizer(run.plain_model, config)
    decayed, exempt = ([names[one] for one in group["params"]] for group in optimizer.param_groups)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    assert len(decayed) + len(exempt) == len(names) == len({*decayed, *exempt})
    assert all(name.endswith("bias") or "LayerNorm" in name for name in exempt)
    assert not any(name.endswith("bias") or "LayerNorm" in name for name in decayed)


def test_gradients_are_clipped_to_the_norm_asked_for(options):
    """With plain descent in place of AdamW, the step is the rate times the clipped gradient."""
    config = options(clip_norm=0.01, dropout=0.0)
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    before = {name: parameter.detach().clone() for name, parameter in run.plain_model.named_parameters()}
    run.engine.optimizer = torch.optim.SGD(run.plain_model.parameters(), lr=0.0)
    run.update(run.batches[0])
    steps = [parameter.detach() - before[name] for name, parameter in run.plain_model.named_parameters()]
    moved = torch.stack([step.norm() for step in steps]).norm()
    assert run.norm > 1 and moved.item() == pytest.approx(0.01 * learning_rate(0, config), rel=1e-2)


def test_a_warm_start_leaves_the_operating_point_behind(options, tmp_path):
    """Its lengths stayed: what taught the sub-networks, as the full model, dropped tokens."""
    train(options(output=tmp_path / "first", steps=1))
    patch_config(
        tmp_path / "first", {"length_config": [0.5, 0.2], "exit_policy": {"name": "entropy", "threshold": 0.3}}
    )
    config = options(init_from=tmp_path / "first")
    model = Run(
        config, start_accelerator(config.precision, config.tracker, config.output), prepare(config)
    ).plain_model
    assert model.config.length_config is None and model.config.exit_policy is None


def test_a_warm_start_from_a_model_of_one_token_type(options, tmp_path):
    train(options(output=tmp_path / "first", steps=1))
    old = ElasticBertForPreTraining.from_pretrained(tmp_path / "first")
    settings = {**old.config.to_dict(), "type_vocab_size": 1}
    ElasticBertForPreTraining(ElasticBertConfig.from_dict(settings)).save_pretrained(tmp_path / "first")
    train(options(init_from=tmp_path / "first", steps=2))
    assert weights(tmp_path / "run")


def test_a_warm_start_in_half_precision_is_trained_in_float32(options, tmp_path):
    """Parameters and moments were half, and the run could not be resumed."""
    train(options(output=tmp_path / "first", steps=1))
    ElasticBertForPreTraining.from_pretrained(tmp_path / "first").bfloat16().save_pretrained(tmp_path / "first")
    config = options(init_from=tmp_path / "first", steps=4)
    model = Run(
        config, start_accelerator(config.precision, config.tracker, config.output), prepare(config)
    ).plain_model
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


def test_a_warm_start_with_more_tokens_than_embeddings_is_named(options, tmp_path):
    train(options(output=tmp_path / "first", steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "first")
    tokenizer.add_tokens(["<unheard>"])
    tokenizer.save_pretrained(tmp_path / "first")
    config = options(init_from=tmp_path / "first", cache=tmp_path / "cache")
    with pytest.raises(
        ValueError, match="tokenizer of .*first has 161 tokens, its model 160; call model.resize_token"
    ):
        train(config)


def test_a_run_is_not_put_into_a_checkpoint(options, tmp_path):
    """A release or an export has no log that would say what it is: its weights were replaced."""
    train(options(output=tmp_path / "first", steps=1))
    (tmp_path / "first" / "data.json").unlink()  # as of a checkpoint that was fine-tuned, which has a log, too
    before = (tmp_path / "first" / "model.safetensors").read_bytes()
    with pytest.raises(ValueError, match="output .*first is a checkpoint; choose another output"):
        train(options(output=tmp_path / "first"))
    assert (tmp_path / "first" / "model.safetensors").read_bytes() == before


def test_an_evaluation_takes_its_own_time_alone_from_the_speed(options, monkeypatch):
    """The window of the log began anew with it: tokens of updates before it were counted without their time."""
    config = options(evaluate_every=5, log_every=6, steps=6)
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    run.update(run.batches[0])
    clock = iter([100.0, 107.0])
    monkeypatch.setattr("pretrain.train.time.perf_counter", lambda: next(clock))
    monkeypatch.setattr("pretrain.train.evaluate", lambda *given: Evaluation({}, {}, {}, {}, 0.0, 0, 0, 0))
    monkeypatch.setattr(run, "_write", lambda line: None)
    run.window.started = 60.0
    run.evaluate()
    assert run.window.started == 67.0


def test_a_warm_start_takes_shape_weights_and_tokenizer(options, tmp_path):
    first = options(output=tmp_path / "first")
    train(first)
    second = options(output=tmp_path / "second", init_from=first.output, steps=3, learning_rate=1e-9, hidden_size=64)
    train(second)
    assert weights(second.output).keys() == weights(first.output).keys()
    assert all(
        torch.allclose(value, weights(second.output)[name], atol=1e-6) for name, value in weights(first.output).items()
    )


def test_means_of_a_window_are_over_the_updates_that_computed_an_exit():
    window = Window()
    for exits in ([1, 3], [2, 3]):
        window.add(Update(exits, [], torch.ones(2, 4), torch.tensor(3.0)), tokens=1, pairs=1, flops=1.0)
    means = window.means(Accelerator())
    assert means["mlm_loss"] == {1: 1.0, 2: 1.0, 3: 1.0} and means["distillation_loss"] == 3.0
    assert peak_flops(2.0, "fp32", 4) == 8e12


def test_dropout_is_that_of_seed_and_step(options):
    """Drawn anew at every update, and by the seed: a resumed run draws what the first would have."""

    def losses(seed, step):
        config = options(dropout=0.3, exit_groups=1, seed=seed)
        torch.manual_seed(7)
        run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(options()))
        run.plain_model.load_state_dict(start)
        run.progress.step = step
        return run._backward(batches, *run._global_counts(batches)[:2]).per_exit.tolist()

    config = options(dropout=0.3, exit_groups=1)
    first = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    batches = first.batches[0]
    start = {name: value.clone() for name, value in first.plain_model.state_dict().items()}
    assert losses(0, 0) == losses(0, 0) and losses(0, 0) != losses(0, 1) and losses(0, 0) != losses(1, 0)


def test_a_batch_without_pairs_learns_its_tokens(options):
    """A mean over no pair at all was NaN, and its update skipped; its tokens were seen all the same."""
    config = options(exit_groups=1)
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    batches = [{**batch, "sentence_order_label": batch["sentence_order_label"] * 0 - 100} for batch in run.batches[0]]
    assert run._backward(batches, *run._global_counts(batches)[:2]).per_exit.isfinite().all()
    run.update(batches)
    assert run.progress.skipped == 0 and math.isfinite(run.norm) and run.norm > 0
    tokens = run.progress.tokens
    run.plain_model.elasticbert.embeddings.LayerNorm.bias.data.fill_(math.nan)
    run.update(run.batches[1])
    seen = sum(int(batch["attention_mask"].sum()) for batch in run.batches[1])
    assert run.progress.skipped == 1 and run.progress.tokens == tokens + seen


def test_the_optimizer_is_berts(options):
    config = options(adam_beta2=0.97, weight_decay=0.02)
    model = ElasticBertForPreTraining(ElasticBertConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1))
    for group in build_optimizer(model, config).param_groups:
        assert (group["betas"], group["eps"]) == ((0.9, 0.97), 1e-6)


def test_new_exits_of_a_warm_start_read_the_mean_and_a_new_decoder_begins_at_the_unigrams(options, tmp_path):
    """Of an encoder without a head for masked tokens."""
    first = options(output=tmp_path / "first")
    train(first)
    stock = BertModel(
        BertConfig(vocab_size=160, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=64,
                   max_position_embeddings=32)
    )  # fmt: skip
    stock.save_pretrained(tmp_path / "stock")
    AutoTokenizer.from_pretrained(first.output).save_pretrained(tmp_path / "stock")
    config = options(output=tmp_path / "second", init_from=tmp_path / "stock")
    run = Run(config, start_accelerator(config.precision, config.tracker, config.output), prepare(config))
    counts = run.train_examples.token_counts() + 1
    decoder = run.plain_model.predictions.decoder.bias.detach().exp().numpy()[: len(counts)]
    assert decoder == pytest.approx(counts / counts.sum(), rel=1e-4)
    assert run.plain_model.config.exit_pooling == ["mean", "cls"]
