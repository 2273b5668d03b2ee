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
from illava_hooks.merge.spans import host_table, scatter_back
from illava_hooks.patchers.llava_onevision.layout import Folded, Geometry, fold_by_mass
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.patchers.vision.tracking import selection, token_sources, vision_tracks
from illava_hooks.runtime.provenance import product, sparse, take_rows
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
    run: EncoderPass, tiles: Tiles, packed: Tensor, geometry: Geometry, show: Callable[[Tensor], Tensor]
) -> tuple[Tensor, VisualRecord]:
    """Finds the survivors among packed tokens.

    Args:
        run: the run of the encoder.
        tiles: the image's tiles.
        packed: ``(P, C)`` stock packing of the expanded tiles.
        geometry: how stock packs this image.
        show: the stock packing of any values on the tiles, ``(T, N, c)`` to ``(P, c)``, with zero newlines.

    Returns:
        ``(P, C)`` tokens and the record.
    """
    device = packed.device
    source, places, newline = (t.to(device) for t in (geometry.source, geometry.packed, geometry.is_newline))
    index = torch.arange(len(packed), device=device)
    from_tile = source >= 0
    keep = torch.where(from_tile, tiles.keep.flatten()[source.clamp_min(0)], newline)
    holder = torch.where(from_tile, places[tiles.holders()[source.clamp_min(0)]], index)
    shares = torch.ones(len(packed), dtype=torch.float32, device=device)
    grid = slice(tiles.owner.shape[1], None)
    if geometry.shrunk:
        inside = (~geometry.is_newline[grid]).nonzero().flatten().to(device) + tiles.owner.shape[1]
        columns = len(inside) // int(geometry.is_newline.sum())
        num_kept = math.ceil(len(inside) * tiles.seats.shape[1] / tiles.owner.shape[1])
        mask = tiles.keep[..., None].float()
        folded = fold_by_mass(packed[inside][None], show(mask)[inside].T, num_kept, columns)
        packed = packed.index_copy(0, inside, folded.values[0])
        keep = keep.index_copy(0, inside, folded.keep[0])
        holder = holder.index_copy(0, inside, inside[folded.holder[0]])
        shares = shares.index_copy(0, inside, folded.shares[0])
    # The owner of a place may be cropped away itself: then the nearest token that stays stands for it.
    fallback = nearest_kept(keep[None], host_table([len(keep)], device)[None])[0]
    holder = torch.where(keep, index, torch.where(holder < 0, fallback, holder))

    def chosen() -> Tensor:
        rows = torch.where(from_tile, tiles.survivor_rows()[source.clamp_min(0)], -1)
        return selection(rows, tiles.seats.numel())

    at = torch.where(from_tile, index, holder)
    tokens = _Interpolated(tiles, show, at, shares) if geometry.shrunk else chosen
    return packed, _record(run, tiles, keep, holder, tokens)


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
        folded = Folded(
            scatter_back(small, shown), shown == torch.arange(n, device=pooled.device), shown, shown.float() * 0
        )
    else:
        mass = pool(tiles.keep[..., None].float())[..., 0]
        num_kept = math.ceil(n * tiles.seats.shape[1] / tiles.owner.shape[1])
        folded = fold_by_mass(pooled, mass, num_kept, math.isqrt(n))
    records = []
    per_video = frames // run.num_videos
    start = torch.arange(per_video, device=pooled.device)[:, None] * n
    for first in range(0, frames, per_video):
        rows = slice(first, first + per_video)
        video = Tiles(first, first + per_video, tiles.owner[rows], tiles.seats[rows], tiles.keep[rows])
        keep = torch.nn.functional.pad(folded.keep[rows].flatten(), (0, 1), value=True)
        holder = (folded.holder[rows] + start).flatten()
        holder = torch.cat([holder, holder.new_tensor([per_video * n])])
        shares = torch.nn.functional.pad(folded.shares[rows].flatten(), (0, 1))
        tokens = None if small is not None else _Interpolated(video, _with_newline(pool), holder, shares)
        records.append(_record(run, video, keep, holder, tokens))
    return folded.values, records


def _with_newline(pool: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Pooling of one video, ``(T, N, c)`` to ``(T * n + 1, c)``; the newline shows nothing."""
    return lambda values: torch.nn.functional.pad(pool(values).flatten(0, 1), (0, 0, 0, 1))


def _fold_matrix(holder: Tensor, shares: Tensor) -> Tensor:
    """Sparse ``(n, n)``: what each token shows after its group was folded into its holder."""
    holder, n = holder.cpu(), len(holder)
    return take_rows(sparse(holder, torch.arange(n), shares.cpu(), (n, n)), holder)


@dataclass(frozen=True, slots=True)
class _Interpolated:
    """Weights of survivors in tokens that the stock code interpolates; computed only when tracked.

    Attributes:
        tiles: the tiles or frames.
        show: runs the stock code over ``(T, N, c)`` values: ``(P, c)``.
        holder: ``(P,)`` int64.
        shares: ``(P,)`` float32, the weight with which each token entered its holder.
    """

    tiles: Tiles
    show: Callable[[Tensor], Tensor]
    holder: Tensor
    shares: Tensor

    def __call__(self) -> Tensor:
        num_tiles, grid = self.tiles.owner.shape
        survivors = self.tiles.survivor_rows().cpu()
        rows, columns, values = [], [], []
        for tile in range(num_tiles):
            probe = torch.zeros(num_tiles, grid, grid, dtype=torch.float32)
            probe[tile] = torch.eye(grid, dtype=torch.float32)
            kernel = self.show(probe)
            token, place = kernel.nonzero(as_tuple=True)
            rows.append(token)
            columns.append(survivors[tile * grid + place])
            values.append(kernel[token, place])
        shape = (len(self.holder), self.tiles.seats.numel())
        shown = sparse(torch.cat(rows), torch.cat(columns), torch.cat(values), shape)
        return product(_fold_matrix(self.holder, self.shares), shown)
