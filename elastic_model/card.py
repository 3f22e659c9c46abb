"""The model card of a checkpoint folder, made from its configuration, its operating points and its record of
provenance: what none of them states is left out of the metadata, and the card says so."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from huggingface_hub.utils import yaml_dump

from elastic_model import cost
from elastic_model.configuration_elasticbert import ElasticBertConfig
from elastic_model.operating_points import FILE as POINTS_FILE
from elastic_model.operating_points import OperatingPoint, OperatingPoints
from elastic_model.provenance import (
    CARD,
    Metric,
    Stage,
    base_model_of,
    datasets_of,
    languages_of,
    license_of,
    listed,
    read_provenance,
    weights_hash,
)

MARKER = "<!-- Written by elastic-model, which may write it anew. Remove this line to keep a card of your own. -->"
TAGS = ("elasticbert", "early-exit", "multi-exit")
NOT_STATED = "not stated"
TOKENS = 128  # the length that FLOPs are stated for, where the model takes as many
TEXTS = '["A first text.", "And a second one, which is longer."]'
PAIRS = '[("A first text.", "A second one, read together with the first.")]'
PAIR_INPUTS = (
    'tokenizer(["A first text."], ["A second one, read together with the first."], padding=True, return_tensors="pt")'
)

TRUST = (
    "`trust_remote_code=True` runs the `.py` files that come with the weights: read them, and fix `revision=` to"
    " the commit that you have read. Where `elastic-model` is installed, `import elastic_model.auto` takes its own"
    " code instead."
)


@dataclass(frozen=True)
class Task:
    """What a card says of a model class: the hub's tag, the class that loads it, its head in `cost`, and its code."""

    pipeline_tag: str
    auto_class: str
    head: str
    inputs: str
    result: str
    ids: str = "[[2, 3, 4, 5]]"
    takes_policy: bool = True
    texts: str = TEXTS


TASKS = {
    "ElasticBertModel": Task(
        "feature-extraction",
        "AutoModel",
        "none",
        f'tokenizer({TEXTS}, padding=True, return_tensors="pt")',
        "output.last_hidden_state.shape",
        takes_policy=False,
    ),
    "ElasticBertForPreTraining": Task(
        "fill-mask",
        "AutoModelForPreTraining",
        "pretraining",
        'tokenizer([f"A {tokenizer.mask_token} text."], return_tensors="pt")',
        "output.prediction_logits.argmax(-1)",
        takes_policy=False,
    ),
    "ElasticBertForMaskedLM": Task(
        "fill-mask",
        "AutoModelForMaskedLM",
        "masked_lm",
        'tokenizer([f"A {tokenizer.mask_token} text."], return_tensors="pt")',
        "output.logits.argmax(-1)",
        takes_policy=False,
    ),
    "ElasticBertForSequenceClassification": Task(
        "text-classification",
        "AutoModelForSequenceClassification",
        "sequence",
        f'tokenizer({TEXTS}, padding=True, return_tensors="pt")',
        "output.logits, output.exit_layers",
    ),
    "ElasticBertForTokenClassification": Task(
        "token-classification",
        "AutoModelForTokenClassification",
        "token",
        f'tokenizer({TEXTS}, padding=True, return_tensors="pt")',
        "output.logits.argmax(-1), output.exit_layers",
    ),
    "ElasticBertForQuestionAnswering": Task(
        "question-answering",
        "AutoModelForQuestionAnswering",
        "question_answering",
        'tokenizer(["Who spoke?"], ["The speaker spoke."], return_tensors="pt")',
        "output.start_logits.argmax(-1), output.end_logits.argmax(-1), output.exit_layers",
        texts='[("Who spoke?", "The speaker spoke.")]',
    ),
    "ElasticBertForMultipleChoice": Task(
        "multiple-choice",
        "AutoModelForMultipleChoice",
        "sequence",
        'tokenizer(["Who spoke?"] * 2, ["The speaker.", "Nobody."], padding=True, return_tensors="pt")',
        "output.logits.argmax(-1), output.exit_layers",
        ids="[[[2, 3, 4], [2, 3, 5]]]",
    ),
}


@dataclass(frozen=True)
class Facts:
    """All that the card of a folder is made from; `metrics` and `points` only where they belong to these weights."""

    name: str
    repo_id: str | None
    config: ElasticBertConfig
    task: Task
    stages: list[Stage]
    metrics: list[Metric]
    points: OperatingPoints | None
    has_tokenizer: bool
    onnx_files: list[str]
    recorded: bool

    @property
    def exit_layers(self) -> list[int]:
        """The layers with an exit, from 1."""
        return list(self.config.exit_layers or ())


def write_card(
    folder: Path | str,
    repo_id: str | None = None,
    *,
    name: str | None = None,
    tags: Iterable[str] = (),
    notes: str = "",
) -> ModelCard:
    """Write README.md of a checkpoint folder, whose weights, tokenizer and record are there already.

    `repo_id`: the id that the code example loads (default: the folder itself); `name`: what the card calls the model
    (default: the folder, which may still have a temporary name); `notes`: Markdown to end with.
    ValueError where the folder is no elastic checkpoint, or holds a card that somebody else wrote.
    """
    file = Path(folder) / CARD
    if file.exists() and not is_ours(file):
        raise ValueError(
            f"{file} was not written by elastic-model and is left as it is; move it away to get a new one"
        )
    facts = read_facts(Path(folder), repo_id, name)
    card = ModelCard(
        f"---\n{metadata(facts, tags).to_yaml()}\n---\n\n{text(facts, notes)}", ignore_metadata_errors=False
    )
    card.save(file)
    return card


def is_ours(card: Path) -> bool:
    """Whether a card is one that `write_card` wrote and nobody claimed since."""
    return MARKER in card.read_text(encoding="utf-8", errors="replace")


def read_facts(folder: Path, repo_id: str | None = None, name: str | None = None) -> Facts:
    """What the folder's files say; ValueError where they are not those of an elastic checkpoint."""
    config, task = _read_config(folder)
    weights = weights_hash(folder)
    if weights is None:
        raise ValueError(f"{folder} holds no weights (*.safetensors); save the model there first")
    stages = read_provenance(folder)
    points = OperatingPoints.read(folder) if (folder / POINTS_FILE).is_file() else None
    return Facts(
        name=name or (repo_id or folder.resolve().name).split("/")[-1],
        repo_id=repo_id,
        config=config,
        task=task,
        stages=stages,
        metrics=[metric for stage in stages if stage.checkpoint == weights for metric in stage.metrics],
        points=points if points is not None and points.checkpoint == weights else None,
        has_tokenizer=(folder / "tokenizer_config.json").is_file(),
        onnx_files=sorted(file.name for file in folder.glob("onnx/*.onnx")),
        recorded=bool(stages) and stages[-1].checkpoint == weights,
    )


def _read_config(folder: Path) -> tuple[ElasticBertConfig, Task]:
    file = folder / "config.json"
    if not file.is_file():
        raise ValueError(f"{folder} has no config.json: it is no checkpoint folder")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is not JSON ({error})") from error
    model_type, classes = content.get("model_type"), content.get("architectures") or []
    if model_type != ElasticBertConfig.model_type:
        raise ValueError(f"{file}: model_type must be {ElasticBertConfig.model_type!r} for a card, got {model_type!r}")
    if not classes or classes[0] not in TASKS:
        raise ValueError(f"{file}: architectures must name one of {', '.join(TASKS)}, got {classes}")
    labels = {"num_labels": 1} if classes[0] == "ElasticBertForMultipleChoice" else {}  # one score for each choice
    config, task = ElasticBertConfig.from_dict(content, **labels), TASKS[classes[0]]
    of_pairs = classes[0] == "ElasticBertForSequenceClassification" and config.text_pairs
    return config, replace(task, inputs=PAIR_INPUTS, texts=PAIRS) if of_pairs else task


def metadata(facts: Facts, tags: Iterable[str] = ()) -> ModelCardData:
    """The hub's metadata; a field that no record states is None, and so is not written."""
    results = eval_results(facts)
    return ModelCardData(
        **license_of(facts.stages),
        base_model=base_model_of(facts.stages),
        datasets=datasets_of(facts.stages) or None,
        language=languages_of(facts.stages) or None,
        library_name="transformers",
        pipeline_tag=facts.task.pipeline_tag,
        tags=[*TAGS, *(["onnx"] if facts.onnx_files else []), *tags],
        metrics=sorted({metric.metric for metric in facts.metrics}) or None,
        model_name=facts.name if results else None,  # the name of the results' list, and nothing else
        eval_results=results or None,
    )


def eval_results(facts: Facts) -> list[EvalResult]:
    """The metrics as the hub's evaluation results; those of one exit name it."""
    hub_ids = {one.name: one.hub_id for stage in facts.stages for one in stage.data if one.hub_id}
    return [
        EvalResult(
            task_type=facts.task.pipeline_tag,
            dataset_type=hub_ids.get(one.data, f"local:{one.data}"),  # a bare name would claim the hub's data set
            dataset_name=one.data,
            dataset_split=one.split,
            metric_type=one.metric,
            metric_name=one.metric if one.exit_layer is None else f"{one.metric} at exit {one.exit_layer}",
            metric_value=one.value,
            metric_args=None if one.exit_layer is None else {"exit_layer": one.exit_layer},
        )
        for one in facts.metrics
        if math.isfinite(one.value)
    ]


def text(facts: Facts, notes: str = "") -> str:
    """The card below its metadata."""
    layers, exits = facts.config.num_hidden_layers, ", ".join(map(str, facts.exit_layers))
    summary = (
        f"A BERT encoder of {layers} layers x {facts.config.hidden_size} with exits after layers {exits}: easy inputs"
        " may leave early, tokens may be dropped on the way up, and the whole model is still there."
    )
    parts = [MARKER, f"# {facts.name}", summary, statements(facts), _example(facts), _exits(facts), _points(facts)]
    parts += [_metrics(facts), _data(facts.stages), _stages(facts), notes.strip()]
    return "\n\n".join(part for part in parts if part) + "\n"


def statements(facts: Facts) -> str:
    """Licence, base model, data sets and languages, each with its value or the words that it is not stated."""
    stages = facts.stages
    base_model = listed(base_model_of(stages))
    if stages and stages[0].parent is None:
        base_model = base_model or ["none, trained from random weights"]
    stated = license_of(stages)
    rows = {
        "License": listed(stated.get("license_name") or stated.get("license")),
        "Base model": base_model,
        "Data sets of the hub": datasets_of(stages),
        "Language": languages_of(stages),
    }
    lines = [f"- {name}: {', '.join(map(_cell, values)) or NOT_STATED}" for name, values in rows.items()]
    if stages and not facts.recorded:
        lines.append(f"- What was done to the weights after the last stage below: {NOT_STATED}")
    return "\n".join(lines)


def _example(facts: Facts) -> str:
    task, source = facts.task, json.dumps(facts.repo_id or ".")
    policy = ""
    if task.takes_policy and facts.config.exit_policy is None:
        policy = f", exit_policy={json.dumps(_policy(facts))}"
    lines = [
        "import torch",
        f"from transformers import {task.auto_class}{', AutoTokenizer' * facts.has_tokenizer}",
        "",
    ]
    lines.append(f"model = {task.auto_class}.from_pretrained({source}, trust_remote_code=True).eval()")
    if facts.has_tokenizer:
        lines.append(f"tokenizer = AutoTokenizer.from_pretrained({source}, trust_remote_code=True)")
        lines.append(f"batch = {task.inputs}")
        if task.auto_class == "AutoModelForMultipleChoice":
            lines.append("batch = {name: tensor[None] for name, tensor in batch.items()}  # (rows, choices, tokens)")
    else:
        lines.append(f'batch = {{"input_ids": torch.tensor({task.ids})}}  # no tokenizer is saved here')
    lines += ["with torch.no_grad():", f"    output = model(**batch{policy})", f"print({task.result})"]
    where = "" if facts.repo_id else " (in this folder)"
    default = f"\n\nIts default exit policy is `{facts.config.exit_policy}`." if facts.config.exit_policy else ""
    code = "\n".join(lines)
    return f"## Use{where}\n\n```python\n{code}\n```\n\n{TRUST}{default}{_session_example(facts)}"


def _policy(facts: Facts) -> dict[str, Any]:
    config, scores = facts.config, facts.task.auto_class == "AutoModelForSequenceClassification"
    if scores and (config.problem_type or ("regression" if config.num_labels == 1 else "")) == "regression":
        return {"name": "patience", "patience": 1, "threshold": 0.5}
    return {"name": "entropy", "threshold": 0.3}


def _session_example(facts: Facts) -> str:
    if not facts.onnx_files:
        return ""
    folder, lines = '"."', ["from elastic_model import ElasticSession"]
    if facts.repo_id:
        lines.insert(0, "from huggingface_hub import snapshot_download\n")
        folder = f'snapshot_download("{facts.repo_id}")'
    lines += ["", f"session = ElasticSession.from_pretrained({folder})", f"print(session({facts.task.texts}))"]
    files = ", ".join(f"`onnx/{name}`" for name in facts.onnx_files)
    return "\n\nWithout torch, from " + files + ":\n\n```python\n" + "\n".join(lines) + "\n```"


def _exits(facts: Facts) -> str:
    config = facts.config
    tokens = min(TOKENS, config.max_position_embeddings - config.position_offset)
    flops = {
        layer: cost.flops(config, tokens, exit_layer=layer, head=facts.task.head, length_config=1.0)
        for layer in facts.exit_layers
    }
    named = [metric for metric in facts.metrics if metric.exit_layer in flops]
    columns = list(dict.fromkeys((one.metric, one.data, one.split) for one in named))
    values = {
        (one.exit_layer, one.metric, one.data, one.split): _interval(one.value, one.low, one.high) for one in named
    }
    header = [
        "exit after layer",
        *(" ".join(column) for column in columns),
        f"FLOPs at {tokens} tokens",
        "of full depth",
    ]
    full = flops[facts.exit_layers[-1]]
    rows = [
        [str(layer), *(values.get((layer, *column), "") for column in columns), f"{count:.4g}", f"{count / full:.1%}"]
        for layer, count in flops.items()
    ]
    missing = "" if named else f"\n\nQuality by exit: {NOT_STATED}."
    return f"## Exits\n\n{_table(header, rows)}{missing}"


def _points(facts: Facts) -> str:
    if facts.points is None or not facts.points.points:
        return ""
    header = ["operating point", "mean exit layer", "quality", "FLOPs", "milliseconds"]
    rows = [
        [
            one.name,
            f"{one.mean_exit_layer:.2f}",
            _quality(one),
            "" if one.flops is None else f"{one.flops:.4g}",
            _latency(one),
        ]
        for one in facts.points.points
    ]
    return f"## Operating points\n\nExit policy: `{_cell(facts.points.policy)}`.\n\n{_table(header, rows)}"


def _quality(point: OperatingPoint) -> str:
    if not point.quality:
        return ""
    interval = _interval(point.quality["value"], point.quality.get("low"), point.quality.get("high"))
    return f"{point.quality.get('metric', '')} {interval} {point.quality.get('split', '')}".strip()


def _latency(point: OperatingPoint) -> str:
    if not point.latency_ms:
        return ""
    settings = ", ".join(f"{name} {value}" for name, value in point.latency_ms.items() if name != "value")
    return f"{point.latency_ms['value']:.4g} ({settings})"


def _metrics(facts: Facts) -> str:
    rows = [
        [one.metric, _interval(one.value, one.low, one.high), one.data, one.split]
        for one in facts.metrics
        if one.exit_layer not in facts.exit_layers
    ]
    return f"## Other measurements\n\n{_table(['metric', 'value', 'data', 'split'], rows)}" if rows else ""


def _data(stages: list[Stage]) -> str:
    rows = [
        [
            stage.stage,
            one.name,
            one.split or "",
            one.license or NOT_STATED,
            f"`{one.sha256[:16]}`" if one.sha256 else "",
        ]
        for stage in stages
        for one in stage.data
    ]
    if not rows:
        return f"## Data\n\nWhat the model was trained on: {NOT_STATED}."
    return f"## Data\n\n{_table(['stage', 'data', 'split', 'licence', 'sha256'], rows)}"


def _stages(facts: Facts) -> str:
    if not facts.stages:
        return f"## How it was made\n\nStages, settings and seeds: {NOT_STATED}."
    return "## How it was made\n\n" + "\n\n".join(_stage(number, one) for number, one in enumerate(facts.stages, 1))


def _stage(number: int, stage: Stage) -> str:
    origin = "random weights"
    if stage.parent:
        origin = stage.parent.hub_id or stage.parent.name
        origin += f" at {stage.parent.revision}" if stage.parent.revision else ""
    elif number > 1:
        origin = "the stage before"
    seed = "" if stage.seed is None else f", seed {stage.seed}"
    versions = ", ".join(f"{name} {one}" for name, one in stage.versions.items())
    line = f"{number}. **{_cell(stage.stage)}** from {_cell(origin)}{seed}" + (
        f" ({_cell(versions)})" if versions else ""
    )
    if not stage.settings:
        return line
    settings = yaml_dump(stage.settings, sort_keys=False).replace("```", "'''")
    return f"{line}\n\n<details><summary>settings</summary>\n\n```yaml\n{settings}```\n\n</details>"


def _interval(value: float, low: float | None, high: float | None) -> str:
    return f"{value:.4g}" + ("" if low is None or high is None else f" ({low:.4g} to {high:.4g})")


def _table(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(value: Any) -> str:
    """A value of a record on one line, so that it cannot break out of its place in the card."""
    return " ".join(str(value).split()).replace("|", "\\|").replace("<", "&lt;")
