"""What merge rules by similarity share: unit vectors, best matches, size-weighted means.

Shapes: ``S`` segments of ``L`` tokens (padded), ``Q`` tokens that look for a match, ``E`` edges per segment.
"""

from __future__ import annotations

import torch
from torch import Tensor

from illava_hooks.merge.decision import RuleInputs, SegmentPlan, assemble

__all__ = ["average", "best_match", "closest_above", "mark", "take_rows", "unit_vectors"]

#: Elements of one block of similarities (16 MB in float32).
BLOCK_ELEMENTS = 1 << 22


def unit_vectors(features: Tensor) -> Tensor:
    """``(S, L, D)`` at length 1, in float32 at least."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1)


def closest_above(features: Tensor, valid: Tensor) -> Tensor:
    """The cosine of each token to the most similar one behind it, in blocks of rows that look only that far.

    Args:
        features: ``(S, L, D)`` unit vectors, in the order that counts.
        valid: ``(S, L)`` bool, False on who is no match.

    Returns:
        ``(S, L)``, ``-inf`` where nobody is behind.
    """
    segments, length, _ = features.shape
    # An eighth of the rows at a time leaves out nearly half of all products.
    rows = max(1, min(-(-length // 8), BLOCK_ELEMENTS // (segments * length)))
    place = torch.arange(length, device=features.device)
    found = []
    for first in range(0, length, rows):
        similarity = features[:, first : first + rows] @ features[:, first:].transpose(1, 2)
        hidden = place[first:] <= place[first : first + rows, None]
        similarity.masked_fill_(hidden | ~valid[:, None, first:], -torch.inf)
        found.append(similarity.amax(-1))
    return torch.cat(found, 1)


def best_match(features: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
    """For each of some tokens the most similar one that is allowed, in blocks of rows.

    Args:
        features: ``(S, L, D)`` unit vectors.
        tokens: ``(S, Q)`` int64.
        allowed: ``(S, L)`` bool, whom they may match.

    Returns:
        Number of the match, ``(S, Q)``; of equals the first.
    """
    segments, length, _ = features.shape
    rows = max(1, BLOCK_ELEMENTS // (segments * length))
    found = []
    for first in range(0, tokens.shape[1], rows):
        similarity = take_rows(features, tokens[:, first : first + rows]) @ features.transpose(1, 2)
        found.append(similarity.masked_fill_(~allowed[:, None], -torch.inf).max(-1).indices)
    return torch.cat(found, 1) if found else tokens


def average(inputs: RuleInputs, kept: Tensor, absorbed: Tensor, anchors: Tensor, used: Tensor) -> SegmentPlan:
    """Size-weighted means of the anchors and what they absorb."""
    size = inputs.token_size
    mass = torch.where(used, size.gather(1, absorbed), 0.0)
    total = size.scatter_add(1, anchors, mass)
    # Unused edges stay inside the table: they point at a survivor and weigh nothing.
    return assemble(inputs, kept, absorbed, anchors, mass / total.gather(1, anchors), size / total)


def mark(index: Tensor, used: Tensor, like: Tensor) -> Tensor:
    """``(S, L)`` bool, True at each ``index`` that is in use."""
    count = torch.zeros_like(like, dtype=torch.int64)
    return count.scatter_add(1, index, used.to(torch.int64).expand_as(index)) > 0


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``(S, ...)`` of a table ``(S, L, C)``: ``(S, ..., C)``."""
    return table.gather(1, index[..., None].expand(*index.shape, table.shape[-1]))
