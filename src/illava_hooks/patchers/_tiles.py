"""What becomes of the tiles of an image, or the frames of a video, behind the encoder, in families that tile.

Which packed tokens stay, and who stands for the others. What stock does to an image is not written again here: its
own methods run over indices instead of features.

Shapes: ``T`` tiles or frames of ``N`` tokens with ``K`` survivors, ``P`` packed tokens of one image, ``C`` width.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.config import MergeConfig
from illava_hooks.engine.counts import keeps_quota, shown_units
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.provenance import product, selection, sparse, take_rows
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.regions import in_region
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.errors import MergeConfigError
from illava_hooks.merge.plan import nearest_kept
from illava_hooks.merge.segments import host_table, scatter_back

__all__ = [
    "Folded",
    "Geometry",
    "Pack",
    "Tiles",
    "geometry_of",
    "keep_heaviest",
    "kept_of_image",
    "place_image",
    "place_row",
    "place_video",
    "tile_record",
]

#: The stock packing of one image: values ``(T, N, c)`` on its tiles and a newline ``(c,)`` become ``(P, c)``.
Pack = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Geometry:
    """What stock ``pack_image_features`` does to one image, as host tables.

    Attributes:
        source: ``(P,)`` int64, tile token shown by each packed token, -1 for a newline.
        packed: ``(T * N,)`` int64, the packed token that shows each tile token, -1 where it is cropped away.
        visible: ``(T, N)`` bool, tile tokens that reach the prompt at all.
        is_newline: ``(P,)`` bool.
        shrunk: whether the grid of tiles was interpolated (more tiles than the limit); then ``source`` and
            ``packed`` hold for the base tile only.
    """

    source: Tensor
    packed: Tensor
    visible: Tensor
    is_newline: Tensor
    shrunk: bool


def geometry_of(num_tiles: int, num_tokens: int, pack: Pack, unlimited: Pack | None = None) -> Geometry:
    """Runs the stock packing over a tensor of indices, on the CPU.

    Args:
        num_tiles: tiles of the image, the base tile included.
        num_tokens: ``N``.
        pack: the stock packing.
        unlimited: the same without a limit of tiles, beyond which it interpolates; None: it never does.
    """
    # The gradient of the sum tells which tokens are looked at; the caller may be in inference mode.
    with torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
        index = torch.arange(num_tiles * num_tokens, dtype=torch.float64).view(num_tiles, num_tokens, 1)
        traced = index.clone().requires_grad_()
        shown = pack(traced, torch.tensor([-1.0]).double())
        (reach,) = torch.autograd.grad(shown.sum(), traced)
        values = shown.detach().flatten()
        newline = pack(0 * index, torch.tensor([1.0]).double()).flatten() > 0
        shrunk = unlimited is not None and len(unlimited(index, torch.zeros(1).double())) != len(values)
        source = values.round().long()
        if shrunk:
            source[num_tokens:] = -1
        packed = torch.full((num_tiles * num_tokens,), -1)
        packed[source[source >= 0]] = (source >= 0).nonzero().flatten()
    return Geometry(source, packed, (reach != 0).squeeze(-1), newline, shrunk)


def kept_of_image(config: MergeConfig, geometry: Geometry, units: Sequence[int], size: Sequence[int]) -> int:
    """Tokens of one image that enter the language model, newlines included.

    Args:
        config: the settings.
        geometry: how stock packs the image.
        units: tokens of each tile before, between and after the merges.
        size: height and width in pixels, for the message.

    Raises:
        MergeConfigError: shapes do not tell, since survivors may be cropped away.
    """
    num_tokens = units[0]
    newlines, shown = int(geometry.is_newline.sum()), geometry.visible.sum(1).tolist()
    if geometry.shrunk:  # the grid of tiles keeps its share of what it was interpolated to
        inside = len(geometry.source) - num_tokens - newlines
        return units[-1] + math.ceil(inside * units[-1] / num_tokens) + newlines
    cropped = any(0 < n < num_tokens for n in shown)
    if cropped and units[-1] < num_tokens and not keeps_quota(config.method, units):
        raise MergeConfigError(
            f"an image of {size[0]} x {size[1]} is cropped, and how many of its tokens method {config.method.name!r} "
            "keeps is not told by shapes; use Method(..., quota=True), no merge by 'bipartite', and a vit_r that "
            "leaves 2 tokens of a tile"
        )
    return newlines + sum(shown_units(units, n)[-1] for n in shown)


@dataclass(frozen=True, slots=True)
class Folded:
    """Interpolated tokens after as many were dropped as the encoder merged.

    Attributes:
        values: ``(F, n, C)``; a dropped token shows its survivor.
        keep: ``(F, n)`` bool.
        survivor_of: ``(F, n)`` int64.
        shares: ``(F, n)`` float32, the weight with which each token entered its survivor.
    """

    values: Tensor
    keep: Tensor
    survivor_of: Tensor
    shares: Tensor


def keep_heaviest(values: Tensor, mass: Tensor, num_kept: int, columns: int) -> Folded:
    """Keeps the tokens with the most survivors under them; the others go to their nearest kept neighbour.

    Args:
        values: ``(F, n, C)`` interpolated tokens of a grid, row-major.
        mass: ``(F, n)`` the same interpolation of the survivors' 0/1 mask.
        num_kept: tokens to keep per ``F``.
        columns: width of the grid.
    """
    frames, n = mass.shape
    order = torch.argsort(mass, dim=-1, descending=True, stable=True)
    kept, dropped = order[:, :num_kept].sort(-1).values, order[:, num_kept:].sort(-1).values
    row_distance = (dropped // columns)[..., None] - (kept // columns)[:, None]
    column_distance = (dropped % columns)[..., None] - (kept % columns)[:, None]
    target = kept.gather(1, (row_distance**2 + column_distance**2).min(-1).indices)
    everywhere = torch.arange(n, device=mass.device).expand(frames, n)
    survivor_of = everywhere.scatter(1, dropped, target)
    mass = mass.to(torch.promote_types(values.dtype, torch.float32))
    total = torch.zeros_like(mass).scatter_add(1, survivor_of, mass)
    share = torch.where(
        total.gather(1, survivor_of) > 0, mass / total.gather(1, survivor_of), (survivor_of == everywhere).to(mass)
    )
    spread = survivor_of[..., None].expand_as(values)
    folded = torch.zeros_like(values, dtype=mass.dtype).scatter_add(1, spread, values * share[..., None])
    return Folded(folded.gather(1, spread).to(values.dtype), survivor_of == everywhere, survivor_of, share.float())


@dataclass(frozen=True, slots=True)
class Tiles:
    """The tiles of one image, or the frames of all videos, after the encoder.

    Attributes:
        first: the first segment of the run that belongs to it.
        last: one past the last.
        kept_at: ``(T, N)`` int64, the survivor that stands for each token.
        origins: ``(T, K)`` int64, where each survivor sits.
        keep: ``(T, N)`` bool, whether a survivor sits there.
    """

    first: int
    last: int
    kept_at: Tensor
    origins: Tensor
    keep: Tensor

    @classmethod
    def of(cls, run: EncoderRun, first: int, last: int, device: torch.device) -> Tiles:
        """Cuts the tiles ``first .. last - 1`` out of a run."""
        state = run.final
        rows = slice(first, last)
        keep = run.keep_mask(state)[rows]
        return cls(first, last, state.kept_at[rows].to(device), state.origins[rows].to(device), keep.to(device))

    @in_region("illava::packing")
    def expand(self, features: Tensor) -> Tensor:
        """``(T, K, C)`` survivors on the full grid, ``(T, N, C)``; on each place who stands for it."""
        return scatter_back(features, self.kept_at)

    def survivors(self) -> Tensor:
        """``(T * N,)`` int64, the flat place of the survivor that stands for each place."""
        start = torch.arange(len(self.kept_at), device=self.kept_at.device)[:, None] * self.kept_at.shape[1]
        return (self.origins.gather(1, self.kept_at) + start).flatten()

    def survivor_rows(self) -> Tensor:
        """``(T * N,)`` int64, the flat survivor that owns each place."""
        start = torch.arange(len(self.kept_at), device=self.kept_at.device)[:, None] * self.origins.shape[1]
        return (self.kept_at + start).flatten()


def tile_record(
    run: EncoderRun, tiles: Tiles, keep: Tensor, survivor_of: Tensor, tokens: Callable[[], Tensor] | None
) -> VisualRecord:
    """The record of the image or video in ``tiles``; ``tokens`` gives the weights of survivors in its tokens."""
    record = VisualRecord(
        run.modality, len(keep), keep, survivor_of, run.patch_counts(tiles.first, tiles.last), run.layers
    )
    if run.session.config.track and tokens is not None:
        record.sources = token_sources(run, tiles.first, tiles.last, tokens())
        record.vision = vision_tracks(run, tiles.first, tiles.last)
    return record


@in_region("illava::packing")
def place_row(run: EncoderRun, tile: Tiles, features: Tensor) -> tuple[Tensor, VisualRecord]:
    """An image of one tile whose patches are its tokens: ``(K, C)`` survivors become ``(N, C)``, and the record."""

    def tokens() -> Tensor:
        return selection(tile.survivor_rows(), tile.origins.numel())

    record = tile_record(run, tile, tile.keep[0], tile.survivors(), tokens)
    return tile.expand(features[None])[0], record


@in_region("illava::packing")
def place_image(
    run: EncoderRun,
    tiles: Tiles,
    packed: Tensor,
    geometry: Geometry,
    show: Callable[[Tensor], Tensor] | None = None,
) -> tuple[Tensor, VisualRecord]:
    """Finds the survivors among packed tokens.

    Args:
        run: the run of the encoder.
        tiles: the image's tiles.
        packed: ``(P, C)`` stock packing of the expanded tiles.
        geometry: how stock packs this image.
        show: the stock packing of any values on the tiles, ``(T, N, c)`` to ``(P, c)``, with zero newlines;
            for images whose grid is interpolated.

    Returns:
        ``(P, C)`` tokens and the record.
    """
    device = packed.device
    source, places, newline = (t.to(device) for t in (geometry.source, geometry.packed, geometry.is_newline))
    index = torch.arange(len(packed), device=device)
    from_tile = source >= 0
    keep = torch.where(from_tile, tiles.keep.flatten()[source.clamp_min(0)], newline)
    survivor_of = torch.where(from_tile, places[tiles.survivors()[source.clamp_min(0)]], index)
    shares = torch.ones(len(packed), dtype=torch.float32, device=device)
    grid = slice(tiles.kept_at.shape[1], None)
    if geometry.shrunk and show is not None:
        inside = (~geometry.is_newline[grid]).nonzero().flatten().to(device) + tiles.kept_at.shape[1]
        columns = len(inside) // int(geometry.is_newline.sum())
        num_kept = math.ceil(len(inside) * tiles.origins.shape[1] / tiles.kept_at.shape[1])
        mask = tiles.keep[..., None].float()
        folded = keep_heaviest(packed[inside][None], show(mask)[inside].T, num_kept, columns)
        packed = packed.index_copy(0, inside, folded.values[0])
        keep = keep.index_copy(0, inside, folded.keep[0])
        survivor_of = survivor_of.index_copy(0, inside, inside[folded.survivor_of[0]])
        shares = shares.index_copy(0, inside, folded.shares[0])
    # The survivor may be cropped away itself: then the nearest token that stays stands for it.
    fallback = nearest_kept(keep[None], host_table([len(keep)], device)[None])[0]
    survivor_of = torch.where(keep, index, torch.where(survivor_of < 0, fallback, survivor_of))

    def chosen() -> Tensor:
        rows = torch.where(from_tile, tiles.survivor_rows()[source.clamp_min(0)], -1)
        return selection(rows, tiles.origins.numel())

    at = torch.where(from_tile, index, survivor_of)
    tokens = _Interpolated(tiles, show, at, shares) if geometry.shrunk and show is not None else chosen
    return packed, tile_record(run, tiles, keep, survivor_of, tokens)


@in_region("illava::packing")
def place_video(
    run: EncoderRun,
    tiles: Tiles,
    pooled: Tensor,
    pool: Callable[[Tensor], Tensor],
    small: Tensor | None,
    newlines: int = 1,
) -> tuple[Tensor, list[VisualRecord]]:
    """Finds the tokens of pooled frames that stay: as many per frame as the encoder kept, rounded up.

    Args:
        run: the run of the encoder.
        tiles: the frames of all videos.
        pooled: ``(T, n, C)`` stock pooling of the expanded frames.
        pool: the stock method.
        small: ``(T, n', C)`` for the published layout, else None.
        newlines: how many end each video.

    Returns:
        ``(T, n, C)`` tokens and one record per video, newlines included.
    """
    frames, n, _ = pooled.shape
    if small is not None:
        shown = torch.arange(n, device=pooled.device).clamp_max(small.shape[1] - 1).expand(frames, n)
        folded = Folded(
            scatter_back(small, shown), shown == torch.arange(n, device=pooled.device), shown, shown.float() * 0
        )
    else:
        mass = pool(tiles.keep[..., None].float())[..., 0]
        num_kept = math.ceil(n * tiles.origins.shape[1] / tiles.kept_at.shape[1])
        folded = keep_heaviest(pooled, mass, num_kept, math.isqrt(n))
    records = []
    per_video = frames // run.num_videos
    start = torch.arange(per_video, device=pooled.device)[:, None] * n
    for first in range(0, frames, per_video):
        rows = slice(first, first + per_video)
        video = Tiles(first, first + per_video, tiles.kept_at[rows], tiles.origins[rows], tiles.keep[rows])
        keep = torch.nn.functional.pad(folded.keep[rows].flatten(), (0, newlines), value=True)
        survivor_of = (folded.survivor_of[rows] + start).flatten()
        behind = torch.arange(newlines, device=pooled.device) + per_video * n
        survivor_of = torch.cat([survivor_of, behind])
        shares = torch.nn.functional.pad(folded.shares[rows].flatten(), (0, newlines))
        tokens = (
            None if small is not None else _Interpolated(video, _with_newlines(pool, newlines), survivor_of, shares)
        )
        records.append(tile_record(run, video, keep, survivor_of, tokens))
    return folded.values, records


def _with_newlines(pool: Callable[[Tensor], Tensor], newlines: int) -> Callable[[Tensor], Tensor]:
    """Pooling of one video, ``(T, N, c)`` to ``(T * n + newlines, c)``; a newline shows nothing."""
    return lambda values: torch.nn.functional.pad(pool(values).flatten(0, 1), (0, 0, 0, newlines))


def _fold_matrix(survivor_of: Tensor, shares: Tensor) -> Tensor:
    """Sparse ``(n, n)``: what each token shows after its group was folded into its survivor."""
    survivor_of, n = survivor_of.cpu(), len(survivor_of)
    return take_rows(sparse(survivor_of, torch.arange(n), shares.cpu(), (n, n)), survivor_of)


@dataclass(frozen=True, slots=True)
class _Interpolated:
    """Weights of survivors in tokens that the stock code interpolates; computed only when tracked.

    Attributes:
        tiles: the tiles or frames.
        show: runs the stock code over ``(T, N, c)`` values: ``(P, c)``.
        survivor_of: ``(P,)`` int64.
        shares: ``(P,)`` float32, the weight with which each token entered its survivor.
    """

    tiles: Tiles
    show: Callable[[Tensor], Tensor]
    survivor_of: Tensor
    shares: Tensor

    def __call__(self) -> Tensor:
        num_tiles, grid = self.tiles.kept_at.shape
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
        shape = (len(self.survivor_of), self.tiles.origins.numel())
        shown = sparse(torch.cat(rows), torch.cat(columns), torch.cat(values), shape)
        return product(_fold_matrix(self.survivor_of, self.shares), shown)
