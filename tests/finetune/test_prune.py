"""Pruning: importance that does not depend on the order of batches, what is kept, a model that is really smaller."""

import json
from dataclasses import replace
from unittest.mock import Mock

import pytest
import torch
from accelerate import Accelerator

import finetune.train
from elastic_model import ElasticBertForSequenceClassification
from elastic_model.provenance import read_provenance
from finetune.__main__ import _command
from finetune.config import PruneOptions
from finetune.prune import (
    Kept,
    Widths,
    _probe,
    best,
    loss_without_labels,
    milliseconds_at,
    prepare_pruning,
    prune,
    schedule,
    target,
)
from finetune.train import train
from finetune.widths import gated, importance, loss_on_labels, narrowed


@pytest.fixture
def pruned(trained, tmp_path):
    """-> options(**changes): a short run from the trained checkpoint."""
    own = {name: getattr(trained, name) for name in ("dev", "text", "label", "max_length", "batch_size")}
    own |= {"model": trained.output, "output": str(tmp_path / "pruned"), "learning_rate": 1e-3, "epochs": 1}
    return lambda **changes: PruneOptions(**{**own, "train": trained.train, "importance_rows": 60, **changes})


@pytest.fixture
def batches():
    """Four batches of padded rows."""
    draw = torch.Generator().manual_seed(0)
    mask = (torch.arange(9) < torch.tensor([9, 6, 3])[:, None]).long()
    labels = torch.tensor([0, 1, 2])
    return [
        {"input_ids": torch.randint(5, 200, (3, 9), generator=draw), "attention_mask": mask, "labels": labels}
        for _ in range(4)
    ]


@pytest.mark.parametrize("loss", [loss_on_labels, loss_without_labels])
def test_importance_does_not_depend_on_the_order_of_batches(tiny_model, batches, loss):
    found = [importance(tiny_model, order, loss) for order in (batches, batches[::-1])]
    alone = [importance(tiny_model, [batch], loss) for batch in batches]
    for kind in (0, 1):
        for layer, score in enumerate(found[0][kind]):
            assert score.sum() > 0
            torch.testing.assert_close(score, found[1][kind][layer], rtol=1e-12, atol=0)
            torch.testing.assert_close(score, sum(one[kind][layer] for one in alone), rtol=1e-12, atol=0)


def test_importance_without_labels_does_not_read_labels(tiny_model, batches):
    others = [{**batch, "labels": torch.tensor([2, 0, 0])} for batch in batches]
    for one, other in zip(
        *(importance(tiny_model, rows, loss_without_labels)[1] for rows in (batches, others)), strict=True
    ):
        assert torch.equal(one, other)


def test_the_probes_squared_gradient_is_the_fisher_information():
    logits = torch.tensor([[0.3, -1.0, 0.8]], requires_grad=True)
    squares = torch.zeros(3)
    for seed in range(4000):
        probe = _probe(logits, "single_label_classification", None, torch.Generator().manual_seed(seed))
        squares += torch.autograd.grad(probe, logits)[0][0] ** 2 / 4000
    p = logits.detach().softmax(-1)[0]
    torch.testing.assert_close(squares, p * (1 - p), rtol=0.1, atol=0)  # Fisher of a softmax: diag(p) - p p'


def test_what_is_kept_is_the_best():
    scores = [torch.tensor([4.0, 1, 3, 2]), torch.tensor([1.0, 1, 1, 9])]
    assert best(scores, [2, 1], uneven=False) == [[0, 2], [3]]
    assert best(scores, [2, 2], uneven=True) == [[0, 2, 3], [3]]  # 9 of norm 9.2, then 4, 3, 2 of norm 5.5
    kept = best([torch.rand(18), torch.rand(16)], [8, 8], uneven=True, multiple_of=4)  # two fill no block
    assert sum(map(len, kept)) == 16 and all(len(one) % 4 == 0 and one for one in kept)
    assert best([torch.rand(5), torch.rand(3)], [4, 4], uneven=True, multiple_of=3) == [[0, 1, 2, 3, 4], [0, 1, 2]]


def test_rounds_fall_evenly_to_the_target():
    steps = schedule(Widths((12, 6), (1536, 768)), Widths((8, 6), (768, 768)), 4, 8)
    assert [step.heads for step in steps] == [(11, 6), (10, 6), (9, 6), (8, 6)]
    assert [step.neurons for step in steps] == [(1344, 768), (1152, 768), (960, 768), (768, 768)]
    assert schedule(Widths((4,), (64,)), Widths((4,), (32,)), 1, 1) == [Widths((4,), (32,))]
    assert len(schedule(Widths((2,), (8,)), Widths((1,), (8,)), 8, 1)) == 1


@pytest.mark.parametrize(
    ("changes", "heads", "neurons"),
    [
        ({"heads": 2}, (2, 1, 2, 2), (64, 20, 60, 64)),
        ({"heads": 3}, (3, 1, 2, 3), (64, 20, 60, 64)),
        ({"intermediate": 48, "multiple_of": 16}, (4, 1, 2, 3), (48, 16, 48, 48)),
        ({"intermediate": 48, "multiple_of": 16, "uneven": True}, (4, 1, 2, 3), 192),
        ({"heads": 2, "uneven": True}, 8, (64, 20, 60, 64)),
        ({"share": 0.8}, (3, 1, 2, 2), (51, 16, 48, 51)),
        ({"share": 0.8, "multiple_of": 8}, (3, 1, 2, 2), (48, 16, 48, 48)),
    ],
)
def test_layers_that_differ_are_pruned_each_from_its_own(pruned, tiny_model, changes, heads, neurons):
    """They were taken for the mean of all, rounded down: kinds that nobody had named were pruned too."""
    places = [[0, 1, 2, 3], [0], [1, 3], [0, 1, 2]], [list(range(size)) for size in (64, 20, 60, 64)]
    found = target(pruned(**changes), Widths.of(narrowed(tiny_model, *places).config))
    assert heads in (found.heads, sum(found.heads)) and neurons in (found.neurons, sum(found.neurons))


@torch.no_grad()
def test_the_pruned_model_is_the_masked_one_after_several_rounds(tiny_model, batches):
    first, then = ([[0, 1, 3]] * 4, [[*range(0, 64, 2)]] * 4), ([[1, 2]] * 4, [[*range(5, 30)]] * 4)
    kept = Kept.everything(tiny_model.config).of(*first).of(*then)
    assert kept.heads[0] == [1, 3] and kept.neurons[0][0] == 10
    gates = [
        [torch.zeros(count).index_fill(0, torch.tensor(one), 1.0) for one in places]
        for places, count in ((kept.heads, 4), (kept.neurons, 64))
    ]
    inputs = {name: one for name, one in batches[0].items() if name != "labels"}
    with gated(tiny_model, *gates):
        expected = tiny_model(**inputs)
    found = narrowed(narrowed(tiny_model, *first), *then)(**inputs)
    for ours, theirs in zip(found.exit_logits, expected.exit_logits, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)


def test_pruned_and_distilled_it_loads_and_exports(pruned, tmp_path):
    from export.config import ExportOptions
    from export.write import export_checkpoint

    options = pruned(heads=3, intermediate=40, rounds=3, uneven=True, multiple_of=8)
    assert prune(options) == 0
    model, loading = ElasticBertForSequenceClassification.from_pretrained(options.output, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    heads, neurons = model.config.num_attention_heads_per_layer, model.config.intermediate_size_per_layer
    assert sum(heads) == 12 and sum(neurons) == 160 and all(count % 8 == 0 for count in neurons)
    assert model.elasticbert.encoder.layer[0].intermediate.dense.weight.shape == (neurons[0], 32)
    result = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert [len(one) for one in result["kept"]["heads"]] == heads and len(result["rounds"]) == 3
    assert read_provenance(options.output)[-1].stage == "prune"
    assert {
        metric.value > 0.8 for metric in read_provenance(options.output)[-1].metrics if metric.exit_layer == 4
    } == {True}
    report = export_checkpoint(ExportOptions(tmp_path / "pruned", tmp_path / "artefact", files=["model_quint8_avx2"]))
    assert report["files"]["model"]


def test_without_distillation_the_weights_are_the_unpruned_ones(pruned, trained, tmp_path):
    assert prune(pruned(share=0.5, rounds=1, label_free=True, distill=False)) == 0
    kept = json.loads((tmp_path / "pruned" / "pruning.json").read_text())["kept"]
    original = ElasticBertForSequenceClassification.from_pretrained(trained.output)
    expected = narrowed(original, kept["heads"], kept["neurons"]).state_dict()
    found = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "pruned").state_dict()
    assert all(torch.equal(found[name], one) for name, one in expected.items())


def test_importance_is_measured_on_train(pruned, monkeypatch, tmp_path):
    """What dev chooses is reported on it: pruning by its rows would be, too."""
    seen = []

    def recorded(model, batches, loss):
        batches = list(batches)
        seen.extend(tuple(row.tolist()) for batch in batches for row in batch["input_ids"])
        return importance(model, batches, loss)

    monkeypatch.setattr("finetune.prune.importance", recorded)
    options = pruned(share=0.5, rounds=1, distill=False, importance_rows=None)
    run = prepare_pruning(options, Accelerator())[0]
    train, dev = ({tuple(row["input_ids"]) for row in run.splits[split].rows} for split in ("train", "dev"))
    assert prune(options) == 0
    found = {tuple(token for token in row if token) for row in seen}
    assert found == train and not dev <= train


def interrupted(monkeypatch, options):
    """Prune, and stop in the second update of what follows."""
    whole = finetune.train.backward

    def stopped(run, phase, engine, number):
        if number == 2:
            raise KeyboardInterrupt
        return whole(run, phase, engine, number)

    with monkeypatch.context() as patched:
        patched.setattr(finetune.train, "backward", stopped)
        with pytest.raises(KeyboardInterrupt):
            prune(options)


def test_a_resumed_run_keeps_the_widths_that_met_the_latency(pruned, monkeypatch, tmp_path):
    """Measured anew, a latency would ask for others."""
    monkeypatch.setattr("finetune.prune.milliseconds_at", lambda model, widths, tokens: widths.neurons[0] / 10)
    interrupted(monkeypatch, pruned(latency_ms=5.0, rounds=1, save_steps=1))
    monkeypatch.setattr("finetune.prune.milliseconds_at", lambda model, widths, tokens: widths.neurons[0] / 5)
    assert prune(pruned(latency_ms=5.0, rounds=1, save_steps=1, resume=True)) == 0
    result = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    model = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert model.config.intermediate_size_per_layer == result["target"]["neurons"]
    assert 25 < result["target"]["neurons"][0] <= 50


def test_a_run_begun_anew_and_killed_at_once_does_not_meet_the_state_before(pruned, monkeypatch, tmp_path):
    """Its notes told other widths than the state that it had not cleared yet: resuming ended in an error of shapes."""
    monkeypatch.setattr("finetune.prune.milliseconds_at", lambda model, widths, tokens: widths.neurons[0] / 10)
    interrupted(monkeypatch, pruned(latency_ms=5.0, rounds=1, save_steps=1))
    monkeypatch.setattr("finetune.prune.milliseconds_at", lambda model, widths, tokens: widths.neurons[0] / 5)
    with monkeypatch.context() as killed:
        killed.setattr("finetune.prune.run_to_the_end", Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prune(pruned(latency_ms=5.0, rounds=1, save_steps=1))
    assert prune(pruned(latency_ms=5.0, rounds=1, save_steps=1, resume=True)) == 0
    model = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert max(model.config.intermediate_size_per_layer) <= 25


def test_a_run_of_other_settings_is_named_before_it_is_pruned_again(pruned, monkeypatch, tmp_path):
    """All rounds were measured, and the notes of the run that was begun were replaced, before that was said."""
    interrupted(monkeypatch, pruned(heads=2, rounds=2, save_steps=1))
    notes = (tmp_path / "pruned.run" / "pruning.json").read_text()
    monkeypatch.setattr("finetune.prune.remove", Mock(side_effect=AssertionError))
    with pytest.raises(ValueError, match="holds a run with heads = 2, not 3"):
        prune(pruned(heads=3, rounds=2, save_steps=1, resume=True))
    assert (tmp_path / "pruned.run" / "pruning.json").read_text() == notes
    assert prune(pruned(heads=2, rounds=2, save_steps=1, resume=True)) == 0  # nothing is measured again
    found = json.loads((tmp_path / "pruned" / "pruning.json").read_text())
    assert found == json.loads(notes)


def test_a_run_begun_by_an_earlier_version_is_resumed(pruned, monkeypatch, tmp_path):
    """Its notes have the target as a number a layer."""
    interrupted(monkeypatch, pruned(heads=2, rounds=1, save_steps=1))
    file = tmp_path / "pruned.run" / "pruning.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "target": {"heads": 2, "neurons": 64}}))
    assert prune(pruned(heads=2, rounds=1, save_steps=1, resume=True)) == 0


def test_notes_of_an_interrupted_run_are_not_anothers(pruned, trained, monkeypatch, tmp_path):
    """A model that was fine-tuned into the output afterwards said that it had been pruned."""
    interrupted(monkeypatch, pruned(heads=2, save_steps=1))
    assert (tmp_path / "pruned.run" / "pruning.json").is_file()
    assert train(replace(trained, output=str(tmp_path / "pruned"), epochs=1)) == 0
    assert not (tmp_path / "pruned" / "pruning.json").exists() and (tmp_path / "pruned" / "metrics.jsonl").is_file()


def test_the_latency_of_a_model_whose_layers_differ(tiny_model):
    """Layers narrower than the mean were asked for heads that they have not."""
    uneven = narrowed(tiny_model, [[0, 1, 2, 3], [0], [1, 3], [0]], [list(range(size)) for size in (64, 8, 40, 16)])
    assert milliseconds_at(uneven, Widths((2, 1, 2, 1), (32, 8, 32, 16)), tokens=8) > 0


def test_a_latency_that_half_the_width_meets_is_met(pruned, monkeypatch, tmp_path):
    monkeypatch.setattr("finetune.prune.milliseconds_at", lambda model, widths, tokens: widths.neurons[0] / 10)
    assert prune(pruned(latency_ms=5.0, rounds=1, distill=False)) == 0
    model = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "pruned")
    assert model.config.num_attention_heads_per_layer == [3] * 4
    assert model.config.intermediate_size_per_layer == [48] * 4
    with pytest.raises(ValueError, match="with one head a layer a row of 32 tokens still takes"):
        prune(pruned(latency_ms=0.1))
    for wrong in (-1.0, 0.0, float("nan"), float("inf")):
        with pytest.raises(ValueError, match=f"latency_ms must be above 0, got {wrong:g}"):
            prune(pruned(latency_ms=wrong))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give one target"),
        (["--heads", "3", "--share", "0.5"], "give one target"),
        (
            ["--share", "0.99", "--multiple_of", "64"],
            "share 0.99 leaves all that the model has: 4 heads",
        ),
        (["--heads", "5"], "heads must be 1 to 4, what a layer of the model has at most, got 5"),
        (["--intermediate", "0"], "intermediate must be 1 to 64"),
        (["--intermediate", "30", "--multiple_of", "8"], "intermediate must be a multiple of multiple_of 8, got 30"),
        (["--heads", "4"], "the target leaves all that the model has: 4 heads and 64 FFN"),
        (["--share", "1"], "share must be above 0 and below 1"),
        (["--heads", "2", "--rounds", "0"], "rounds must be at least 1"),
        (["--heads", "2", "--distillation", "none"], "distillation none: there is nothing but the teacher's answers"),
        (["--heads", "2", "--distill=false", "--temperature=2"], "temperature 2.0 would do nothing: --distill false"),
    ],
)
def test_bad_input_is_named_before_training(pruned, flags, message, tmp_path):
    own = pruned()
    common = [f"--{name}={getattr(own, name)}" for name in ("model", "train", "dev", "text", "label", "output")]
    with pytest.raises(ValueError, match=message):
        _command(["prune", *common, "--max_length=32", "--batch_size=10", *flags])
    assert not (tmp_path / "pruned").exists() and not (tmp_path / "pruned.run").exists()


def test_layers_are_compared_by_scores_of_one_norm():
    scores = [torch.tensor([40.0, 10, 30, 20]), torch.tensor([9.0, 8, 1, 1])]
    assert best(scores, [2, 2], uneven=True) == [[0, 2], [0, 1]]


def test_batches_for_importance_are_of_all_lengths(pruned, monkeypatch):
    widths = []

    def recorded(model, batches, loss):
        batches = list(batches)
        widths.extend(batch["input_ids"].shape[1] for batch in batches)
        return importance(model, batches, loss)

    monkeypatch.setattr("finetune.prune.importance", recorded)
    prune(pruned(share=0.5, rounds=1, distill=False, importance_rows=20))
    assert len(widths) == 2 and widths[1] < widths[0] - 2


def test_the_probe_sees_real_tokens_and_every_exit(tiny_model, batches):
    logits, mask = torch.randn(1, 5, 3), torch.tensor([[True, True, True, False, False]])
    draws = [torch.Generator().manual_seed(0) for _ in range(2)]
    real = _probe(logits[:, :3], "token_classification", None, draws[0])
    torch.testing.assert_close(_probe(logits, "token_classification", mask, draws[1]), real)
    before = loss_without_labels(tiny_model, batches[0]).item()
    with torch.no_grad():
        tiny_model.classifiers.at(1).weight.mul_(5)
    assert loss_without_labels(tiny_model, batches[0]).item() != before


def test_importance_is_that_of_the_whole_model_without_dropout(tiny_model, batches):
    """Whatever mode it is in, and whatever lengths it answers with by default."""
    expected = importance(tiny_model, batches)
    for module in tiny_model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    tiny_model.train().config.length_config = [0.5, 0.4, 0.3, 0.3]
    for kind, found in zip(expected, importance(tiny_model, batches), strict=True):
        for one, other in zip(kind, found, strict=True):
            assert torch.equal(one, other)
    assert tiny_model.training
