"""What stands around Qwen2-VL's feature methods, and behind its vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from illava_hooks.patchers.qwen2_vl.layers import PackedTraits
from illava_hooks.patchers.vision import hooks
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.patchers.vision.tracking import token_sources, vision_tracks
from illava_hooks.runtime.provenance import sparse
from illava_hooks.runtime.session import KEY, MergeSession, VisualRecord
from illava_hooks.schedules import Modality

__all__ = ["ExpandTower", "FeatureMethods"]


class FeatureMethods:
    """What stands around the model's feature methods, and behind its vision tower."""

    def __init__(self, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        self.base, self.session = base, session

    def image_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: same shapes, records attached."""
        return self._features("image", "image_grid_thw", method, args, kwargs)

    def video_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_video_features``: same shapes, records attached."""
        return self._features("video", "video_grid_thw", method, args, kwargs)

    def _features(self, modality: Modality, grid: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        kwargs.pop(KEY, None)  # the state of the forward, which Qwen2-VL hands on to its feature methods
        if not (self.session.active and not self.session.config.schedule(modality).is_identity):
            return method(*args, **kwargs)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        grids = call[grid].tolist()
        lengths = [height * width for time, height, width in grids for _ in range(time)]
        size = self.base.visual.spatial_merge_size**2
        unit = 1 if self.session.config.method.is_published else size
        device = call["pixel_values" if modality == "image" else "pixel_values_videos"].device
        run = EncoderPass(self.session, modality, PackedTraits(unit, size), lengths, 1, device)
        first = 0
        with hooks.running(run):
            output = method(*args, **{**kwargs, "return_dict": True, KEY: run})
        shown = _shown(run, size)
        for time, _, _ in grids:
            run.records.append(_record(run, shown, first, first + time, size))
            first += time
        self.session.note_vision(run.records)
        return hooks.handed_out(run, output, kwargs.get("return_dict"), self.base.config)


class ExpandTower:
    """Hook behind the vision tower: gives its outputs their unpatched lengths back before stock splits them."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leaves the output alone when no run travels with the call."""
        run = kwargs.get(KEY)
        if run is None:
            return None
        hooks.expand_output(run, output)
        merged = output.pooler_output
        output.pooler_output = merged[_shown(run, module.spatial_merge_size**2).to(merged.device)]
        return output


def _shown(run: EncoderPass, size: int) -> Tensor:
    """``(n,)`` int64: the output of the patch merger at each place of the packed row.

    Groups stay where they are. Single patches, as published, fill the first places of their slice; the last one
    fills the rest.
    """
    if run.traits.unit == size:
        return run.final.owner[0]
    start, parts = 0, []
    for chain in run.lengths:
        kept = chain[-1] // size
        parts.append(torch.arange(chain[0] // size).clamp_max(kept - 1) + start)
        start += kept
    return torch.cat(parts).to(run.final.owner.device)


def _record(run: EncoderPass, shown: Tensor, first: int, last: int, size: int) -> VisualRecord:
    """The record of the image or video in segments ``first .. last - 1``.

    Args:
        run: the run of the encoder.
        shown: ``(n,)`` int64, the merged token at each place of the packed row.
        first: the first segment.
        last: one past the last segment.
        size: patches of one visual token.
    """
    unit = run.traits.unit
    start = sum(chain[0] for chain in run.lengths[:first]) * unit // size
    num_tokens = sum(chain[0] for chain in run.lengths[first:last]) * unit // size
    place = torch.arange(num_tokens, device=shown.device)
    here = shown[start : start + num_tokens]
    if unit == 1:  # the first places of each slice; the others show what the last of them shows
        keep = torch.cat([place[:1] == 0, here[1:] != here[:-1]])
        holder = torch.where(keep, place, 0).cummax(0).values
    else:
        keep = run.keep_mask(run.final)[0, start : start + num_tokens]
        holder = run.final.seats[0][here] - start
    record = VisualRecord(run.modality, num_tokens, keep, holder, run.patch_counts(first, last), run.layers)
    if run.session.config.track:
        per_token = size // unit
        lane = torch.arange(per_token).repeat(num_tokens)
        skipped = sum(chain[-1] for chain in run.lengths[:first])
        columns = here.cpu().repeat_interleave(per_token) * per_token + lane - skipped
        width = sum(chain[-1] for chain in run.lengths[first:last])
        rows = torch.arange(num_tokens).repeat_interleave(per_token)
        tokens = sparse(rows, columns, torch.full(rows.shape, 1 / per_token, dtype=torch.float32), (num_tokens, width))
        record.sources = token_sources(run, first, last, tokens)
        record.vision = vision_tracks(run, first, last)
    return record
