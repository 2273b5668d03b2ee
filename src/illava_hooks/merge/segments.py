"""Where the tokens that may merge with each other lie: the segments of a batch.

Shapes: ``B`` rows of ``N`` tokens each, seen flat as ``B * N`` token rows; ``S`` segments of at most ``L``
tokens. A segment is one tile, one temporal slice, or the visual span of one image in the prompt. Tokens of
different segments never meet in a merge.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import accumulate
from typing import Any, ParamSpec

import torch
from torch import Tensor

#: Tables that are kept for later, of each kind.
_REMEMBERED = 128

P = ParamSpec("P")

__all__ = [
    "Segments",
    "aligned_rows",
    "borders",
    "buckets",
    "counting",
    "everybody",
    "host_table",
    "in_words",
    "made_once",
    "numbered",
    "ones",
    "repeated",
    "right_align",
    "scatter_back",
    "unit_means",
    "zeros",
]


def made_once(make: Callable[P, Tensor]) -> Callable[P, Tensor]:
    """Remembers tables that follow from numbers of the host: a device is told each of them once.

    Args:
        make: makes a table on the host of hashable arguments; the last one is the device that it goes to. The copy
            joins the device's queue and nobody waits.

    Returns:
        The same function. Its tables are shared: they must never be written to.
    """

    @lru_cache(maxsize=_REMEMBERED)
    def remembered(stream: int, *args: Any) -> Tensor:
        # One that is made in inference mode could not be saved for a backward pass later.
        with torch.inference_mode(False), torch.no_grad():
            return make(*args).to(args[-1], non_blocking=True)  # type: ignore[call-arg]

    @functools.wraps(make)
    def made(*args: P.args, **kwargs: P.kwargs) -> Tensor:
        device: Any = args[-1]
        if torch.compiler.is_compiling() or _fakes():  # what is made here is no tensor that others could use
            return make(*args).to(device)  # type: ignore[call-arg]
        return remembered(_stream(device) if device.type == "cuda" else 0, *args)

    return made


def _stream(device: torch.device) -> int:
    """Which stream a device works through: another one does not wait for the copy of this one.

    The public way makes an object of Python for each question, at ten times the cost.
    """
    index = torch.cuda.current_device() if device.index is None else device.index
    raw = getattr(torch._C, "_cuda_getCurrentRawStream", None)
    return torch.cuda.current_stream(device).cuda_stream if raw is None else raw(index)


def _fakes() -> bool:
    """Whether tensors are fake here: what is real is no good there, and the other way round."""
    key = torch._C._TorchDispatchModeKey.FAKE
    return torch._C._get_dispatch_mode(key) is not None


@made_once
def _table(values: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=dtype, device="cpu")


def host_table(values: Sequence[int], device: torch.device) -> Tensor:
    """Numbers of the host on a device, ``(n,)`` int64, made once: never write to it."""
    return _table(tuple(values), torch.int64, device)


@made_once
def _repeated(values: tuple[int, ...], counts: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device="cpu").repeat_interleave(torch.tensor(counts, device="cpu"))


def repeated(values: Sequence[int], counts: Sequence[int], device: torch.device) -> Tensor:
    """``(sum(counts),)`` int64, each value so many times; made once: never write to it."""
    return _repeated(tuple(values), tuple(counts), device)


@made_once
def counting(num: int, device: torch.device) -> Tensor:
    """``(num,)`` int64: 0, 1, ...; never write to it."""
    return torch.arange(num, device="cpu")


@made_once
def _in_words(lengths: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    first = torch.tensor((0, *lengths[:-1]), device="cpu").cumsum(0)[:, None]
    last = first + torch.tensor(lengths, device="cpu")[:, None] - 1
    return torch.minimum(first + torch.arange(width, device="cpu"), last)


def in_words(packed: Tensor, lengths: Sequence[int], word: int = 16) -> Tensor:
    """``(P,)`` of packed segments as ``(S, L)``, where every row starts at a multiple of so many elements.

    ``L`` is the longest length rounded up; what stands behind the end of a shorter segment means nothing.
    """
    longest = max(lengths)
    if not longest % word and min(lengths) == longest:
        return packed.view(-1, longest)
    return packed[_in_words(tuple(lengths), -(-longest // word) * word, packed.device)]


@made_once
def _full(num: int, value: float, dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.full((num,), value, dtype=dtype, device="cpu")


def ones(shape: Sequence[int], device: torch.device) -> Tensor:
    """Ones, float32, of any shape without a launch; never write to it."""
    return _full(math.prod(shape), 1.0, torch.float32, device).view(*shape)


def zeros(shape: Sequence[int], device: torch.device) -> Tensor:
    """Zeros, float32, of any shape without a launch; never write to it."""
    return _full(math.prod(shape), 0.0, torch.float32, device).view(*shape)


def everybody(shape: Sequence[int], device: torch.device) -> Tensor:
    """True, of any shape without a launch; never write to it."""
    return _full(math.prod(shape), True, torch.bool, device).view(*shape)


@made_once
def starts(segments: int, length: int, device: torch.device) -> Tensor:
    """``(segments, 1)`` int64, where each of equally long segments begins; never write to it."""
    return torch.arange(segments, device="cpu")[:, None] * length


def borders(lengths: Sequence[int], device: torch.device, dtype: torch.dtype = torch.int64) -> Tensor:
    """Borders of segments that lie one after the other, ``(S + 1,)``: 0, ..., their sum; never write to it."""
    return _table((0, *accumulate(lengths)), dtype, device)


@dataclass(frozen=True, slots=True)
class Segments:
    """Segments of unequal length as one padded index table.

    Attributes:
        rows: ``(S, L)`` int64, flat token row of each token; padding repeats the segment's first row.
        valid: ``(S, L)`` bool, False on padding; None when all segments are equally long.
        lengths: the length of each segment, known on the host.
        dense: whether they are equally long, follow each other and fill all rows: nothing need be copied then.
        packed_rows: whether they are of unequal length, follow each other and fill all rows.
    """

    rows: Tensor
    valid: Tensor | None
    lengths: tuple[int, ...]
    dense: bool = False
    packed_rows: bool = False

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
        found = tuple(lengths)
        return cls(order[_index(found, order.device)], _valid(found, True, order.device), found)

    @classmethod
    def packed(cls, lengths: Sequence[int], device: torch.device) -> Segments:
        """Segments that lie one after the other and fill all rows."""
        found, total = tuple(lengths), sum(lengths)
        if len({*found}) == 1:
            return cls(counting(total, device).view(len(found), -1), None, found, dense=True)
        return cls(_index(found, device), _valid(found, True, device), found, packed_rows=True)

    def take(self, flat: Tensor) -> Tensor:
        """Gathers ``(R, ...)`` rows into ``(S, L, ...)``."""
        return flat.reshape(*self.rows.shape, *flat.shape[1:]) if self.dense else flat[self.rows]

    @property
    def padding(self) -> Tensor | None:
        """``(S, L)`` bool, True on padding; None when all segments are equally long."""
        return None if self.valid is None else _valid(self.lengths, False, self.rows.device)

    def rows_of(self, tokens: Tensor) -> Tensor:
        """Flat rows of tokens ``(S, E)`` that are given by their number in the segment."""
        if self.dense:
            segments, length = self.rows.shape
            return tokens if segments == 1 else tokens + starts(segments, length, tokens.device)
        return self.rows.gather(1, tokens)

    def put(self, flat: Tensor, values: Tensor) -> Tensor:
        """Returns a copy of ``flat`` ``(R,)`` with the segments' ``values`` ``(S, L)`` written in."""
        if self.dense:
            return values.reshape(flat.shape)
        if self.packed_rows:
            return values.flatten()[_slots(self.lengths, values.device)]
        if self.valid is not None:
            # Padding repeats the first row: it must write what that row gets anyway.
            values = torch.where(self.valid, values, values[:, :1])
        return flat.index_copy(0, self.rows.flatten(), values.flatten())


@made_once
def numbered(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """``(2, P)`` int64 for tokens of segments that follow each other: the segment's number, and its first token's."""
    sizes = torch.tensor(lengths, device="cpu")
    return torch.stack([torch.arange(len(lengths), device="cpu"), sizes.cumsum(0) - sizes]).repeat_interleave(sizes, 1)


def _padded(lengths: Sequence[int]) -> Tensor:
    """``(S, L)`` int64 on the host: numbers 0, 1, ... of all tokens of segments that follow each other, else -1."""
    sizes, column = torch.tensor(lengths, device="cpu"), torch.arange(max(lengths), device="cpu")
    return torch.where(column < sizes[:, None], (sizes.cumsum(0) - sizes)[:, None] + column, -1)


@made_once
def _index(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """``(S, L)`` int64: the number of each token; padding repeats the segment's first."""
    index = _padded(lengths)
    return torch.where(index < 0, index[:, :1], index)


@made_once
def _valid(lengths: tuple[int, ...], valid: bool, device: torch.device) -> Tensor:
    """``(S, L)`` bool, ``valid`` on tokens and its opposite on padding."""
    return (_padded(lengths) >= 0) == valid


@made_once
def _slots(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """``(P,)`` int64: where each token stands among the ``S * L`` of the padded table."""
    return (_padded(lengths).flatten() >= 0).nonzero()[:, 0]


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
    order = torch.argsort(keep_mask.view(torch.uint8), dim=-1, stable=True)
    return order[:, order.shape[1] - num_kept :]


def aligned_rows(keep_mask: Tensor, num_kept: int, slots: Tensor | None) -> Tensor:
    """Flat rows of the kept tokens, ``(B, num_kept)`` int64, as ``right_align`` has their columns.

    Args:
        keep_mask: ``(B, N)`` bool.
        num_kept: as ``right_align``.
        slots: ``(B, N)`` int64, place of each kept token in the flat result; None where some row keeps fewer.
    """
    batch, width = keep_mask.shape
    if slots is None:
        columns = right_align(keep_mask, num_kept)
        return (columns + starts(batch, width, columns.device)) if batch > 1 else columns
    # Cheaper than a sort: each writes its row into its place, and those that go into one behind all. No place is
    # beyond the table, and none of it without a row, also where a rule of somebody's own keeps more or fewer.
    num, rows = batch * num_kept, counting(keep_mask.numel(), keep_mask.device)
    places = torch.where(keep_mask, slots, host_table((num + width,), rows.device)).flatten()
    table = _full(num + width + 1, 0, torch.int64, rows.device)
    return table.scatter(0, places, rows)[:num].view(batch, -1)


def scatter_back(survivors: Tensor, kept_at: Tensor) -> Tensor:
    """Expands ``(B, K, ...)`` survivors so that each position holds the survivor that owns it.

    Args:
        survivors: ``(B, K, ...)``.
        kept_at: ``(B, N)`` int64, column of ``survivors`` that position shows.
    """
    index = kept_at.reshape(*kept_at.shape, *([1] * (survivors.dim() - 2)))
    return survivors.gather(1, index.expand(*kept_at.shape, *survivors.shape[2:]))


def unit_means(per_head: Tensor, unit: int, rows: int = 1, prefix: int = 0) -> Tensor:
    """The mean over heads and over the neighbours of a unit, ``(P / unit,)``, of ``(H, P)``.

    Args:
        per_head: a number for each head and token.
        unit: tokens of a unit.
        rows: equal rows that the tokens lie in.
        prefix: tokens in front of each row, which belong to no unit and are left out.
    """
    tokens = per_head.view(len(per_head), rows, -1)[..., prefix:]
    return tokens.reshape(len(per_head), rows, -1, unit).mean((0, 3)).flatten()
