"""The same without Triton: a fixed number of large blocks, whatever the number of tokens and of segments.

A device is told what to do one operation at a time, so few large operations are fast where many small ones are not.
Segments of one length are a batch; others lie in one row whose blocks see the segments that they touch.

Shapes: ``P`` queries or keys of all segments, ``H`` query heads, ``G`` key heads, ``D`` head width, ``S`` segments,
``B`` tables of ``N`` queries and ``M`` keys: the segments, or one of everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate

import torch
from torch import Tensor

__all__ = ["closest_behind", "column_means", "match_behind", "row_lse"]

#: Operations of one call, at any length.
MOST_LAUNCHES = 64
#: Elements of a block below which no smaller ones are made (64 MB in float32).
BLOCK_ELEMENTS = 1 << 24
#: Blocks of the search, each of about ten operations.
_SEARCH_BLOCKS = 3


def row_lse(
    query: Tensor,
    key: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    causal: bool,
) -> Tensor:
    """``(H, P)`` float32, the logarithm of the sum of each query's exponentials."""
    walk = _Walk(query, key, query_lengths, key_lengths, scale, bias, causal, per_block=4 + (bias is not None))
    highest = torch.empty(walk.batch * walk.heads, walk.rows, 1, dtype=torch.float32, device=query.device)
    total = torch.empty_like(highest)
    for lines, _, logits, _ in walk:
        top = torch.amax(logits, -1, keepdim=True, out=highest[:, lines])
        if bias is not None:  # where it hides all keys, infinity minus infinity would be no number
            top.clamp_min_(torch.finfo(torch.float32).min)
        torch.sum(logits.sub_(top).exp_(), -1, keepdim=True, out=total[:, lines])
    out = total.log_().add_(highest).view(walk.batch, walk.heads, -1)
    return out.transpose(0, 1).reshape(walk.heads, -1)


def column_means(
    query: Tensor,
    key: Tensor,
    query_lengths: Sequence[int],
    key_lengths: Sequence[int],
    scale: float,
    bias: Tensor | None,
    lse: Tensor | None,
    causal: bool,
) -> Tensor:
    """``(H, P)`` float32, the mean over its segment's queries of the attention that a key receives."""
    walk = _Walk(query, key, query_lengths, key_lengths, scale, bias, causal, per_block=4)
    tables = walk.batch * walk.heads
    columns = torch.zeros(tables, 1, walk.columns, dtype=torch.float32, device=query.device)
    ones = columns.new_ones(tables, 1, walk.rows)
    if lse is not None:
        lse = lse.view(walk.heads, walk.batch, walk.rows).transpose(0, 1).reshape(tables, walk.rows, 1)
    for lines, window, logits, hidden in walk:
        if lse is None:
            torch.softmax(logits, -1, out=logits)
        else:
            logits.sub_(lse[:, lines]).exp_()
        if hidden is not None:  # a row that is no number must not reach what it does not see
            logits.masked_fill_(hidden, 0.0)
        columns[..., window].baddbmm_(ones[..., : logits.shape[1]], logits)
    received = columns.view(walk.batch, walk.heads, -1).transpose(0, 1).reshape(walk.heads, -1)
    if walk.batch == len(query_lengths):
        return received / walk.rows
    counts = torch.tensor(query_lengths, dtype=torch.float32).to(query.device, non_blocking=True)
    sizes = torch.tensor(key_lengths).to(query.device, non_blocking=True)
    return received / counts.repeat_interleave(sizes, output_size=len(key))


class _Walk:
    """Goes through all attention maps in blocks: slices of queries and keys, logits ``(B * H, n, m)`` float32, a mask.

    Where the mask, ``(n, m)`` bool or None, is True a query does not see the key, and the logit is minus infinity.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        query_lengths: Sequence[int],
        key_lengths: Sequence[int],
        scale: float,
        bias: Tensor | None,
        causal: bool,
        per_block: int,
    ) -> None:
        self.scale, self.causal, self.heads = scale, causal, query.shape[1]
        even = len({*query_lengths}) == 1 and len({*key_lengths}) == 1
        self.batch = len(query_lengths) if even else 1
        self.rows, self.columns = len(query) // self.batch, len(key) // self.batch
        if key.shape[1] != self.heads:
            key = key.repeat_interleave(self.heads // key.shape[1], dim=1)
        self.query, self.key = self._tables(query), self._tables(key).transpose(1, 2)
        self.bias = None if bias is None else bias.view(self.batch, 1, -1).repeat_interleave(self.heads, 0)
        # Of segments that are no batch: their borders, and the number of each row's segment.
        self.borders = None if even else [(0, *accumulate(n)) for n in (query_lengths, key_lengths)]
        self.segments = [] if even else [_numbers(n, query.device) for n in (query_lengths, key_lengths)]
        # Places are counted from the end of a segment, where the last query meets the last key.
        self.places = [self._places(i, (self.rows, self.columns)[i], query.device) for i in (0, 1)] if causal else []
        most = (MOST_LAUNCHES - 28) // (per_block + 1 + (causal or not even) * (1 + causal + (not even)))
        elements = self.batch * self.heads * self.rows * self.columns
        self.step = -(-self.rows // min(most, max(1, -(-elements // BLOCK_ELEMENTS))))

    def _tables(self, packed: Tensor) -> Tensor:
        """``(P, H, D)`` as ``(B * H, N, D)``, in float32 at least."""
        table = packed.view(self.batch, -1, *packed.shape[1:]).transpose(1, 2)
        return table.to(torch.promote_types(packed.dtype, torch.float32)).flatten(0, 1)

    def _places(self, side: int, count: int, device: torch.device) -> Tensor:
        place = torch.arange(count, device=device) - count
        if self.borders is None:
            return place
        ends = torch.tensor([border - count for border in self.borders[side][1:]]).to(device, non_blocking=True)
        return place - ends[self.segments[side]]

    def __iter__(self) -> Iterator[tuple[slice, slice, Tensor, Tensor | None]]:
        for first in range(0, self.rows, self.step):
            lines = slice(first, min(first + self.step, self.rows))
            window = self._window(lines)
            keys = self.key[..., window]
            added = keys[:, :1] if self.bias is None else self.bias[..., window].to(keys)
            beta = 0 if self.bias is None else 1  # with 0 what is added is not even read
            logits = torch.baddbmm(added, self.query[:, lines], keys, beta=beta, alpha=self.scale).float()
            hidden = self._hidden(lines, window)
            if hidden is not None:
                logits.masked_fill_(hidden, -torch.inf)
            yield lines, window, logits, hidden

    def _hidden(self, lines: slice, window: slice) -> Tensor | None:
        hidden = None
        if self.segments:
            hidden = self.segments[0][lines, None] != self.segments[1][window]
        if self.places:
            future = self.places[1][window] > self.places[0][lines, None]
            hidden = future if hidden is None else hidden | future
        return hidden

    def _window(self, lines: slice) -> slice:
        """The keys of the segments that some queries lie in."""
        if self.borders is None:
            return slice(0, self.columns)
        queries, keys = self.borders
        touched = [i for i in range(len(queries) - 1) if queries[i] < lines.stop and queries[i + 1] > lines.start]
        return slice(keys[touched[0]], keys[touched[-1] + 1])


def _numbers(lengths: Sequence[int], device: torch.device) -> Tensor:
    """``(P,)`` int64, the segment of each row."""
    sizes = torch.tensor(lengths).to(device, non_blocking=True)
    return torch.arange(len(lengths), device=device).repeat_interleave(sizes, output_size=sum(lengths))


def closest_behind(features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, scores: Tensor) -> Tensor:
    """As ``ops.closest_behind``."""
    length = order.shape[1]
    place, table = torch.arange(length, device=order.device), _ordered(features, rows, order)
    padding = place >= lengths[:, None]
    best = torch.empty_like(order, dtype=torch.float32)
    for lines in _thirds(length):
        cosine = _cosines(table, lines, slice(lines.start, None))
        hidden = padding[:, None, lines.start :] | (place[lines.start :] <= place[lines, None])
        best[:, lines] = cosine.masked_fill_(hidden, -torch.inf).amax(-1)
    best.masked_fill_(best == torch.inf, torch.nan).masked_fill_(padding, -torch.inf)
    return torch.empty_like(best).scatter_(1, order, best).masked_fill_(scores == torch.inf, -torch.inf)


def match_behind(
    features: Tensor, rows: Tensor, order: Tensor, lengths: Tensor, splits: Tensor
) -> tuple[Tensor, Tensor]:
    """As ``ops.match_behind``."""
    length = order.shape[1]
    place, table = torch.arange(length, device=order.device), _ordered(features, rows, order)
    asks = place < splits[:, None]
    nobody = (asks | (place >= lengths[:, None]))[:, None]
    match, best = torch.empty_like(order), torch.empty_like(order, dtype=torch.float32)
    far = torch.iinfo(torch.int64).max
    for lines in _thirds(length):
        cosine = _cosines(table, lines, slice(None)).masked_fill_(nobody, -torch.inf)
        # Of equals the first.
        highest = cosine.amax(-1, keepdim=True)
        best[:, lines] = highest[..., 0]
        others = order[:, None].masked_fill(cosine < highest, far)
        match[:, lines] = others.masked_fill_(nobody, far).amin(-1)
    best.masked_fill_(best == torch.inf, torch.nan).masked_fill_(~asks, -torch.inf)
    return torch.stack([rows.gather(1, order), rows.gather(1, torch.where(asks, match, order))]), best


def _ordered(features: Tensor, rows: Tensor, order: Tensor) -> Tensor:
    """``(S, L, C)`` unit vectors in the order of each segment, in float32 at least."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1)[rows.gather(1, order)]


def _thirds(length: int) -> Iterator[slice]:
    step = -(-length // _SEARCH_BLOCKS)
    return (slice(first, min(first + step, length)) for first in range(0, length, step))


def _cosines(table: Tensor, lines: slice, others: slice) -> Tensor:
    """``(S, n, m)`` float32; no number, which broken pixels give, comes out on top."""
    cosine = (table[:, lines] @ table[:, others].transpose(1, 2)).float()
    return cosine.nan_to_num_(torch.inf, torch.inf, -torch.inf)
