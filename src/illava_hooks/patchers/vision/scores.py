"""Scores of the tokens of one merging encoder layer.

Shapes: ``S`` segments of ``L`` units (padded), ``u`` patches per unit, ``P`` patches in all, ``H`` heads, ``D`` head
width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from illava_hooks.merge.scoring import Score, ScoreInputs
from illava_hooks.merge.spans import Segments, buckets, host_table
from illava_hooks.methods import checked_scores

__all__ = ["LayerAttention", "segment_scores"]


@dataclass(slots=True)
class LayerAttention:
    """What the attention of a merging layer left behind.

    Attributes:
        layer_idx: the layer.
        project: returns queries and keys with RoPE, each ``(P, H, D)``.
        scale: factor of the attention logits.
        received: what ``received_attention`` would find, ``(s, n)`` for some segments after the other; or nothing.
        log_sizes: ``(P,)`` what the attention adds to the logits of each key, or None.
    """

    layer_idx: int
    project: Callable[[], tuple[Tensor, Tensor]]
    scale: float
    received: Sequence[Tensor] = ()
    log_sizes: Tensor | None = None
    _heads: tuple[Tensor, Tensor] | None = field(default=None, init=False)

    @property
    def heads(self) -> tuple[Tensor, Tensor]:
        """Queries and keys, computed when first asked for."""
        if self._heads is None:
            self._heads = self.project()
        return self._heads


def segment_scores(
    name: str, score: Score, attention: LayerAttention, segments: Segments, unit: int, places: Callable[[], Tensor]
) -> Tensor:
    """``(S, L)`` float32 scores of the units, the mean of their patches; ``+inf`` on padding.

    Args:
        name: of the method, for messages.
        score: what ranks.
        attention: of the layer.
        segments: of units.
        unit: patches that stay together.
        places: returns each patch's place in its segment before any merge, ``(P,)`` int64.
    """
    if sum(table.numel() for table in attention.received) == sum(segments.lengths) * unit:
        flat = torch.cat([table.flatten() for table in attention.received])
        found = segments.take(flat.view(-1, unit).mean(-1))
        return found if segments.valid is None else found.masked_fill(~segments.valid, torch.inf)
    (query, key), place = attention.heads, places()
    scores = torch.full(segments.rows.shape, torch.inf, dtype=torch.float32, device=key.device)
    patches = torch.arange(unit, device=key.device)
    for length, numbers in buckets(segments.lengths).items():
        members = host_table(numbers, key.device)
        rows = (segments.rows[members, :length, None] * unit + patches).flatten(1)
        whole = segments.valid is None  # then segments are a view, and nothing is copied
        table = (query.view(*rows.shape, *query.shape[1:]) if whole else query[rows]).transpose(1, 2)
        keys = (key.view(*rows.shape, *key.shape[1:]) if whole else key[rows]).transpose(1, 2)
        inputs = ScoreInputs(
            key=keys,
            query=lambda table=table: table,  # type: ignore[misc]  # bound now, not at the loop's end
            last_query=lambda table=table: table[:, :, -1],  # type: ignore[misc]
            positions=place[rows],
            key_valid=None,
            scale=attention.scale,
            layer_idx=attention.layer_idx,
            causal=False,
            key_bias=None if attention.log_sizes is None else attention.log_sizes[rows],
        )
        found = checked_scores(name, score, inputs)
        scores[members, :length] = found.view(len(members), length, unit).mean(-1)
    return scores
