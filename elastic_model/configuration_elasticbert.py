"""The configuration of an elastic BERT encoder."""

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .checks import check_exit_layers, check_exit_policy, check_length_config
from .losses import exit_weights

POOLING = ("cls", "mean")
PROBLEM_TYPES = ("regression", "single_label_classification", "multi_label_classification")  # of sequences


@strict
class ElasticBertConfig(PreTrainedConfig):
    """BERT's fields, and what makes the encoder elastic.

    Exits: `num_output_layers` (an exit after each of the last n layers; None = every layer; 1 = static use, one
    classifier) or `exit_layers` (explicit, 1-based, rising, ending at the last layer); `max_output_layers`: the depth
    the checkpoint was made with. `exit_pooling`: what the pooler of an exit reads, `cls` or `mean` (of the tokens
    still kept), one for all or a list with an entry per layer. Width: `num_attention_heads_per_layer`,
    `intermediate_size_per_layer` (one entry per layer, for pruned models) and `attention_head_size`. Training:
    `exit_loss` (a key of `losses.EXIT_LOSSES`), `gradient_equilibrium`, `exit_groups` (the commands take turns with
    them; a loop of your own passes `exits=`), `learned_exit_head` (BERxiT's, which the policy "learned" asks). Default
    operating point: `exit_policy`, `length_config`; `keep_cls`: [CLS] is never dropped. `no_answer_threshold`: of
    `spans.best_answer`, None where every question has an answer. `text_pairs`: whether the training rows were pairs of
    texts, None where unknown. `position_offset` and `type_vocab_size`: 2 and 1 for RoBERTa, 0 and 0 for DistilBERT.

    Exits and per-layer lists are resolved when read: with `num_hidden_layers=k` set on a deeper model, lists are cut
    to the first k, exits above k dropped and k added.
    """

    model_type = "elasticbert"
    keys_to_ignore_at_inference = [
        "exit_logits",
        "exit_layers",
        "exit_start_logits",
        "exit_end_logits",
        "exit_prediction_logits",
        "exit_sop_logits",
        "exit_losses",
        "exit_uncertainty",
        "mlm_losses",
        "sop_losses",
        "mlm_right",
        "distillation_loss",
        "hidden_states",
        "attentions",
    ]
    base_model_fsdp_plan = {"embeddings": "free_full_weight", "encoder.layer.*": "free_full_weight"}

    vocab_size: int = 30522
    hidden_size: int = 768
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    intermediate_size: int = 3072
    hidden_act: str = "gelu"
    pooler_act: str = "tanh"
    hidden_dropout_prob: float | int = 0.1
    attention_probs_dropout_prob: float | int = 0.1
    classifier_dropout: float | int | None = None
    max_position_embeddings: int = 512
    position_offset: int = 0
    type_vocab_size: int = 2
    initializer_range: float = 0.02
    layer_norm_eps: float = 1e-12
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    tie_word_embeddings: bool = True

    num_output_layers: int | None = None
    max_output_layers: int | None = None
    exit_layers: list[int] | tuple[int, ...] | None = None
    exit_pooling: str | list[str] | tuple[str, ...] = "cls"
    num_attention_heads_per_layer: list[int] | tuple[int, ...] | None = None
    intermediate_size_per_layer: list[int] | tuple[int, ...] | None = None
    attention_head_size: int | None = None

    exit_loss: str = "sum"
    gradient_equilibrium: bool = True
    exit_groups: int = 1
    learned_exit_head: bool = False

    length_config: list | tuple | dict | float | None = None
    keep_cls: bool = True
    exit_policy: dict | None = None
    no_answer_threshold: float | None = None
    text_pairs: bool | None = None

    def __post_init__(self, **kwargs):
        if self.max_output_layers is None:
            self.max_output_layers = self.num_hidden_layers
        super().__post_init__(**kwargs)

    def __setattr__(self, name, value):
        super().__setattr__(name, _plain(value) if name in ("exit_policy", "length_config") else value)

    def __getattribute__(self, name):
        value = super().__getattribute__(name)
        resolve = _RESOLVED.get(name)
        return value if resolve is None else resolve(self, value)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """As in transformers; where fewer exits are asked for, an exit policy of the checkpoint loses theirs, and with
        new ones, for which it has no threshold, it holds no longer."""
        asked = {name: kwargs[name] for name in _EXIT_FIELDS if name in kwargs}
        if asked.get("num_output_layers") and "exit_layers" not in asked:  # counts exits, whichever the checkpoint has
            config_dict = {**config_dict, "exit_layers": None}
        policy = config_dict.get("exit_policy")
        if asked and policy and "exit_policy" not in kwargs and config_dict.get("model_type") == cls.model_type:
            plain = {**config_dict, "exit_policy": None, "length_config": None}
            before, after = (list(cls(**fields).exit_layers or ()) for fields in (plain, {**plain, **asked}))
            kwargs = {**kwargs, "exit_policy": _policy_of(policy, before, after)}
        return super().from_dict(config_dict, **kwargs)

    @property
    def head_sizes(self) -> list[int]:
        """Width of all heads together, for each layer."""
        return [heads * (self.attention_head_size or 0) for heads in self.num_attention_heads_per_layer or ()]

    def validate_sizes(self):
        """Widths that fit together; one entry per layer in the per-layer lists."""
        if self.num_hidden_layers < 1:
            raise ValueError(f"num_hidden_layers must be at least 1, got {self.num_hidden_layers}.")
        for name in ("hidden_act", "pooler_act"):
            if getattr(self, name) not in ACT2FN:
                raise ValueError(f"{name} must be one of {', '.join(sorted(ACT2FN))}, got {getattr(self, name)!r}.")
        if not 0 <= self.position_offset < self.max_position_embeddings:
            raise ValueError(
                f"position_offset must be 0 to {self.max_position_embeddings - 1} (max_position_embeddings - 1), "
                f"got {self.position_offset}."
            )
        if self.num_attention_heads < 1:
            raise ValueError(f"num_attention_heads must be at least 1, got {self.num_attention_heads}.")
        if "attention_head_size" not in self.__dict__ or self.__dict__["attention_head_size"] is None:
            if self.hidden_size % self.num_attention_heads:
                raise ValueError(
                    f"hidden_size must be a multiple of num_attention_heads (or attention_head_size be given), "
                    f"got {self.hidden_size} and {self.num_attention_heads}."
                )
        for name in ("num_attention_heads_per_layer", "intermediate_size_per_layer"):
            values = getattr(self, name)
            if len(values) != self.num_hidden_layers or min(values) < 1:
                raise ValueError(
                    f"{name} must have one entry of at least 1 per layer, {self.num_hidden_layers}, got {values}."
                )

    def validate_exits(self):
        """Exits within the layers, ending at the last one; a known weighting."""
        deepest = self.max_output_layers or self.num_hidden_layers
        if self.num_output_layers is not None and not 1 <= self.num_output_layers <= deepest:
            raise ValueError(f"num_output_layers must be 1 to {deepest}, got {self.num_output_layers}.")
        exit_weights(self.exit_loss, check_exit_layers(self.exit_layers, self.num_hidden_layers))
        pooling = self.exit_pooling
        if len(pooling) != self.num_hidden_layers or not set(pooling) <= set(POOLING):
            raise ValueError(
                f"exit_pooling must be one of {', '.join(POOLING)}, or a list of them with one entry per layer, "
                f"{self.num_hidden_layers}, got {self.__dict__['exit_pooling']}."
            )
        if self.exit_groups < 1:
            raise ValueError(f"exit_groups must be at least 1, got {self.exit_groups}.")

    def validate_problem_type(self):
        """Nothing, or a type of what sequences are labelled with."""
        if self.problem_type is not None and self.problem_type not in PROBLEM_TYPES:
            raise ValueError(f"problem_type must be one of {', '.join(PROBLEM_TYPES)}, got {self.problem_type!r}.")

    def validate_operating_point(self):
        """A default policy and length configuration that fit the model."""
        check_exit_policy(self.exit_policy, len(self.exit_layers or ()))
        check_length_config(self.length_config, self.num_hidden_layers)


def pooling_with_new_exits(config, new: str = "mean", keeps_last: bool = True) -> list[str]:
    """`exit_pooling` for a checkpoint, elastic or stock, that gets exits to be trained: one that it has reads what it
    did, a new one `new`. keeps_last: the last exit of a stock model is one that it has.

    In the lower layers of a model that was trained without exits [CLS] gathers nothing: in all-MiniLM-L6-v2 its state
    differs by a thousandth of its size between texts up to layer 3, and exits that read it never leave chance. A last
    exit that is trained together with exits that read the mean learns more where it reads it too (measured in
    benchmarks/README.md).
    """
    layers = config.num_hidden_layers
    has = {layers: "cls"} if keeps_last else {}
    if config.model_type == ElasticBertConfig.model_type:
        has = {layer: config.exit_pooling[layer - 1] for layer in config.exit_layers}
    return [has.get(layer, new) for layer in range(1, layers + 1)]


def _plain(value):
    """Python's numbers and lists in place of numpy's, which a JSON file cannot hold."""
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    return value.tolist() if hasattr(value, "tolist") else value


_EXIT_FIELDS = ("num_hidden_layers", "exit_layers", "num_output_layers", "max_output_layers")


def _policy_of(policy: dict, before: list[int], after: list[int]) -> dict | None:
    """A policy of the exits `before` where there are those `after`: their thresholds, a constant layer that is there;
    None where some have no threshold."""
    thresholds = policy.get("threshold")
    if isinstance(thresholds, list) and len(thresholds) == len(before):
        if not set(after[:-1]) <= set(before):
            return None
        own = dict(zip(before, thresholds, strict=True))  # a new last exit is never asked
        return {**policy, "threshold": [own.get(layer, thresholds[-1]) for layer in after]}
    if policy.get("name") == "constant" and policy.get("layer") not in after:
        return {**policy, "layer": max([layer for layer in after if layer <= policy["layer"]], default=after[0])}
    return policy


def _exit_layers(config, given):
    layers = config.num_hidden_layers
    if given is None:
        return list(range(max(0, layers - (config.num_output_layers or layers)) + 1, layers + 1))
    if config.num_output_layers == 1:  # static use: one exit, after the last layer
        return [layers]
    below = [layer for layer in given if layer < layers]
    return list(given) if not given or max(given) <= layers else [*below, layers]


def _per_layer(uniform):
    def resolve(config, given):
        layers = config.num_hidden_layers
        return [getattr(config, uniform)] * layers if given is None else list(given)[:layers]

    return resolve


def _exit_pooling(config, given):
    return [given] * config.num_hidden_layers if isinstance(given, str) else list(given)[: config.num_hidden_layers]


def _length_config(config, given):
    if isinstance(given, dict) and isinstance(given.get("mass"), list):
        return {**given, "mass": given["mass"][: config.num_hidden_layers]}
    return given[: config.num_hidden_layers] if isinstance(given, list) else given


# fields whose value depends on others, and that must follow when `from_pretrained` overrides those after construction
_RESOLVED = {
    "exit_layers": _exit_layers,
    "exit_pooling": _exit_pooling,
    "num_attention_heads_per_layer": _per_layer("num_attention_heads"),
    "intermediate_size_per_layer": _per_layer("intermediate_size"),
    "attention_head_size": lambda config, given: (
        config.hidden_size // config.num_attention_heads if given is None else given
    ),
    "length_config": _length_config,
}
