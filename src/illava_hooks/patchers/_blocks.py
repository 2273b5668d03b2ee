"""What families share whose encoder keeps picture order, and that join blocks of patches behind it.

Tiles of one size; pooling or a pixel shuffle makes one token of each block. The patches of a block are kept or merged
as one; from the first merging layer on a row has them side by side (``EncoderTraits.regroups``), and behind the tower
every patch shows its survivor, in picture order, so that stock joins them as ever.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import expand_output, run_features
from illava_hooks.engine.hookset import Hook
from illava_hooks.engine.provenance import selection
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import Picture
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import ENCODER_RUN, in_features
from illava_hooks.merge.plan import nearest_kept
from illava_hooks.merge.segments import host_table
from illava_hooks.patchers._towers import with_patch_numbers

__all__ = ["BlockFeatures", "ExpandTower", "tile_pictures"]

#: What a family says of the rows of a base model's tower, and how many patches a tile has.
Rows = Callable[[Any], tuple[EncoderTraits, int]]


class BlockFeatures:
    """Around ``get_image_features``, whose every tile is an image of its own."""

    def __init__(self, base: Any, session: MergeSession, rows: Rows) -> None:
        """Belongs to one model and its session."""
        self.base, self.session, self.rows = base, session, rows

    def features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Same shapes, records attached."""
        if in_features():
            return method(*args, **kwargs)
        run: EncoderRun | None = None
        if self.session.active and not self.session.config.image.is_identity:
            run = self.plan(inspect.signature(method).bind(*args, **kwargs).arguments)

        def note(output: Any) -> None:
            if run is not None:
                run.records = [_record(run, tile) for tile in range(run.num_rows)]

        return run_features(self.session, method, args, kwargs, run, self.base.config, note)

    def plan(self, call: Mapping[str, Any]) -> EncoderRun | None:
        """The run of a call, by its arguments' names."""
        pixels = call["pixel_values"]
        traits, patches = self.rows(self.base)
        return EncoderRun(self.session, "image", traits, [patches] * len(pixels), len(pixels), pixels.device)


class ExpandTower(Hook):
    """Hook behind the tower: every patch shows its survivor, in picture order, before stock joins them."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the output alone when no run travels with the call."""
        run: EncoderRun | None = kwargs.get(ENCODER_RUN)
        (out,) = output
        if run is None or out is None:
            return None
        run.check_finished()  # a merge that did not happen leaves states of lengths that nobody planned
        expand_output(run, out)
        return out


def _record(run: EncoderRun, tile: int) -> VisualRecord:
    """What merged in one tile; each block is one of its tokens, in the order in which stock joins them."""
    kept_at: Tensor = run.final.kept_at[tile]
    keep, survivor_of = run.keep_mask(run.final)[tile], run.final.origins[tile][kept_at]
    if run.padding is not None and run.padding.counts[tile].real and len(set(run.lengths[tile])) > 1:
        keep, survivor_of = _without_padding(keep, survivor_of, run.padding.empty()[tile])
    record = VisualRecord("image", len(keep), keep, survivor_of, run.patch_counts(tile, tile + 1), run.layers)
    if run.session.config.track:
        tokens = selection(kept_at.cpu(), run.final.origins.shape[1])
        record.sources = token_sources(run, tile, tile + 1, tokens)
        record.vision = vision_tracks(run, tile, tile + 1)
    return record


def _without_padding(keep: Tensor, survivor_of: Tensor, empty: Tensor) -> tuple[Tensor, Tensor]:
    """Padding is the first to go: what is left of it in the encoder, whose rows are of one length, goes here."""
    keep = keep & ~empty
    return keep, torch.where(
        empty, nearest_kept(keep[None], host_table([len(keep)], keep.device)[None])[0], survivor_of
    )


def tile_pictures(pixels: Tensor, patch: int) -> list[Picture]:
    """Each tile, as the encoder sees it: an image of its own.

    Args:
        pixels: ``(T, 3, H, W)``.
        patch: side of a patch, in pixels.
    """
    return [Picture("image", ((with_patch_numbers(patch, tile[None])[0],),)) for tile in pixels]
