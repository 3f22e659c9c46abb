"""Pipelines: which strings are any, stages that are kept and continued, what is measured, the study."""

import json
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

import finetune.train
from elastic_model import ElasticBertConfig, ElasticBertForSequenceClassification, ElasticBertModel, ElasticSession
from elastic_model.folders import MARKER
from elastic_model.operating_points import checkpoint_hash
from elastic_model.provenance import read_provenance
from export.write import patch_config
from finetune.__main__ import _command
from finetune.evolution import JOURNAL
from finetune.labels import Labels
from finetune.pipelines import stages
from finetune.pipelines.config import PipelineOptions
from finetune.pipelines.estimate import by_pipeline
from finetune.pipelines.letters import checkpoint_of, name_of, parse, prefixes, stage_of
from finetune.pipelines.measure import (
    TURNS,
    Measurement,
    Point,
    Trial,
    is_current,
    line_in_tokens,
    operating_point,
    times_in_turns,
)
from finetune.pipelines.stages import SHARED, read_record, settings_of, stage_hash
from finetune.pipelines.study import all_orders, measured_pipelines, savings, stages_of
from finetune.pipelines.work import Work, begin, pruned_widths
from finetune.prune import Widths
from finetune.run import run_folder
from finetune.widths import narrowed
from tests.finetune.test_estimate import measurement


@pytest.fixture
def start(trained):
    """The folder that `trained` began with: a checkpoint without a head."""
    return trained.model


@pytest.fixture
def flags(small_task, start, tmp_path):
    """-> flags(*more): of a short pipeline on the small task."""
    own = [f"--{split}={small_task / name}.tsv" for split, name in (("train", "more"), ("dev", "dev"))]
    own += ["--text=text", "--label=label", "--max_length=32", "--batch_size=24", "--epochs=1", "--rounds=2"]
    own += ["--learning_rate=1e-3", "--timed_rows=4", "--search_iterations=1", f"--output={tmp_path / 'out'}"]
    return lambda *more: [f"--model={start}", *own, *more]


@pytest.mark.parametrize(
    ("text", "letters"), [("O", ""), ("deplq", "DEPLQ"), ("EDPQL", "EDPLQ"), ("LSQ", "SLQ"), ("P", "P")]
)
def test_pipelines(text, letters):
    assert parse(text) == letters


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("DX", "'X' is no operator; the letters are D, P, E, S, L, Q, or O alone"),
        ("DED", "D stands twice"),
        ("OD", "O is the pipeline of no operators"),
        ("DO", "O is the pipeline of no operators"),
        ("QE", "E after Q"),
        ("LD", "D after L"),
        ("SP", "P after S"),
        ("PD", "D after P"),
        ("EPD", "D after P"),
        ("QS", "S after Q"),
    ],
)
def test_impossible_pipelines_say_why(text, message):
    with pytest.raises(ValueError, match=message):
        parse(text)


def test_the_way_to_a_pipeline():
    assert prefixes("DEQ") == ["", "D", "DE", "DEQ"]
    assert stage_of("DLQ") == "DQ" and checkpoint_of("DLQ") == "D"


def test_the_orders_are_the_papers():
    assert set(all_orders()) == {"D", "P", "E", "DP", "DE", "ED", "PE", "EP", "DPE", "DEP", "EDP"}
    stages = stages_of(all_orders())
    assert len(stages) == 12 + 4 + 2 and all(stage[:-1] in stages[: stages.index(stage)] for stage in stages[1:])
    assert {"L", "Q", "LQ", "DPLQ", "PQ", "EDP", "ESLQ"} <= set(measured_pipelines(all_orders()))


def test_the_operating_point_is_the_loosest_before_quality_first_falls():
    curve = [Point(None, 0.9, 9, 9, 6), Point(0.9, 0.91, 6, 6, 4), Point(0.8, 0.88, 4, 4, 3), Point(0.7, 0.9, 2, 2, 2)]
    assert operating_point(curve, 0.01).ms == 6
    assert operating_point(curve, 0.05).ms == 2


def test_a_share_of_a_negative_quality_is_still_a_loss():
    """A correlation can be below 0 at full depth, of which a permitted share was a demand for more."""
    curve = [Point(None, -0.1, 9, 9, 6), Point(0.9, -0.11, 6, 6, 4), Point(0.8, -0.2, 4, 4, 3)]
    assert operating_point(curve, 0.2).ms == 6


def test_times_of_other_rows_follow_a_line_in_their_tokens():
    spent = np.array([[1.0, 2.0, 3.0], [2.0, 4.0, 6.0]])
    np.testing.assert_allclose(line_in_tokens(spent, [10, 20, 30], [15, 30, 40]), [[1.5, 3, 4], [3, 6, 8]])
    np.testing.assert_allclose(line_in_tokens(spent, [9, 9, 9], [5]), [[2], [4]])


def test_pipelines_are_timed_in_turns():
    called = []
    trials = [Trial(lambda row, place: called.append(row + str(place)), [(row, 0), (row, 1)]) for row in "ab"]
    assert [spent.shape for spent in times_in_turns(trials)] == [(2,), (2,)]
    assert called == ["a0", "a0", "a1", "b0", "b0", "b1"] * TURNS


def measured_in(folder):
    return {one["pipeline"]: one for one in json.loads((folder / "measured.json").read_text())["measurements"]}


def test_a_pipeline_and_its_second_run(flags, tmp_path, capsys):
    assert _command(["pipeline", "DEPL", *flags("--layers=2")]) == 0
    shown, out = capsys.readouterr().out, tmp_path / "out"
    assert "time saved" in shown and "\nDEPL " in shown and "O padded to 64 tokens" in shown
    measured = measured_in(out)
    assert list(measured) == ["O", "D", "DE", "DEP", "DEPL"]
    assert measured["D"]["parameters"] < measured["O"]["parameters"]
    assert measured["DEP"]["parameters"] < measured["DE"]["parameters"]
    assert len(measured["DE"]["curve"]) > 10 and len(measured["O"]["curve"]) == 1
    assert measured["DEPL"]["flops"] < measured["DEP"]["flops"] < measured["O"]["flops"]
    assert measured["DEPL"]["curve"][0]["quality"] == measured["DEP"]["curve"][0]["quality"]
    model = ElasticBertForSequenceClassification.from_pretrained(out / "DEP")
    assert model.exit_layers == [1, 2] and model.config.num_attention_heads_per_layer == [3, 3]
    assert model.config.intermediate_size_per_layer == [32, 32] and not model.config.gradient_equilibrium
    record = json.loads((out / "DEP" / "stage.json").read_text())
    assert record["parent"]["name"] == "DE" and record["seconds"] > 0 and set(record["data"]) == {"train", "dev"}
    assert record["metrics"]["2"]["accuracy"] == measured["DEP"]["full_quality"]
    assert [stage.stage for stage in read_provenance(out / "DEP")][-4:] == ["finetune", "distill", "finetune", "prune"]

    made = {stage: (out / stage / "model.safetensors").stat().st_mtime_ns for stage in ("O", "D", "DE", "DEP")}
    shutil.rmtree(out / "DEP")  # only what is missing is made again
    assert _command(["pipeline", "DEP", *flags("--layers=2")]) == 0
    again = [stage for stage, when in made.items() if (out / stage / "model.safetensors").stat().st_mtime_ns != when]
    assert again == ["DEP"]
    shutil.rmtree(out / "DEP")  # what is gone is not timed again with the rest
    assert _command(["pipeline", "E", *flags()]) == 0
    assert "measuring O D DE E, seed 0, in turns" in capsys.readouterr().out
    assert set(measured_in(out)) == {"O", "D", "DE", "E"} and measured_in(out)["D"]["settings"]["layers"] == 2
    assert measured_in(out)["D"]["ms"] != measured["D"]["ms"]
    rows = (Path(next(one for one in flags() if "--dev" in one).partition("=")[2])).read_text()
    (tmp_path / "renamed.tsv").write_text("\n".join(f"{row}s" for row in rows.splitlines()).replace("labels", "label"))
    file = next(one for one in flags() if "--train" in one).partition("=")[2]
    (tmp_path / "train.tsv").write_text(
        "\n".join(f"{row}s" for row in Path(file).read_text().splitlines()).replace("labels", "label")
    )
    with pytest.raises(ValueError, match="was made from data with the labels .*'early'.*have .*'earlys'"):
        _command(["pipeline", "D", *flags(f"--dev={tmp_path / 'renamed.tsv'}", f"--train={tmp_path / 'train.tsv'}")])
    (out / "D" / "dev.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match="dev.npz is damaged .*; remove .*D to make the stage anew"):
        _command(["pipeline", "D", *flags("--layers=2", "--again")])
    with pytest.raises(ValueError, match="stage .*D was made with layers = 2, not 1"):
        _command(["pipeline", "DE", *flags("--layers=1")])
    with pytest.raises(ValueError, match="was made from other data: its train rows differ"):
        _command(["pipeline", "DE", *flags("--layers=2", "--train_rows=100")])


@pytest.mark.slow
def test_a_pipeline_of_lengths_and_int8(flags, tmp_path):
    assert _command(["pipeline", "ESLQ", *flags()]) == 0
    measured = measured_in(tmp_path / "out")
    assert list(measured) == ["O", "E", "ES", "ESL", "ESLQ"]
    assert measured["ESL"]["flops"] < measured["ES"]["flops"] < measured["O"]["flops"]
    assert measured["ESLQ"]["bytes"] < measured["ESL"]["bytes"]
    lengths = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "out" / "ES").config.length_config
    assert lengths is not None and lengths[-1] < 1
    assert _command(["pipeline", "LQ", *flags()]) == 0  # nothing to decide at run time: no control flow
    plain, whole = (ElasticSession.from_pretrained(tmp_path / "out" / name) for name in ("Q", "ESQ"))
    assert "length_config" in whole.inputs - plain.inputs and measured_in(tmp_path / "out")["LQ"]["exit_ms"]


def test_a_stage_is_made_again_where_its_parent_is_another(flags, trained, tmp_path, capsys):
    fine_tuned = [f"--model={trained.output}", *(flag for flag in flags() if not flag.startswith("--model"))]
    assert _command(["pipeline", "E", *fine_tuned]) == 0
    out = tmp_path / "out"
    other = json.loads((out / "E" / "stage.json").read_text())
    other["parent"]["sha256"] = "0" * 64
    (out / "E" / "stage.json").write_text(json.dumps(other))
    capsys.readouterr()
    assert _command(["pipeline", "E", *fine_tuned]) == 0
    shown = capsys.readouterr().out
    assert "O is another since it was made" in shown and "stage O: there already" in shown
    (out / "O" / "stage.json").write_text("{")
    with pytest.raises(ValueError, match="O/stage.json: not the record of a stage .*remove the folder"):
        _command(["pipeline", "E", *fine_tuned])


def test_lengths_that_were_searched_again_make_another_stage(tiny_checkpoint):
    """S writes them into the configuration, not the weights: what was made from the stage before is not of it."""
    before = stage_hash(tiny_checkpoint)
    assert before == checkpoint_hash(tiny_checkpoint)
    hashes = {before}
    for lengths in ([0.5] * 4, [0.25] * 4):
        patch_config(tiny_checkpoint, {"length_config": lengths})
        hashes.add(stage_hash(tiny_checkpoint))
    assert len(hashes) == 3


def test_what_a_student_lacks_is_named_before_training(flags, start, tmp_path):
    narrow = tmp_path / "narrow"
    shutil.copytree(start, narrow)
    config = ElasticBertConfig.from_pretrained(start)
    fields = {"num_attention_heads": 2, "num_attention_heads_per_layer": None, "attention_head_size": None}
    ElasticBertModel(ElasticBertConfig.from_dict({**config.to_dict(), **fields})).save_pretrained(narrow)
    with pytest.raises(ValueError, match="heads must be 1 to 2"):
        _command(["pipeline", "DP", *flags(f"--student={narrow}", "--heads=3", "--intermediate=32")])
    tokenizer = json.loads((narrow / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append({**tokenizer["added_tokens"][0], "id": 10_000, "content": "[NEW]"})
    (narrow / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="narrow has another vocabulary"):
        _command(["pipeline", "ED", *flags(f"--student={narrow}")])
    assert not (tmp_path / "out").exists()


def test_a_fine_tuned_model_is_taken_as_it_is(flags, trained, tmp_path):
    fine_tuned = [flag for flag in flags() if not flag.startswith("--model")]
    assert _command(["pipeline", "O", f"--checkpoint={trained.output}", *fine_tuned]) == 0
    found = ElasticBertForSequenceClassification.from_pretrained(tmp_path / "out" / "O").state_dict()
    given = ElasticBertForSequenceClassification.from_pretrained(trained.output).state_dict()
    assert "classifiers.3.weight" in found and "classifiers.0.weight" not in found
    assert all((found[name] == given[name]).all() for name in found)


@pytest.mark.parametrize(
    ("text", "more", "message"),
    [
        ("PD", [], "D after P"),
        ("D", ["--layers=4"], "layers must be 1 to 3"),
        ("D", ["--layers=2", "--student=elsewhere"], "give layers or student, not both, got 2 and elsewhere"),
        ("P", ["--heads=5"], "heads must be 1 to 4"),
        ("P", ["--heads=0"], "heads must be 1 to 4, what a layer of the model has at most, got 0"),
        ("P", ["--intermediate=100"], "intermediate must be 1 to 64"),
        ("P", ["--intermediate=30"], "intermediate must be a multiple of multiple_of 8"),
        ("P", ["--multiple_of=80"], "multiple_of must be at most 64, the FFN neurons of a layer, got 80"),
        ("P", ["--heads=4", "--intermediate=64"], "the target leaves all that the model has: 4 heads and 64 FFN"),
        ("O", ["--max_length=1000"], "max_length must be 3 to"),
        ("D", ["--temperature=0"], "temperature must be above 0"),
        ("E", ["--epochs=0"], "epochs must be at least 1"),
        ("E", ["--permitted_loss=1"], "permitted_loss must be from 0 to 1"),
    ],
)
def test_bad_input_is_named_before_training(flags, tmp_path, text, more, message):
    with pytest.raises(ValueError, match=message):
        _command(["pipeline", text, *flags(*more)])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("command", [["pipeline", "D"], ["study"]])
def test_stages_are_not_put_into_a_checkpoint(flags, trained, command):
    before = sorted(Path(trained.output).rglob("*"))
    with pytest.raises(ValueError, match=f"output {trained.output} is a checkpoint; choose another output"):
        _command([*command, *flags(f"--output={trained.output}")])
    assert sorted(Path(trained.output).rglob("*")) == before


def test_what_was_begun_with_other_settings_is_named_before_training(flags, tmp_path):
    """It was when its stage came: hours later, where others had to be trained before it."""
    state = tmp_path / "out" / "DE.run" / "state"
    state.mkdir(parents=True)
    (tmp_path / "out" / MARKER).write_text("")
    (state / "progress.json").write_text(json.dumps({"settings": {"epochs": 7, "batch_size": 24}}))
    with pytest.raises(ValueError, match="DE.run was begun with epochs = 7, not 1; choose another --output"):
        _command(["pipeline", "DE", *flags()])
    assert not (tmp_path / "out" / "O").exists()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": 3}, "P.run was begun with heads = 3, not 2; choose another --output"),
        ({"rounds": 5}, "P.run was begun with rounds = 5, not 2"),
        ({"dev rows": "0"}, "P.run was begun on other data: its dev rows differ"),
    ],
)
def test_an_operator_that_was_begun_otherwise_is_named_before_training(flags, tmp_path, settings, message):
    """O was trained and P measured in all its rounds first."""
    seen = {}
    own = flags("--heads=2")
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(
            "finetune.pipelines.pipeline.carry_out", lambda work, stage: seen.setdefault("work", work) and 9
        )
        assert _command(["pipeline", "P", *own]) == 9
    work, state = seen["work"], tmp_path / "out" / "P.run" / "state"
    state.mkdir(parents=True)
    shared = {name: getattr(work.options, name) for name in (*SHARED, "metrics", "rounds", "importance_rows")}
    shared |= {"heads": 2, **{f"{split} rows": rows for split, rows in work.data.items()}}
    (state / "progress.json").write_text(json.dumps({"settings": shared}))
    assert read_record(work, "P") is None
    (state / "progress.json").write_text(json.dumps({"settings": {**shared, **settings}}))
    with pytest.raises(ValueError, match=message):
        _command(["pipeline", "P", *own])


def test_an_s_that_was_begun_is_its_own(flags, tmp_path, monkeypatch):
    """Its training run has a permitted loss of its own, which was taken for that of the search."""
    own = flags("--permitted_loss=0.05")
    assert _command(["pipeline", "O", *own]) == 0
    step = finetune.train._step

    def stopped(*given):
        signal.raise_signal(signal.SIGTERM)
        return step(*given)

    with monkeypatch.context() as patched:
        patched.setattr(finetune.train, "_step", stopped)
        assert _command(["pipeline", "S", *own]) == 143
    state = tmp_path / "out" / "S.run" / "state" / "progress.json"
    assert json.loads(state.read_text())["progress"]["update"] > 0
    assert _command(["pipeline", "S", *own]) == 0


@pytest.mark.parametrize(("more", "kept"), [({}, 1), ({"heads": 3}, 3), ({"heads": 5}, None)])
def test_layers_that_differ_are_checked_as_they_will_be_pruned(trained, tmp_path, more, kept):
    model = ElasticBertForSequenceClassification.from_pretrained(trained.output)
    places = [[list(range(count)) for count in counts] for counts in ([4, 1, 2, 3], [64, 4, 60, 64])]
    narrowed(model, *places).save_pretrained(tmp_path / "uneven")
    AutoTokenizer.from_pretrained(trained.output).save_pretrained(tmp_path / "uneven")
    own = {name: getattr(trained, name) for name in ("train", "dev", "text", "label", "max_length")}
    places = {"model": str(tmp_path / "uneven"), "output": str(tmp_path / "out")}
    options = PipelineOptions(pipeline="P", **own, **places, **more)
    if kept is None:
        with pytest.raises(ValueError, match="heads must be 1 to 4, what a layer of the model has at most, got 5"):
            begin(options, tmp_path / "out", "P")
        return
    begin(options, tmp_path / "out", "P")
    with pytest.raises(ValueError, match="heads must be 1 to 3"):  # of the layers 2 and 4 that D takes
        begin(replace(options, heads=4), tmp_path / "out", "DP")
    widths = pruned_widths(options, Widths.of(ElasticBertConfig.from_pretrained(tmp_path / "uneven")))
    assert (widths["multiple_of"], widths["heads"]) == (2, kept)


def test_stages_of_a_pipeline_and_of_a_study_do_not_share_a_folder(flags, tmp_path):
    """The one replaced what the other had measured."""
    for stage, command in (("seed-0/P", ["pipeline", "P"]), ("P", ["study"])):
        out = tmp_path / stage.replace("/", "-")
        (out / stage).mkdir(parents=True)
        (out / MARKER).write_text("")
        (out / stage / "stage.json").write_text("{}")
        with pytest.raises(ValueError, match="has the stages of a (study|pipeline) .*; choose another output"):
            _command([*command, *flags(f"--output={out}")])
    with pytest.raises(ValueError, match="seed 7 would do nothing: a study has --seeds"):
        _command(["study", *flags("--seed=7", "--plan")])


def test_what_has_no_record_is_not_measured(tiny_checkpoint, tmp_path):
    """A stage that was being made again when it was killed ended every run of the folder."""
    labels = Labels("single_label_classification", ["a", "b"], ("accuracy",))
    work = Work(PipelineOptions(pipeline="E", model="m", output="o"), tmp_path, labels, None, 9, {})
    folder = shutil.copytree(tiny_checkpoint, work.folder("E"))
    one = measurement("E", (1.0, 0.5))
    one = replace(one, checkpoint=stage_hash(folder))
    assert not is_current(work, one)
    (folder / "stage.json").write_text("{}")
    assert is_current(work, one)


def test_a_search_that_was_begun_goes_on(tiny_checkpoint):
    """S searched anew where its search had been interrupted."""
    journal = Path(f"{tiny_checkpoint}.search") / JOURNAL
    assert not stages._searched(tiny_checkpoint)
    journal.parent.mkdir()
    for first, begun in ((checkpoint_hash(tiny_checkpoint), True), ("0" * 64, False)):
        journal.write_text(json.dumps({"checkpoint": first}) + "\n{")
        assert stages._searched(tiny_checkpoint) == begun


def test_a_stage_whose_parent_is_gone_is_made_again(tiny_checkpoint, tmp_path):
    """As its own remedy has it, "remove the folder to make it anew": every run ended at the folder that was gone."""
    labels = Labels("single_label_classification", ["a", "b"], ("accuracy",))
    work = Work(PipelineOptions(pipeline="DE", model=str(tiny_checkpoint), output="o"), tmp_path, labels, None, 9, {})
    for stage, parent in (("", tiny_checkpoint), ("D", tmp_path / "O"), ("DE", tmp_path / "D")):
        folder = shutil.copytree(tiny_checkpoint, work.folder(stage))
        record = {"settings": settings_of(work, stage), "data": {}, "parent": {"sha256": stage_hash(parent)}}
        (folder / "stage.json").write_text(json.dumps(record))
    assert all(read_record(work, stage) for stage in ("", "D", "DE"))
    shutil.rmtree(work.folder("D"))
    assert [read_record(work, stage) is None for stage in ("", "D", "DE")] == [False, True, True]
    old = json.loads((work.folder("") / "stage.json").read_text())
    del old["settings"]["metrics"]  # not noted by earlier versions
    (work.folder("D")).mkdir()
    (work.folder("") / "stage.json").write_text(json.dumps(old))
    assert read_record(work, "")
    (work.folder("") / "stage.json").write_text(json.dumps({**old, "settings": settings_of(work, "")}))
    by_f1 = replace(work, labels=Labels("single_label_classification", ["a", "b"], ("f1",)))
    with pytest.raises(ValueError, match=r"stage .*O was made with metrics = \['accuracy'\], not \['f1'\]"):
        read_record(by_f1, "")


def test_the_time_before_an_interruption_counts(tiny_checkpoint, tmp_path, monkeypatch):
    """A study's plan expects of a stage what others of its kind took."""
    labels = Labels("single_label_classification", ["a", "b"], ("accuracy",))
    options = PipelineOptions(pipeline="O", model=str(tiny_checkpoint), output="o")
    work, clock = Work(options, tmp_path, labels, None, 9, {}), iter([0.0, 40.0, 100.0, 107.0])
    codes = iter([143, 0])

    def job(work, stage, parent, folder):
        run_folder(str(folder)).mkdir(exist_ok=True)
        code = next(codes)
        if not code:
            shutil.copytree(parent, folder)
        return code

    monkeypatch.setitem(stages.JOBS, "", job)
    monkeypatch.setattr(stages, "answer", lambda work, stage: {})
    monkeypatch.setattr(stages.time, "monotonic", lambda: next(clock))
    assert (stages.carry_out(work, ""), stages.carry_out(work, "")) == (143, 0)
    assert read_record(work, "")["seconds"] == 47.0


def test_a_student_is_known_by_its_weights(tiny_checkpoint, tmp_path):
    shutil.copytree(tiny_checkpoint, tmp_path / "student")
    options = PipelineOptions(pipeline="D", model="m", output="o", student=str(tmp_path / "student"))
    labels = Labels("single_label_classification", ["a", "b"], ("accuracy",))
    work = Work(options, tmp_path, labels, None, 9, {})
    before = settings_of(work, "D")["student"]
    assert before == checkpoint_hash(tiny_checkpoint)
    weights = tmp_path / "student" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"x")
    assert settings_of(work, "D")["student"] != before


def test_a_stock_start_is_known_by_its_weights(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "pytorch_model.bin").write_bytes(name.encode())
    assert checkpoint_hash(tmp_path / "a") != checkpoint_hash(tmp_path / "b")


def test_orders_without_p_alone_have_no_estimate_of_lq():
    """The study ended there, when all was trained and measured."""
    one = Measurement(
        "O", 0, "", "accuracy", 0.9, 0.9, 4.0, 1.0, 4.0, 1, 1, [4.0], None, [Point(None, 0.9, 4, 1, 4)], {}
    )
    measured = by_pipeline([replace(one, pipeline=name_of(letters)) for letters in measured_pipelines(["DP"])])
    found = savings(measured)
    assert found["DP"]["estimated_LQ"] is None and found["D"]["estimated_LQ"] is not None


def test_what_was_measured_stays_in_the_turns(flags, trained, tmp_path, capsys):
    """`--again`, or other settings of the times, forgot all other pipelines of the folder."""
    given = [*flags("--epochs=1", "--layers=2"), f"--model={trained.output}"]
    for text, more in (("E", []), ("D", []), ("O", ["--again"]), ("O", ["--timed_rows=3"])):
        assert not _command(["pipeline", text, *given, *more])
        if more:
            assert "measuring" in capsys.readouterr().out
    names = {one["pipeline"] for one in json.loads((tmp_path / "out" / "measured.json").read_text())["measurements"]}
    assert names == {"O", "D", "E"}


def test_two_jobs_do_not_share_a_folder(flags, tmp_path):
    """A second pipeline of the same folder broke both: each removed what the other was writing."""
    code = (
        "import sys; from pathlib import Path; from elastic_model.folders import working_in\n"
        "with working_in(Path(sys.argv[1])):\n"
        "    print('there', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "out")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout.readline() == "there\n"
        for name in ("pipeline", "study"):
            with pytest.raises(ValueError, match="another process is working in"):
                _command([name, *(["O"] if name == "pipeline" else ["--orders=D"]), *flags()])
        assert not (tmp_path / "out" / "O").exists()
        other.stdin.close()


def test_a_study_prints_its_plan_and_continues(flags, tmp_path, capsys):
    own = ["--orders", "DE", "ED", "P", "--seeds", "0", "1", "--layers=2"]
    assert _command(["study", *flags(), *own, "--plan"]) == 0
    assert "h are left" in capsys.readouterr().out and not (tmp_path / "out").exists()
    assert _command(["study", *flags(), *own, "--minutes=0"]) == 0
    assert "run the same again to go on" in capsys.readouterr().out
    assert not (tmp_path / "out" / "study.json").exists()
    with pytest.raises(ValueError, match="orders are of D, P and E, got DQ"):
        _command(["study", *flags(), "--orders", "DQ"])
    with pytest.raises(ValueError, match="seeds must be different numbers"):
        _command(["study", *flags(), "--seeds", "1", "1"])
    for minutes in ("-1", "nan"):
        with pytest.raises(ValueError, match=f"minutes must be at least 0, got {minutes}"):
            _command(["study", *flags(), f"--minutes={minutes}"])


@pytest.mark.slow
def test_a_study_of_two_orders_over_two_seeds(flags, tmp_path, capsys):
    own = ["--orders", "DE", "ED", "P", "--seeds", "0", "1", "--layers=2"]
    assert _command(["study", *flags(), *own]) == 0
    result = json.loads((tmp_path / "out" / "study.json").read_text())
    table = result["table_1"]["D+E"]
    assert table["orders"] == ["DE", "ED"]  # and of curves with a time in common, if there are any, their distance
    assert table.get("different", {"pairs": 0})["pairs"] <= 4
    assert set(result["table_2"]) == {"O", "D", "P"} and result["table_2"]["O"]["saved_LQ"] > 0
    assert set(result["against_O"]) == {"LQ", "ESLQ"} and "commutative" in result
    assert {"DE", "ED"} <= set(result["figure_4"]) and result["figure_4"]["DE"]["median_error"]["time"] >= 0
    assert (tmp_path / "out" / "curves.png").is_file() and (tmp_path / "out" / "estimates.png").is_file()
    assert not _command(["estimate", "EDQ", "--from", str(tmp_path / "out" / "measured.json")])
    assert _command(["study", *flags(), *own]) == 0  # nothing is left to do
    assert "there already" in capsys.readouterr().out
