"""What a checkpoint answers, and at which operating point its file runs by itself."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from elastic_model import ElasticBertConfig
from elastic_model.checks import LengthConfig, check_exit_policy, policy_kind, shares_and_mass, thresholds_of
from elastic_model.session import FORMAT, never

EMBEDDING, QUESTIONS, TOKENS = "embedding", "question_answering", "token_classification"
REGRESSION, MULTI_LABEL, SINGLE_LABEL = "regression", "multi_label_classification", "single_label_classification"
STAY: dict[str, Any] = {"name": "entropy", "threshold": 0.0}  # nothing is below an entropy of 0
STAY_REGRESSION: dict[str, Any] = {"name": "patience", "patience": 1, "threshold": 0.0}


@dataclass(frozen=True)
class Head:
    """Where a kind of model keeps its heads, what they read, and the outputs that a graph of it has.

    module: the name of the heads' weights, one per exit, and of the only one in static use.
    """

    module: str
    static_module: str
    pools: bool  # the head reads the pooled state of a row; else every token's state
    problem_type: str | None  # None: the configuration says
    outputs: tuple[str, ...] = ("logits",)
    exit_outputs: tuple[str, ...] = ("exit_logits",)


HEADS = {
    "ElasticBertForSequenceClassification": Head("classifiers", "classifier", True, None),
    "ElasticBertForTokenClassification": Head("classifiers", "classifier", False, TOKENS),
    "ElasticBertForQuestionAnswering": Head(
        "qa_outputs",
        "qa_outputs",
        False,
        QUESTIONS,
        ("start_logits", "end_logits"),
        ("exit_start_logits", "exit_end_logits"),
    ),
    "ElasticBertModel": Head("", "", False, EMBEDDING, ("last_hidden_state", "pooler_output"), ()),
}
CLASSIFIER = "ElasticBertForSequenceClassification"


@dataclass(frozen=True)
class Task:
    """What the graph answers and where its defaults lie: `policy` as in a configuration (None: rows never leave by
    themselves), a threshold per exit, the layer that no row goes above, the length configuration of `forward`."""

    head: Head
    problem_type: str
    policy: dict | None
    thresholds: list[float]
    max_layer: int
    lengths: LengthConfig
    labels: int  # outputs of a head

    @property
    def remembers(self) -> bool:
        """Whether the policy looks at the exits before the last."""
        return self.policy is not None and self.policy["name"] in ("patience", "voting")


def task_of(config: ElasticBertConfig, measured: dict[str, Any] | None = None, architecture: str = CLASSIFIER) -> Task:
    """The task and the default operating point of a configuration.

    measured: the policy of the checkpoint's operating points. Where the configuration names none, that one is built
    in, or without points entropy, with default thresholds that let nobody leave, as in PyTorch. ValueError where the
    two are of different kinds, and for lengths in tokens, which mean another share for every text.
    """
    head, exits = HEADS[architecture], config.exit_layers
    problem_type = head.problem_type or config.problem_type or (REGRESSION if config.num_labels == 1 else SINGLE_LABEL)
    try:
        shares, mass = shares_and_mass(config.length_config, config.num_hidden_layers)
    except ValueError as error:
        raise ValueError(f"{error}: state shares in config.json, or null") from error
    lengths: LengthConfig = shares if min(mass) == 1 else {"mass": mass}
    labels = {QUESTIONS: 2, EMBEDDING: config.hidden_size}.get(problem_type, config.num_labels)
    if problem_type == EMBEDDING:
        own = config.exit_policy or {}
        layer = _constant_layer(own, exits) if own.get("name") == "constant" else exits[-1]
        return Task(head, problem_type, None, [], layer, lengths, labels)
    policy, thresholds, max_layer = _policy_of(config, measured, problem_type)
    return Task(head, problem_type, policy, thresholds, max_layer, lengths, labels)


def _policy_of(config, measured: dict[str, Any] | None, problem_type: str) -> tuple[dict, list[float], int]:
    """The policy built in, its thresholds, and the layer that no row goes above."""
    exits = config.exit_layers
    policy, max_layer = check_exit_policy(config.exit_policy, len(exits), problem_type), exits[-1]
    names = {(one or {}).get("name") for one in (policy, measured)}
    if "learned" in names and not config.learned_exit_head:
        raise ValueError("exit_policy 'learned' needs a model with learned_exit_head=true in its config.json")
    if policy is not None and policy["name"] == "constant":
        max_layer, policy = _constant_layer(policy, exits), None
    if policy is None:
        policy = measured or (STAY_REGRESSION if problem_type == REGRESSION else STAY)
        return policy, never(policy, problem_type, len(exits)), max_layer
    if measured and policy_kind(measured) != policy_kind(policy):
        raise ValueError(
            f"the configuration's exit policy is {policy}, but the operating points were measured with {measured}; "
            "give --at POINT, search again with that policy, or set exit_policy to null in config.json"
        )
    counts = {"patience": policy.get("patience"), "voting": policy.get("votes")}
    settings = policy if "threshold" in policy else {"threshold": counts[policy["name"]]}
    return policy, thresholds_of(settings, len(exits)), max_layer


def _constant_layer(policy: dict[str, Any], exits: list[int]) -> int:
    if policy.get("layer") not in exits:
        raise ValueError(f"exit_policy 'constant': layer must be one of {exits}, got {policy.get('layer')!r}")
    return int(policy["layer"])


def metadata(
    config: ElasticBertConfig,
    task: Task,
    own: Mapping[str, Any],
    versions: Mapping[str, str],
    requires: Mapping[str, Any],
    plain: int | None = None,
) -> dict[str, str]:
    """What a client needs to know, as ONNX metadata: keys `elastic_*`, values JSON. own: what the checkpoint alone
    knows; plain: the exit of a plain file."""
    names = config.id2label or {}
    labels = [names[number] for number in range(config.num_labels or 0)]
    values = {
        "format": FORMAT,
        "exit_layers": config.exit_layers if plain is None else [plain],
        "layers": config.num_hidden_layers,
        "labels": [] if task.problem_type in (EMBEDDING, QUESTIONS) else labels,
        "problem_type": task.problem_type,
        "policy": task.policy if plain is None else None,
        "thresholds": task.thresholds if plain is None else [],
        "length_config": task.lengths if plain is None else [1.0] * plain,
        "max_layer": task.max_layer if plain is None else plain,
        **own,
        "no_answer_threshold": config.no_answer_threshold,
        "text_pairs": config.text_pairs,
        "flops": [_flops(config, task, layer) for layer in range(1, config.num_hidden_layers + 1)],
        "requires": requires,
        "versions": versions,
        "config": config.to_diff_dict(),
    }
    return {f"elastic_{name}": json.dumps(value) for name, value in values.items()}


def cut_config(config: ElasticBertConfig, layer: int) -> ElasticBertConfig:
    """The configuration of the layers up to an exit, that exit alone."""
    fields = config.to_dict() | {"num_hidden_layers": layer, "exit_layers": [layer], "max_output_layers": None}
    static = config.num_output_layers == 1
    fields |= {"num_output_layers": 1 if static else None, "exit_policy": None, "length_config": None}
    return ElasticBertConfig(**fields)


def _flops(config: ElasticBertConfig, task: Task, layer: int) -> dict[str, int]:
    """What layer `layer` (from 1) costs, as `elastic_model.cost` counts: per token before and pair of tokens,
    per token kept, per row at its exit, and there per token of the row."""
    width, heads = config.hidden_size, config.head_sizes[layer - 1]
    head = width * task.labels
    pooled = width * width + head if task.head.pools else 0
    if task.problem_type == EMBEDDING:  # its one pooler, wherever it is asked: counted with the first layer
        asked, pooled, head = layer == 1, width * width, 0
    else:
        asked = layer in config.exit_layers
    return {
        "attention": 8 * width * heads,
        "pairs": 4 * heads,
        "feed_forward": 4 * width * config.intermediate_size_per_layer[layer - 1],
        "exit": asked * 2 * (pooled + width * config.learned_exit_head),
        "exit_tokens": asked * 2 * head * (not task.head.pools),
    }
