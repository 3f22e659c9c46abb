"""Token tagging: spans in IOB1 or IOB2, or plain tags, read at each word's first piece (Devlin et al. 2019, section
5.3)."""

from dataclasses import dataclass

import numpy as np
from transformers import PreTrainedTokenizerBase

from finetune.data import IGNORED, TokenEncoded, check_fast, rows_of
from finetune.examples import Examples
from finetune.labels import Labels
from finetune.tasks import Task

OUTSIDE = "O"
SPAN = ("B-", "I-")  # prefixes of the tags of spans; a task without any has plain tags (parts of speech)


@dataclass(frozen=True)
class EncodedTags(TokenEncoded):
    """words: of each row, the token of every word's first piece; -1 for a word cut off, or of no pieces."""

    words: list[np.ndarray]

    head = "token"


def _split(tag: str, place: str) -> tuple[str, str]:
    """The prefix (B, I or O) and the type of a tag."""
    prefix, _, kind = tag.partition("-")
    if tag == OUTSIDE:
        return OUTSIDE, ""
    if prefix not in ("B", "I") or not kind:
        raise ValueError(f"{place}: tag {tag!r} is neither O nor B- or I- with a type (IOB1 and IOB2 are read)")
    return prefix, kind


def is_iob1(sentences: list[list[str]], places: list[str]) -> bool:
    """Whether tags follow IOB1 (Ramshaw and Marcus 1995): a B only parts an entity from one of its type before it.

    ValueError for tags of neither scheme: entities that begin with I beside a B that parts nothing.
    """
    begins_inside, begins = None, None
    for tags, place in zip(sentences, places, strict=True):
        before = (OUTSIDE, "")
        for tag in tags:
            prefix, kind = _split(tag, place)
            follows = before[0] != OUTSIDE and before[1] == kind
            if prefix == "I" and not follows:
                begins_inside = begins_inside or (place, tag)
            if prefix == "B" and not follows:
                begins = begins or (place, tag)
            before = (prefix, kind)
    if begins_inside and begins:
        raise ValueError(
            f"tags follow neither IOB1 nor IOB2: {begins_inside[0]}: {begins_inside[1]} begins an entity, "
            f"and {begins[0]}: {begins[1]} begins one that follows none of its type"
        )
    return begins_inside is not None


def normalise(sentences: list[list[str]], places: list[str]) -> list[list[str]]:
    """Tags of spans as IOB2, where every entity begins with B; ValueError for what is no IOB. Plain tags stay."""
    if not any(tag.startswith(SPAN) for tags in sentences for tag in tags) or not is_iob1(sentences, places):
        return sentences
    return [_to_iob2(tags) for tags in sentences]


def _to_iob2(tags: list[str]) -> list[str]:
    before, normal = OUTSIDE, []
    for tag in tags:
        follows = before != OUTSIDE and before[2:] == tag[2:]
        normal.append(f"B-{tag[2:]}" if tag.startswith("I-") and not follows else tag)
        before = tag
    return normal


def tags_of(examples: Examples) -> list[list[str]]:
    """The tags of every sentence as IOB2; ValueError where a sentence has not one a word."""
    for words, tags, place in zip(examples.texts, examples.labels, examples.places, strict=True):
        if not isinstance(tags, list) or len(tags) != len(words) or not all(isinstance(tag, str) for tag in tags):
            raise ValueError(f"{place}: {len(words)} words need as many tags (text), got {tags!r:.80}")
    return normalise(examples.labels, examples.places)


def find_tags(examples: Examples) -> list[str]:
    """The names of the classes: O, then B and I of every type that the (training) examples have; plain tags sorted."""
    tags = {tag for sentence in tags_of(examples) for tag in sentence}
    if not any(tag.startswith(SPAN) for tag in tags):
        return sorted(tags)
    types = sorted({tag[2:] for tag in tags - {OUTSIDE}})
    return [OUTSIDE, *(f"{prefix}-{kind}" for kind in types for prefix in "BI")]


def encode_tags(
    task: Task, examples: Examples, split: str, labels: Labels, tokenizer: PreTrainedTokenizerBase, max_length: int
) -> EncodedTags:
    """The sentences tokenised, tags at first pieces; ValueError for a tag unknown to the model, or one everywhere."""
    check_fast(tokenizer)
    truth, numbers = tags_of(examples), {name: number for number, name in enumerate(labels.names)}
    for tags, place in zip(truth, examples.places, strict=True):
        unknown = next((tag for tag in tags if tag not in numbers), None)
        if unknown is not None:
            raise ValueError(f"{place}: tag {unknown!r} is not among the tags of the model: {', '.join(numbers)}")
    if len(found := {tag for tags in truth for tag in tags}) < 2:
        raise ValueError(f"the {split} split has one class only, {found} ({len(truth)} sentences); it needs two")
    spaced = [[f" {word}" for word in words] for words in examples.texts]  # byte-level BPE knows words by their space
    encoding = tokenizer(spaced, is_split_into_words=True, truncation=True, max_length=max_length)
    words = [_first_pieces(encoding.word_ids(row), len(tags)) for row, tags in enumerate(truth)]
    targets = [[IGNORED] * len(ids) for ids in encoding["input_ids"]]
    for row, (places, tags) in enumerate(zip(words, truth, strict=True)):
        for place, tag in zip(places, tags, strict=True):
            if place >= 0:
                targets[row][place] = numbers[tag]
    cut = sum(bool(row.overflowing) for row in encoding.encodings)
    return EncodedTags(rows_of(encoding), {"labels": targets}, _objects([tuple(tags) for tags in truth]), cut, words)


def _first_pieces(word_ids: list[int | None], words: int) -> np.ndarray:
    places = np.full(words, -1)
    for token in reversed(range(len(word_ids))):
        word = word_ids[token]
        if word is not None:
            places[word] = token
    return places


def _objects(values: list) -> np.ndarray:
    array = np.empty(len(values), dtype=object)
    array[:] = values
    return array


def read_tags(logits: np.ndarray, encoded: EncodedTags, labels: Labels) -> np.ndarray:
    """The tags that logits (rows, tokens, labels) give the words of every row; O for words that were not seen."""
    classes, names = logits.argmax(-1), np.array([*labels.names, OUTSIDE], dtype=object)
    rows = (
        names[np.where(places >= 0, row[places], len(names) - 1)]
        for row, places in zip(classes, encoded.words, strict=True)
    )
    return _objects([tuple(tags) for tags in rows])
