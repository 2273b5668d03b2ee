"""Where the tokens that may merge with each other lie: the segments of a batch.

Shapes: ``B`` rows of ``N`` tokens each, seen flat as ``B * N`` token rows; ``S`` segments of at most ``L``
tokens. A segment is one tile, one temporal slice, or the visual span of one image in the prompt. Tokens of
different segments never meet in a merge.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

__all__ = ["Segments", "buckets", "host_table", "right_align", "scatter_back"]


def host_table(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device, ``(n,)`` int64; the copy joins the device's queue and nobody waits."""
    return torch.tensor(values, dtype=torch.int64).to(device, non_blocking=True)


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of unequal length as one padded index table.

    Attributes:
        rows: ``(S, L)`` int64, flat token row of each token; padding repeats the segment's first row.
        valid: ``(S, L)`` bool, False on padding; None when all segments are equally long.
        lengths: the length of each segment, known on the host.
    """

    rows: Tensor
    valid: Tensor | None
    lengths: tuple[int, ...]

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], order: Tensor) -> Segments:
        """Cuts ``order``, the flat rows of all tokens segment after segment, into segments.

        Args:
            lengths: number of tokens of each segment, each at least 1.
            order: ``(sum(lengths),)`` int64.
        """
        longest = max(lengths)
        if min(lengths) == longest:
            return cls(order.view(len(lengths), longest), None, tuple(lengths))
        size = host_table(lengths, order.device)
        column = torch.arange(longest, device=order.device)
        valid = column < size[:, None]
        index = (size.cumsum(0) - size)[:, None] + torch.where(valid, column, 0)
        return cls(order[index], valid, tuple(lengths))

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments that lie one after the other and fill all rows."""
        return cls.from_lengths(lengths, torch.arange(sum(lengths), device=device))

    def take(self, flat: Tensor) -> Tensor:
        """Gathers ``(R, ...)`` rows into ``(S, L, ...)``."""
        return flat[self.rows]

    def put(self, flat: Tensor, values: Tensor) -> Tensor:
        """Returns a copy of ``flat`` ``(R,)`` with the segments' ``values`` ``(S, L)`` written in."""
        if self.valid is not None:
            # Padding repeats the first row: it must write what that row gets anyway.
            values = torch.where(self.valid, values, values[:, :1])
        return flat.index_copy(0, self.rows.flatten(), values.flatten())


def buckets(lengths: Sequence[int]) -> dict[int, list[int]]:
    """Groups segment numbers by length, so that work runs over distinct lengths and never over images."""
    found: dict[int, list[int]] = {}
    for index, length in enumerate(lengths):
        found.setdefault(length, []).append(index)
    return found


def right_align(keep_mask: Tensor, num_kept: int) -> Tensor:
    """Columns of the kept tokens, ascending and right-aligned.

    Args:
        keep_mask: ``(B, N)`` bool.
        num_kept: width of the result; at least the largest number of kept tokens in a row.

    Returns:
        ``(B, num_kept)`` int64. A row with fewer kept tokens is filled up on the left with columns of tokens
        that are not kept, so ``keep_mask.gather(1, result)`` tells padding from tokens. Needs no transfer to
        the host.
    """
    order = torch.argsort(keep_mask.to(torch.uint8), dim=-1, stable=True)
    return order[:, order.shape[1] - num_kept :]


def scatter_back(survivors: Tensor, kept_at: Tensor) -> Tensor:
    """Expands ``(B, K, ...)`` survivors so that each position holds the survivor that owns it.

    Args:
        survivors: ``(B, K, ...)``.
        kept_at: ``(B, N)`` int64, column of ``survivors`` that position shows.
    """
    index = kept_at.reshape(*kept_at.shape, *([1] * (survivors.dim() - 2)))
    return survivors.gather(1, index.expand(*kept_at.shape, *survivors.shape[2:]))
