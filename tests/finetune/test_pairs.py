"""A model remembers whether its training rows were pairs of texts, and says it where it is given others."""

import json
import re
import shutil
import warnings
from pathlib import Path

import pytest
from transformers import AutoConfig

from elastic_model import ElasticSession
from elastic_model.card import write_card
from export.config import ExportOptions
from export.write import export_checkpoint
from finetune.calibrate import calibrate
from finetune.config import CalibrateOptions, DistillOptions, ElastifyOptions, EvaluateOptions, PruneOptions
from finetune.distill import distill
from finetune.elastify import elastify
from finetune.evaluate import evaluate
from finetune.prune import prune
from finetune.train import train
from tests.finetune.conftest import options_for
from tests.finetune.test_elastify import stock_model


@pytest.fixture(scope="module")
def paired(small_task, tmp_path_factory):
    """The small task with a second text in each row."""
    folder = tmp_path_factory.mktemp("pairs")
    for split in ("train", "dev"):
        header, *rows = (small_task / f"{split}.tsv").read_text().splitlines()
        lines = ["\t".join(["of the people", *row.split("\t")]) for row in rows]
        (folder / f"{split}.tsv").write_text("\n".join([f"first\t{header}", *lines]) + "\n")
    return folder


@pytest.fixture(scope="module")
def of_pairs(paired, trained, tmp_path_factory):
    """A checkpoint trained on pairs, and one trained on their second texts alone."""
    folder, short = tmp_path_factory.mktemp("checkpoints"), {"epochs": 1, "max_length": 40}
    pairs = options_for(paired, f"{trained.output}/../start", folder / "pairs", text="first", pair="text", **short)
    single = options_for(paired, f"{trained.output}/../start", folder / "single", **short)
    assert train(pairs) == train(single) == 0
    return {True: pairs.output, False: single.output}


def rows_of(paired, pairs):
    columns = {"text": "first", "pair": "text"} if pairs else {"text": "text"}
    return {"label": "label", **columns, **{split: str(paired / f"{split}.tsv") for split in ("train", "dev")}}


def said(work):
    """What `work` warns of texts of the other kind: "pairs" or "single texts", what the model was trained on."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        work()
    found = {
        match[1] for one in caught if (match := re.search("trained on (.*?)( of texts)?, these", str(one.message)))
    }
    assert len(found) < 2
    return "".join(found)


@pytest.mark.parametrize("trained_on_pairs", [True, False])
@pytest.mark.parametrize("given_pairs", [True, False])
def test_rows_of_the_other_kind_are_noticed(of_pairs, paired, trained_on_pairs, given_pairs):
    model, rows = of_pairs[trained_on_pairs], rows_of(paired, given_pairs)
    assert AutoConfig.from_pretrained(model).text_pairs is trained_on_pairs
    expected = "" if trained_on_pairs == given_pairs else ("pairs" if trained_on_pairs else "single texts")
    assert said(lambda: evaluate(EvaluateOptions(model=model, max_length=40, **rows))) == expected
    unlabelled = {name: rows[name] for name in ("text", "pair") if name in rows}
    bound = {"max_disagreement": 0.9, "texts": rows["dev"], "exit_policy": "entropy", "max_length": 40}
    assert said(lambda: calibrate(CalibrateOptions(model=model, **bound, **unlabelled))) == expected


@pytest.mark.parametrize("trained_on_pairs", [True, False])
def test_the_exported_file_notices_too(of_pairs, paired, tmp_path, trained_on_pairs):
    columns = rows_of(paired, trained_on_pairs)
    given = {name: columns[name] for name in ("text", "pair") if name in columns}
    options = ExportOptions(Path(of_pairs[trained_on_pairs]), tmp_path / "out", rows=paired / "dev.tsv", **given)
    assert said(lambda: export_checkpoint(options)) == ""
    session = ElasticSession.from_pretrained(tmp_path / "out")
    assert session.text_pairs is trained_on_pairs
    single, pair = "of the people", ("of the people", "a treaty")
    of = {True: pair, False: single}
    assert said(lambda: session([of[trained_on_pairs]] * 2)) == ""
    expected = "pairs" if trained_on_pairs else "single texts"
    assert said(lambda: session(of[not trained_on_pairs])) == expected
    assert said(lambda: session([single, pair])) == expected  # one of them is


def test_what_is_made_of_it_remembers_too(of_pairs, paired, tmp_path):
    short = {"max_length": 40, "batch_size": 10, "epochs": 1, **rows_of(paired, True)}
    student, pruned = str(tmp_path / "student"), str(tmp_path / "pruned")
    assert said(lambda: distill(DistillOptions(model=of_pairs[True], layers=2, output=student, **short))) == ""
    assert said(lambda: prune(PruneOptions(model=student, heads=2, output=pruned, **short))) == ""
    assert AutoConfig.from_pretrained(pruned).text_pairs is True
    other = DistillOptions(model=of_pairs[False], layers=2, output=str(tmp_path / "other"), **short)
    assert said(lambda: distill(other)) == "single texts"


def test_of_a_checkpoint_that_does_not_say_nothing_is_said(of_pairs, paired, tmp_path):
    folder = Path(shutil.copytree(of_pairs[True], tmp_path / "before"))
    content = json.loads((folder / "config.json").read_text())
    del content["text_pairs"]
    (folder / "config.json").write_text(json.dumps(content))
    assert AutoConfig.from_pretrained(folder).text_pairs is None
    assert said(lambda: evaluate(EvaluateOptions(model=str(folder), max_length=40, **rows_of(paired, False)))) == ""


def test_an_elastified_model_learns_it_from_its_texts(tiny_tokenizer, paired, tmp_path):
    stock = stock_model(tmp_path / "stock", tiny_tokenizer, "bert", "single_label_classification")
    rows = {"texts": str(paired / "train.tsv"), "text": "first", "pair": "text", "max_length": 40, "batch_size": 10}
    for number, (model, columns) in enumerate([(stock, {}), (tmp_path / "0", {"text": "text", "pair": None})]):
        options = ElastifyOptions(**{"model": str(model), "output": str(tmp_path / str(number)), **rows, **columns})
        assert said(lambda options=options: elastify(options)) == ("pairs" if number else "")
        assert AutoConfig.from_pretrained(options.output).text_pairs is True


def test_the_card_shows_pairs(of_pairs):
    for pairs, folder in of_pairs.items():
        assert ('tokenizer(["A first text."], [' in write_card(folder).text) is pairs
