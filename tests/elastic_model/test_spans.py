import re
import subprocess
import sys

import numpy as np
import pytest
import torch

from elastic_model import ElasticBertConfig, ElasticBertForQuestionAnswering
from elastic_model.spans import best_answer

CONTEXT = (
    "The revenue has met the expenses of the Government. A treaty of commerce was signed in the spring. "
    "The mails now reach every county of the western States within a fortnight. The army keeps its strength. "
    "We will invest in new energy and in new roads."
)
QUESTION = "When was it signed?"


@pytest.fixture
def windows(tiny_tokenizer):
    """The question and a context in windows of 40 tokens that overlap by 12: offsets, which tokens are context."""

    def cut(context):
        encoding = tiny_tokenizer(
            [QUESTION],
            [context],
            truncation="only_second",
            max_length=40,
            stride=12,
            return_overflowing_tokens=True,
            return_offsets_mapping=True,
            padding="max_length",
        )
        in_context = [[part == 1 for part in encoding.sequence_ids(i)] for i in range(len(encoding["input_ids"]))]
        return np.array(encoding["offset_mapping"]), np.array(in_context)

    return cut


def logits_for(offsets, in_context, left, right):
    """Logits that are 8 at the characters' first and last token wherever a window sees them, else small noise."""
    noise = np.random.default_rng(0).normal(size=(2, *in_context.shape)).astype(np.float32)
    start, end = noise * 0.1
    start[in_context & (offsets[..., 0] == left)] = 8.0
    end[in_context & (offsets[..., 1] == right)] = 8.0
    return start, end


@pytest.mark.parametrize(
    "answer", ["The revenue", "in the spring", "within a fortnight", "its strength", "new roads."]
)
def test_an_answer_is_found_wherever_it_stands_in_a_long_context(windows, answer):
    offsets, in_context = windows(CONTEXT)
    assert len(offsets) >= 4
    left = CONTEXT.index(answer)
    found = best_answer(CONTEXT, *logits_for(offsets, in_context, left, left + len(answer)), offsets, in_context)
    assert (found.text, found.start, found.end) == (answer, left, left + len(answer))
    assert found.score == 16.0


def test_the_best_span_is_that_of_an_exhaustive_search():
    random = np.random.default_rng(1)
    start, end = random.normal(size=(2, 3, 12)).astype(np.float32)
    in_context = random.random((3, 12)) < 0.7
    context = "".join(chr(ord("a") + i) for i in range(12))
    offsets = np.broadcast_to(np.stack([np.arange(12), np.arange(12) + 1], -1), (3, 12, 2))
    scores = {
        (window, first, last): start[window, first] + end[window, last]
        for window in range(3)
        for first in range(12)
        for last in range(first, min(first + 4, 12))
        if in_context[window, first] and in_context[window, last]
    }
    _, first, last = max(scores, key=scores.get)
    found = best_answer(context, start, end, offsets, in_context, max_tokens=4)
    assert (found.text, found.score) == (context[first : last + 1], max(scores.values()))


def test_question_and_special_tokens_and_spans_that_run_backwards_are_never_the_answer(windows):
    offsets, in_context = windows(CONTEXT)
    start, end = logits_for(offsets, in_context, CONTEXT.index("treaty"), CONTEXT.index("spring") + 6)
    start[~in_context] = end[~in_context] = 50.0
    before = in_context & (offsets[..., 1] < CONTEXT.index("treaty"))
    end[before] = 12.0  # ends before it starts
    found = best_answer(CONTEXT, start, end, offsets, in_context)
    assert found.text == "treaty of commerce was signed in the spring"


def test_an_answer_has_at_most_max_tokens(windows):
    offsets, in_context = windows(CONTEXT)
    start, end = logits_for(offsets, in_context, CONTEXT.index("treaty"), CONTEXT.index("spring") + 6)
    short = best_answer(CONTEXT, start, end, offsets, in_context, max_tokens=3)
    assert short.score < 16.0 and len(short.text) < len("treaty of commerce was signed in the spring")


def test_no_answer_wins_only_by_its_lowest_window_and_its_threshold(windows):
    offsets, in_context = windows(CONTEXT)
    left = CONTEXT.index("spring")
    start, end = logits_for(offsets, in_context, left, left + 6)
    start[:, 0], end[:, 0] = 9.0, 9.0  # every window but one denies that it holds the answer
    start[1, 0], end[1, 0] = 5.0, 5.0
    arguments = (CONTEXT, start, end, offsets, in_context)
    assert best_answer(*arguments).text == "spring"
    found = best_answer(*arguments, no_answer_threshold=0.0)
    assert (found.text, found.score, found.no_answer_score) == ("spring", 16.0, 10.0)
    assert best_answer(*arguments, no_answer_threshold=5.9).text == "spring"
    none = best_answer(*arguments, no_answer_threshold=6.0)
    assert (none.text, none.start, none.end) == ("", 0, 0)


def test_the_space_that_byte_level_tokens_carry_is_no_part_of_the_answer():
    offsets = np.array([[[0, 0], [0, 3], [3, 7]]])
    start, end = np.array([[0.0, 0.0, 5.0]]), np.array([[0.0, 0.0, 5.0]])
    found = best_answer("the end", start, end, offsets, [[False, True, True]])
    assert (found.text, found.start, found.end) == ("end", 4, 7)


GOOD = {
    "start_logits": np.zeros((1, 3)),
    "end_logits": np.zeros((1, 3)),
    "offsets": np.zeros((1, 3, 2), dtype=int),
    "in_context": [[False, True, True]],
}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"start_logits": np.zeros(3)}, "start_logits must have the shape (windows, tokens)"),
        ({"end_logits": np.zeros((1, 4))}, "end_logits must have the shape (1, 3)"),
        ({"offsets": np.zeros((1, 3))}, "offsets must have the shape (1, 3, 2)"),
        ({"in_context": [[True]]}, "in_context must have the shape (1, 3)"),
        ({"in_context": [[False] * 3]}, "marks no token of the context"),
        ({"start_logits": np.array([[0.0, np.nan, 0.0]])}, "must be finite"),
        ({"max_tokens": 0}, "max_tokens must be at least 1, got 0"),
    ],
)
def test_bad_input_is_named(wrong, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        best_answer("context", **(GOOD | wrong))


def test_spans_need_no_torch():
    code = "import sys, elastic_model.spans; assert 'torch' not in sys.modules and 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


OPENS, CLOSES, WIDTH = 6, 7, 16  # an answer's first and last word; a window holds [CLS] and WIDTH - 1 words


def questions(rows, generator):
    """Windows of random words, an answer of three in half of them; its start and end, [CLS] if there is none."""
    ids = torch.randint(8, 60, (rows, WIDTH), generator=generator)
    ids[:, 0] = 2
    at = torch.randint(1, WIDTH - 2, (rows,), generator=generator)
    has = torch.arange(rows) % 2 == 0
    ids[has, at[has]], ids[has, at[has] + 2] = OPENS, CLOSES
    return ids, torch.where(has, at, 0), torch.where(has, at + 2, 0)


@pytest.fixture(scope="module")
def trained():
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(0)
    config = ElasticBertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
        max_position_embeddings=WIDTH,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    model = ElasticBertForQuestionAnswering(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-3)
    for _ in range(80):
        ids, start, end = questions(32, generator)
        model(input_ids=ids, start_positions=start, end_positions=end).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model.eval()


def test_a_trained_model_answers_from_a_context_much_longer_than_itself(trained):
    random = np.random.default_rng(3)
    right = 0
    for _ in range(20):
        words = random.integers(8, 60, 60)
        at = random.integers(58)
        words[at], words[at + 2] = OPENS, CLOSES
        context = " ".join(f"w{word:02d}" for word in words)  # four characters a word
        starts = range(0, 60 - WIDTH + 5, WIDTH // 2 - 1)  # windows overlap by half
        tokens = [[-1, *range(start, min(start + WIDTH - 1, 60))] for start in starts]
        tokens = [window + [-1] * (WIDTH - len(window)) for window in tokens]
        index = np.array(tokens)
        ids = torch.tensor(np.where(index < 0, 0, words[index]))
        ids[:, 0] = 2
        mask = torch.tensor((index >= 0) | (np.arange(WIDTH) == 0))
        offsets = np.where(index[..., None] < 0, 0, index[..., None] * 4 + np.array([0, 3]))
        with torch.no_grad():
            output = trained(input_ids=ids, attention_mask=mask.long())
        found = best_answer(
            context, output.start_logits, output.end_logits, offsets, index >= 0, no_answer_threshold=0.0
        )
        right += (found.start, found.end) == (4 * at, 4 * at + 11)
    assert right >= 18
