"""`python -m export predict`: a file of texts, answered by an exported folder."""

import json
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

from elastic_model.folders import check_file, new_file
from elastic_model.operating_points import BUDGETS
from elastic_model.session import ElasticSession
from export.config import PredictOptions
from export.rows import read_texts

LAST = ("exit_layer", "point")


def predict_file(options: PredictOptions) -> None:
    """A line per text, in order: label, score, what else the task answers, exit_layer, point; lists as JSON."""
    if options.output:
        check_file(options.output, options.input)
    session = ElasticSession.from_pretrained(options.folder, options.file, options.threads)
    texts = read_texts(options.input, options.text, options.pair)
    results = session(
        iter(texts),
        budget=read_budget(options.budget),
        max_layer=options.max_layer,
        batch_size=options.batch_size,
        progress=(lambda done: show_progress(done, len(texts))) if sys.stderr.isatty() else None,
    )
    with new_file(options.output) if options.output else nullcontext() as path:
        if path is None:
            sys.stdout.writelines(lines(results))
        else:
            with path.open("w", encoding="utf-8", newline="\n") as output:
                output.writelines(lines(results))


def lines(results: Iterator[dict[str, Any]]) -> Iterator[str]:
    """A header and a line per result, as they come."""
    columns: list[str] = []
    for result in results:
        if not columns:
            columns = ["label", "score"] if "label" in result else []
            columns += [name for name in result if name not in (*columns, *LAST)] + list(LAST)
            yield "\t".join(columns) + "\n"
        yield "\t".join(_cell(result[column]) for column in columns) + "\n"


def _cell(value: Any) -> str:
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, list):
        return json.dumps(value, ensure_ascii=False)
    return " ".join(str(value).split()) if isinstance(value, str) else str(value)


def show_progress(done: int, total: int) -> None:
    """A line on the terminal, overwritten as it goes."""
    print(f"\r{done} of {total} texts", end="\n" if done == total else "", file=sys.stderr, flush=True)


def read_budget(text: str | None, flag: str = "--budget") -> str | dict[str, float] | None:
    """A budget as the session takes it: `speedup=4` becomes a mapping, anything else is a point's name."""
    name, equals, value = (text or "").partition("=")
    if not equals:
        return text
    if name not in BUDGETS:
        raise ValueError(f"{flag} {text}: allowed are a point's name or one of {', '.join(BUDGETS)} with =NUMBER")
    try:
        return {name: float(value)}
    except ValueError:
        raise ValueError(f"{flag} {text}: {value!r} is not a number") from None
