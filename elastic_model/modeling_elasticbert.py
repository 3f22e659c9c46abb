"""The elastic BERT models: the encoder, and a head per task with an exit after every layer.

Legend of shapes: rows, tokens, width, labels, vocabulary. "Real" tokens are those that the attention mask marks.
"""

import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from operator import itemgetter
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.activations import ACT2FN
from transformers.utils import TransformersKwargs
from transformers.utils.output_capturing import OutputRecorder, capture_outputs

from .checks import check_exit_policy, check_layer_config, check_length_config
from .configuration_elasticbert import ElasticBertConfig
from .encoder import (
    ElasticBertEmbeddings,
    ElasticBertEncoder,
    ElasticBertLayer,
    ElasticBertSelfAttention,
    Exit,
    Flow,
    PerExit,
    zero_for_others,
)
from .exit_policies import Prediction, leaving, predict
from .losses import (
    cross_entropy,
    exit_task_loss,
    exit_weights,
    inplace_distillation,
    trained_exits,
    uncertainty_loss,
    weighted_loss,
    wrong_answers,
)
from .outputs import (
    ElasticBertExitOutput,
    ElasticBertForPreTrainingOutput,
    ElasticBertModelOutput,
    ElasticBertQuestionAnsweringOutput,
    RecordingArguments,
)
from .pretrained import commit_of, damage_named, load_foreign, save_code


class ElasticBertPreTrainedModel(PreTrainedModel):
    """Weights initialised as BERT's; loads stock BERT, RoBERTa and DistilBERT checkpoints too (see `pretrained`)."""

    config: ElasticBertConfig
    base_model_prefix = "elasticbert"
    supports_gradient_checkpointing = True
    _no_split_modules = ["ElasticBertEmbeddings", "ElasticBertLayer"]
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_attention_backend = True
    _can_record_outputs = {
        "hidden_states": ElasticBertLayer,
        "attentions": OutputRecorder(ElasticBertSelfAttention, index=1),
    }
    _keys_to_ignore_on_load_unexpected = [r"embeddings\.position_ids$"]

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *model_args, **kwargs):
        """As in transformers; a stock BERT, RoBERTa or DistilBERT checkpoint becomes an elastic model whose full
        depth is it."""
        name = pretrained_model_name_or_path
        with damage_named(name):
            foreign, commit = load_foreign(cls, name, kwargs), commit_of(name, kwargs)
            if foreign is None:
                loaded = super().from_pretrained(name, *model_args, **kwargs)
            else:
                config, state_dict, kwargs = foreign
                loaded = super().from_pretrained(None, *model_args, config=config, state_dict=state_dict, **kwargs)
        if name is not None:
            model = loaded[0] if isinstance(loaded, tuple) else loaded
            model.name_or_path = str(name)  # which PEFT notes as an adapter's base
            model.config._name_or_path, model.config._commit_hash = str(name), commit
        return loaded

    def save_pretrained(self, save_directory, is_main_process=True, *args, **kwargs):
        """As in transformers, with the code that the checkpoint needs where the package is not installed."""
        if is_main_process:
            save_code(self.config, Path(__file__), save_directory)
        super().save_pretrained(save_directory, is_main_process, *args, **kwargs)


def _values(tensor: torch.Tensor) -> bool:
    """Whether a tensor's values can be looked at: not while tracing or compiling, not on the meta device."""
    return not (torch.compiler.is_compiling() or torch.jit.is_tracing() or tensor.is_meta or not tensor.numel())


def _check_ids(name: str, ids, allowed: int, what: str) -> None:
    if ids is None:
        return
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"{name} must be integers, got {ids.dtype}.")
    if _values(ids) and ((ids < 0) | (ids >= allowed)).any():
        low, high = ids.min().item(), ids.max().item()
        raise ValueError(f"{name} must lie within 0..{allowed - 1} ({what}), got values from {low} to {high}.")


def _check_inputs(config, input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds) -> None:
    """Clear errors instead of an index error from inside a kernel."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("exactly one of input_ids and inputs_embeds must be given.")
    shape = input_ids.shape if inputs_embeds is None else inputs_embeds.shape[:-1]
    if len(shape) != 2 or 0 in shape:
        raise ValueError(f"inputs must have the shape (rows, tokens), at least one of each, got {tuple(shape)}.")
    longest = config.max_position_embeddings - config.position_offset
    if position_ids is None and shape[1] > longest:
        raise ValueError(
            f"inputs may have at most {longest} tokens (the position table), got {shape[1]}: truncate them."
        )
    _check_ids("input_ids", input_ids, config.vocab_size, "the vocabulary")
    _check_ids("position_ids", position_ids, config.max_position_embeddings, "the position table")
    if config.type_vocab_size:
        _check_ids("token_type_ids", token_type_ids, config.type_vocab_size, "type_vocab_size")
    for name, ids in (("token_type_ids", token_type_ids), ("attention_mask", attention_mask)):
        if ids is not None and ids.shape != shape:
            raise ValueError(f"{name} must have the shape of the inputs, {tuple(shape)}, got {tuple(ids.shape)}.")
    if attention_mask is not None and _values(attention_mask) and not attention_mask.bool().any(1).all():
        empty = (~attention_mask.bool().any(1)).nonzero().squeeze(1).tolist()
        raise ValueError(f"every row needs at least one real token, rows {empty} are padding only.")


def _warn_of_first_token(attention_mask: torch.Tensor | None, pooling: list[str]) -> None:
    """A warning where an exit reads [CLS] and finds padding; an error would refuse what every BERT accepts."""
    if "cls" not in pooling or attention_mask is None or not _values(attention_mask):
        return
    if attention_mask.dim() == 2 and not attention_mask[:, 0].all():
        warnings.warn(  # the same text each time, which Python shows once
            "attention_mask hides some rows' first token, where exits read [CLS]: what they answer is made from "
            'padding. Pad on the right (tokenizer.padding_side = "right").',
            stacklevel=2,
        )


def _check_keywords(given: Mapping[str, Any]) -> None:
    """TypeError, as Python's own, for an argument that no forward takes: the decorator above it hands on any."""
    allowed = TransformersKwargs.__annotations__.keys() | RecordingArguments.__annotations__.keys()
    unknown = next((name for name in given if name not in allowed), None)
    if unknown is not None:
        raise TypeError(f"forward() got an unexpected keyword argument {unknown!r}.")


class ElasticBertModel(ElasticBertPreTrainedModel):
    """The encoder: final hidden states, dropped tokens restored, and the last exit's pooled output."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__(config)
        config.validate()
        self.embeddings = ElasticBertEmbeddings(config)
        self.encoder = ElasticBertEncoder(config, add_pooling_layer)
        self.post_init()

    def get_input_embeddings(self):
        return self.embeddings.word_embeddings

    def set_input_embeddings(self, value):
        self.embeddings.word_embeddings = value

    def exits(self, inputs: tuple, wanted: list[int], equilibrium: bool = False, **kwargs) -> Iterator[Exit]:
        """Walk up the layers, from exit to exit, as `ElasticBertEncoder.exits` does; inputs: the first five arguments
        of `forward`, length_config and layer_config."""
        _check_keywords(kwargs)
        *ids, length_config, layer_config = inputs
        input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds = ids
        config = self.config
        _check_inputs(config, *ids)
        lengths = check_length_config(
            config.length_config if length_config is None else length_config, config.num_hidden_layers
        )
        layers = check_layer_config(layer_config, config.num_hidden_layers)
        hidden = self.embeddings(input_ids, token_type_ids, position_ids, inputs_embeds)
        flow = Flow(hidden, None if attention_mask is None else attention_mask.bool())
        yield from self.encoder.exits(flow, lengths, layers, wanted, equilibrium, **kwargs)

    def pool(self, here: Exit) -> torch.Tensor:
        """What an exit's pooler makes of [CLS] or of the tokens' mean, as `exit_pooling` says; (rows, width)."""
        assert self.encoder.pooler is not None
        means = self.config.exit_pooling[here.layer - 1] == "mean"
        state = here.flow.mean_token() if means else here.flow.first_token(self.config.keep_cls)
        return self.encoder.pooler.at(here.layer)(state)

    def ends_at(self, exit_policy: dict | None) -> int:
        """The layer at which a pass ends whose exits have no answers to decide by: that of a constant policy, the
        argument's or the config's, else the last exit, as always while training. ValueError for another policy."""
        exits, own = self.encoder.exit_layers, self.config.exit_policy or {}
        if exit_policy is None and own.get("name") == "constant":  # others ask a head, for which they are kept
            exit_policy = own
        policy = check_exit_policy(exit_policy, len(exits))
        if policy is not None and policy["name"] != "constant":
            raise ValueError(f"exit_policy {policy['name']!r} needs a task head; this model knows never and constant.")
        if policy is not None and policy["layer"] not in exits:
            raise ValueError(f"exit_policy 'constant': layer must be one of {exits}, got {policy['layer']}.")
        return exits[-1] if policy is None or self.training else policy["layer"]

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        length_config: list | float | None = None,
        layer_config: list[int] | None = None,
        exit_policy: dict | None = None,
        **kwargs: Unpack[RecordingArguments],
    ) -> ElasticBertModelOutput:
        """length_config, layer_config: the sub-network, None = the config's; exit_policy: only "never" and "constant"
        here, None = the config's where that is constant; none holds while the model trains."""
        lowest = self.ends_at(exit_policy)
        wanted = [layer for layer in self.encoder.exit_layers if layer >= lowest]
        ids = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        last = next(self.exits((*ids, length_config, layer_config), wanted, **kwargs))
        return ElasticBertModelOutput(
            last_hidden_state=last.flow.all_tokens(),
            pooler_output=None if self.encoder.pooler is None else self.pool(last),
        )


class ElasticBertTaskModel(ElasticBertPreTrainedModel):
    """The encoder under a task's heads."""

    pools = True  # the heads read the pooled state of a row; else every token's state

    def __init__(self, config):
        super().__init__(config)
        self.elasticbert = ElasticBertModel(config, add_pooling_layer=self.pools)

    @property
    def exit_layers(self) -> list[int]:
        """The layers with an exit, 1-based."""
        return list(self.config.exit_layers or ())

    def walk(self, inputs: tuple, exits: list[int] | None, kwargs: Mapping[str, Any]) -> Iterator[Exit]:
        """The encoder's exits for one forward: inputs as `ElasticBertModel.exits` takes them; exits: those
        to compute, by layer, None = all. While training, with gradient equilibrium as configured."""
        exits = self.exit_layers if exits is None else sorted(set(exits))
        if not exits or not set(exits) <= set(self.exit_layers):
            raise ValueError(f"exits must be some of the exit layers {self.exit_layers}, got {exits}.")
        if self.pools:
            _warn_of_first_token(inputs[1], [self.config.exit_pooling[layer - 1] for layer in exits])
        weighted = all(exit_weights(self.config.exit_loss, exits))  # an exit without weight is not trained
        equilibrium = self.training and self.config.gradient_equilibrium and weighted
        return self.elasticbert.exits(inputs, exits, equilibrium, **kwargs)

    def policy_for(self, exit_policy: dict | None, labels, problem_type: str) -> dict | None:
        """The policy in force: the argument's or the config's; none while training or when labels are given."""
        if exit_policy is None and (self.training or labels is not None):
            return None
        policy = self.config.exit_policy if exit_policy is None else exit_policy
        policy = check_exit_policy(policy, len(self.exit_layers), problem_type)
        if policy and policy["name"] == "learned" and not hasattr(self, "exit_uncertainty"):
            raise ValueError(
                "exit_policy 'learned' needs a model for a task with learned_exit_head=True in its config."
            )
        if policy and policy["name"] == "constant" and policy["layer"] not in self.exit_layers:
            raise ValueError(
                f"exit_policy 'constant': layer must be one of {self.exit_layers}, got {policy['layer']}."
            )
        return None if self.training or labels is not None else policy


@dataclass
class Answers:
    """What the exits of one forward said: logits {exit layer: (rows, ...)} in the whole batch, NaN where a row had
    left; the same for the learned exit head's uncertainty (rows,); each row's answer (rows, ...) and the layer it
    left at (rows,)."""

    logits: dict[int, torch.Tensor]
    uncertainty: dict[int, torch.Tensor]
    answer: torch.Tensor
    left_at: torch.Tensor

    def per_exit(self, exit_layers: list[int]) -> tuple[torch.Tensor, ...]:
        """One tensor per exit of the model, NaN where an exit was not computed."""
        if len(self.logits) == len(exit_layers):
            return tuple(self.logits.values())
        missing = torch.full_like(self.answer, torch.nan)
        return tuple(self.logits.get(layer, missing) for layer in exit_layers)

    def uncertainties(self, exit_layers: list[int]) -> torch.Tensor | None:
        """(exits, rows), or None without a learned exit head."""
        if not self.uncertainty:
            return None
        missing = torch.full_like(self.left_at, torch.nan, dtype=next(iter(self.uncertainty.values())).dtype)
        return torch.stack([self.uncertainty.get(layer, missing) for layer in exit_layers])


def _in_batch(values: torch.Tensor, rows: torch.Tensor | None, batch: int) -> torch.Tensor:
    """Values of the rows inside, (inside, ...), at their places in the batch; NaN elsewhere."""
    if rows is None:
        return values
    everywhere = values.new_full((batch, *values.shape[1:]), torch.nan)
    everywhere[rows] = values
    return everywhere


def gather_answers(walk, head, policy, problem_type, exit_layers, mask=None, choices=1) -> Answers:
    """Ask `head` at every exit of `walk()` and let rows leave as `policy` says.

    With a policy this is not compiled: rows that leave change what the walk goes on with, which no compiler follows.
    head(here) -> logits (rows inside, ...) and the learned uncertainty (rows inside,) or None. mask (rows, tokens)
    for tasks that answer per token. choices: how many consecutive rows make one question (multiple choice) and leave
    together.
    """
    gather = _gather if policy is None else torch.compiler.disable(_gather)
    return gather(walk, head, policy, problem_type, exit_layers, mask, choices)


def _gather(walk, head, policy, problem_type, exit_layers, mask, choices) -> Answers:
    answers: Answers | None = None
    history: list[Prediction] = []
    positions: list[int] = []
    for here in walk():
        logits, doubt = head(here)
        rows = here.flow.rows if here.flow.rows is None or choices == 1 else here.flow.rows[::choices] // choices
        if answers is not None:  # the model's layers may lie on several devices
            device = answers.left_at.device
            logits, doubt, rows = (None if one is None else one.to(device) for one in (logits, doubt, rows))
        if answers is None:
            left_at = torch.full((logits.shape[0],), here.layer, dtype=torch.long, device=logits.device)
            answers = Answers({}, {}, logits.clone(), left_at)
        batch = answers.left_at.shape[0]
        answers.logits[here.layer] = _in_batch(logits, rows, batch)
        if doubt is not None:
            answers.uncertainty[here.layer] = _in_batch(doubt, rows, batch)
        if rows is None:
            answers.answer, answers.left_at = logits, torch.full_like(answers.left_at, here.layer)
        else:
            answers.answer = answers.answer.index_copy(0, rows, logits)
            answers.left_at[rows] = here.layer
        if policy is None or here.is_last:
            continue
        inside = mask if mask is None or rows is None else mask[rows]
        history.append(predict(logits, problem_type, inside, doubt))
        positions.append(here.position)
        leaves = leaving(policy, history, positions, exit_layers)
        if leaves.any():
            here.leave(leaves.repeat_interleave(choices))
            history = [prediction.select(~leaves) for prediction in history]
    assert answers is not None  # the last exit always answers
    return answers


def _share(labels: torch.Tensor, num_items: torch.Tensor | int | None) -> torch.Tensor | float:
    """Of an update's labels, the share that is in this batch; None: all."""
    return 1.0 if num_items is None else (labels != -100).sum() / num_items


def _check_labels(labels: torch.Tensor, classes: int) -> None:
    if labels.is_floating_point():
        raise ValueError(f"labels must be integers for this task, got {labels.dtype}.")
    if _values(labels) and ((labels != -100) & ((labels < 0) | (labels >= classes))).any():
        wrong = labels[(labels != -100) & ((labels < 0) | (labels >= classes))].unique().tolist()
        raise ValueError(f"labels must lie within 0..{classes - 1} (or be -100, ignored), got {wrong}.")


class ElasticBertExitModel(ElasticBertTaskModel):
    """A linear head per exit, `classifiers.{layer - 1}`; in static use the only one, under the stock model's name."""

    head_name, static_head_name = "classifiers", "classifier"

    def __init__(self, config):
        super().__init__(config)
        rate = config.hidden_dropout_prob if config.classifier_dropout is None else config.classifier_dropout
        self.dropout = nn.Dropout(rate)
        outputs = self.head_outputs()
        self.is_static = config.num_output_layers == 1
        if self.is_static:
            setattr(self, self.static_head_name, nn.Linear(config.hidden_size, outputs))
        else:
            setattr(self, self.head_name, PerExit(config.exit_layers, lambda: nn.Linear(config.hidden_size, outputs)))
        if config.learned_exit_head:
            self.exit_uncertainty = nn.Linear(config.hidden_size, 1)
        self.post_init()

    def head_outputs(self) -> int:
        """Width of an exit's logits."""
        return int(self.config.num_labels or 1)

    def head_at(self, layer: int) -> nn.Module:
        """The head of the exit after `layer`, from 1."""
        return getattr(self, self.static_head_name) if self.is_static else getattr(self, self.head_name).at(layer)

    def head(self, here: Exit) -> tuple[torch.Tensor, torch.Tensor | None]:
        """logits (rows, labels) or (rows, tokens, labels), and the learned uncertainty (rows,) where the model has
        that head."""
        states = self.elasticbert.pool(here) if self.pools else here.flow.all_tokens()
        logits = self.head_at(here.layer)(self.dropout(states))
        if not self.config.learned_exit_head:
            return logits, None
        first = states if self.pools else here.flow.first_token(self.config.keep_cls)
        return logits, self.exit_uncertainty(first).squeeze(-1).sigmoid()

    def answer(self, walk, policy: dict | None, problem_type: str, mask=None) -> Answers:
        """Every exit's logits and each row's answer; see `gather_answers`."""
        return gather_answers(walk, self.head, policy, problem_type, self.exit_layers, mask)

    def output(self, answers: Answers, loss=None, exit_losses=None) -> ElasticBertExitOutput:
        """The answers, each exit's logits, and the loss where there are labels."""
        return ElasticBertExitOutput(
            loss=loss,
            logits=answers.answer,
            exit_logits=answers.per_exit(self.exit_layers),
            exit_layers=answers.left_at,
            exit_losses=exit_losses,
            exit_uncertainty=answers.uncertainties(self.exit_layers),
        )

    def exits_loss(
        self, answers: Answers, loss_of: Callable, wrong: Callable, share: torch.Tensor | float = 1.0
    ) -> tuple[torch.Tensor, tuple]:
        """The weighted loss over the exits computed, and the loss of each; loss_of(logits) -> scalar, wrong(logits)
        -> (rows,); share: of the update's items that are in this batch, where `loss_of` divides by all of them.

        With a learned exit head its squared error, averaged over the exits below the last (the only ones it is asked
        at), is added.
        """
        losses = {layer: loss_of(logits) for layer, logits in answers.logits.items()}
        loss = weighted_loss(losses, self.config.exit_loss)
        below = [layer for layer in answers.uncertainty if layer != self.exit_layers[-1]]
        if below:
            terms = [uncertainty_loss(answers.uncertainty[layer], wrong(answers.logits[layer])) for layer in below]
            loss = loss + share * sum(terms) / len(terms)
        elif answers.uncertainty:
            loss = loss + 0.0 * sum(doubt.sum() for doubt in answers.uncertainty.values())
        trained = trained_exits(self.config.exit_loss, list(answers.logits))
        return loss + zero_for_others(self, trained), tuple(losses.values())

    def with_loss(self, answers: Answers, labels, problem_type: str, num_items=None) -> ElasticBertExitOutput:
        """The answers, with the loss over the exits where there are labels."""
        if labels is None:
            return self.output(answers)
        if problem_type not in ("regression", "multi_label_classification"):
            _check_labels(labels, answers.answer.shape[-1])
        elif _values(labels) and not labels.isfinite().all():
            raise ValueError("labels must be finite numbers, got NaN or infinity.")
        loss, losses = self.exits_loss(
            answers,
            lambda logits: exit_task_loss(logits, labels, problem_type, num_items),
            lambda logits: wrong_answers(logits, labels, problem_type),
            _share(labels, num_items),
        )
        return self.output(answers, loss, losses)

    def problem(self, labels=None) -> str:
        """What an exit's logits mean; as in transformers, inferred from the labels where the config does not say."""
        default: Any = "regression" if self.head_outputs() == 1 else "single_label_classification"
        if self.config.problem_type is None and labels is not None:
            several = self.head_outputs() > 1 and labels.is_floating_point()
            self.config.problem_type = "multi_label_classification" if several else default
        return self.config.problem_type or default

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        length_config: list | float | None = None,
        layer_config: list[int] | None = None,
        exit_policy: dict | None = None,
        exits: list[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[RecordingArguments],
    ) -> ElasticBertExitOutput:
        """labels (rows,) classes, (rows,) floats for regression, (rows, labels) floats for multi-label; for
        token heads (rows, tokens), -100 where a token has none.

        length_config, layer_config, exit_policy: None = the config's; exits: the exit layers to compute (grouped
        training), None = all. The policy is ignored while training and when labels are given.
        """
        problem_type = self.problem(labels)
        policy = self.policy_for(exit_policy, labels, problem_type)
        ids = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        walk = partial(self.walk, (*ids, length_config, layer_config), exits, kwargs)
        mask = None if self.pools or attention_mask is None else attention_mask.bool()
        answers = self.answer(walk, policy, problem_type, mask)
        return self.with_loss(answers, labels, problem_type, num_items_in_batch)


class ElasticBertForSequenceClassification(ElasticBertExitModel):
    """Classification, regression (one label, or problem_type) and multi-label classification of sequences, at every
    exit."""


class ElasticBertForTokenClassification(ElasticBertExitModel):
    """A label per token, at every exit; dropped tokens are restored before a head reads them."""

    pools = False

    def problem(self, labels=None) -> str:
        return "token_classification"


class ElasticBertForMultipleChoice(ElasticBertExitModel):
    """One score per choice, at every exit; inputs (questions, choices, tokens). The choices of a question leave
    together."""

    def head_outputs(self) -> int:
        return 1

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        length_config: list | float | None = None,
        layer_config: list[int] | None = None,
        exit_policy: dict | None = None,
        exits: list[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[RecordingArguments],
    ) -> ElasticBertExitOutput:
        """labels (questions,): the right choice; logits (questions, choices); the rest as in sequence
        classification."""
        given = input_ids if inputs_embeds is None else inputs_embeds
        ids = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        flat_ones = [tuple(one.shape) for one in ids if one is not None and one.dim() < 3]
        if given is None or flat_ones:
            shape = None if given is None else flat_ones[0]
            raise ValueError(f"multiple choice inputs must have the shape (questions, choices, tokens), got {shape}.")
        choices = given.shape[1]
        policy = self.policy_for(exit_policy, labels, "single_label_classification")
        flat = tuple(None if one is None else one.flatten(0, 1) for one in ids)
        walk = partial(self.walk, (*flat, length_config, layer_config), exits, kwargs)

        def head(here):
            scores, doubt = self.head(here)
            return scores.view(-1, choices), None if doubt is None else doubt.view(-1, choices).amax(-1)

        answers = gather_answers(walk, head, policy, "single_label_classification", self.exit_layers, choices=choices)
        return self.with_loss(answers, labels, "single_label_classification", num_items_in_batch)


class ElasticBertForQuestionAnswering(ElasticBertExitModel):
    """The span that answers a question, at every exit: heads `qa_outputs.{layer - 1}` (`qa_outputs` in static use)."""

    pools = False
    head_name = static_head_name = "qa_outputs"

    def head_outputs(self) -> int:
        return 2

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        start_positions: torch.Tensor | None = None,
        end_positions: torch.Tensor | None = None,
        length_config: list | float | None = None,
        layer_config: list[int] | None = None,
        exit_policy: dict | None = None,
        exits: list[int] | None = None,
        **kwargs: Unpack[RecordingArguments],
    ) -> ElasticBertQuestionAnsweringOutput:
        """start_positions, end_positions (rows,): tokens; one beyond the input is ignored, as in transformers."""
        labels = None if start_positions is None or end_positions is None else (start_positions, end_positions)
        policy = self.policy_for(exit_policy, labels, "question_answering")
        ids = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        walk = partial(self.walk, (*ids, length_config, layer_config), exits, kwargs)
        mask = None if attention_mask is None else attention_mask.bool()
        answers = self.answer(walk, policy, "question_answering", mask)
        loss = losses = None
        if labels is not None:
            spans = torch.stack([positions.reshape(-1) for positions in labels], dim=1)  # (rows, start and end)
            tokens = answers.answer.shape[1]
            if _values(spans) and (spans < 0).any():
                raise ValueError(f"start_positions and end_positions must not be negative, got {spans.min().item()}.")
            spans = spans.masked_fill(spans >= tokens, -100)
            loss, losses = self.exits_loss(
                answers,
                lambda logits: sum(cross_entropy(logits[..., side], spans[:, side]) for side in (0, 1)) / 2,
                lambda logits: wrong_answers(logits, spans, "question_answering", mask),
            )
        both = self.output(answers)
        return ElasticBertQuestionAnsweringOutput(
            loss=loss,
            start_logits=answers.answer[..., 0],
            end_logits=answers.answer[..., 1],
            exit_start_logits=tuple(logits[..., 0] for logits in both.exit_logits or ()),
            exit_end_logits=tuple(logits[..., 1] for logits in both.exit_logits or ()),
            exit_layers=both.exit_layers,
            exit_losses=losses,
            exit_uncertainty=both.exit_uncertainty,
        )


class ElasticBertPredictionTransform(nn.Module):
    """Dense, `hidden_act`, LayerNorm: what an exit does to a token's state before the decoder; (..., width)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.hidden_act]
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, states):
        return self.LayerNorm(self.activation(self.dense(states)))


class ElasticBertPredictions(nn.Module):
    """Masked-token prediction: a transform per exit, and one decoder for all, tied to the word embeddings."""

    def __init__(self, config):
        super().__init__()
        self.transforms = PerExit(config.exit_layers, lambda: ElasticBertPredictionTransform(config))
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size)

    def forward(self, states, layer):
        """states (..., width) at the exit after `layer` -> logits (..., vocabulary)"""
        return self.decoder(self.transforms.at(layer)(states))


class ElasticBertMaskedModel(ElasticBertTaskModel):
    """A model with masked-token prediction at every exit."""

    pools = False
    _tied_weights_keys = {"predictions.decoder.weight": "elasticbert.embeddings.word_embeddings.weight"}

    def __init__(self, config):
        super().__init__(config)
        self.predictions = ElasticBertPredictions(config)

    def get_output_embeddings(self):
        return self.predictions.decoder

    def set_output_embeddings(self, new_embeddings):
        self.predictions.decoder = new_embeddings

    def masked_loss(
        self, here: Exit, labels: torch.Tensor, count=None, teacher: torch.Tensor | None = None, recompute: bool = True
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One exit's mean loss over the masked tokens, and how many of them it predicts right; logits are computed at
        those positions only.

        Cross-entropy, or the divergence from `teacher` (masked, vocabulary), the full model's detached logits there.
        recompute: the backward pass computes the logits anew, so that memory holds those of one exit at a time.
        """
        tokens = here.flow.all_tokens()
        if labels.shape != tokens.shape[:2]:
            raise ValueError(
                f"labels must be of shape {tuple(tokens.shape[:2])}, as the tokens, got {tuple(labels.shape)}."
            )
        masked = labels != -100
        targets = labels[masked]

        def loss(states):
            logits = self.predictions(states, here.layer)  # (masked, vocabulary)
            right = (logits.detach().argmax(-1) == targets).sum()
            if teacher is None:
                return cross_entropy(logits, targets, count), right
            return inplace_distillation(logits, teacher, "masked_lm", num_items=count), right

        states = tokens[masked]
        if recompute and torch.is_grad_enabled():
            return checkpoint(loss, states, use_reentrant=False)
        return loss(states)


class ElasticBertForMaskedLM(ElasticBertMaskedModel):
    """Masked language modelling at every exit."""

    def __init__(self, config):
        super().__init__(config)
        self.post_init()

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        length_config: list | float | None = None,
        layer_config: list[int] | None = None,
        exit_policy: dict | None = None,
        exits: list[int] | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
        **kwargs: Unpack[RecordingArguments],
    ) -> ElasticBertExitOutput:
        """labels (rows, tokens), -100 where nothing is to be predicted.

        logits (rows, tokens, vocabulary). With labels, logits are those of the last exit asked for, and while training
        there are none: the loss needs them at masked positions only.
        """
        policy = self.policy_for(exit_policy, labels, "token_classification")
        ids = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        walk = partial(self.walk, (*ids, length_config, layer_config), exits, kwargs)
        if labels is None:
            mask = None if attention_mask is None else attention_mask.bool()
            answers = gather_answers(walk, self.head, policy, "token_classification", self.exit_layers, mask)
            return ElasticBertExitOutput(
                logits=answers.answer, exit_logits=answers.per_exit(self.exit_layers), exit_layers=answers.left_at
            )
        _check_labels(labels, self.config.vocab_size)
        losses, logits = {}, None
        for here in walk():
            losses[here.layer], _ = self.masked_loss(here, labels, num_items_in_batch, recompute=not here.is_last)
            if here.is_last and not self.training:
                logits = self.head(here)[0]
        trained = trained_exits(self.config.exit_loss, list(losses))
        loss = weighted_loss(losses, self.config.exit_loss) + zero_for_others(self, trained)
        return ElasticBertExitOutput(loss=loss, logits=logits, exit_losses=tuple(losses.values()))

    def head(self, here: Exit) -> tuple[torch.Tensor, None]:
        """logits (rows, tokens, vocabulary); no learned uncertainty."""
        return self.predictions(here.flow.all_tokens(), here.layer), None


_subnetwork = itemgetter("length_config", "layer_config")


@dataclass
class Teacher:
    """The full model's last answers, detached, and where they count: labels (rows, tokens) and their predictions
    (masked, vocabulary); order (rows, 2), and where it was asked for, ordered (rows,) or None."""

    labels: torch.Tensor
    predictions: torch.Tensor
    order: torch.Tensor
    ordered: torch.Tensor | None


class ElasticBertForPreTraining(ElasticBertMaskedModel):
    """Masked language modelling and sentence-order prediction at every exit: loss = sum over exits of MLM + SOP."""

    pools = True
    accepts_loss_kwargs = False  # two losses with two counts: no one number of items can scale them

    def __init__(self, config):
        super().__init__(config)
        self.sop_classifiers = PerExit(config.exit_layers, lambda: nn.Linear(config.hidden_size, 2))
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.post_init()

    def check_targets(self, labels: torch.Tensor | None, orders: torch.Tensor | None, students: Sequence) -> None:
        """ValueError for labels outside their range, and for students without labels to learn at."""
        if labels is not None:
            _check_labels(labels, self.config.vocab_size)
        elif students:
            raise ValueError("students learn at the masked tokens: labels must be given.")
        if orders is not None:
            _check_labels(orders, 2)

    def exits_for(self, exit_policy: dict | None, exits: list[int] | None, trained: bool) -> list[int] | None:
        """The exits to compute, None = all: those that were asked for, else up to where a policy ends the pass. It is
        checked also where it does not hold, as with labels (`trained`)."""
        last = self.elasticbert.ends_at(exit_policy)
        return exits if trained or exits is not None else [layer for layer in self.exit_layers if layer <= last]

    def sentence_order(self, here: Exit) -> torch.Tensor:
        """Logits of the segments' order at one exit: as they were, swapped; (rows, 2)."""
        return self.sop_classifiers.at(here.layer)(self.dropout(self.elasticbert.pool(here)))

    def weighted(self, *losses: dict[int, torch.Tensor]) -> torch.Tensor:
        """The sum of the objectives, each {exit layer: scalar} under the config's weighting of the exits."""
        return torch.stack([weighted_loss(one, self.config.exit_loss) for one in losses if one]).sum()

    @torch.no_grad()
    def teacher(self, last: Exit, labels: torch.Tensor, orders: torch.Tensor | None, order: torch.Tensor) -> Teacher:
        """The last exit's answers; orders (rows,): the order labels, order (rows, 2): its logits of them."""
        predictions = self.predictions(last.flow.all_tokens()[labels != -100], last.layer)
        return Teacher(labels, predictions, order.detach(), None if orders is None else orders != -100)

    def student_loss(self, walk: Iterator[Exit], teacher: Teacher, mlm_count=None, sop_count=None) -> torch.Tensor:
        """The divergence of a sub-network's exits from the teacher, at masked tokens and in the order of segments
        (Yu and Huang 2019; Kim and Cho 2021, section 3.2)."""
        mlm, sop = {}, {}
        for here in walk:
            mlm[here.layer], _ = self.masked_loss(here, teacher.labels, mlm_count, teacher.predictions)
            if teacher.ordered is not None:
                sop[here.layer] = inplace_distillation(
                    self.sentence_order(here), teacher.order, "single_label_classification", teacher.ordered, sop_count
                )
        return self.weighted(mlm, sop)

    @capture_outputs
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        token_type_ids: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        inputs_embeds: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        sentence_order_label: torch.Tensor | None = None,
        length_config: list | float | None = None,
        layer_config: list[int] | None = None,
        exit_policy: dict | None = None,
        exits: list[int] | None = None,
        students: Sequence[Mapping[str, Any]] = (),
        mlm_count: torch.Tensor | float | None = None,
        sop_count: torch.Tensor | float | None = None,
        **kwargs: Unpack[RecordingArguments],
    ) -> ElasticBertForPreTrainingOutput:
        """labels (rows, tokens), -100 where nothing is to be predicted; sentence_order_label (rows,): 1 = swapped.

        exit_policy: never or constant, as `ElasticBertModel` takes it; none holds where there are labels. students:
        sub-networks, each a length_config and a layer_config, that learn this pass's last answers (sandwich rule with
        inplace distillation); the loss is then the mean over the full model and them.
        mlm_count, sop_count: what the summed losses are divided by (None: this batch's own counts), the counts of the
        global batch over the number of processes that average gradients. With them there are no prediction_logits."""
        ids = (input_ids, attention_mask, token_type_ids, position_ids, inputs_embeds)
        self.check_targets(labels, sentence_order_label, students)
        exits = self.exits_for(exit_policy, exits, labels is not None or sentence_order_label is not None)
        mlm, sop, right, predictions, orders = {}, {}, {}, {}, {}
        for here in self.walk((*ids, length_config, layer_config), exits, kwargs):
            orders[here.layer] = self.sentence_order(here)
            if labels is not None:
                recompute = bool(students) or not here.is_last
                mlm[here.layer], right[here.layer] = self.masked_loss(here, labels, mlm_count, recompute=recompute)
            if sentence_order_label is not None:
                sop[here.layer] = cross_entropy(orders[here.layer], sentence_order_label, sop_count)
            if labels is None or (here.is_last and not self.training and mlm_count is None):
                predictions[here.layer] = self.predictions(here.flow.all_tokens(), here.layer)
        loss = distillation = None
        if mlm or sop:
            loss = self.weighted(mlm, sop)
            if students and labels is not None:
                teacher = self.teacher(here, labels, sentence_order_label, orders[here.layer])
                walks = (self.walk((*ids, *one), exits, kwargs) for one in map(_subnetwork, students))
                losses = [self.student_loss(walk, teacher, mlm_count, sop_count) for walk in walks]
                distillation = torch.stack(losses).mean()
                loss = torch.stack([loss, *losses]).mean()
            loss = loss + zero_for_others(self, trained_exits(self.config.exit_loss, list(orders)))
        return ElasticBertForPreTrainingOutput(
            loss=loss,
            prediction_logits=predictions.get(here.layer),
            sop_logits=orders[here.layer],
            exit_prediction_logits=tuple(predictions.values()) if labels is None else None,
            exit_sop_logits=tuple(orders.values()),
            exit_layers=torch.full_like(orders[here.layer][:, 0], here.layer, dtype=torch.long),
            mlm_losses=tuple(mlm.values()) or None,
            sop_losses=tuple(sop.values()) or None,
            mlm_right=tuple(right.values()) or None,
            distillation_loss=distillation,
        )
