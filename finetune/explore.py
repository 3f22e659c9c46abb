"""The exits' logits under many length configurations at once: what configurations share is computed once.

Configurations that agree up to a layer have the same states up to there, and the attention of the layer after it:
tokens are dropped behind the attention. So the configurations are walked as a tree, a branch per share and layer. Of
the last layer a head that pools [CLS] reads that alone, which no share drops: there is one branch, and one query.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from torch.nn.functional import scaled_dot_product_attention
from transformers import PreTrainedTokenizerBase

from elastic_model.checks import LengthConfig
from elastic_model.encoder import Exit, Flow
from elastic_model.length_drop import most_significant, restore, take_tokens, tokens_to_keep
from elastic_model.modeling_elasticbert import ElasticBertExitModel
from elastic_model.session import ElasticSession, Encoding, exit_values
from finetune.candidates import STEPS, Lengths, shares
from finetune.data import Encoded, collate, inputs_of, sorted_batches

Said = tuple[torch.Tensor, torch.Tensor | None]  # logits (exits, rows, ...), uncertainties (exits, rows)


@dataclass
class Observed:
    """What the exits say of all rows: logits (exits, rows, ...) float32 with zeros at padding, and (exits, rows)
    uncertainties where the model has a learned exit head."""

    logits: np.ndarray
    uncertainty: np.ndarray | None

    @classmethod
    def blank(cls, said: Said, rows: int, tokens: int) -> "Observed":
        """Zeros for that many rows, of at most that many tokens, in the shape of what was said of some of them."""
        logits, doubt = said
        padded = [tokens] if logits.ndim == 4 else []  # logits per token
        shape = (len(logits), rows, *padded, logits.shape[-1])
        return cls(np.zeros(shape, np.float32), None if doubt is None else np.zeros(shape[:2], np.float32))

    def put(self, rows: list[int], said: Said, exits: Mapping[int, int]) -> None:
        """Fill in what was said of those rows; exits: the place and the layer of those that were computed, the others
        hold NaN. ValueError for NaN or infinity there, which no metric would show."""
        logits, doubt = said
        place: tuple = (slice(None), rows, *map(slice, logits.shape[2:-1]))
        values = logits.float().cpu().numpy()
        check_finite(values, exits, "the model's")
        self.logits[place] = values
        if self.uncertainty is not None and doubt is not None:
            self.uncertainty[:, rows] = doubt.float().cpu().numpy()

    def followed_by(self, more: "Observed") -> "Observed":
        """With the rows of `more` behind its own."""
        doubts = (self.uncertainty, more.uncertainty)
        both = None if doubts[0] is None or doubts[1] is None else np.concatenate([doubts[0], doubts[1]], axis=1)
        return Observed(np.concatenate([self.logits, more.logits], axis=1), both)


def check_finite(logits: np.ndarray, exits: Mapping[int, int], whose: str) -> None:
    """ValueError where one of the exits (first axis; their place and layer) says NaN or infinity of a row (second)."""
    wrong = ~np.isfinite(logits[list(exits)]).all(axis=tuple(range(2, logits.ndim)))
    if wrong.any():
        layers = [layer for layer, one in zip(exits.values(), wrong, strict=True) if one.any()]
        raise ValueError(
            f"{whose} logits are NaN or infinite at the exits {', '.join(map(str, layers))} (of "
            f"{', '.join(map(str, exits.values()))}) for {wrong.any(axis=0).sum()} of {logits.shape[1]} rows looked "
            "at: its weights are damaged, or its training diverged"
        )


@dataclass
class Tree:
    """A walk of one batch: `found`: what each configuration gave, (exits, rows, ...), and its uncertainties."""

    model: ElasticBertExitModel
    found: dict[Lengths, Said] = field(default_factory=dict)

    def walk(self, flow: Flow, layer: int, lengths: list[Lengths], exits: list[tuple]) -> None:
        """Pass `layer` (from 1) and all above with the sorted configurations that share the flow below it."""
        config = self.model.config
        module: Any = self.model.elasticbert.encoder.layer[layer - 1]
        if layer == config.num_hidden_layers and self.first_alone:
            (one,) = lengths  # `_alike`: the last share tells no two apart
            self.found[one] = self.said([*exits, self.head(layer, replace(flow, hidden=_first_above(flow, module)))])
            return
        before = lengths[0][layer - 2] if layer > 1 else STEPS
        attended: tuple[torch.Tensor, torch.Tensor] | None = None
        for steps, group in groupby(lengths, key=lambda one: one[layer - 1]):
            branch, same = replace(flow), list(group)
            if steps == before:
                branch.through(module, config, None)
            else:
                if attended is None:
                    attended = module.attention(flow.hidden, None, flow.real_mask())
                self._drop(branch, module, attended, steps / STEPS)
            here = list(exits)
            if layer in self.model.exit_layers:
                here.append(self.head(layer, branch))
            if layer < config.num_hidden_layers:
                self.walk(branch, layer + 1, same, here)
            else:
                self.found[same[0]] = self.said(here)

    @property
    def first_alone(self) -> bool:
        """Whether the last exit reads [CLS] alone, and it is never dropped."""
        config = self.model.config
        return self.model.pools and config.keep_cls and config.exit_pooling[-1] == "cls"

    def head(self, layer: int, flow: Flow) -> tuple:
        """What the exit behind a layer says: logits and, where there is a learned exit head, its uncertainty."""
        exits = self.model.exit_layers
        return self.model.head(Exit(layer, exits.index(layer), layer == exits[-1], flow, flow))

    @staticmethod
    def said(exits: list[tuple]) -> Said:
        """What the exits said, stacked."""
        doubts = [doubt for _, doubt in exits if doubt is not None]
        return torch.stack([logits for logits, _ in exits]), torch.stack(doubts) if doubts else None

    def _drop(self, flow: Flow, module: Any, attended: tuple[torch.Tensor, torch.Tensor], share: float) -> None:
        """The layer behind its attention, as `Flow.through` has it; last states are kept where a head reads them."""
        hidden, scores = attended
        real, before, positions = flow.real_mask(), flow.hidden, flow.positions
        if flow.real_tokens is None:
            flow.real_tokens = real.sum(1)
        counts = tokens_to_keep(share, flow.real_tokens).minimum(real.sum(1))
        kept, mask = most_significant(scores, real, counts, self.model.config.keep_cls)
        hidden = take_tokens(hidden, kept)
        if not self.first_alone:
            memory = before if flow.memory is None or positions is None else flow.memory
            flow.memory = before if positions is None else restore(memory, before, positions, real)
            flow.positions = kept if positions is None else positions.gather(1, kept)
        flow.hidden, flow.mask = module.output(module.intermediate(hidden), hidden), mask
        flow.attention_mask_is_stale = True


@torch.inference_mode()
def explore_batch(
    model: ElasticBertExitModel, batch: Mapping[str, torch.Tensor], lengths: list[Lengths]
) -> dict[Lengths, Said]:
    """What every exit says of a batch under each of the configurations: logits (exits, rows, ...), uncertainties."""
    inputs = {name: tensor for name, tensor in batch.items() if name in ("input_ids", "token_type_ids")}
    hidden, mask = model.elasticbert.embeddings(**inputs), batch["attention_mask"].bool()
    tree, alike = Tree(model), _alike(mask.sum(1))
    walked = {one: tuple(alike[steps] for steps in one) for one in lengths}
    if tree.first_alone:
        walked = {one: (*steps[:-1], 1) for one, steps in walked.items()}
    tree.walk(Flow(hidden, mask), 1, sorted(set(walked.values())), [])
    return {one: tree.found[walked[one]] for one in lengths}


def _first_above(flow: Flow, layer: Any) -> torch.Tensor:
    """The first token behind a layer, (rows, 1, width): keys and values of all tokens, one query."""
    attention, first = layer.attention.self, flow.hidden[:, :1]
    query, key, value = (
        project(states).unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)
        for project, states in (
            (attention.query, first),
            (attention.key, flow.hidden),
            (attention.value, flow.hidden),
        )
    )
    mask = flow.real_mask()[:, None, None]
    context = scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=attention.scaling)
    hidden = layer.attention.output(context.transpose(1, 2).flatten(2), first)
    return layer.output(layer.intermediate(hidden), hidden)


def _alike(real_tokens: torch.Tensor) -> dict[int, int]:
    """For each share, in steps, the largest that keeps as many tokens of every row: what differs in name alone is
    passed once."""
    largest: dict[tuple[int, ...], int] = {}
    alike = {}
    for steps in range(STEPS, 0, -1):
        counts = tuple(tokens_to_keep(steps / STEPS, real_tokens).tolist())
        alike[steps] = largest.setdefault(counts, steps)
    return alike


def explore(
    model: ElasticBertExitModel,
    encoded: Encoded,
    tokenizer: PreTrainedTokenizerBase,
    batch_size: int,
    lengths: list[Lengths],
    some: range | None = None,
) -> dict[Lengths, Observed]:
    """What every exit says of all rows, or of `some`, under each of the configurations; batches are of rows of like
    length."""
    found: dict[Lengths, Observed] = {}
    some = range(len(encoded)) if some is None else some
    for rows, batch in batches_of(model, encoded, tokenizer, batch_size, some) if lengths else ():
        for one, said in explore_batch(model, batch, lengths).items():
            if one not in found:
                found[one] = Observed.blank(said, len(some), max(encoded.lengths))
            found[one].put(rows, said, dict(enumerate(model.exit_layers)))
    return found


def encodings_of(encoded: Encoded) -> list[Encoding]:
    """The rows of a split as an `ElasticSession` takes them."""
    return [Encoding(row["input_ids"], row.get("token_type_ids", [0] * len(row["input_ids"]))) for row in encoded.rows]


def observe_graph(
    session: ElasticSession,
    encoded: Encoded,
    batch_size: int,
    lengths: LengthConfig | None = None,
    some: range | None = None,
) -> Observed:
    """What every exit of an exported graph says of all rows, or of `some`; lengths: None = the file's own."""
    rows_read, some = encodings_of(encoded), range(len(encoded)) if some is None else some
    observed: Observed | None = None
    for rows in sorted_batches([encoded.lengths[row] for row in some], batch_size):
        batch = [rows_read[some[row]] for row in rows]
        values = exit_values(session.run(batch, session.never, session.exit_layers[-1], lengths))
        said = torch.from_numpy(values), None
        observed = observed or Observed.blank(said, len(some), max(encoded.lengths))
        observed.put(rows, said, dict(enumerate(session.exit_layers)))
    assert observed is not None  # a split has rows
    return observed


def explore_graph(
    session: ElasticSession, encoded: Encoded, batch_size: int, lengths: list[Lengths], some: range | None = None
) -> dict[Lengths, Observed]:
    """As `explore`, of an exported graph: what is served answers, a pass for each configuration."""
    return {one: observe_graph(session, encoded, batch_size, shares(one), some) for one in lengths}


def batches_of(
    model: ElasticBertExitModel, encoded: Encoded, tokenizer: PreTrainedTokenizerBase, batch_size: int, some: range
) -> Iterator[tuple[list[int], dict[str, torch.Tensor]]]:
    """Batches of rows of like length: their places in `some`, and what the model takes."""
    device, tokens = next(model.parameters()).device, encoded.lengths
    for rows in sorted_batches([tokens[row] for row in some], batch_size):
        yield rows, inputs_of(collate(encoded, [some[row] for row in rows], tokenizer, device))
