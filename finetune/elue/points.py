"""Operating points of a model on a task: chosen on dev, run on test, written as ELUE's files."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from accelerate import Accelerator
from transformers import PreTrainedTokenizerBase

from elastic_model import ElasticBertConfig
from elastic_model.cost import exit_flops
from elastic_model.exit_policies import simulate, sweep
from elastic_model.front import pareto_front
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from finetune.data import Encoded
from finetune.elue.methods import Setting
from finetune.elue.submission import modules_text, steps_of, write_predictions
from finetune.evaluate import observe
from finetune.explore import Observed
from finetune.kinds import answers_of
from finetune.labels import Labels
from finetune.metrics import metric
from finetune.policies import at_one_exit, candidates

NEVER = {"name": "never"}


@dataclass(frozen=True)
class Subject:
    """A fine-tuned model with what its points are made of."""

    model: ElasticBertExitModel
    tokenizer: PreTrainedTokenizerBase
    labels: Labels
    batch_size: int

    @property
    def config(self) -> ElasticBertConfig:
        """The model's."""
        return self.model.config

    @property
    def exit_layers(self) -> list[int]:
        """The layers with an exit, from 1."""
        return list(self.config.exit_layers or ())


def outputs_of(subject: Subject, encoded: Encoded, setting: Setting) -> Observed:
    """One pass over a split with the sub-network of a setting; its policy does not matter yet."""
    return observe(subject.model, encoded, subject.tokenizer, subject.batch_size, Accelerator(), **setting.sub_network)


def leave(subject: Subject, setting: Setting, outputs: Observed) -> tuple[np.ndarray, np.ndarray]:
    """What a setting answers, logits (rows, labels), and the layer, from 1, that each row leaves at (rows,)."""
    if setting.exit_layer is not None:
        at = subject.exit_layers.index(setting.exit_layer)
        return outputs.logits[at], np.full(outputs.logits.shape[1], setting.exit_layer)
    policy = dict(setting.policy or NEVER)
    problem_type = subject.labels.problem_type
    chosen, left_at = simulate(
        policy, outputs.logits, subject.exit_layers, problem_type, uncertainty=outputs.uncertainty
    )
    return chosen.numpy(), left_at.numpy()


def choose_settings(
    subject: Subject, policy: str, lengths: Sequence[list[float] | None], dev: Encoded, count: int, depths: bool
) -> list[Setting]:
    """At most `count` settings of a policy (and of lengths, jointly): on dev's Pareto front, those nearest to costs
    spread evenly between its ends. depths: also those at which all rows leave at the same exit."""
    tried: list[Setting] = []
    costs: list[float] = []
    qualities: list[float] = []
    for length_config in lengths:
        base = Setting("", length_config=length_config)
        outputs = outputs_of(subject, dev, base)
        policies = candidates(policy, outputs.logits, subject.labels.problem_type)
        if depths:
            policies += at_one_exit(policies[-1], len(subject.exit_layers), subject.labels.problem_type)
        left = sweep(
            policies,
            outputs.logits,
            subject.exit_layers,
            subject.labels.problem_type,
            uncertainty=outputs.uncertainty,
        )
        flops = exit_flops(subject.config, dev.lengths, length_config=length_config or 1.0)
        costs += flops.gather(0, left).double().mean(1).tolist()
        for one, exits in zip(policies, left.numpy(), strict=True):
            tried.append(replace(base, policy=one))
            answered = outputs.logits[exits, np.arange(len(dev))]
            qualities.append(_quality(subject, answered, dev))
    front = pareto_front(costs, qualities)
    targets = np.linspace(costs[front[0]], costs[front[-1]], count)
    nearest: dict[int, int] = {}  # setting -> the first target that it is nearest to
    for number, target in enumerate(targets, start=1):
        nearest.setdefault(min(front, key=lambda one: abs(costs[one] - target)), number)
    return [replace(tried[one], name=f"point_{number}") for one, number in nearest.items()]


def _quality(subject: Subject, logits: np.ndarray, encoded: Encoded) -> float:
    return metric(subject.labels.metrics[0])(answers_of(logits, encoded, subject.labels), encoded.labels)


def write_point(
    subject: Subject,
    setting: Setting,
    outputs: Observed,
    encoded: Encoded,
    folder: Path,
    classes: Sequence[str],
    suffix: str = "",
) -> None:
    """The test file of one operating point.

    classes: ELUE's order of them, empty for regression; suffix: behind the modules' names, where other points have
    others of the same name.
    """
    logits, left_at = leave(subject, setting, outputs)
    answers = answers_of(logits, encoded, subject.labels)
    numbers = {subject.labels.names.index(name): number for number, name in enumerate(classes)}
    named = [numbers[int(answer)] if numbers else float(answer) for answer in answers]
    paths: dict[tuple[int, int], str] = {}
    for row in zip(encoded.lengths, left_at.tolist(), strict=True):
        if row not in paths:
            tokens, layer = row
            asked = None if setting.exit_layer is None else [layer]
            steps = steps_of(subject.config, tokens, **setting.sub_network, exit_layer=layer, asked=asked)
            paths[row] = modules_text(replace(step, name=step.name + suffix) for step in steps)
    rows = [paths[row] for row in zip(encoded.lengths, left_at.tolist(), strict=True)]
    write_predictions(folder / f"{setting.name}.tsv", named, rows)
