"""What the text of a run amounts to, per source and in all."""

from typing import Any

import numpy as np

from pretrain.config import PretrainConfig
from pretrain.data import Examples, GlobalBatches, Share
from pretrain.prepare import Corpus, TokenizedSource, prepare

COLUMNS = {
    "documents": ",d",
    "sentences": ",d",
    "tokens": ",d",
    "unknown": ".2%",
    "examples": ",d",
    "pairs": ",d",
    "padding": ".1%",
    "share": ".1%",
    "held_out": ",d",
}


def statistics(corpus: Corpus, batches: GlobalBatches, held_out: Examples) -> dict[str, Any]:
    """Of every source, and of all: `documents`, `sentences`, `tokens`, `unknown` (share of the tokens); training
    `examples`, `pairs` (those of two segments), `padding` (share of `max_length` that they leave empty), `share` (of
    the examples of an epoch); `held_out` examples.

    `padding_in_batches` is less than `padding`: rows of like length share a batch, padded to its longest.
    """
    train = batches.examples
    weights = [source.weight or (train.source == number).sum() for number, source in enumerate(corpus.sources)]
    return {
        "sources": {
            source.name: {
                **_counts(corpus.sources[number : number + 1], train, train.source == number),
                "share": float(weights[number] / sum(weights)),
                "held_out": int((held_out.source == number).sum()),
                "parts": [{"name": part.name, "sha256": part.key} for part in source.parts],
            }
            for number, source in enumerate(corpus.sources)
        },
        "total": {
            **_counts(corpus.sources, train, np.ones(len(train), dtype=bool)),
            "share": 1.0,
            "held_out": len(held_out),
        },
        "padding_in_batches": batches.padding(),
        "max_length": train.config.max_length,
        "vocabulary": len(corpus.tokenizer),
    }


def _counts(sources: list[TokenizedSource], train: Examples, chosen: np.ndarray) -> dict[str, Any]:
    """Of these sources, whose training examples are `chosen` (examples,)."""
    total = {name: sum(source.total(name) for source in sources) for name in ("documents", "sentences", "tokens")}
    return {
        **total,
        "unknown": sum(source.total("unknown") for source in sources) / total["tokens"],
        "examples": int(chosen.sum()),
        "pairs": int(train.ordered[chosen].sum()),
        "padding": float(1 - train.lengths[chosen].mean() / train.config.max_length) if chosen.any() else 0.0,
    }


def table(found: dict[str, Any]) -> str:
    """`statistics` as lines of text, a source a line."""
    lines = {**found["sources"], **({"total": found["total"]} if len(found["sources"]) > 1 else {})}
    rows = [["", *COLUMNS]]
    rows += [[name, *(format(of[column], how) for column, how in COLUMNS.items())] for name, of in lines.items()]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)
    return (
        f"{text}\npadding is up to max_length {found['max_length']}; in the batches, sorted by length, it is "
        f"{found['padding_in_batches']:.1%}; vocabulary {found['vocabulary']:,}"
    )


def prepare_text(config: PretrainConfig) -> int:
    """Prepare the text of a run, without a model, and print its statistics."""
    corpus = prepare(config)
    train, held_out = (Examples(corpus, config, held_out=side) for side in (False, True))
    batches = GlobalBatches(train, config.batch_size, Share(0, 1, config.micro_batch_size or config.batch_size))
    print(table(statistics(corpus, batches, held_out)))
    return 0
