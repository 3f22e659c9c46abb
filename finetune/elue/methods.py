"""The methods that ELUE compares, as data: how each is trained, and what gives its operating points."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from elastic_model import ElasticBertConfig
from elastic_model.subnetworks import constant_rate
from finetune.elue.config import LAST_EXIT, RunOptions


@dataclass(frozen=True)
class Setting:
    """One operating point before it is run: a policy, or for static use the layer that all rows leave at."""

    name: str
    exit_layer: int | None = None
    policy: Mapping[str, Any] | None = None
    length_config: list[float] | list[int] | None = None
    layer_config: list[int] | None = None

    @property
    def sub_network(self) -> dict[str, Any]:
        """What `forward` and `cost` are told; lengths are named, so that the configuration's own do not count."""
        return {"length_config": self.length_config or 1.0, "layer_config": self.layer_config}


Settings = Callable[[ElasticBertConfig, RunOptions], list[Setting]]


def exits(config: ElasticBertConfig, options: RunOptions) -> list[Setting]:
    """Every exit as a model of its own: no other exit is asked."""
    return [Setting(f"exit_{layer}", layer) for layer in config.exit_layers or ()]


def last_exit(config: ElasticBertConfig, options: RunOptions) -> list[Setting]:
    """The whole model."""
    return [Setting(f"layers_{config.num_hidden_layers}", config.num_hidden_layers)]


def shares(config: ElasticBertConfig, options: RunOptions) -> list[Setting]:
    """The whole depth at lengths that fall by a fixed share from layer to layer."""
    layers = config.num_hidden_layers
    lengths = {f"share_{share:g}": constant_rate(share, layers) for share in options.shares}
    return [Setting(name, layers, length_config=one) for name, one in lengths.items()]


def spread_layers(config: ElasticBertConfig, options: RunOptions) -> list[Setting]:
    """Half the layers to all of them, spread evenly over the depth, the last one among them (Fan et al. 2019)."""
    layers = config.num_hidden_layers
    chosen = {kept: [round(layers * step / kept) for step in range(1, kept + 1)] for kept in range(layers, 0, -1)}
    return [Setting(f"layers_{kept}", layers, layer_config=run) for kept, run in chosen.items() if kept >= layers // 2]


@dataclass(frozen=True)
class Method:
    """training: changes of `TrainOptions` (methods with the same share a checkpoint); after: the method whose
    checkpoint the recipe's last phase trains on, and learns from; settings: its static operating points; policy,
    regression_policy: what its points are swept over, None where it has none for such tasks; lengths_and_depths:
    swept jointly with the shares of the run, and all rows at one exit beside it; depths: a model of its own for
    every depth, cut before fine-tuning."""

    paper: str
    training: Mapping[str, Any] = field(default_factory=dict)
    after: str | None = None
    settings: Settings | None = None
    policy: str | None = None
    regression_policy: str | None = None
    lengths_and_depths: bool = False
    depths: bool = False
    note: str = ""

    def policy_for(self, problem_type: str) -> str | None:
        """The policy for a task of this problem type; None: static, or not made for such tasks."""
        return self.regression_policy if problem_type == "regression" else self.policy

    def fits(self, problem_type: str) -> bool:
        """Whether the method can be run on a task of this problem type."""
        return self.settings is not None or self.policy_for(problem_type) is not None

    def describe(self, trained: bool = True) -> str:
        """The method in a line: paper, training (or that a checkpoint was taken as it is), what its points are."""
        training = ", ".join(f"{name} {value}" for name, value in self.training.items())
        training = training if trained else "a checkpoint as it was given"
        after = f"after {self.after}, its teacher" if self.after and trained else ""
        static = "static" if self.settings is not None else ""
        policies = ", ".join(dict.fromkeys(filter(None, (self.policy, self.regression_policy)))) or static
        return "; ".join(filter(None, (self.paper, training, after, policies, self.note)))


ELASTICBERT = {"recipe": "joint"}

METHODS: dict[str, Method] = {
    "elasticbert": Method(
        "Liu et al. 2022", ELASTICBERT, settings=exits, note="every exit in static use: the reference"
    ),
    "elasticbert-entropy": Method("Liu et al. 2022", ELASTICBERT, policy="entropy"),
    "elasticbert-patience": Method("Liu et al. 2022", ELASTICBERT, policy="patience", regression_policy="patience"),
    "static": Method(
        "Liu et al. 2022, baselines",
        {"recipe": "joint", "exit_layers": LAST_EXIT},
        settings=last_exit,
        depths=True,
        note="the first layers of the backbone, fine-tuned alone",
    ),
    "deebert": Method("Xin et al. 2020", {"recipe": "two_stage"}, policy="entropy"),
    "fastbert": Method(
        "Liu et al. 2020",
        {"recipe": "self_distillation"},
        policy="entropy",
        note="linear exits, no branch attention; KL(last exit || exit) as in their code, not their equation 6",
    ),
    "pabee": Method(
        "Zhou et al. 2020",
        {"recipe": "joint", "exit_loss": "linear", "gradient_equilibrium": False},
        policy="patience",
        regression_policy="patience",
    ),
    "voting": Method(
        "Sun et al. 2021",
        {"recipe": "joint", "gradient_equilibrium": False},
        policy="voting",
        note="without its diversity loss; at the top the last exit answers, whatever the votes",
    ),
    "berxit": Method(
        "Xin et al. 2021",
        {"recipe": "learned", "gradient_equilibrium": False},
        policy="learned",
        regression_policy="learned",
    ),
    "lengthdrop": Method(
        "Kim and Cho 2021",
        {"recipe": "sandwich", "layer_drop": 0.0, "exit_layers": LAST_EXIT},
        settings=shares,
        note="fixed shares, no search",
    ),
    "layerdrop": Method(
        "Fan et al. 2019",
        {
            "recipe": "sandwich",
            "length_drop": 0.0,
            "sandwich_rule": False,
            "sampled": 1,
            "distillation": "none",
            "exit_layers": LAST_EXIT,
        },
        settings=spread_layers,
        note="the full model and two sub-networks an update, each on the labels",
    ),
    "elastic": Method(
        "ours: Liu et al. 2022 with Kim and Cho 2021",
        {"recipe": "sandwich", "layer_drop": 0.0},
        after="elasticbert",
        policy="entropy",
        regression_policy="patience",
        lengths_and_depths=True,
        note="LengthDrop, exits and depth, swept jointly on dev",
    ),
}


def chosen_methods(names: Sequence[str]) -> dict[str, Method]:
    """The methods called so, or all; ValueError lists the table for another name."""
    names = list(METHODS) if list(names) == ["all"] else list(dict.fromkeys(names))
    for name in names:
        if name not in METHODS:
            raise ValueError(f"method {name!r} is unknown; allowed: {', '.join(METHODS)}, or all")
    if not names:
        raise ValueError(f"--methods is empty; allowed: {', '.join(METHODS)}, or all")
    return {name: METHODS[name] for name in names}
