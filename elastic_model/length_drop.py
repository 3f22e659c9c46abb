"""Drop-and-restore: which tokens a layer keeps, and how dropped tokens come back (Kim and Cho 2021; Goyal et al.
2020)."""

import torch


def significance(probabilities: torch.Tensor, real: torch.Tensor) -> torch.Tensor:
    """How much attention each token receives, summed over heads and real query tokens (Goyal et al. 2020).

    probabilities (rows, heads, queries, keys) without dropout, real (rows, queries) -> (rows, keys), float32
    """
    return (probabilities.sum(1, dtype=torch.float32) * real[..., None]).sum(1)


def tokens_to_keep(length: float | int, real_tokens: torch.Tensor) -> torch.Tensor:
    """Tokens each row keeps: a share of its own real tokens, max(2, ceil(share n)), or a count; never more than it
    has.

    real_tokens (rows,) -> (rows,). The product is taken in float32, as every implementation of the format does.
    """
    if isinstance(length, int):
        return real_tokens.clamp(max=length)
    share = torch.tensor(length, dtype=torch.float32, device=real_tokens.device)
    return (share * real_tokens.float()).ceil().long().clamp(min=2).minimum(real_tokens)


def tokens_to_cover(mass: float, scores: torch.Tensor, real: torch.Tensor, keep_cls: bool) -> torch.Tensor:
    """Tokens each row keeps where it chooses itself: the fewest, the most significant first, whose scores sum to the
    share `mass` of the row's; at least 2, as far as it has them. [CLS] comes first where it is always kept.

    scores, real (rows, tokens) -> (rows,)
    """
    ranked = scores.masked_fill(~real, -torch.inf)
    if keep_cls:
        ranked = ranked.scatter(1, real.long().argmax(1, keepdim=True), torch.inf)
    order = ranked.sort(dim=1, descending=True, stable=True).indices
    covered = scores.masked_fill(~real, 0.0).gather(1, order).cumsum(1)
    counts = (covered < mass * covered[:, -1:]).sum(1) + 1
    return counts.clamp(min=2).minimum(real.sum(1))


def most_significant(
    scores: torch.Tensor, mask: torch.Tensor, counts: torch.Tensor, keep_cls: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The `counts` most significant tokens of each row in reading order; the earlier token wins a tie.

    scores, mask (rows, tokens), counts (rows,) -> kept (rows, longest) indices into tokens, and (rows, longest), true
    where a slot holds a kept token: rows that keep fewer than the longest are filled up with slots that count as
    padding.
    """
    tokens = scores.shape[1]
    scores = scores.masked_fill(~mask, -torch.inf)  # padding is never kept before a real token
    if keep_cls:
        scores = scores.scatter(1, mask.long().argmax(1, keepdim=True), torch.inf)
    longest = int(counts.max()) if len(counts) else 0
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :longest]
    filled = torch.arange(longest, device=scores.device) < counts[:, None]
    order = torch.where(filled, ranked, ranked + tokens).sort(dim=1).values
    return order % tokens, order < tokens


def take_tokens(states: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """states (rows, tokens, width), kept (rows, k) -> (rows, k, width)"""
    return states.take_along_dim(kept[..., None], dim=1)


def restore(memory: torch.Tensor, states: torch.Tensor, positions: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Write the survivors back in place; a dropped token keeps exactly the state it had when it was dropped.

    memory (rows, all tokens, width), states (rows, tokens, width), positions and mask (rows, tokens) -> like memory
    """
    index = positions[..., None].expand_as(states)
    survivors = torch.where(mask[..., None], states, memory.gather(1, index))
    return memory.scatter(1, index, survivors)
