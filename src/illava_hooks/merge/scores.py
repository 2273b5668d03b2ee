"""Scores: how much each token matters. Higher means keep.

Shapes: ``S`` segments (or samples), ``H`` query heads, ``G`` key heads (``H`` is a multiple of ``G``), ``N``
tokens that are scored, ``P >= N`` keys (with those of the cache), ``D`` head width. All results are float32.

No attention map is ever held: the encoder score goes through the map in blocks of rows, or falls out of the attention
that ran (``attention``); the language-model score needs the row of one query. On a CPU blocks are small enough for its
cache; on other devices kernels take all segments in one launch.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.merge.kernels.devices import takes
from illava_hooks.merge.segments import borders, made_once, unit_means

__all__ = [
    "ATTENTION_SCORES",
    "PLACE_SCORES",
    "SCORES",
    "Score",
    "ScoreInputs",
    "last_query_attention",
    "packed_scores",
    "place_scores",
    "query_lse",
    "random_scores",
    "received_attention",
]

#: Elements of one block of the attention map (4 MB in float32).
BLOCK_ELEMENTS = 1 << 20

_SEED = 0x1D5A
_MASK = (1 << 31) - 1


@dataclass(frozen=True, slots=True)
class ScoreInputs:
    """What a score may look at; give ``Method`` a function of it to score in your own way.

    Attributes:
        key: ``(S, G, P, D)`` keys with RoPE; the scored tokens are the last ``N`` of them.
        query: returns the queries of the scored tokens, ``(S, H, N, D)``, with RoPE.
        last_query: returns the one query that decides in the language model, ``(S, H, D)``.
        key_bias: ``(S, P)`` float32 that the attention adds to the logits of each key, or None.
        last_place: ``(S,)`` int64, which of the ``N`` tokens that query belongs to; None in the encoder.
        positions: ``(S, N)`` int64, each token's place in its image, tile or frame before any merge.
        key_valid: ``(S, P)`` bool or None, False on padding.
        scale: factor of the attention logits.
        layer_idx: the layer that merges.
        causal: whether token i sees only keys up to itself.
    """

    key: Tensor
    query: Callable[[], Tensor]
    last_query: Callable[[], Tensor]
    positions: Tensor
    key_valid: Tensor | None
    scale: float
    layer_idx: int
    causal: bool
    last_place: Tensor | None = None
    key_bias: Tensor | None = None


Score = Callable[[ScoreInputs], Tensor]


def received_attention(inputs: ScoreInputs) -> Tensor:
    """Mean over heads and queries of the attention that a token receives: ``(S, N)``.

    The exact column mean of the softmax (iLLaVA, arXiv 2412.06263), taken in blocks of rows.
    """
    (samples, num_tokens), num_keys = inputs.positions.shape, inputs.key.shape[2]
    if takes(inputs.key.device):
        from illava_hooks.merge.kernels.ops import received_attention_varlen

        query, key, packing = _packed(inputs)
        return received_attention_varlen(query, key, **packing).view(samples, num_keys)[:, -num_tokens:]
    num_heads = inputs.query().shape[1]
    columns = torch.zeros(samples * num_heads, 1, num_keys, dtype=torch.float32, device=inputs.key.device)
    for heads, _, logits in _logit_blocks(inputs):
        exponentials = logits.sub_(logits.amax(-1, keepdim=True)).exp_()
        inverse = exponentials.sum(-1, keepdim=True).reciprocal_()
        # The product with a row of inverse sums normalises and adds up the rows in one pass.
        columns[heads] += torch.bmm(inverse.transpose(1, 2), exponentials)
    return columns.view(samples, num_heads, num_keys).mean(1)[:, -num_tokens:] / num_tokens


def query_lse(inputs: ScoreInputs) -> Tensor:
    """Mean over heads of ``logsumexp_j(q_i k_j * scale)`` of the token's own row: ``(S, N)``.

    What the published Qwen2-VL code in fact ranks by, in both stages.
    """
    samples, num_tokens = inputs.positions.shape
    if takes(inputs.key.device):
        from illava_hooks.merge.kernels.ops import row_lse_varlen

        query, key, packing = _packed(inputs)
        return row_lse_varlen(query, key, **packing).mean(0).view(samples, num_tokens)
    num_heads = inputs.query().shape[1]
    scores = torch.empty(samples * num_heads, num_tokens, dtype=torch.float32, device=inputs.key.device)
    for heads, rows, logits in _logit_blocks(inputs):
        scores[heads, rows] = logits.logsumexp(-1)
    return scores.view(samples, num_heads, num_tokens).mean(1)


def packed_scores(
    score: Score,
    query: Tensor,
    key: Tensor,
    lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    unit: int = 1,
    lse: Tensor | None = None,
    rows: int = 1,
    prefix: int = 0,
) -> Tensor | None:
    """The scores of all segments at once where a kernel gives them; None: each length goes through ``score``.

    Args:
        score: the score.
        query: ``(P, H, D)`` of the tokens of all segments, which see all of their segment.
        key: ``(P, G, D)``.
        lengths: tokens of each segment.
        scale: factor of the attention logits.
        bias: ``(P,)`` of any type, added to the logits of each key in float32; or None.
        unit: neighbours whose mean is asked for.
        lse: ``(H, P)`` float32 of the attention that ran, so that it is not computed again; None: it gave none.
        rows: equal rows that the tokens lie in.
        prefix: tokens in front of each row, which attend and are not ranked.

    Returns:
        ``(P / unit,)`` float32, or None.
    """
    if score is query_lse and lse is not None:
        return unit_means(lse, unit, rows, prefix)
    if score not in ATTENTION_SCORES or not takes(key.device):
        return None
    from illava_hooks.merge.kernels.ops import received_attention_varlen, row_lse_varlen

    packing: dict[str, Any] = {
        "cu_seqlens": borders(lengths, key.device),
        "scale": scale,
        "bias": bias,
        "lengths": lengths,
    }
    if score is query_lse:
        return unit_means(row_lse_varlen(query, key, **packing), unit, rows, prefix)
    return received_attention_varlen(query, key, **packing, lse=lse, unit=unit, rows=rows, prefix=prefix)


def last_query_attention(inputs: ScoreInputs) -> Tensor:
    """Mean over heads of the attention that the deciding query pays to each token: ``(S, N)``.

    FastV (arXiv 2403.06764) and iLLaVA rank by it in the language model.
    """
    query = inputs.last_query()
    samples, groups = inputs.key.shape[:2]
    logits = query.view(samples, groups, -1, query.shape[-1]) @ inputs.key.transpose(2, 3)
    logits = logits.float() * inputs.scale
    if inputs.key_valid is not None:
        logits = logits.masked_fill(~inputs.key_valid[:, None, None], torch.finfo(logits.dtype).min)
    if inputs.last_place is not None:
        # Tokens behind the query (labels, candidates) must not have a say.
        num_keys = inputs.key.shape[2]
        last = inputs.last_place + num_keys - inputs.positions.shape[1]
        behind = torch.arange(num_keys, device=logits.device) > last[:, None]
        logits = logits.masked_fill(behind[:, None, None], torch.finfo(logits.dtype).min)
    return logits.softmax(-1).flatten(1, 2).mean(1)[:, -inputs.positions.shape[1] :]


def random_scores(inputs: ScoreInputs) -> Tensor:
    """A fixed hash of layer and place: reproducible, and independent of the batch and of any generator."""
    bits = inputs.positions * 0x9E3779B1 + inputs.layer_idx * 0x85EBCA6B + _SEED
    for factor in (0x2C1B3C6D, 0x297A2D39):
        bits = ((bits ^ (bits >> 15)) * factor) & _MASK
    return (bits ^ (bits >> 13)).double().div(_MASK).float()


def uniform(inputs: ScoreInputs) -> Tensor:
    """Spreads survivors evenly over the image: the golden-ratio sequence of places."""
    return torch.frac((inputs.positions + 1).double() * 0.6180339887498949).float()


def place_scores(score: Score, positions: Tensor, layer_idx: int, num_places: int) -> Tensor:
    """The scores by one of ``PLACE_SCORES``, for which no query and no key need be at hand: looked up in a table.

    Args:
        score: the score.
        positions: int64, each token's place in its image, tile or frame before any merge.
        layer_idx: the layer that merges.
        num_places: how many places there are at most.

    Returns:
        float32, of the shape of ``positions``.
    """
    # Rounded up, so that pictures of many sizes share a table.
    return _score_of_places(score, layer_idx, 1 << (num_places - 1).bit_length(), positions.device)[positions]


@made_once
def _score_of_places(score: Score, layer_idx: int, num: int, device: torch.device) -> Tensor:
    """``(num,)`` float32, the score of each place."""
    nothing = torch.zeros(1, 1, num, 0, device="cpu")
    inputs = ScoreInputs(
        key=nothing,
        query=lambda: nothing,
        last_query=lambda: nothing[:, :, -1],
        positions=torch.arange(num, device="cpu")[None],
        key_valid=None,
        scale=1.0,
        layer_idx=layer_idx,
        causal=False,
    )
    return score(inputs)[0]


def _packed(inputs: ScoreInputs) -> tuple[Tensor, Tensor, dict[str, Any]]:
    """Queries ``(S * N, H, D)``, keys ``(S * P, G, D)``, and how they lie there."""
    samples, num_tokens = inputs.positions.shape
    query, key = (table.transpose(1, 2).flatten(0, 1) for table in (inputs.query(), inputs.key))
    bias = inputs.key_bias
    if inputs.key_valid is not None:
        bias = torch.zeros_like(inputs.key_valid, dtype=torch.float32) if bias is None else bias
        bias = bias.masked_fill(~inputs.key_valid, torch.finfo(torch.float32).min)
    keys, queries = [inputs.key.shape[2]] * samples, [num_tokens] * samples
    packing: dict[str, Any] = {"scale": inputs.scale, "bias": None if bias is None else bias.flatten()}
    packing |= {"cu_seqlens": borders(keys, key.device), "lengths": keys, "causal": inputs.causal}
    return query, key, packing | {"cu_seqlens_q": borders(queries, key.device), "lengths_q": queries}


def _logit_blocks(inputs: ScoreInputs) -> Iterator[tuple[slice, slice, Tensor]]:
    """Goes through the attention map: slices of ``S * H`` heads and of rows, and their masked logits."""
    query = inputs.query()
    key = inputs.key.repeat_interleave(query.shape[1] // inputs.key.shape[1], dim=1).flatten(0, 1)
    num_heads, query = query.shape[1], query.flatten(0, 1)
    (total, num_rows), num_keys = query.shape[:2], key.shape[1]
    rows = max(1, min(num_rows, BLOCK_ELEMENTS // num_keys))
    heads = max(1, min(total, BLOCK_ELEMENTS // (rows * num_keys)))
    columns = torch.arange(num_keys, device=key.device)
    for head in range(0, total, heads):
        pick = slice(head, min(head + heads, total))
        keys = key[pick].transpose(1, 2)
        sample = torch.arange(pick.start, pick.stop, device=key.device) // num_heads
        for row in range(0, num_rows, rows):
            lines = slice(row, min(row + rows, num_rows))
            logits = torch.bmm(query[pick, lines], keys).float().mul_(inputs.scale)
            if inputs.key_bias is not None:
                logits.add_(inputs.key_bias[sample][:, None])
            if inputs.causal:
                last = columns[lines, None] + (num_keys - num_rows)
                logits.masked_fill_(columns > last, torch.finfo(logits.dtype).min)
            if inputs.key_valid is not None:
                logits.masked_fill_(~inputs.key_valid[sample][:, None], torch.finfo(logits.dtype).min)
            yield pick, lines, logits


#: Scores that fall out of an attention of all tokens to all, or of its LSE.
ATTENTION_SCORES: tuple[Score, ...] = (received_attention, query_lse)

#: Scores that look at places alone: no attention is computed for them, and none is listened to.
PLACE_SCORES: tuple[Score, ...] = (random_scores, uniform)

#: Scores by name.
SCORES: dict[str, Score] = {
    "received_attention": received_attention,
    "last_query_attention": last_query_attention,
    "query_lse": query_lse,
    "random": random_scores,
    "uniform": uniform,
}
