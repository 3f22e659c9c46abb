"""The encoder: embeddings, layers, and the one loop that walks up from exit to exit.

Legend of shapes: rows, tokens, width, heads. "Real" tokens are those that the attention mask marks.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.masking_utils import create_bidirectional_mask
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .checks import Mass
from .length_drop import most_significant, restore, significance, take_tokens, tokens_to_cover, tokens_to_keep
from .losses import gradient_equilibrium


class ElasticBertEmbeddings(nn.Module):
    """Word, position and (where the model has them) token type embeddings."""

    def __init__(self, config):
        super().__init__()
        self.word_embeddings = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_embeddings = nn.Embedding(config.max_position_embeddings, config.hidden_size)
        if config.type_vocab_size:
            self.token_type_embeddings = nn.Embedding(config.type_vocab_size, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.position_offset = config.position_offset

    def forward(self, input_ids, token_type_ids=None, position_ids=None, inputs_embeds=None):
        words = self.word_embeddings(input_ids) if inputs_embeds is None else inputs_embeds  # (rows, tokens, width)
        if position_ids is None:
            position_ids = torch.arange(words.shape[1], device=words.device)[None] + self.position_offset
        embeddings = words
        if hasattr(self, "token_type_embeddings"):
            if token_type_ids is None:
                token_type_ids = torch.zeros(words.shape[:2], dtype=torch.long, device=words.device)
            embeddings = embeddings + self.token_type_embeddings(token_type_ids)
        embeddings = embeddings + self.position_embeddings(position_ids)
        return self.dropout(self.LayerNorm(embeddings))


def _attention_scores(query, key, attention_mask, scaling):
    """Attention probabilities without dropout; query, key (rows, heads, tokens, size) -> (rows, heads, tokens,
    tokens)"""
    scores = torch.matmul(query, key.transpose(2, 3)) * scaling
    if attention_mask is not None and attention_mask.dtype == torch.bool:
        scores = scores.masked_fill(~attention_mask, torch.finfo(scores.dtype).min)
    elif attention_mask is not None:
        scores = scores + attention_mask
    return scores.softmax(-1)


def eager_attention_forward(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    """Attention written out, the fallback of the attention interface: (rows, tokens, heads, size) and the
    probabilities."""
    probabilities = _attention_scores(query, key, attention_mask, scaling)
    probabilities = nn.functional.dropout(probabilities, p=dropout, training=module.training)
    return torch.matmul(probabilities, value).transpose(1, 2).contiguous(), probabilities


class ElasticBertSelfAttention(nn.Module):
    """Multi-head attention whose number of heads is the layer's own."""

    is_causal = False

    def __init__(self, config, index):
        super().__init__()
        self.config = config
        self.attention_head_size = config.attention_head_size
        self.scaling = self.attention_head_size**-0.5
        self.query = nn.Linear(config.hidden_size, config.head_sizes[index])
        self.key = nn.Linear(config.hidden_size, config.head_sizes[index])
        self.value = nn.Linear(config.hidden_size, config.head_sizes[index])
        self.attention_dropout = config.attention_probs_dropout_prob

    def forward(self, hidden, attention_mask=None, real=None, **kwargs):
        """-> context (rows, tokens, all heads), probabilities where the attention implementation gives them, and,
        where `real` is given, the tokens' significance scores (rows, tokens): only then must probabilities be written
        out, whatever the attention implementation."""
        shape = (*hidden.shape[:-1], -1, self.attention_head_size)
        query, key, value = (
            project(hidden).view(shape).transpose(1, 2)  # (rows, heads, tokens, size)
            for project in (self.query, self.key, self.value)
        )
        dropout = self.attention_dropout if self.training else 0.0
        if real is None:
            attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
            context, probabilities = attend(
                self, query, key, value, attention_mask, dropout=dropout, scaling=self.scaling, **kwargs
            )
            return context.reshape(*hidden.shape[:-1], -1), probabilities, None
        keys = real[:, None, None]  # a mask of our own: the attention implementation's need not be a dense one
        probabilities = _attention_scores(query, key, keys, self.scaling)
        scores = significance(probabilities, real)
        kept = nn.functional.dropout(probabilities, p=dropout, training=self.training)
        context = torch.matmul(kept, value).transpose(1, 2).reshape(*hidden.shape[:-1], -1)
        recorded = self.config._attn_implementation == "eager"  # else of these layers alone, which nobody asked for
        return context, probabilities if recorded else None, scores


class ElasticBertResidual(nn.Module):
    """Projection back to the width, dropout, residual, LayerNorm."""

    def __init__(self, config, width_in):
        super().__init__()
        self.dense = nn.Linear(width_in, config.hidden_size)
        self.LayerNorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, inner, residual):
        return self.LayerNorm(self.dropout(self.dense(inner)) + residual)


class ElasticBertAttention(nn.Module):
    """Holds BERT's key names `attention.self` and `attention.output`."""

    def __init__(self, config, index):
        super().__init__()
        self.self = ElasticBertSelfAttention(config, index)
        self.output = ElasticBertResidual(config, config.head_sizes[index])

    def forward(self, hidden, attention_mask=None, real=None, **kwargs):
        context, _, scores = self.self(hidden, attention_mask, real, **kwargs)
        return self.output(context, hidden), scores


class ElasticBertIntermediate(nn.Module):
    """Holds BERT's key name `intermediate.dense`."""

    def __init__(self, config, index):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.intermediate_size_per_layer[index])
        self.activation = ACT2FN[config.hidden_act]

    def forward(self, hidden):
        return self.activation(self.dense(hidden))


class ElasticBertLayer(GradientCheckpointingLayer):
    """One layer; tokens may be dropped after its attention, before its feed-forward."""

    def __init__(self, config, index):
        super().__init__()
        self.attention = ElasticBertAttention(config, index)
        self.intermediate = ElasticBertIntermediate(config, index)
        self.output = ElasticBertResidual(config, config.intermediate_size_per_layer[index])

    def forward(self, hidden, attention_mask=None, real=None, counts=None, mass=None, keep_cls=True, **kwargs):
        """hidden (rows, tokens, width) -> the same with the kept tokens, and the kept tokens' indices and mask (rows,
        kept).

        counts (rows,): how many of the `real` (rows, tokens) tokens stay; mass: how much of the significance they
        cover; neither: all of them, and no significance is computed.
        """
        drops = counts is not None or mass is not None
        hidden, scores = self.attention(hidden, attention_mask, real if drops else None, **kwargs)
        kept = mask = None
        if drops:
            if mass is not None:
                counts = tokens_to_cover(mass, scores, real, keep_cls)
            kept, mask = most_significant(scores, real, counts, keep_cls)
            hidden = take_tokens(hidden, kept)
        return self.output(self.intermediate(hidden), hidden), kept, mask


class ElasticBertPooler(nn.Module):
    """Dense and activation over a row's state, [CLS] or the mean of its tokens; (rows, width)."""

    def __init__(self, config):
        super().__init__()
        self.dense = nn.Linear(config.hidden_size, config.hidden_size)
        self.activation = ACT2FN[config.pooler_act]

    def forward(self, state):
        return self.activation(self.dense(state))


@dataclass
class Flow:
    """What passes from layer to layer: the rows still inside, each with the tokens it still keeps.

    hidden (rows, tokens, width); mask (rows, tokens), true at real tokens still kept, None = all. rows (rows,): their
    indices in the batch, None = all. Once a token has been dropped: positions (rows, tokens), where each stood, and
    memory (rows, all tokens, width), the last states. real_tokens (rows,): before any drop.
    """

    hidden: torch.Tensor
    mask: torch.Tensor | None
    rows: torch.Tensor | None = None
    positions: torch.Tensor | None = None
    memory: torch.Tensor | None = None
    real_tokens: torch.Tensor | None = None
    attention_mask: Any = None  # as the attention implementation wants it, made from `mask`
    attention_mask_is_stale: bool = True

    def through(self, layer: nn.Module, config, length: float | int | Mass | None, **kwargs) -> None:
        """Pass a layer, dropping tokens where `length` says so."""
        if self.attention_mask_is_stale:
            self.attention_mask = create_bidirectional_mask(
                config=config, inputs_embeds=self.hidden, attention_mask=self.mask
            )
            self.attention_mask_is_stale = False
        if length is None or (isinstance(length, int) and length >= self.hidden.shape[1]):
            self.hidden, _, _ = layer(self.hidden, self.attention_mask, **kwargs)
            self.follow()
            return
        real = self.real_mask()
        if self.real_tokens is None:
            self.real_tokens = real.sum(1)
        dropping: dict[str, Any] = {}
        if isinstance(length, Mass):
            dropping["mass"] = length.share
        else:
            dropping["counts"] = tokens_to_keep(length, self.real_tokens).minimum(real.sum(1))
        before = self.hidden
        self.hidden, kept, mask = layer(
            self.hidden, self.attention_mask, real=real, keep_cls=config.keep_cls, **dropping, **kwargs
        )
        self.follow()
        before, real = before.to(self.hidden.device), real.to(self.hidden.device)
        if self.memory is None or self.positions is None:
            self.memory, self.positions = before, kept
        else:
            self.memory = restore(self.memory, before, self.positions, real)
            self.positions = self.positions.gather(1, kept)
        self.mask, self.attention_mask_is_stale = mask, True

    def follow(self) -> None:
        """What goes with the states goes where they are: the model's layers may lie on several devices."""
        for name in ("mask", "rows", "positions", "memory", "real_tokens"):
            if (value := getattr(self, name)) is not None:
                setattr(self, name, value.to(self.hidden.device))

    def real_mask(self) -> torch.Tensor:
        """(rows, tokens) booleans, true at real tokens still kept."""
        if self.mask is None:
            return torch.ones(self.hidden.shape[:2], dtype=torch.bool, device=self.hidden.device)
        return self.mask

    def all_tokens(self) -> torch.Tensor:
        """Drop-and-restore: (rows, all tokens, width)."""
        if self.memory is None or self.positions is None:
            return self.hidden
        return restore(self.memory, self.hidden, self.positions, self.real_mask())

    def first_token(self, keep_cls: bool) -> torch.Tensor:
        """[CLS]; (rows, width). Where it may have been dropped, its last state."""
        return (self.hidden if keep_cls or self.memory is None else self.all_tokens())[:, 0]

    def mean_token(self) -> torch.Tensor:
        """The mean of the real tokens still kept; (rows, width)."""
        real = self.real_mask().to(self.hidden.dtype)
        shares = real / real.sum(1, keepdim=True)  # first: a sum of 512 states can exceed float16
        return (self.hidden * shares[..., None]).sum(1)

    def select_rows(self, stay: torch.Tensor) -> None:
        """Only the rows of `stay` (booleans) go on, cut to the longest of them."""
        index = stay.nonzero().squeeze(1).to(self.hidden.device)
        for name in ("hidden", "mask", "positions", "memory", "real_tokens"):
            value = getattr(self, name)
            setattr(self, name, None if value is None else value[index])
        self.rows = index if self.rows is None else self.rows[index]
        if self.positions is not None and len(index):  # kept tokens stand first: cut to the longest row
            longest = int(self.real_mask().sum(1).max())
            for name in ("hidden", "mask", "positions"):
                setattr(self, name, getattr(self, name)[:, :longest])
        self.attention_mask_is_stale = True

    def branch_off(self, exits_from_here: int) -> "Flow":
        """Gradient equilibrium: a copy for this exit's branch; what goes on is scaled too."""
        branch = replace(self)
        for name in ("hidden", "memory"):
            if getattr(self, name) is not None:
                scaled, upward = gradient_equilibrium(getattr(self, name), exits_from_here)
                setattr(branch, name, scaled)
                setattr(self, name, upward)
        return branch


@dataclass
class Exit:
    """An exit on the way up: its layer, from 1, its place among the model's exits, whether it is the last that is
    computed, and the flow as its branch sees it.

    `flow` is the branch's; rows leave by `leave`, which acts on what goes on.
    """

    layer: int
    position: int
    is_last: bool
    flow: Flow
    onward: Flow

    def leave(self, leaves: torch.Tensor) -> None:
        """The rows of `leaves` (booleans) do not go on."""
        self.onward.select_rows(~leaves)


class PerExit(nn.Module):
    """One module per exit, named layer - 1 as in the public checkpoints.

    Not a ModuleDict: PEFT trains and saves no such container as a whole (`modules_to_save=["classifiers"]`).
    """

    def __init__(self, exit_layers: list[int], make: Callable[[], nn.Module]):
        super().__init__()
        for layer in exit_layers:
            self.add_module(str(layer - 1), make())

    def at(self, layer: int) -> nn.Module:
        """The module of the exit after `layer`, from 1."""
        return getattr(self, str(layer - 1))

    def __getitem__(self, name: str) -> nn.Module:
        """The module of that name, layer - 1; this and what follows as in a ModuleDict."""
        return self.get_submodule(name)

    def __contains__(self, name: str) -> bool:
        return name in self._modules

    def __iter__(self) -> Iterator[str]:
        return iter(self._modules)

    def __len__(self) -> int:
        return len(self._modules)

    def keys(self) -> Iterable[str]:
        """Their names."""
        return self._modules.keys()

    def values(self) -> Iterable[nn.Module]:
        """The modules, from the lowest exit."""
        return self.children()

    def items(self) -> Iterable[tuple[str, nn.Module]]:
        """Names and modules."""
        return self.named_children()

    def others(self, layers: list[int]) -> Iterator[nn.Module]:
        """The modules of the exits that are not in `layers`."""
        return (module for name, module in self.named_children() if int(name) + 1 not in layers)


def zero_for_others(model: nn.Module, layers: list[int]) -> torch.Tensor | float:
    """What to add to the loss when only the exits of `layers` were computed: 0, but with a gradient for all exits'
    parameters.

    Optimizers treat a missing gradient and a zero one differently, and distributed training wants every parameter to
    take part. The modules are called, on no rows: where parameters are gathered for a call (ZeRO-3) they are not there
    outside of one.
    """
    width = next(module.config.hidden_size for module in model.modules() if isinstance(module, ElasticBertEncoder))
    # not of model.parameters(), which the replicas of DataParallel do not have
    weight = next(module.weight for module in model.modules() if isinstance(module, nn.Embedding))
    nothing = weight.new_zeros(0, width)
    per_exit = [module for module in model.modules() if isinstance(module, PerExit)]
    return sum(module(nothing).sum() for one in per_exit for module in one.others(layers))


class ElasticBertEncoder(nn.Module):
    """The layers, and a pooler per exit."""

    def __init__(self, config, add_pooling_layer=True):
        super().__init__()
        self.config = config
        self.layer = nn.ModuleList(ElasticBertLayer(config, index) for index in range(config.num_hidden_layers))
        self.exit_layers = config.exit_layers
        self.pooler: PerExit | None = (
            PerExit(self.exit_layers, lambda: ElasticBertPooler(config)) if add_pooling_layer else None
        )

    def exits(
        self, flow: Flow, lengths, layers: list[int], wanted: list[int], equilibrium: bool, **kwargs
    ) -> Iterator[Exit]:
        """The only loop over layers and exits, up to the last that is wanted: yields each exit of `wanted` whose layer
        is executed, and the top one whatever is.

        lengths: one entry per layer, or None; layers: those executed; equilibrium: scale the gradients of the exits
        yielded.
        """
        before = None
        top = self.exit_layers[-1]
        computed = [layer for layer in wanted if layer in layers or layer == top]
        if not computed:
            raise ValueError(f"exits {wanted} are after layers that layer_config {layers} leaves out.")
        for number, layer in enumerate(self.layer, start=1):
            if number in layers:
                length = None if lengths is None or lengths[number - 1] in (before, 1.0) else lengths[number - 1]
                flow.through(layer, self.config, length, **kwargs)
                if not isinstance(length, Mass):  # which is of what is left: the same again drops more
                    before = length or before
            if number not in computed:
                continue
            exits_from_here = len(computed) - computed.index(number)
            branch = flow.branch_off(exits_from_here) if equilibrium and exits_from_here > 1 else replace(flow)
            yield Exit(number, self.exit_layers.index(number), number == computed[-1], branch, flow)
            if number == computed[-1] or not flow.hidden.shape[0]:
                return
