"""Tiles of which a part shows nothing: which units merge with whom, and how many each tile gives up.

Some encoders take images that were padded to a common size, and a mask of the patches that show something. A unit is
whole, mixed or empty. Empty units go first and meet only each other; mixed ones stay, since what merges patch by patch
would carry padding along; whole ones give up what is left to give. Every tile of a batch gives up the same number.

Shapes: ``B`` tiles of ``M`` units of ``u`` patches.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.merge.segments import Segments, host_table

__all__ = ["Padding", "Shares", "TileCounts", "filled_up", "padded_segments"]

#: Kinds of units; those that merge, each with its like, come first.
WHOLE, EMPTY, MIXED = range(3)


@dataclass(frozen=True, slots=True)
class TileCounts:
    """One tile on the host.

    Attributes:
        whole: units whose patches all show something.
        empty: units that show nothing.
        real: patches that show something, those of mixed units too.
    """

    whole: int
    empty: int
    real: int


@dataclass(frozen=True, slots=True, eq=False)
class Padding:
    """Which patches of each tile show something.

    Attributes:
        real: ``(B, M * u)`` bool, by the place in the row once units follow each other.
        kinds: ``(B, M)`` int64, whole, empty or mixed.
        counts: of each tile.
    """

    real: Tensor
    kinds: Tensor
    counts: tuple[TileCounts, ...]

    @classmethod
    def of(cls, real: Tensor, there: Tensor, traits: EncoderTraits) -> tuple[int, Padding | None]:
        """Sorts the units of tiles; one transfer to the host.

        Args:
            real: ``(T, M * u)`` bool in picture order.
            there: ``(T,)`` bool, which tiles the encoder gets.
            traits: how patches belong together.

        Returns:
            ``B``, how many tiles it gets, and their padding; None where every patch of theirs shows something.
        """
        row = real if traits.order is None else real[:, traits.order.to(real.device)]
        units = row.view(len(row), -1, traits.patches_per_unit)
        kinds = torch.where(units.all(-1), WHOLE, torch.where(units.any(-1), MIXED, EMPTY))
        table = torch.stack([there, (kinds == WHOLE).sum(1), (kinds == EMPTY).sum(1), row.sum(1)], 1).tolist()
        tiles = [tile for tile, (is_there, *_) in enumerate(table) if is_there]
        counts = tuple(TileCounts(*table[tile][1:]) for tile in tiles)
        if all(tile.real == row.shape[1] for tile in counts):
            return len(tiles), None
        numbers = host_table(tiles, row.device)
        return len(tiles), cls(row[numbers], kinds[numbers], counts)

    def empty(self) -> Tensor:
        """``(B, M)`` bool, units that show nothing."""
        return self.kinds == EMPTY


class Shares:
    """How many whole and empty units each tile has left, merge by merge.

    Attributes:
        units: how many units every tile has before, between and after the merges, and what was asked for in vain.
        left: at the same places ``(whole, empty)`` of each tile.
    """

    def __init__(
        self, config: MergeConfig, modality: Modality, traits: EncoderTraits, num_patches: int, padding: Padding
    ) -> None:
        """Plans as ``encoder_counts`` does, up to what the tile can give that has least to give."""
        self._method, self._last = config.method, num_patches // traits.patches_per_unit
        self.left: list[list[tuple[int, int]]] = []
        self._start = [(tile.whole, tile.empty) for tile in padding.counts]
        self.units = encoder_counts(config, modality, traits, num_patches, self._most)
        self._follow(self.units.units[-1])

    def _most(self, units: int) -> int:
        """How many of its ``units`` every tile can give up at once."""
        self._follow(units)
        return min(self._can_go(whole) + self._can_go(empty) for whole, empty in self.left[-1])

    def _follow(self, units: int) -> None:
        """Notes what is left in tiles that have come down to so many units: empty ones went first."""
        removed, self._last = self._last - units, units
        after = []
        for whole, empty in self.left[-1] if self.left else self._start:
            first = min(removed, self._can_go(empty))
            after.append((whole - removed + first, empty - first))
        self.left.append(after)

    def _can_go(self, units: int) -> int:
        return max(0, min(self._method.max_removed(units), units - 1))


def padded_segments(
    padding: Padding, origins: Tensor, before: Sequence[tuple[int, int]], after: Sequence[tuple[int, int]]
) -> tuple[Segments, tuple[int, ...]]:
    """Whole units of each tile, and empty ones apart; mixed ones are in no segment, and stay.

    Args:
        padding: of the tiles.
        origins: ``(B, K)`` int64, the unit where each survivor stood before any merge.
        before: ``(whole, empty)`` of each tile before a merge.
        after: the same behind it.

    Returns:
        The segments, and how many are to stay in each.
    """
    kinds = padding.kinds.gather(1, origins)
    number = torch.arange(len(kinds), device=kinds.device)[:, None] * MIXED + kinds
    number = torch.where(kinds == MIXED, MIXED * len(kinds), number)  # behind all that merge
    counts = [(n, m) for tile, rest in zip(before, after, strict=True) for n, m in zip(tile, rest, strict=True) if n]
    lengths = [n for n, _ in counts]
    order = torch.argsort(number.flatten(), stable=True)[: sum(lengths)]
    return Segments.from_lengths(lengths, order), tuple(m for _, m in counts)


def filled_up(planned: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Counts of segments and of the padding behind each: rows stay equally wide, and each keeps a unit of padding.

    A longer segment gives up no less than a shorter one, so padding never grows.
    """
    widths = [max(column) + 1 for column in zip(*planned, strict=True)]
    return [
        counts
        for units in planned
        for counts in (units, tuple(width - n for width, n in zip(widths, units, strict=True)))
    ]
