"""Token tagging: IOB in its schemes, first pieces, from a CoNLL file to tags of words."""

import json
import random

import numpy as np
import pytest

from elastic_model import ElasticBertForTokenClassification
from elastic_model.tables import read_table
from finetune.config import EvaluateOptions, TrainOptions
from finetune.data import collate
from finetune.evaluate import evaluate
from finetune.examples import Examples
from finetune.labels import Labels
from finetune.tokens import encode_tags, find_tags, normalise, read_tags
from finetune.train import train

IOB1 = ["I-x", "I-x", "B-x", "O", "I-y", "I-x"]
IOB2 = ["B-x", "I-x", "B-x", "O", "B-y", "B-x"]
NAMES = ["O", "B-x", "I-x", "B-y", "I-y"]


def examples_of(*sentences):
    """(word, tag) pairs."""
    words, tags = ([[pair[side] for pair in sentence] for sentence in sentences] for side in (0, 1))
    return Examples(words, None, tags, [f"sentence {number}" for number in range(1, len(sentences) + 1)])


def test_both_schemes_are_normalised():
    assert normalise([IOB1, ["O"]], ["a", "b"]) == [IOB2, ["O"]]
    assert normalise([IOB2], ["a"]) == [IOB2]
    assert normalise([["NN", "VBZ"]], ["a"]) == [["NN", "VBZ"]]


@pytest.mark.parametrize(
    ("tags", "message"),
    [
        (["B-x", "O", "I-x"], "neither IOB1 nor IOB2: line 4: I-x begins an entity, and line 4: B-x begins one"),
        (["B-x", "S-x"], "line 4: tag 'S-x' is neither O nor B- or I- with a type"),
        (["B-x", "I-"], "line 4: tag 'I-' is neither"),
    ],
)
def test_what_is_no_iob_is_named_with_its_place(tags, message):
    with pytest.raises(ValueError, match=message):
        normalise([tags], ["line 4"])


def test_classes_are_o_and_both_tags_of_every_type():
    assert find_tags(examples_of([("a", "O"), ("b", "B-y"), ("c", "B-x")])) == NAMES
    assert find_tags(examples_of([("a", "VBZ"), ("b", "NN")])) == ["NN", "VBZ"]


def encoded(examples, tokenizer, max_length=64, names=NAMES):
    return encode_tags(None, examples, "dev", Labels("token_classification", names, ()), tokenizer, max_length)


def test_tags_stand_at_first_pieces_and_are_read_there(tiny_tokenizer):
    examples = examples_of([("harvest", "B-x"), ("Xylophonists", "I-x"), ("\u200d", "O"), ("of", "B-y")])
    rows = encoded(examples, tiny_tokenizer)
    pieces = tiny_tokenizer.convert_ids_to_tokens(rows.rows[0]["input_ids"])
    targets = rows.targets["labels"][0]
    at = [place for place, tag in enumerate(targets) if tag != -100]
    assert [targets[place] for place in at] == [1, 2, 3] and len(pieces) > 6
    assert all(not pieces[place].startswith("##") for place in at) and pieces[0] == "[CLS]" and 0 not in at
    logits = np.zeros((1, len(pieces), 5))
    for place in at:
        logits[0, place, targets[place]] = 1.0
    assert rows.words[0][2] == -1  # nothing is left of the third word: its answer is O
    assert read_tags(logits, rows, Labels("token_classification", NAMES, ()))[0] == ("B-x", "I-x", "O", "B-y")
    assert rows.labels[0] == ("B-x", "I-x", "O", "B-y")


def test_byte_level_words_are_read_as_in_running_text():
    """RoBERTa's pieces of a word say whether a space stood before it."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import RobertaTokenizerFast

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    special = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=300, special_tokens=special, initial_alphabet=alphabet)
    trained.train_from_iterator(["of our schools and our harvest"] * 5, trainer)
    model = json.loads(trained.to_str())["model"]
    tokenizer = RobertaTokenizerFast(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    rows = encoded(examples_of([("of", "O"), ("our", "B-x"), ("schools", "I-x")]), tokenizer)
    pieces = tokenizer.convert_ids_to_tokens(rows.rows[0]["input_ids"])
    assert [pieces[place] for place in rows.words[0]][1:] == ["Ġour", "Ġschools"]


def test_words_behind_the_length_are_answered_o_and_counted(tiny_tokenizer):
    rows = encoded(examples_of([("harvest", "B-x")] * 30, [("of", "O")] * 2), tiny_tokenizer, max_length=12)
    assert rows.cut == 1 and (rows.words[0] == -1).sum() > 15 and max(rows.lengths) == 12
    answers = read_tags(np.ones((2, 12, 5)) * [0, 1, 0, 0, 0], rows, Labels("token_classification", NAMES, ()))
    assert answers[0][0] == "B-x" and answers[0][-1] == "O" and len(answers[0]) == 30


def test_batches_pad_tags_with_what_the_loss_ignores(tiny_tokenizer):
    rows = encoded(examples_of([("harvest", "B-x")], [("of", "O")] * 5), tiny_tokenizer)
    batch = collate(rows, [0, 1], tiny_tokenizer, "cpu")
    assert batch["labels"].shape == batch["input_ids"].shape
    assert (batch["labels"][batch["attention_mask"] == 0] == -100).all()
    assert rows.mask.tolist() == batch["attention_mask"].bool().tolist()


@pytest.mark.parametrize(
    ("sentence", "message"),
    [
        ([("a", "B-z")], "sentence 1: tag 'B-z' is not among the tags of the model: O, B-x"),
        ([("a", "O"), ("b", "O")], "the dev split has one class only"),
    ],
)
def test_tags_that_cannot_be_measured_are_named(sentence, message, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        encoded(examples_of(sentence), tiny_tokenizer)


def test_conll_files(tmp_path):
    file = tmp_path / "a.conll"
    file.write_text(
        "-DOCSTART- -X- O\n\n# newdoc id = a\n# sent_id = 1\n"
        "EU NNP B-ORG\nrejects VBZ O\n \nNew York\tNNP\tB-LOC\n#\tX\tO\n"
    )
    rows = read_table(file)
    assert [row["1"] for row in rows] == [["EU", "rejects"], ["New York", "#"]]
    assert [row["3"] for row in rows] == [["B-ORG", "O"], ["B-LOC", "O"]]
    assert rows[1].place.endswith("sentence from line 8")
    with pytest.raises(ValueError, match="there is no column 'ner'; columns: 1, 2, 3"):
        rows[0]["ner"]
    file.write_text("a O\nb\n")
    with pytest.raises(ValueError, match=r"line 2: 1 columns, expected 2: 'b'"):
        read_table(file)


def _write(file, sentences, seed, scheme):
    """Fillers, and two kinds of entities, each of words of its own."""
    draw, lines = random.Random(seed), []
    for _ in range(sentences):
        for kind, words in draw.choices([("", "of to and"), ("ship", "army ships"), ("law", "treaty revenue")], k=4):
            for number, word in enumerate(words.split()[: draw.randint(1, 2)]):
                begins = "B" if number == 0 and scheme == "IOB2" else "I"
                lines.append(f"{word}\tX\t{f'{begins}-{kind}' if kind else 'O'}")
            lines.append("the\tX\tO")
        lines.append("")
    file.write_text("\n".join(lines))
    return str(file)


def test_from_a_conll_file_to_tags_of_words(tmp_path, tiny_config, tiny_tokenizer, capsys):
    """Train, checkpoint, evaluate: the checkpoint says in IOB2 what files in IOB1 say."""
    tiny_config.id2label, tiny_config.label2id = {0: "a", 1: "b"}, {"a": 0, "b": 1}
    ElasticBertForTokenClassification(tiny_config).elasticbert.save_pretrained(tmp_path / "start")
    tiny_tokenizer.save_pretrained(tmp_path / "start")
    files = {
        "train": _write(tmp_path / "train.conll", 120, 0, "IOB1"),
        "dev": _write(tmp_path / "dev.conll", 30, 1, "IOB2"),
    }
    options = {"model": str(tmp_path / "start"), "output": str(tmp_path / "out"), "max_length": 48}
    assert train(TrainOptions(**options, **files, batch_size=12, epochs=4, learning_rate=3e-3)) == 0
    assert "token_classification (O, B-law, I-law, B-ship, I-ship)" in capsys.readouterr().out
    model = ElasticBertForTokenClassification.from_pretrained(tmp_path / "out")
    assert list(model.config.id2label.values()) == ["O", "B-law", "I-law", "B-ship", "I-ship"]
    options = {"model": str(tmp_path / "out"), "output": str(tmp_path / "seen"), "max_length": 48}
    evaluate(EvaluateOptions(**options, dev=files["dev"]))
    exits = json.loads((tmp_path / "seen/curve.json").read_text())["exits"]
    assert exits["4"][0]["metric"] == "entity_f1" and exits["4"][0]["value"] > 0.9
    rows = [line.split("\t") for line in (tmp_path / "seen/predictions.tsv").read_text().splitlines()]
    assert len(rows) == 31 and all(len(row[1].split()) == len(row[2].split()) for row in rows[1:])
