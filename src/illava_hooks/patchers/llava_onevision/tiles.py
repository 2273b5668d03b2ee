"""LLaVA-OneVision's survivors in the prompt: which packed tokens stay, and who stands for the others.

Shapes: ``T`` tiles or frames of ``N`` tokens with ``K`` survivors, ``P`` packed tokens of one image, ``C`` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.merge.decision import nearest_kept
from illava_hooks.merge.spans import scatter_back
from illava_hooks.patchers.llava_onevision.layout import Folded, Geometry, fold_by_mass
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.patchers.vision.tracking import selection, token_sources, vision_tracks
from illava_hooks.runtime.provenance import product, sparse
from illava_hooks.runtime.session import VisualRecord

__all__ = ["Tiles", "front_record", "settle_image", "settle_video"]


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one image, or the frames of all videos, after the encoder.

    Attributes:
        first: the first segment of the run that belongs to it.
        last: one past the last.
        owner: ``(T, N)`` int64, the survivor that stands for each token.
        seats: ``(T, K)`` int64, where each survivor sits.
        keep: ``(T, N)`` bool, whether a survivor sits there.
    """

    first: int
    last: int
    owner: Tensor
    seats: Tensor
    keep: Tensor

    @classmethod
    def of(cls, run: EncoderPass, first: int, last: int, device: torch.device) -> Tiles:
        """Cuts the tiles ``first .. last - 1`` out of a run."""
        state = run.final
        rows = slice(first, last)
        keep = run.keep_mask(state)[rows]
        return cls(first, last, state.owner[rows].to(device), state.seats[rows].to(device), keep.to(device))

    def expand(self, features: Tensor) -> Tensor:
        """``(T, K, C)`` survivors on the full grid, ``(T, N, C)``; the value of its owner on each place."""
        return scatter_back(features, self.owner)

    def holders(self) -> Tensor:
        """``(T * N,)`` int64, the flat place of the owner of each place."""
        start = torch.arange(len(self.owner), device=self.owner.device)[:, None] * self.owner.shape[1]
        return (self.seats.gather(1, self.owner) + start).flatten()

    def survivor_rows(self) -> Tensor:
        """``(T * N,)`` int64, the flat survivor that owns each place."""
        start = torch.arange(len(self.owner), device=self.owner.device)[:, None] * self.seats.shape[1]
        return (self.owner + start).flatten()


def _record(
    run: EncoderPass, tiles: Tiles, keep: Tensor, holder: Tensor, tokens: Callable[[], Tensor] | None
) -> VisualRecord:
    """The record of the image or video in ``tiles``; ``tokens`` gives the weights of survivors in its tokens."""
    record = VisualRecord(run.modality, len(keep), keep, holder, run.patch_counts(tiles.first, tiles.last), run.layers)
    if run.session.config.track and tokens is not None:
        record.sources = token_sources(run, tiles.first, tiles.last, tokens())
        record.vision = vision_tracks(run, tiles.first, tiles.last)
    return record


def front_record(run: EncoderPass, tiles: Tiles, small: Tensor, num_tokens: int) -> tuple[Tensor, VisualRecord]:
    """The published layout: the packed survivors ``(P', C)`` at the front of ``num_tokens`` places."""
    place = torch.arange(num_tokens, device=small.device)
    shown = place.clamp_max(len(small) - 1)
    return small[shown], _record(run, tiles, place < len(small), shown, None)


def settle_image(
    run: EncoderPass, tiles: Tiles, packed: Tensor, geometry: Geometry, mass: Callable[[], Tensor]
) -> tuple[Tensor, VisualRecord]:
    """Finds the survivors among packed tokens.

    Args:
        run: the run of the encoder.
        tiles: the image's tiles.
        packed: ``(P, C)`` stock packing of the expanded tiles.
        geometry: how stock packs this image.
        mass: gives the stock packing of the survivors' mask, ``(P,)``; asked only where stock interpolates.

    Returns:
        ``(P, C)`` tokens and the record.
    """
    device = packed.device
    source, places, newline = (t.to(device) for t in (geometry.source, geometry.packed, geometry.is_newline))
    index = torch.arange(len(packed), device=device)
    from_tile = source >= 0
    keep = torch.where(from_tile, tiles.keep.flatten()[source.clamp_min(0)], newline)
    holder = torch.where(from_tile, places[tiles.holders()[source.clamp_min(0)]], index)
    folded: Folded | None = None
    grid = slice(tiles.owner.shape[1], None)
    if geometry.shrunk:
        inside = (~geometry.is_newline[grid]).nonzero().flatten().to(device) + tiles.owner.shape[1]
        columns = len(inside) // int(geometry.is_newline.sum())
        num_kept = math.ceil(len(inside) * tiles.seats.shape[1] / tiles.owner.shape[1])
        folded = fold_by_mass(packed[inside][None], mass()[inside][None], num_kept, columns)
        packed = packed.index_copy(0, inside, folded.values[0])
        keep = keep.index_copy(0, inside, folded.keep[0])
        holder = holder.index_copy(0, inside, inside[folded.holder[0]])
    # The owner of a place may be cropped away itself: then the nearest token that stays stands for it.
    fallback = nearest_kept(keep[None], torch.tensor([[len(keep)]], device=device))[0]
    holder = torch.where(keep, index, torch.where(holder < 0, fallback, holder))

    def tokens() -> Tensor:
        rows = torch.where(from_tile, tiles.survivor_rows()[source.clamp_min(0)], -1)
        return selection(rows, tiles.seats.numel())

    return packed, _record(run, tiles, keep, holder, None if folded is not None else tokens)


def settle_video(
    run: EncoderPass, tiles: Tiles, pooled: Tensor, pool: Callable[[Tensor], Tensor], small: Tensor | None
) -> tuple[Tensor, list[VisualRecord]]:
    """Finds the tokens of pooled frames that stay: as many per frame as the encoder kept, rounded up.

    Args:
        run: the run of the encoder.
        tiles: the frames of all videos.
        pooled: ``(T, n, C)`` stock pooling of the expanded frames.
        pool: the stock method.
        small: ``(T, n', C)`` for the published layout, else None.

    Returns:
        ``(T, n, C)`` tokens and one record per video; its last token is the newline.
    """
    frames, n, _ = pooled.shape
    if small is not None:
        shown = torch.arange(n, device=pooled.device).clamp_max(small.shape[1] - 1).expand(frames, n)
        folded = Folded(scatter_back(small, shown), shown == torch.arange(n, device=pooled.device), shown, shown * 0.0)
    else:
        mass = pool(tiles.keep[..., None].to(pooled.dtype))[..., 0]
        num_kept = math.ceil(n * tiles.seats.shape[1] / tiles.owner.shape[1])
        folded = fold_by_mass(pooled, mass, num_kept, math.isqrt(n))
    records = []
    per_video = frames // run.num_videos
    for first in range(0, frames, per_video):
        rows = slice(first, first + per_video)
        video = Tiles(first, first + per_video, tiles.owner[rows], tiles.seats[rows], tiles.keep[rows])
        start = torch.arange(per_video, device=pooled.device)[:, None] * n
        keep = torch.nn.functional.pad(folded.keep[rows].flatten(), (0, 1), value=True)
        holder = (folded.holder[rows] + start).flatten()
        holder = torch.cat([holder, holder.new_tensor([per_video * n])])
        part = Folded(folded.values[rows], folded.keep[rows], folded.holder[rows], folded.shares[rows])
        weights = None if small is not None else _PooledTokens(video, part, pool)
        records.append(_record(run, video, keep, holder, weights))
    return folded.values, records


@dataclass(frozen=True, slots=True)
class _PooledTokens:
    """Weights of survivors in pooled tokens; computed only when tracked."""

    tiles: Tiles
    folded: Folded
    pool: Callable[[Tensor], Tensor]

    def __call__(self) -> Tensor:
        frames, grid = self.tiles.owner.shape
        kernel = self.pool(torch.eye(grid).expand(1, grid, grid))[0]
        n, kept = kernel.shape[0], self.tiles.seats.shape[1]
        token, place = kernel.nonzero(as_tuple=True)
        parts = []
        for frame in range(frames):
            onto = sparse(token, self.tiles.owner[frame].cpu()[place], kernel[token, place], (n, kept))
            fold = sparse(self.folded.holder[frame].cpu(), torch.arange(n), self.folded.shares[frame].cpu(), (n, n))
            part = product(fold, onto)
            part = torch.index_select(part, 0, self.folded.holder[frame].cpu()).coalesce()
            index = part.indices()
            parts.append((index[0] + frame * n, index[1] + frame * kept, part.values()))
        rows, columns, values = (torch.cat(piece) for piece in zip(*parts, strict=True))
        return sparse(rows, columns, values, (frames * n + 1, frames * kept))
