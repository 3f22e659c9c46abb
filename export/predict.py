"""`python -m export predict`: a file of texts, answered by an exported folder."""

import sys
from contextlib import nullcontext

from elastic_model.folders import new_file
from elastic_model.operating_points import BUDGETS
from elastic_model.session import ElasticSession
from export.config import PredictOptions
from export.rows import read_texts

COLUMNS = ("label", "score", "exit_layer", "point")


def predict_file(options: PredictOptions) -> None:
    """A line per text, in order: label, score, exit_layer, point."""
    session = ElasticSession.from_pretrained(options.folder, options.file, options.threads)
    texts = read_texts(options.input, options.text, options.pair)
    budget = read_budget(options.budget)
    results = session(texts, budget=budget, max_layer=options.max_layer, batch_size=options.batch_size)
    lines = ["\t".join(COLUMNS), *("\t".join(str(result[column]) for column in COLUMNS) for result in results)]
    with new_file(options.output) if options.output else nullcontext() as path:
        if path is None:
            sys.stdout.write("\n".join(lines) + "\n")
        else:
            path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def read_budget(text: str | None) -> str | dict[str, float] | None:
    """A budget as the session takes it: `speedup=4` becomes a mapping, anything else is a point's name."""
    name, equals, value = (text or "").partition("=")
    if not equals:
        return text
    if name not in BUDGETS:
        raise ValueError(f"--budget {text}: allowed are a point's name or one of {', '.join(BUDGETS)} with =NUMBER")
    try:
        return {name: float(value)}
    except ValueError:
        raise ValueError(f"--budget {text}: {value!r} is not a number") from None
