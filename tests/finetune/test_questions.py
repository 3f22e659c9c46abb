"""Question answering: SQuAD's files, windows over long contexts, the best span, none where there is none."""

import json
import random
import re
from dataclasses import replace

import numpy as np
import pytest

from elastic_model import ElasticBertForQuestionAnswering
from elastic_model.tables import read_table
from export.write import patch_config
from finetune.config import EvaluateOptions, TrainOptions
from finetune.data import collate
from finetune.evaluate import evaluate
from finetune.examples import Examples, find_problem_type, read_examples
from finetune.labels import Labels
from finetune.metrics import metric
from finetune.pipelines.config import PipelineOptions
from finetune.pipelines.pipeline import pipeline
from finetune.questions import choose_no_answer, encode_questions, read_answers
from finetune.tasks import own_task
from finetune.train import train

FILLER = "the harvest of this year has been plentiful in every part of the country and the army is at peace . "
LABELS = Labels("question_answering", ["start", "end"], ("squad_f1",))


def examples_of(*rows):
    """(question, context, answers with their places)."""
    questions, contexts, labels = [], [], []
    for question, context, answers in rows:
        questions.append(question)
        contexts.append(context)
        labels.append({"text": [text for text, _ in answers], "answer_start": [start for _, start in answers]})
    return Examples(questions, contexts, labels, [f"question {number}" for number in range(1, len(rows) + 1)])


def at(text, context):
    return (text, context.index(text))


def encoded(examples, tokenizer, max_length=32):
    return encode_questions(None, examples, "dev", LABELS, tokenizer, max_length)


def logits_for(rows):
    """Logits that are sure of the targets."""
    logits = np.zeros((len(rows), max(rows.lengths), 2))
    for side, name in enumerate(("start_positions", "end_positions")):
        logits[np.arange(len(rows)), rows.targets[name], side] = 5.0
    return logits


LONG = FILLER * 3 + "Two ships of the line were finished. " + FILLER * 2


def test_an_answer_behind_the_first_window_is_found_again(tiny_tokenizer):
    examples = examples_of(
        ("how many ships ?", LONG, [at("Two ships", LONG)]), ("what ?", "our schools", [("schools", 4)])
    )
    rows = encoded(examples, tiny_tokenizer)
    assert np.diff(rows.first)[0] > 4 and np.diff(rows.first)[1] == 1
    assert rows.size(32) == f"2 questions in {len(rows)} windows of 32 tokens"
    held = rows.targets["start_positions"] > 0
    assert 1 <= held[: rows.first[1]].sum() < rows.first[1] and held[-1]
    answers = read_answers(logits_for(rows), rows, LABELS)
    assert list(answers) == ["Two ships", "schools"]
    assert metric("exact_match")(answers, rows.labels) == 1.0


def test_every_character_of_a_context_is_in_a_window(tiny_tokenizer):
    rows = encoded(examples_of(("what ?", LONG, [at("Two", LONG)])), tiny_tokenizer)
    seen = np.zeros(len(LONG), dtype=int)
    for window in range(len(rows)):
        for start, end in rows.offsets[window][rows.in_context[window, : rows.lengths[window]]]:
            seen[start:end] += 1
    assert all(count for count, letter in zip(seen, LONG, strict=True) if letter.strip())
    assert seen.max() > 1 and max(rows.lengths) == 32


def test_a_long_question_leaves_room_for_the_context(tiny_tokenizer):
    rows = encoded(examples_of((FILLER * 5, "our schools", [("schools", 4)])), tiny_tokenizer)
    assert list(read_answers(logits_for(rows), rows, LABELS)) == ["schools"]


def test_batches_have_start_and_end(tiny_tokenizer):
    rows = encoded(examples_of(("what ?", "our schools", [("schools", 4)])), tiny_tokenizer)
    batch = collate(rows, [0], tiny_tokenizer, "cpu")
    start, end = batch["start_positions"].item(), batch["end_positions"].item()
    assert tiny_tokenizer.decode(batch["input_ids"][0, start : end + 1]) == "schools"


def test_the_layer_of_a_question_is_the_highest_of_its_windows(tiny_tokenizer):
    rows = encoded(examples_of(("what ?", LONG, [at("Two", LONG)]), ("what ?", "our schools", [])), tiny_tokenizer)
    layers = np.arange(len(rows))
    assert rows.per_example(layers).tolist() == [len(rows) - 2, len(rows) - 1]


def test_the_no_answer_threshold_is_the_best_of_all(tiny_tokenizer):
    draw, places = np.random.default_rng(0), random.Random(0)
    rows = []
    for _ in range(40):
        word = places.choice(["army", "harvest", "country"])
        rows.append(("what ?", FILLER, [at(word, FILLER)] if places.random() < 0.6 else []))
    rows = encoded(examples_of(*rows), tiny_tokenizer, 64)
    logits = logits_for(rows) + draw.normal(scale=2.0, size=(len(rows), max(rows.lengths), 2))

    def score(threshold):
        labels = Labels("question_answering", LABELS.names, LABELS.metrics, threshold)
        return metric("squad_f1")(read_answers(logits, rows, labels), rows.labels)

    chosen = choose_no_answer(logits, rows)
    assert score(chosen) == pytest.approx(max(map(score, np.linspace(-25, 25, 501))), abs=1e-9)
    assert score(chosen) > max(score(-1e9), score(1e9))  # it is neither always nor never


@pytest.mark.parametrize(
    ("context", "answer", "message"),
    [
        ("our schools", ("schools", 3), r"question 1: the answer 'schools' does not stand at character 3: ' school'"),
        ("our schools", ("schools", 99), r"does not stand at character 99"),
        ("our schools", ("schools", -7), r"does not stand at character -7"),
        ("our schools", ("schools", "4"), r"does not stand at character 4"),
        ("our schools", (" ", 3), r"the answer ' ' is no text"),
    ],
)
def test_spans_that_do_not_align_are_named(context, answer, message, tiny_tokenizer):
    with pytest.raises(ValueError, match=message):
        encoded(examples_of(("what ?", context, [answer])), tiny_tokenizer)


@pytest.mark.parametrize(
    "answer",
    [{"text": "a", "answer_start": 0}, {"text": None, "answer_start": []}, {"text": ["a"], "answer_start": []}],
)
def test_answers_of_another_form_are_named(answer, tiny_tokenizer):
    examples = replace(examples_of(("what ?", "our schools", [])), labels=[answer])
    with pytest.raises(ValueError, match="question 1: text and answer_start must be lists of one length"):
        encoded(examples, tiny_tokenizer)


def test_a_split_without_answers_is_named(tiny_tokenizer):
    with pytest.raises(ValueError, match="the dev split has no question with an answer"):
        encoded(examples_of(("what ?", "our schools", [])), tiny_tokenizer)


def squad(file, questions, version="v2.0"):
    """questions: (id, question, context, answers, is it impossible)."""
    paragraphs = [
        {
            "context": context,
            "qas": [
                {
                    "id": name,
                    "question": question,
                    "answers": [{"text": text, "answer_start": start} for text, start in answers],
                    **({"is_impossible": impossible} if version == "v2.0" else {}),
                }
            ],
        }
        for name, question, context, answers, impossible in questions
    ]
    file.write_text(json.dumps({"version": version, "data": [{"title": "t", "paragraphs": paragraphs}]}))
    return str(file)


def test_squad_files_of_both_versions(tmp_path):
    one = ("q1", "what ?", "our schools", [("schools", 4)], False)
    none = ("q2", "who ?", "our schools", [("our", 0)], True)  # v2 files keep plausible answers apart: no answer
    file = squad(tmp_path / "v2.json", [one, none])
    task = own_task({"train": file}, {"text": None, "pair": None, "label": None}, None)
    examples = read_examples(task, "train")
    assert find_problem_type(task, examples) == "question_answering"
    assert examples.labels == [{"text": ["schools"], "answer_start": [4]}, {"text": [], "answer_start": []}]
    assert read_table(tmp_path / "v2.json")[1].place.endswith("question q2")
    file = squad(tmp_path / "v1.json", [one], "1.1")
    assert read_examples(own_task({"train": file}, {}, None), "train").texts == ["what ?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"text": "a"}\n{"text": "b"}', r"not JSON \(Extra data\); JSON lines end in .jsonl"),
        ('[{"text": "a"}]', "not SQuAD's JSON"),
        ('{"data": [{"paragraphs": [{"context": "a", "qas": [{"id": 1}]}]}]}', "KeyError at 'question'"),
        ('{"data": []}', "has no rows"),
    ],
)
def test_json_that_is_no_squad_is_named(tmp_path, content, message):
    (tmp_path / "a.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        read_table(tmp_path / "a.json")


def _questions(count, seed):
    """The answer is the word behind `ships`; a third of the contexts have none."""
    draw = random.Random(seed)
    for number in range(count):
        words = draw.choices("the of and to every country year our".split(), k=draw.randint(8, 30))
        place, has = draw.randrange(len(words)), number % 3 > 0
        words[place : place + 1] = ["ships", draw.choice(["treaty", "revenue", "harvest"])] if has else ["army"]
        context = " ".join(words)
        found = re.search(r"ships (\w+)", context)
        yield f"q{number}", "ships ?", context, [(found[1], found.start(1))] if found else [], not has


def test_from_a_squad_file_to_answers(tmp_path, tiny_config, tiny_tokenizer):
    """Train, checkpoint with its no-answer threshold, evaluate; contexts longer than the model's rows."""
    ElasticBertForQuestionAnswering(tiny_config).elasticbert.save_pretrained(tmp_path / "start")
    tiny_tokenizer.save_pretrained(tmp_path / "start")
    files = {
        split: squad(tmp_path / f"{split}.json", _questions(60, seed)) for seed, split in enumerate(("train", "dev"))
    }
    options = {"model": str(tmp_path / "start"), "output": str(tmp_path / "out"), "max_length": 24}
    assert train(TrainOptions(**options, **files, batch_size=16, epochs=2, learning_rate=3e-3)) == 0
    model = ElasticBertForQuestionAnswering.from_pretrained(tmp_path / "out")
    assert isinstance(model.config.no_answer_threshold, float)
    options = {"model": str(tmp_path / "out"), "output": str(tmp_path / "seen"), "max_length": 24}
    evaluate(EvaluateOptions(**options, dev=files["dev"]))
    exits = json.loads((tmp_path / "seen/curve.json").read_text())["exits"]
    trained = json.loads((tmp_path / "out/evaluation.json").read_text())["exits"]["dev"]
    assert exits == trained  # the threshold chosen on dev is the one that the checkpoint answers with
    assert exits["4"][0]["metric"] == "squad_f1" and exits["4"][0]["value"] >= 1 / 3  # of never answering
    rows = [line.split("\t") for line in (tmp_path / "seen/predictions.tsv").read_text().splitlines()]
    assert len(rows) == 61 and all(len(row) == 4 for row in rows)

    # a pipeline's stage answers with the threshold that its own checkpoint has, here one at which nothing is answered
    patch_config(tmp_path / "out", {"no_answer_threshold": 1e6})
    given = {**options, "output": str(tmp_path / "pipeline"), "pipeline": "O", "batch_size": 16, "timed_rows": 1}
    assert pipeline(PipelineOptions(**given, **files)) == 0
    (stage,) = json.loads((tmp_path / "pipeline/measured.json").read_text())["measurements"]
    assert stage["quality"] == 1 / 3 != exits["4"][0]["value"]


def test_an_answer_that_a_window_does_not_hold_whole_is_not_in_it(tiny_tokenizer):
    """Neither cut on the left nor on the right: its window teaches that there is none."""
    answer = FILLER[4:60].strip()
    whole = encoded(examples_of(("what ?", FILLER * 3, [(answer, 4)])), tiny_tokenizer, 64)
    cut = encoded(examples_of(("what ?", FILLER * 3, [(answer, 4)])), tiny_tokenizer, 20)
    assert whole.targets["end_positions"][0] > 0
    assert not cut.targets["start_positions"].any() and not cut.targets["end_positions"].any()


def test_no_answer_scores_as_in_its_lowest_window(tiny_tokenizer):
    """SQuAD v2's rule: a window that rules an answer out says nothing of the others."""
    rows = encoded(examples_of(("what ?", LONG, [at("Two", LONG)])), tiny_tokenizer)
    logits = logits_for(rows)
    holding = int(rows.targets["start_positions"].argmax())
    logits[:, 0], logits[0, 0] = 0.0, -10.0
    assert holding > 0 and len(rows) > 2
    given = {
        threshold: read_answers(logits, rows, replace(LABELS, no_answer_threshold=threshold))[0]
        for threshold in (29.0, 31.0)
    }
    assert given == {29.0: "Two", 31.0: ""}


def test_questions_of_one_margin_are_answered_together(tiny_tokenizer):
    """A threshold between them does not exist: what was gained by it was not."""
    sure, wrong, less = ("what ?", FILLER, [at("army", FILLER)]), ("what ?", FILLER, []), ("what ?", FILLER, None)
    rows = encoded(examples_of(sure, wrong, (*less[:2], sure[2])), tiny_tokenizer, 64)
    start, end = rows.targets["start_positions"][0], rows.targets["end_positions"][0]
    logits = np.zeros((len(rows), max(rows.lengths), 2))
    for row, height in enumerate((5.0, 5.0, 3.0)):
        logits[row, start, 0] = logits[row, end, 1] = height
    chosen = choose_no_answer(logits, rows)
    answers = read_answers(logits, rows, replace(LABELS, no_answer_threshold=chosen))
    assert answers.tolist() == ["army"] * 3
