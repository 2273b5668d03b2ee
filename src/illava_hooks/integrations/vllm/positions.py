"""Where survivors stand in the prompt: digits that ride on their embeddings, and M-RoPE made of them; no vLLM here.

A placeholder's position depends on the picture, since survivors keep their places in its grid. vLLM asks for positions
before it has seen the picture, and again with the embeddings of each chunk. So the first answer has the text exact and
the placeholders provisional, and columns behind each embedding tell the rest: its place (t, h, w) in the grid of its
item, and how far the text behind the item moves on. Each number is two digits of base 256, since an embedding may be
bfloat16, which is exact up to 256 only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = [
    "COLUMNS",
    "Item",
    "from_digits",
    "grid_table",
    "in_seconds",
    "place",
    "prompt_positions",
    "to_digits",
    "with_table",
]

#: Numbers that ride on an embedding: t, h, w, and the extent of the item.
NUMBERS = 4
COLUMNS = 2 * NUMBERS
BASE = 256

#: On the tensor of positions that vLLM keeps for a request: what follows its length, which steps without embeddings
#: ask for again.
DELTA = "illava_delta"


@dataclass(frozen=True, slots=True)
class Item:
    """An image or video in a prompt.

    Attributes:
        offset: its first placeholder.
        length: how many placeholders it has: its survivors.
        extent: by how much the text behind it moves on: as if nothing had merged.
    """

    offset: int
    length: int
    extent: int


def to_digits(numbers: Tensor) -> Tensor:
    """``(n, k)`` int64 below 65,536 as ``(n, 2 k)``: high and low digit of each."""
    return torch.stack([numbers // BASE, numbers % BASE], -1).flatten(1)


def from_digits(columns: Tensor) -> Tensor:
    """The way back: ``(n, 2 k)`` of any dtype as ``(n, k)`` int64."""
    digits = columns.round().long().view(len(columns), -1, 2)
    found: Tensor = digits[..., 0] * BASE + digits[..., 1]
    return found


def grid_table(seats: Tensor, height: int, width: int, extent: int) -> Tensor:
    """``(n, 4)`` int64: the numbers of an item's survivors.

    Args:
        seats: ``(n,)`` int64, the place of each among the item's tokens before any merge, row by row.
        height: rows of a temporal slice, in tokens.
        width: columns.
        extent: of the item.
    """
    area = height * width
    thw = [seats // area, seats % area // width, seats % width]
    return torch.stack([*thw, torch.full_like(seats, extent)], 1)


def with_table(embeddings: Tensor, table: Tensor) -> Tensor:
    """``(n, C)`` embeddings with the digits of ``(n, 4)`` behind them."""
    return torch.cat([embeddings, to_digits(table).to(embeddings)], 1)


def in_seconds(embeddings: Tensor, interval: float, extent: int) -> Tensor:
    """Survivors of a video with digits that tell their slices, whose positions are further apart than by one.

    Args:
        embeddings: ``(n, C + COLUMNS)``.
        interval: positions from one slice to the next, rounded down for each slice, as vLLM does.
        extent: of the item, at this interval.
    """
    table = from_digits(embeddings[:, -COLUMNS:])
    table[:, 0] = (table[:, 0].double() * interval).long()
    table[:, 3] = extent
    return with_table(embeddings[:, :-COLUMNS], table)


def prompt_positions(num_tokens: int, items: Sequence[Item], flat: bool = False) -> tuple[Tensor, int]:
    """Positions of a prompt before any picture is seen.

    Text is exact: behind an item it goes on where it would without merging. The placeholders of an item are
    provisional, but for the largest, by which the prompt's end is known.

    Args:
        num_tokens: of the prompt, survivors' placeholders included.
        items: in the order of the prompt.
        flat: whether the model looks at the first row only; then the second one keeps where each item begins, and
            items need no token between them.

    Returns:
        ``(3, num_tokens)`` int64, and what is to be added to a later token's index.
    """
    parts, starts, at, base = list[Tensor](), list[Tensor](), 0, 0
    for item in items:
        text = torch.arange(item.offset - at) + base
        base += len(text)
        inside = torch.arange(item.length).clamp_max(item.extent - 1)
        inside[-1:] = item.extent - 1
        parts += [text, inside + base]
        starts += [text, torch.full_like(inside, base)]
        at, base = item.offset + item.length, base + item.extent
    rest = torch.arange(num_tokens - at) + base
    delta = base - at
    row = torch.cat([*parts, rest])
    positions = torch.stack([row, torch.cat([*starts, rest]) if flat else row, row])
    setattr(positions, DELTA, delta)
    return positions, delta


def place(
    ids: Any,
    placeholders: Sequence[int],
    embeddings: Sequence[Tensor],
    positions: Tensor,
    num_computed: int,
    flat: bool = False,
) -> tuple[list[Tensor], Tensor, int]:
    """Puts the survivors of a chunk where they belong; may be done again, in other chunks.

    Args:
        ids: ``(N,)`` of the prompt.
        placeholders: ids of visual tokens; between two items there is another token at least, unless ``flat``.
        embeddings: ``(n, C + COLUMNS)`` of the chunk's visual tokens, by item.
        positions: ``(3, N)`` int64, as they are so far.
        num_computed: tokens in front of the chunk.
        flat: as for ``prompt_positions``; survivors' places are the first of their numbers.

    Returns:
        The embeddings without their digits, the positions, and what is to be added to a later token's index.
    """
    delta: int | None = getattr(positions, DELTA, None)
    if not embeddings:
        return [], positions, int(positions.max()) + 1 - len(ids) if delta is None else delta
    tokens = torch.as_tensor(ids, device=positions.device)
    table = from_digits(torch.cat([item[:, -COLUMNS:] for item in embeddings])).to(positions.device)
    index = torch.arange(len(tokens), device=positions.device)
    visual = torch.isin(tokens, torch.tensor(placeholders, device=tokens.device))
    if flat:
        base = positions[1]
    else:
        before = torch.where(visual, -1, index).cummax(0).values  # the last text token in front
        base = torch.where(before < 0, 0, positions[0, before.clamp_min(0)] + 1)
    places = (visual & (index >= num_computed)).nonzero().flatten()[: len(table)]
    placed, rows = positions.clone(), 1 if flat else 3
    placed[:rows, places] = base[places] + table[:, :rows].T.to(positions.dtype)
    if delta is None:
        ends = torch.cat([placed.max()[None], base[places] + table[:, 3].to(base.dtype) - 1])
        delta = int(ends.max()) + 1 - len(tokens)
    else:
        setattr(placed, DELTA, delta)
    return [item[:, :-COLUMNS] for item in embeddings], placed, delta
