"""What an export adds to the model card: the ONNX files, how to call them, what was checked."""

from typing import Any

NOTES = """\
## ONNX files

{files}

They take the tokenizer's arrays and answer `logits` (rows, labels), `exit_layer` (rows) and `exit_logits` (exits,
rows, labels), NaN where a row had left. Two further inputs have defaults, which onnxruntime in Python can override (in
Node and in the browser a file runs at its defaults): `exit_threshold`, one number per exit for the policy `{policy}`,
and `max_layer`, above which no row goes. Needed: onnxruntime {onnxruntime} or later.
"""


def card_notes(report: dict[str, Any]) -> str:
    """The section of the card, from the export's report."""
    return NOTES.format(
        files="\n".join(f"- `onnx/{name}.onnx`: {summary(result)}." for name, result in report["files"].items()),
        policy=report["policy"]["name"],
        onnxruntime=report["requires"]["onnxruntime"],
    )


def summary(result: dict[str, Any]) -> str:
    """What the checks of one file found, in a line."""
    if "unchecked" in result:
        return f"int8, not checked: {result['unchecked']}"
    if "largest_difference" in result:
        return f"float32, logits differ from PyTorch by at most {max(result['largest_difference'].values()):.1g}"
    rows = f"{result['rows']} {'real' if result['real_rows'] else 'random'} rows"
    full = [*result["agreement"].values()][-1]
    default = result["default_agreement"]
    return f"int8, answers {full:.1%} of {rows} like float32 at full depth, {default:.1%} at its default"
