"""The README of an artefact: what its files are, how to call them, what was checked."""

from typing import Any

from elastic_model.operating_points import OperatingPoints
from export.checkpoint import Checkpoint

CARD = """\
---
library_name: elastic-model
pipeline_tag: text-classification
---

# {name}

A BERT classifier with an exit after layers {exits}: easy texts leave early. Labels: {labels}.

```python
from elastic_model import ElasticSession

session = ElasticSession.from_pretrained("{name}")
print(session(["A text to classify."]))
```

Or with onnxruntime alone: `onnx/*.onnx` take the tokenizer's arrays and answer `logits` and `exit_layer`. Two further
inputs have defaults: `exit_threshold`, one number per exit ({policy}), and `max_layer`.
{points}
## Checks

{checks}
"""


def model_card(checkpoint: Checkpoint, report: dict[str, Any], points: OperatingPoints | None) -> str:
    """The checkpoint's own README with the ONNX files added, or a short one."""
    config = checkpoint.config
    lines = [f"- `onnx/{name}.onnx`: {summary(result)}" for name, result in report["files"].items()]
    return CARD.format(
        name=checkpoint.folder.resolve().name,
        exits=", ".join(map(str, config.exit_layers)),
        labels=", ".join(config.id2label.values()),
        policy=report["policy"]["name"],
        points=_table(points),
        checks="\n".join(lines),
    )


def summary(result: dict[str, Any]) -> str:
    """What the checks of one file found, in a line."""
    if "unchecked" in result:
        return f"not checked: {result['unchecked']}"
    if "largest_difference" in result:
        return f"float32; logits differ from PyTorch by at most {max(result['largest_difference'].values()):.1g}"
    where = "real" if result["real_rows"] else "random"
    agreement = min(result["agreement"].values())
    return f"int8; answers like float32 on at least {agreement:.1%} of {result['rows']} {where} rows at every exit"


def _table(points: OperatingPoints | None) -> str:
    if points is None or not points.points:
        return ""
    rows = [f"| {point.name} | {point.mean_exit_layer:.2f} | {_quality(point.quality)} |" for point in points.points]
    return "\n".join(["", "| operating point | mean exit layer | quality |", "| --- | --- | --- |", *rows, ""])


def _quality(quality: dict[str, Any] | None) -> str:
    if quality is None:
        return ""
    interval = f" ({quality['low']:.3f} to {quality['high']:.3f})" if "low" in quality else ""
    return f"{quality.get('metric', '')} {quality['value']:.3f}{interval}".strip()
