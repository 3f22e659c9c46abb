"""Search: configurations never rise, what they share changes no answer, a kill changes no result."""

import itertools
import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch

from elastic_model import (
    ElasticBertConfig,
    ElasticBertForQuestionAnswering,
    ElasticBertForSequenceClassification,
    ElasticBertForTokenClassification,
)
from elastic_model.arguments import dispatch, run
from elastic_model.checks import check_length_config
from elastic_model.cost import mean_flops
from elastic_model.folders import MARKER
from elastic_model.operating_points import OperatingPoint, OperatingPoints, checkpoint_hash
from elastic_model.session import ElasticSession
from export.__main__ import COMMANDS
from export.write import patch_config
from finetune.by_row import by_row, explore_batch_by_row, explore_by_row, fit_share
from finetune.candidates import STEPS, constant_ratio, crossover, initial, mutate, offspring, shares
from finetune.config import EvaluateOptions, SearchOptions
from finetune.evaluate import evaluate
from finetune.evolution import JOURNAL, Found, next_generation, read_journal
from finetune.examples import read_examples
from finetune.explore import explore, explore_batch, explore_graph
from finetune.prepare import chosen_task
from finetune.search import RESULT, guaranteed, load_served, named_as_measured, prepare, search


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


def test_a_points_name_is_what_was_measured():
    """Those of the searched rows stood in the names: speedup-1.83 was slower than full depth."""
    costs = {"full": 12.0, "speedup-1.90": 6.0, "speedup-2.00": 6.0, "lossless": 5.0, "speedup-4.10": 3.0}
    costs |= {"speedup-4.10-by-row": 2.9, "lossless-by-row": 5.0}
    points = [OperatingPoint(name, [0.5], 1.0, flops=flops) for name, flops in costs.items()]
    names = ["full", "speedup-2.00", "speedup-2.00#2", "lossless", "speedup-4.00", "speedup-4.00-by-row"]
    assert [point.name for point in named_as_measured(points)] == [*names, "lossless-by-row"]
    timed = [replace(point, latency_ms={"value": 2.0 if point.name == "full" else 1.0}) for point in points[::4]]
    assert [point.name for point in named_as_measured(timed)] == ["full", "speedup-2.00"]


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
    "mean tokens below": (ElasticBertForSequenceClassification, {"exit_pooling": ["mean"] * 3 + ["cls"]}),
    "mean tokens": (ElasticBertForSequenceClassification, {"exit_pooling": "mean"}),
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
    with torch.autocast("cpu", torch.bfloat16):
        rough = explore_batch(model, batch, [(STEPS,) * 4, (20, 20, 9, 9)])
    assert all(0 < (logits.float() - found[one][0]).abs().mean() < 0.1 for one, (logits, _) in rough.items())
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


@pytest.mark.parametrize("kind", MODELS)
def test_rows_that_choose_their_lengths_answer_as_in_the_model(kind):
    torch.manual_seed(0)
    model_class, overrides = MODELS[kind]
    sizes = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = ElasticBertConfig(**sizes, intermediate_size=48, num_labels=3, initializer_range=0.3, **overrides)
    model, lengths = model_class(config).eval(), {"mass": [0.9, 1.0, 0.8, 0.7]}
    mask = torch.arange(17)[None] < torch.tensor([17, 9, 12, 3, 1])[:, None]
    batch = {"input_ids": torch.randint(1, 60, (5, 17)) * mask, "attention_mask": mask.long()}
    (logits, _), kept = explore_batch_by_row(model, batch, lengths)
    assert kept.shape == (4, 5) and (kept[0] == kept[1]).all() and (kept.diff(dim=0) <= 0).all()
    with torch.no_grad():
        output = model(**batch, length_config=lengths, exit_policy={"name": "never"})
    plain = output.get("exit_logits")
    if plain is None:
        pairs = zip(output.exit_start_logits, output.exit_end_logits, strict=True)
        plain = tuple(torch.stack(pair, -1) for pair in pairs)
    torch.testing.assert_close(logits, torch.stack(plain), atol=1e-5, rtol=0, equal_nan=True)


@pytest.fixture
def checkpoint(tiny_config, tiny_tokenizer, tmp_path):
    """A classifier of random weights, large ones: it answers otherwise at every exit and length."""
    torch.manual_seed(0)
    tiny_config.initializer_range = 0.3
    ElasticBertForSequenceClassification(tiny_config).save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    return tmp_path / "checkpoint"


def options_of(checkpoint, small_task, output, **changes):
    own = {"dev": str(small_task / "more.tsv"), "text": "text", "label": "label", "max_length": 32, "rows": 40}
    small = {"iterations": 2, "mutations": 5, "crossovers": 5, "first": 5, "halving": 2}
    return SearchOptions(**{"model": str(checkpoint), "output": str(output), **own, **small, **changes})


def result_of(output):
    """What a search found, without what it took."""
    result = json.loads((output / RESULT).read_text())
    return {**result, "iterations": [{**one, "seconds": 0} for one in result["iterations"]]}


def test_a_search_from_end_to_end(checkpoint, small_task, tmp_path, capsys):
    search(options_of(checkpoint, small_task, tmp_path / "whole"))
    result, points = result_of(tmp_path / "whole"), OperatingPoints.load(checkpoint)
    areas = [one["area"] for one in result["iterations"]]
    assert areas == sorted(areas) and areas[0] < areas[-1] <= 1 and len(areas) == 3
    assert all((tmp_path / "whole" / f"{name}.png").stat().st_size for name in ("front", "area", "points"))
    lines = (tmp_path / "whole" / JOURNAL).read_text().splitlines()
    tried = [tuple(json.loads(line)["lengths"]) for line in lines[1:]]
    assert len(set(tried)) == len(tried) == result["iterations"][-1]["configurations"] >= 15
    whole = {tuple(one["lengths"]) for line in lines[1:] if len((one := json.loads(line))["rungs"]) == 2}
    assert len(whole) == result["iterations"][-1]["on_all_rows"] < len(tried)  # the others stopped half way
    assert {tuple(one["lengths"]) for one in result["front"]} <= whole and set(tried[:5]) <= whole
    full, best, lossless = (result[name] for name in ("full", "best", "lossless"))
    assert best["quality"] == max(one["quality"] for one in result["front"]) and lossless["cost"] <= full["cost"]
    assert lossless["quality"] >= full["quality"] and points.full().padded_flops == full["padded_flops"]
    policy, lengths = points.at(max_drop=100)
    model = ElasticBertForSequenceClassification.from_pretrained(checkpoint).eval()
    left = model(torch.tensor([[2, 9, 8, 7, 3]]), exit_policy=policy, length_config=lengths).exit_layers
    assert left.item() in model.exit_layers and points.at("full").mean_exit_layer == 4
    assert {"full", "best"} <= {one.name for one in points.points} and "speed-up" in capsys.readouterr().out

    torn = tmp_path / "killed"
    shutil.copytree(tmp_path / "whole", torn)
    (torn / JOURNAL).write_text("\n".join(lines[:9]) + "\n" + lines[9][:40])
    search(options_of(checkpoint, small_task, torn, resume=True))
    assert result_of(torn) == result and (torn / JOURNAL).read_text().splitlines()[:9] == lines[:9]
    with pytest.raises(ValueError, match="holds a search with mutations = 5, not 6"):
        search(options_of(checkpoint, small_task, torn, resume=True, mutations=6))


def test_rows_seen_in_parts_answer_as_seen_at_once(checkpoint, small_task, tmp_path):
    work, every = prepare(options_of(checkpoint, small_task, tmp_path / "out", rows=64))
    assert [len(rung) for rung in work.rungs] == [16, 32, 64] and len(every) == 240
    assert all(rung.rows == work.encoded.rows[: len(rung)] for rung in work.rungs)
    lengths, how = (20, 12, 9, 9), (work.model, work.encoded, work.tokenizer, 8)
    (whole,), first, rest = (explore(*how, [lengths], some).values() for some in (None, range(20), range(20, 64)))
    parts = next(iter(first)).followed_by(*rest)
    np.testing.assert_allclose(parts.logits, whole.logits, atol=1e-5)


def test_rows_choose_their_lengths_at_the_cost_of_searched_ones(checkpoint, small_task, tmp_path, capsys):
    options = options_of(checkpoint, small_task, tmp_path / "out", by_row=True, iterations=1)
    search(options)
    points = OperatingPoints.load(checkpoint)
    own = {one.name: one for one in points.points if isinstance(one.length_config, dict)}
    dropping = {one.name for one in points.points if one.name not in own and one.length_config[-1] < 1}
    assert own and set(own) == {f"{name}-by-row" for name in dropping} and "mass" in capsys.readouterr().out
    work, _ = prepare(options)
    how = (work.model, work.encoded, work.tokenizer, 8)
    _, kept = explore_by_row(*how, by_row(work.model, 0.8))
    cost = mean_flops(work.model.config, work.encoded.lengths[:40], head=work.encoded.head, kept=kept)
    assert 0.8 - 1 / 256 <= fit_share(*how, cost, {}) <= 0.8 + 1 / 256
    with pytest.raises(ValueError, match="rows that choose their own lengths cost at least"):
        fit_share(*how, 1.0, {})

    policy, lengths = points.at(next(iter(own)))
    model = ElasticBertForSequenceClassification.from_pretrained(checkpoint, length_config=lengths)
    model.save_pretrained(checkpoint)
    data = {"dev": options.dev, "text": "text", "label": "label", "split": "dev", "max_length": 32}
    evaluate(EvaluateOptions(model=str(checkpoint), **data))
    assert "MFLOPs a row" in capsys.readouterr().out
    assert not run(lambda: dispatch(COMMANDS, [str(checkpoint), str(tmp_path / "exported")], "export"))
    session = ElasticSession.from_pretrained(tmp_path / "exported", "model")
    texts = read_examples(chosen_task(options), "dev").texts
    for name, point in own.items():  # as PyTorch measured it
        answers = session(texts, budget=name, cost=True)
        assert np.mean([one["exit_layer"] for one in answers]) == pytest.approx(point.mean_exit_layer, abs=0.02)
        assert np.mean([one["flops"] for one in answers]) == pytest.approx(point.flops, rel=0.01)


def test_no_subset_has_one_class_only(checkpoint, tmp_path):
    rows = ["text\tlabel", *["the treaty\tearly"] * 70, "army ships\tmiddle"]
    (tmp_path / "more.tsv").write_text("\n".join(rows) + "\n")
    work, _ = prepare(options_of(checkpoint, tmp_path, tmp_path / "out", rows=71))
    assert all(len(set(rung.labels.tolist())) == 2 for rung in work.rungs)


def test_one_axis_alone_is_searched_alone(checkpoint, small_task, tmp_path):
    search(options_of(checkpoint, small_task, tmp_path / "lengths", axes="lengths"))
    search(options_of(checkpoint, small_task, tmp_path / "exits", axes="exits"))
    lengths, exits = (result_of(tmp_path / axes) for axes in ("lengths", "exits"))
    assert {one["mean_exit_layer"] for one in lengths["front"]} == {4.0}
    assert {tuple(one["lengths"]) for one in exits["front"]} == {(STEPS,) * 4} and len(exits["front"]) > 1


def test_a_damaged_journal_is_named(tmp_path):
    (tmp_path / JOURNAL).write_text('{"seed": 0}\n{"lengths"\n{}\n')
    with pytest.raises(ValueError, match="line 2: damaged"):
        read_journal(tmp_path, {"seed": 0})


def test_latency_as_the_cost(checkpoint, small_task, tmp_path):
    run(lambda: dispatch(COMMANDS, [str(checkpoint), str(tmp_path / "exported")], "export"))
    options = options_of(checkpoint, small_task, tmp_path / "out", latency=str(tmp_path / "exported"), latency_rows=8)
    search(options)
    for folder in (checkpoint, tmp_path / "exported"):
        points = OperatingPoints.load(folder)
        assert all(one.latency_ms["value"] > 0 and one.latency_ms["batch"] == 1 for one in points.points)
    promised = replace(points.points[1], name="calibrated", calibration={"at_most": 0.1})  # of what is served
    replace(points, points=[*points.points, promised]).save(tmp_path / "exported")
    search(replace(options, iterations=0))
    kept = [OperatingPoints.load(folder) for folder in (checkpoint, tmp_path / "exported")]
    assert [[one.name for one in table.points if one.calibration] for table in kept] == [[], ["calibrated"]]
    slowest = max(one.latency_ms["value"] for one in points.points)
    assert points.at(latency_ms=slowest) and result_of(tmp_path / "out")["latency"]["batch"] == 1
    with pytest.raises(ValueError, match="is not an export of"):
        model = ElasticBertForSequenceClassification.from_pretrained(checkpoint)
        torch.nn.init.zeros_(model.classifiers.at(4).weight)
        (checkpoint / "operating_points.json").unlink()
        model.save_pretrained(checkpoint)
        search(options)


def test_answers_of_the_exported_graph_can_be_searched(checkpoint, small_task, tmp_path, capsys):
    exported = tmp_path / "exported"
    assert not run(lambda: dispatch(COMMANDS, [str(checkpoint), str(exported)], "export"))
    options = options_of(checkpoint, small_task, tmp_path / "out", graph=str(exported), iterations=1)
    work, _ = prepare(options)
    session, configurations = ElasticSession.from_pretrained(exported, "model"), [(20, 12, 9, 9), (20,) * 4]
    ours = explore(work.model, work.encoded, work.tokenizer, 8, configurations, range(3, 30))
    theirs = explore_graph(session, work.encoded, 8, configurations, range(3, 30))
    for one in configurations:
        np.testing.assert_allclose(theirs[one].logits, ours[one].logits, atol=1e-4)
    search(options)
    served = work.graph.exit_logits(work.examples.texts)[-1].argmax(1)  # of the int8 file
    assert result_of(tmp_path / "out")["full"]["quality"] == (served == work.encoded.labels).mean()
    assert OperatingPoints.load(exported) == OperatingPoints.load(checkpoint)
    assert str(exported / "operating_points.json") in capsys.readouterr().out
    with pytest.raises(ValueError, match="holds a search with graph = "):
        search(replace(options, graph=None, resume=True))
    with pytest.raises(ValueError, match="PyTorch's costs: leave it or --graph away"):
        search(replace(options, by_row=True))
    with pytest.raises(ValueError, match="precision bf16 would do nothing: the exported file computes as it was"):
        search(replace(options, precision="bf16"))


def test_timing_without_a_file_to_time_is_refused(checkpoint, small_task, tmp_path):
    with pytest.raises(ValueError, match="latency_rows 5 would do nothing: no --latency is given"):
        search(options_of(checkpoint, small_task, tmp_path / "out", latency_rows=5))


def test_a_file_that_stops_early_is_searched_to_its_last_exit(checkpoint, small_task, tmp_path):
    """Its exits above the default said NaN, whose argmax was the first class."""
    patch_config(checkpoint, {"exit_policy": {"name": "constant", "layer": 2}})
    exported = tmp_path / "exported"
    assert not run(lambda: dispatch(COMMANDS, [str(checkpoint), str(exported)], "export"))
    search(options_of(checkpoint, small_task, tmp_path / "out", graph=str(exported), iterations=0))
    work, _ = prepare(options_of(checkpoint, small_task, tmp_path / "out", graph=str(exported)))
    served = work.graph.exit_logits(work.examples.texts)[-1].argmax(1)
    assert result_of(tmp_path / "out")["full"]["quality"] == (served == work.encoded.labels).mean()


def test_the_split_that_is_asked_for_is_searched(checkpoint, small_task, tmp_path):
    rows = {split: str(small_task / f"{split}.tsv") for split in ("train", "dev", "test")}
    for split in rows:
        work, every = prepare(options_of(checkpoint, small_task, tmp_path / "out", **rows, split=split))
        texts = [line.split("\t")[0] for line in (small_task / f"{split}.tsv").read_text().splitlines()[1:]]
        assert len(every) == len(texts) and set(work.examples.texts) <= set(texts)


def test_rows_are_known_by_what_they_are(checkpoint, small_task, tmp_path, monkeypatch):
    """The same file under another name ended a search that was resumed."""
    options = options_of(checkpoint, small_task, tmp_path / "out", iterations=0)
    search(options)
    monkeypatch.chdir(small_task)
    search(replace(options, dev="more.tsv", resume=True))
    with pytest.raises(ValueError, match="holds a search with rows_hash = "):
        search(replace(options, dev="train.tsv", resume=True))


def test_another_policy_is_not_resumed_with(checkpoint, small_task, tmp_path):
    options = options_of(checkpoint, small_task, tmp_path / "out", iterations=0)
    search(options)
    patch_config(checkpoint, {"exit_policy": {"name": "confidence", "threshold": 0.7}})
    with pytest.raises(ValueError, match="holds a search with policy = .*entropy.*, not .*confidence"):
        search(replace(options, resume=True))
    patch_config(checkpoint, {"exit_policy": None})
    lines = (tmp_path / "out" / JOURNAL).read_text().splitlines()
    old = {name: value for name, value in json.loads(lines[0]).items() if name != "policy"}  # of an earlier version
    (tmp_path / "out" / JOURNAL).write_text("\n".join([json.dumps(old), *lines[1:]]) + "\n")
    (checkpoint / "operating_points.json").unlink()
    search(replace(options, resume=True))


def test_the_policy_of_the_points_counts_where_the_configuration_has_none(checkpoint, small_task, tmp_path):
    """As it does in an export: a search of its graph could not agree with it."""
    search(options_of(checkpoint, small_task, tmp_path / "out", iterations=0, exit_policy="confidence"))
    assert not run(lambda: dispatch(COMMANDS, [str(checkpoint), str(tmp_path / "exported")], "export"))
    options = options_of(checkpoint, small_task, tmp_path / "again", iterations=0, graph=str(tmp_path / "exported"))
    search(options)
    assert OperatingPoints.load(checkpoint).policy["name"] == "confidence"


def test_a_guaranteed_point_costs_the_same_share_of_full_depth(tmp_path, capsys):
    """Its FLOPs were of other rows than those of the points beside it."""
    full, points = OperatingPoint("full", [0.0], 4.0, flops=100.0), {"name": "entropy", "threshold": 0.0}
    promised = OperatingPoint("calibrated", [0.5], 2.0, flops=40.0, calibration={"at_most": 0.1})
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    weights = checkpoint_hash(tmp_path)
    OperatingPoints(weights, points, [full, promised]).save(tmp_path)
    new = OperatingPoints(weights, points, [replace(full, flops=50.0)])
    assert guaranteed(tmp_path, new) == [replace(promised, flops=20.0)]
    assert not guaranteed(tmp_path, replace(new, policy={"name": "margin", "threshold": 1.0}))
    assert "its calibrated point is of the policy 'entropy', and left out" in capsys.readouterr().out
    OperatingPoints(weights, points, [promised]).save(tmp_path)
    assert guaranteed(tmp_path, new) == [replace(promised, flops=None)]


def test_words_and_questions_are_timed(tiny_config, tiny_tokenizer, tmp_path):
    """Words were no text to the tokenizer, and one long question ended the search; rows are cut as those measured."""
    lines = [f"{word} {tag}\n" for word, tag in zip("our army ships".split(), ("O", "B-x", "O"), strict=True)]
    (tmp_path / "dev.conll").write_text("\n".join("".join(lines * size) for size in (1, 2, 30)))
    model = ElasticBertForTokenClassification(tiny_config)
    model.config.id2label, model.config.label2id = {0: "B-x", 1: "I-x", 2: "O"}, {"B-x": 0, "I-x": 1, "O": 2}
    model.save_pretrained(tmp_path / "checkpoint")
    tiny_tokenizer.save_pretrained(tmp_path / "checkpoint")
    assert not run(lambda: dispatch(COMMANDS, [str(tmp_path / "checkpoint"), str(tmp_path / "exported")], "export"))
    own = {"dev": str(tmp_path / "dev.conll"), "text": "1", "label": "2", "latency": str(tmp_path / "exported")}
    options = options_of(tmp_path / "checkpoint", tmp_path, tmp_path / "out", **own, max_length=16)
    work, _ = prepare(options)
    assert {len(one.ids) for one in load_served(options, work, tmp_path / "out").encodings} == {8, 14, 16}


def test_a_search_removes_nothing_but_an_earlier_search(checkpoint, small_task, tmp_path):
    """Its output was emptied whatever it held: the checkpoint searched, another one, a folder of pipelines."""
    other = shutil.copytree(checkpoint, tmp_path / "other")
    for ours in (other, checkpoint, checkpoint.parent):
        (ours / MARKER).write_text("")
    with pytest.raises(ValueError, match="output .*other holds what is not a search; choose another output"):
        search(options_of(checkpoint, small_task, other))
    for output in (checkpoint, checkpoint.parent):
        with pytest.raises(ValueError, match="would replace .*, which is read"):
            search(options_of(checkpoint, small_task, output))
    assert (checkpoint / "model.safetensors").is_file() and (other / "model.safetensors").is_file()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"rows": 0}, "rows must be at least 1, got 0"),
        ({"halving": 0}, "halving must be at least 1, got 0"),
        ({"mutation_probability": 2.0}, "mutation_probability lies from 0 to 1"),
        ({"exit_policy": "learned"}, "asks a learned exit head"),
        ({"exit_policy": "constant"}, "'constant' cannot be calibrated"),
    ],
)
def test_bad_options_are_named(checkpoint, small_task, tmp_path, changes, says):
    with pytest.raises(ValueError, match=says):
        search(options_of(checkpoint, small_task, tmp_path / "out", **changes))
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_two_processes_find_what_one_finds(checkpoint, small_task, tmp_path):
    search(options_of(checkpoint, small_task, tmp_path / "one"))
    flags = {**vars(options_of(checkpoint, small_task, tmp_path / "two")), "metrics": None, "resume": None}
    words = [word for name, value in flags.items() if value is not None for word in (f"--{name}", str(value))]
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--master_port", "29617"]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launch, "-m", "finetune", "search", *words], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert result_of(tmp_path / "two") == result_of(tmp_path / "one")


def test_the_better_of_two_goes_on(checkpoint, small_task, tmp_path):
    work, _ = prepare(options_of(checkpoint, small_task, tmp_path / "out"))

    def found(lengths, quality, cost):
        return [Found(lengths, 0, quality, cost, cost, cost, 4.0)]

    good, bad = (12,) * 4, (10,) * 4
    work.generations, work.found = [[work.whole]], {work.whole: [found(work.whole, 0.8, 10.0)] * len(work.rungs)}
    work.found |= {good: [found(good, 0.75, 5.0)], bad: [found(bad, 0.5, 5.0)]}
    assert work.promising([good, bad], 0) == {good}


def test_a_search_draws_by_its_seed(checkpoint, small_task, tmp_path):
    """Its rows' order, of which each rung takes the first, and its children."""
    searches = [
        prepare(options_of(checkpoint, small_task, tmp_path / "out", seed=seed, rows=240))[0] for seed in (0, 0, 1)
    ]
    first, again, other = (one.examples.texts for one in searches)
    read = [line.split("\t")[0] for line in (small_task / "more.tsv").read_text().splitlines()[1:]]
    assert first == again and len({tuple(first), tuple(other), tuple(read)}) == 3
    assert sorted(first) == sorted(other) == sorted(read)
    children = []
    for one in searches:
        one.found[one.whole] = [[Found(one.whole, 0, 0.5, 1.0, 1.0, 1.0, 4.0)]] * len(one.rungs)
        one.generations = [[one.whole]]
        children.append(next_generation(one, 1))
    assert children[0] == children[1] != children[2]
