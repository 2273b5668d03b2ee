"""Scores of the units of one merging encoder layer, of what listened to its attention.

Shapes: ``B`` rows of ``K`` units of ``u`` patches, behind a prefix of tokens that attend but never merge; ``S``
segments of what attends to each other, ``P`` tokens of all, ``H`` query heads, ``G`` key heads, ``D`` head width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.engine.attention_tap import EncoderTap
from illava_hooks.merge.scores import Score, ScoreInputs, packed_scores, place_scores
from illava_hooks.merge.segments import Segments, buckets, host_table, unit_means
from illava_hooks.methods import checked_scores

__all__ = ["ScoredLayer", "scores_by_place", "unit_scores"]


@dataclass(frozen=True, slots=True, eq=False)
class ScoredLayer:
    """What a score needs to know of a layer besides its queries and keys.

    Attributes:
        method: name of the method, for messages.
        score: the score.
        layer_idx: the layer.
        segments: units of what attends to each other.
        num_rows: ``B``.
        unit: ``u``.
        prefix: tokens in front of each row.
        places: returns ``(B * K * u,)`` int64, each patch's place in its segment before any merge.
        num_places: how many such places there are at most.
        real: ``(B, K * u)`` bool, False on padding, which scores 0 and no score gets to see; None: there is none.
        real_counts: on the host, how many patches of each row are no padding.
    """

    method: str
    score: Score
    layer_idx: int
    segments: Segments
    num_rows: int
    unit: int
    prefix: int
    places: Callable[[], Tensor]
    num_places: int
    real: Tensor | None = None
    real_counts: Sequence[int] = ()


def scores_by_place(layer: ScoredLayer) -> Tensor:
    """As ``unit_scores`` by one of ``PLACE_SCORES``, for which nothing need have listened."""
    scores = place_scores(layer.score, layer.places(), layer.layer_idx, layer.num_places)
    if layer.real is not None:
        scores = scores * layer.real.flatten()
    return scores.view(-1, layer.unit).mean(-1)


def unit_scores(layer: ScoredLayer, tap: EncoderTap) -> Tensor:
    """``(B * K,)`` float32 scores of the units, each the mean of its patches'.

    Args:
        layer: what is scored.
        tap: what listened to the layer's attention.
    """
    if layer.real is not None:
        return _padded_scores(layer, layer.real, tap)
    segments, unit, prefix = layer.segments, layer.unit, layer.prefix
    rows = [n * unit + prefix for n in segments.lengths]
    where = {"unit": unit, "rows": layer.num_rows if prefix else 1, "prefix": prefix}
    if sum(table.numel() for table in tap.received) == sum(rows):
        return unit_means(torch.cat([table.flatten() for table in tap.received])[None], **where)
    query, key = tap.heads()
    packed = packed_scores(layer.score, query, key, rows, tap.scale, tap.bias, lse=tap.row_lse(), **where)
    if packed is not None:
        return packed
    place = layer.places()
    scores = torch.empty(len(place) // unit, dtype=torch.float32, device=key.device)
    for length, numbers in buckets(segments.lengths).items():
        members = host_table(numbers, key.device)
        units = segments.rows[members, :length]
        patches = (units[..., None] * unit + torch.arange(unit, device=key.device)).flatten(1)
        # Tokens in front of a row attend, but are not ranked: they are keys and queries like all others.
        tokens = patches if not prefix else _with_prefix(patches, prefix)
        places = torch.nn.functional.pad(place[patches], (prefix, 0))
        inputs = _score_inputs(layer, tap, query, key, tokens, places)
        found = checked_scores(layer.method, layer.score, inputs)[:, prefix:]
        scores[units.flatten()] = found.reshape(-1, unit).mean(-1)
    return scores


def _padded_scores(layer: ScoredLayer, real: Tensor, tap: EncoderTap) -> Tensor:
    """As ``unit_scores`` for rows with padding, which no score gets to see: neither as a key nor as a query."""
    query, key = tap.heads()
    place = layer.places()
    first = torch.argsort((~real).to(torch.uint8), dim=1, stable=True)
    scores = torch.zeros(real.numel(), dtype=torch.float32, device=key.device)
    for length, numbers in buckets(layer.real_counts).items():
        if length:
            rows = host_table(numbers, key.device)
            tokens = first[rows, :length] + rows[:, None] * real.shape[1]
            inputs = _score_inputs(layer, tap, query, key, tokens, place[tokens])
            scores[tokens.flatten()] = checked_scores(layer.method, layer.score, inputs).flatten()
    return scores.view(-1, layer.unit).mean(-1)


def _with_prefix(patches: Tensor, prefix: int) -> Tensor:
    """Token rows ``(S, prefix + n)`` of the patches ``(S, n)`` of whole rows, and of what stands in front of them."""
    width = patches.shape[1]
    row = patches[:, :1] // width
    front = row * (width + prefix) + torch.arange(prefix, device=patches.device)
    return torch.cat([front, patches + prefix * (row + 1)], 1)


def _score_inputs(
    layer: ScoredLayer, tap: EncoderTap, query: Tensor, key: Tensor, tokens: Tensor, places: Tensor
) -> ScoreInputs:
    """What a score may look at of the segments whose token rows are ``tokens``, ``(S, N)``."""
    whole = tokens.numel() == len(key) and len(layer.segments.lengths) == len(tokens)
    # Segments of one length are a view, and nothing is copied.
    queries, keys = (
        (table.view(*tokens.shape, *table.shape[1:]) if whole else table[tokens]).transpose(1, 2)
        for table in (query, key)
    )
    bias = tap.bias
    return ScoreInputs(
        key=keys,
        query=lambda: queries,
        last_query=lambda: queries[:, :, -1],
        positions=places,
        key_valid=None,
        scale=tap.scale,
        layer_idx=layer.layer_idx,
        causal=False,
        key_bias=None if bias is None else bias[tokens].float(),
    )
