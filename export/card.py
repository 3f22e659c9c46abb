"""What an export adds to the model card: the ONNX files, how to call them, what was checked."""

from typing import Any

NOTES = """\
## ONNX files

{files}

They take the tokenizer's arrays and answer {outputs}. {inputs}Needed: onnxruntime {onnxruntime} or later.
"""
INPUTS = """\
Further inputs have defaults, which onnxruntime in Python can override; Node and the browser ignore them, and a file
runs at its defaults there (`python -m export CHECKPOINT FOLDER --at POINT` writes others): `exit_threshold`, one
number per exit for the policy `{policy}`; `max_layer`, above which no row goes; `length_config`, for each layer the
share of a row's tokens that it keeps (NaN and more than 1 drop nothing, a share that rises counts as the smallest
before it); `length_mass`, for each layer the share of the attention that goes to the tokens it keeps, as few of each
row as it takes. """


def card_notes(report: dict[str, Any]) -> str:
    """The section of the card, from the export's report."""
    policy, plain = report["policy"], "exit" in report
    outputs = (
        "as the transformers model does, at the exit after layer {exit}".format(**report)
        if plain
        else (
            "the row's answer, `exit_layer` (rows) and every exit's answer (`exit_logits`), NaN where a row had left"
        )
    )
    return NOTES.format(
        files="\n".join(f"- `onnx/{name}.onnx`: {summary(result)}." for name, result in report["files"].items()),
        outputs=outputs,
        inputs="" if plain else INPUTS.format(policy=policy["name"] if policy else "none"),
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
