"""The tokenizer of a run: WordPiece trained on the text, or an existing one."""

import itertools
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer, BertTokenizer, PreTrainedTokenizerBase

SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
WORD_START = "\u2581"
ALPHABET = 1000  # characters that a new vocabulary knows at least, the most frequent ones; BERT's own stops there
COVERED = 0.9995  # of the text by characters that it knows: more of them where a script has more


def train_wordpiece(lines: Iterable[str], vocab_size: int, lowercase: bool) -> BertTokenizer:
    """A BERT tokenizer whose vocabulary, at most `vocab_size`, was merged pair by pair on `lines`; always the same.
    It knows the 1,000 most frequent characters, and more up to 99.95 % of the text (and a quarter of `vocab_size`):
    each takes two entries, and a few pages in other scripts would fill it.

    The WordPiece trainer of `tokenizers` numbers its ##-pieces in the order of a hash table, so two runs give two
    vocabularies. Marking where words start, not where they continue, gives the same merges from a sorted alphabet.
    """
    lines = list(lines)  # read twice
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.BertPreTokenizer(), pre_tokenizers.Metaspace(WORD_START, prepend_scheme="always", split=False)]
    )
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, min_frequency=2, show_progress=False)
    rare = _rare_characters(lines, tokenizer.normalizer, vocab_size // 4)
    tokenizer.train_from_iterator((line.translate(rare) for line in lines), trainer)
    merged = tokenizer.get_vocab()
    vocabulary = _wordpieces(sorted(merged, key=merged.__getitem__), vocab_size)
    return BertTokenizer(vocab={token: number for number, token in enumerate(vocabulary)}, do_lower_case=lowercase)


def _rare_characters(lines: list[str], normalizer: normalizers.Normalizer, most: int) -> dict[int, str]:
    """Those beyond the alphabet's limit, each with the space that stands for it. (The trainer's own `limit_alphabet`
    chooses between characters of one frequency by the order of a hash table.)"""
    written: Counter[str] = Counter()
    for line in lines:
        written.update(line)
    read = {character: normalizer.normalize_str(character).strip() for character in written}
    counts: Counter[str] = Counter()
    for character, count in written.items():
        for known in read[character]:
            counts[known] += count
    ordered = sorted(counts, key=lambda character: (-counts[character], character))
    covered = itertools.accumulate(counts[character] for character in ordered)
    needed = 1 + sum(one < COVERED * counts.total() for one in covered)
    kept = set(ordered[: max(ALPHABET, min(needed, most))])
    return {ord(character): " " for character, known in read.items() if not kept.issuperset(known)}


def _wordpieces(merged: list[str], vocab_size: int) -> list[str]:
    """Special tokens, every character as a word's start and as its continuation, then the merges in their order."""
    characters = [token for token in merged if len(token) == 1 and token != WORD_START]
    if len(SPECIAL_TOKENS) + 2 * len(characters) >= vocab_size:
        needed = len(SPECIAL_TOKENS) + 2 * len(characters)
        raise ValueError(
            f"vocab_size must be above {needed} for a text of {len(characters)} different characters, got {vocab_size}"
        )
    pieces = [token[1:] if token.startswith(WORD_START) else f"##{token}" for token in merged if token != WORD_START]
    ordered = [*SPECIAL_TOKENS, *characters, *(f"##{character}" for character in characters), *pieces]
    return list(dict.fromkeys(ordered))[:vocab_size]


def load_tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    """The tokenizer saved in `folder`; ValueError for one without the special tokens that pre-training needs."""
    if not folder.is_dir():
        raise ValueError(f"tokenizer folder {folder} does not exist")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} has no tokenizer that loads ({str(error).splitlines()[0]})") from error
    if not tokenizer.is_fast:
        raise ValueError(
            f"the tokenizer in {folder} ({type(tokenizer).__name__}) is not one of the tokenizers library"
        )
    if None in tokenizer.convert_ids_to_tokens(list(range(len(tokenizer)))):
        raise ValueError(
            f"the vocabulary of the tokenizer in {folder} has holes: some ids below its size name no token"
        )
    for name in ("cls_token", "sep_token", "mask_token", "pad_token"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"the tokenizer in {folder} has no {name}: pre-training needs cls, sep, mask and pad")
    return tokenizer


def word_starts(tokenizer: PreTrainedTokenizerBase) -> list[bool]:
    """For every entry of the vocabulary: whether it starts a word (WordPiece marks the others, byte-level these)."""
    tokens = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
    model = tokenizer.backend_tokenizer.model
    if isinstance(model, models.WordPiece):  # not by the look of the tokens: byte-level ones know ## as text
        return [not token.startswith(model.continuing_subword_prefix) for token in tokens]
    return [token.startswith(("\u0120", WORD_START)) for token in tokens]
