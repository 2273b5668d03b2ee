"""Rows of patches that are padded to one length, as Gemma 4's tower takes them, rearranged block by block."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.errors import InputError

__all__ = ["Rows", "flat", "frames_of", "rows_of"]


@dataclass(frozen=True, slots=True)
class Rows:
    """How the rows of a call are rearranged: blocks of patches side by side, as wide as the largest image.

    Attributes:
        lengths: real patches of each row.
        source: ``(R, W)`` int64, which patch of the processor's row stands at each place; its width on padding.
        order: ``(R * W,)`` int64, the place among the real patches of the processor's rows, as ``EncoderTraits``.
    """

    lengths: tuple[int, ...]
    source: Tensor
    order: Tensor

    @property
    def ragged(self) -> bool:
        """Whether there is padding."""
        return len(set(self.lengths)) > 1

    def arrange(self, values: Tensor, padding: float) -> Tensor:
        """``(..., N, C)`` in the processor's order as ``(..., W, C)``, with a value where padding is."""
        lead, rows = values.shape[:-2], flat(values)
        rows = torch.nn.functional.pad(rows, (0, 0, 0, 1), value=padding)
        index = self.source.to(rows.device)
        return _taken(rows, index).view(*lead, -1, values.shape[-1])

    def put_back(self, hidden: Tensor, width: int) -> Tensor:
        """``(R, W, C)`` as ``(R, N, C)`` in the processor's order; zeros where it had padding."""
        index = torch.full((len(self.source), width + 1), self.source.shape[1])
        index.scatter_(1, self.source, torch.arange(self.source.shape[1]).expand_as(self.source))
        # The place of padding itself was written as well, and is not shown.
        return _taken(torch.nn.functional.pad(hidden, (0, 0, 0, 1)), index[:, :width].to(hidden.device))


def rows_of(positions: Tensor, pool: int) -> Rows:
    """Rearranges rows by where their patches lie.

    Args:
        positions: ``(R, N, 2)`` int64, column and row of each patch; -1 on padding.
        pool: side of a block.

    Raises:
        InputError: the patches of an image are no whole blocks.
    """
    positions, unit = positions.cpu(), pool * pool
    real = (positions != -1).any(-1)
    lengths, width = real.sum(1), positions.shape[1]
    columns = (positions[..., 0].amax(1, keepdim=True) + 1) // pool
    block = positions[..., 0] // pool + columns * (positions[..., 1] // pool)
    sorted_blocks, source = block.masked_fill(~real, width).sort(dim=1, stable=True)
    place = torch.arange(width)
    whole = (place >= lengths[:, None]) | (sorted_blocks == place // unit)
    broken = ~whole.all(1) | (lengths % unit != 0) | (lengths == 0)
    if bool(broken.any()):
        raise InputError(
            f"the {int(lengths[broken][0])} patches of image or frame {int(broken.nonzero()[0])} are no whole "
            f"{pool} x {pool} blocks, which merge as one; use the model's own processor, or vit_layers=[]"
        )
    longest = int(lengths.max())
    # With padding every row has some, so that none loses its last: a mask is there in each layer, or in none.
    wide = longest + unit if int(lengths.min()) < longest else longest
    source = torch.nn.functional.pad(source, (0, unit), value=width)[:, :wide]
    source = source.masked_fill(torch.arange(wide) >= lengths[:, None], width)
    rank = torch.nn.functional.pad(real.cumsum(1) - 1, (0, 1)).gather(1, source)
    rank = torch.where(source < width, rank, torch.arange(wide))
    order = (rank + torch.arange(len(rank))[:, None] * wide).flatten()
    return Rows(tuple(lengths.tolist()), source, order)


def frames_of(modality: Modality, pixels: Tensor, inputs: Mapping[str, Any]) -> list[int]:
    """Rows of each image or video; older releases give videos a dimension of frames instead of numbers of them."""
    if modality == "image":
        return [1] * len(pixels)
    counts = inputs.get("num_frames_per_video")
    found: list[int] = [pixels.shape[1]] * len(pixels) if counts is None else counts.tolist()
    return found


def flat(values: Tensor) -> Tensor:
    """``(R, N, C)`` of ``(..., N, C)``."""
    return values.reshape(-1, *values.shape[-2:])


def _taken(rows: Tensor, index: Tensor) -> Tensor:
    """``(R, W, C)``: the places ``index`` of ``rows`` ``(R, N, C)``."""
    return rows.gather(1, index[..., None].expand(*index.shape, rows.shape[-1]))
