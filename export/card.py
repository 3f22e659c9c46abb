"""What an export adds to the model card: the ONNX files, how to call them, what was checked."""

from typing import Any

NOTES = """\
## ONNX files

{files}

They take the tokenizer's {tokens} and answer {outputs}. {defaults}Needed: onnxruntime {onnxruntime} or later.
"""
PLAIN = "`{}`, as the transformers model does, at the exit after layer {}"
DEFAULTS = """\
Further inputs have defaults, which onnxruntime in Python can override; Node and the browser ignore them, and a file
runs at its defaults there (`python -m export CHECKPOINT FOLDER --at POINT` writes others): {}. """
INPUTS = {
    "exit_threshold": "for each exit the {number} at which the policy `{policy}` lets a row leave",
    "max_layer": "above which no row goes",
    "length_config": "for each layer the share of a row's tokens that it keeps (NaN and more than 1 drop nothing, a "
    "share that rises counts as the smallest before it)",
    "length_mass": "for each layer the share of the attention that goes to the tokens it keeps, as few of each row as "
    "it takes",
}
OUTPUTS = {
    "exit_layer": "the layer after which each row left",
    "kept_tokens": "how many tokens of each row every layer kept",
    "exit_logits": "every exit's answer, NaN where a row had left",
}
OUTPUTS |= dict.fromkeys(("exit_start_logits", "exit_end_logits"), OUTPUTS["exit_logits"])


def _listed(names: list[str], meanings: dict[str, str], **values: str) -> str:
    known = {name: f" ({meanings[name].format(**values)})" if name in meanings else "" for name in names}
    return ", ".join(f"`{name}`{meaning}" for name, meaning in known.items())


def card_notes(report: dict[str, Any]) -> str:
    """The section of the card, from the export's report."""
    policy = (report["policy"] or {}).get("name", "")
    number = "count" if policy in ("patience", "voting") else "number"
    first = next(iter(report["files"].values()))  # the others have the same names
    given = [name for name in first["inputs"] if name in INPUTS]
    outputs = _listed(first["outputs"], OUTPUTS)
    return NOTES.format(
        files="\n".join(f"- `onnx/{name}.onnx`: {summary(result)}." for name, result in report["files"].items()),
        tokens=_listed([name for name in first["inputs"] if name not in INPUTS], {}),
        outputs=PLAIN.format("`, `".join(first["outputs"]), report["exit"]) if "exit" in report else outputs,
        defaults=DEFAULTS.format(_listed(given, INPUTS, policy=policy, number=number)) if given else "",
        onnxruntime=report["requires"]["onnxruntime"],
    )


STOCK = """\
---
library_name: transformers
---

# {name}

A stock BERT made of the first {exit} layers of an elastic checkpoint and the exit after them; it needs no code but
transformers'. Its outputs differ from that exit's by at most {stock_difference:.1g}.

{notes}"""


def stock_card(name: str, report: dict[str, Any]) -> str:
    """The card of a stock BERT folder."""
    return STOCK.format(name=name, notes=card_notes(report), **report)


def summary(result: dict[str, Any]) -> str:
    """What the checks of one file found, in a line."""
    size = f"{result['bytes'] / 2**20:.0f} MiB"
    if "unchecked" in result:
        return f"{size}, not checked: {result['unchecked']}"
    if "largest_difference" in result:
        worst = max(result["largest_difference"].values())
        return f"{size}, float32, differs from PyTorch by at most {worst:.1g}"
    rows = f"{result['rows']} {'real' if result['real_rows'] else 'random'} rows"
    full = [*result["agreement"].values()][-1]
    default = result["default_agreement"]
    int8 = f"int8 ({result['int8_share']:.0%} of products)" if result["int8_share"] else "16-bit weights"
    where = f", emulated {result['emulated']}" if "emulated" in result else ""
    return (
        f"{size}, {int8}{where}, answers {full:.1%} of {rows} like float32 at full depth, {default:.1%} at its default"
    )
