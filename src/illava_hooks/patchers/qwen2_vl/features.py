"""What stands around Qwen2-VL's feature methods, and behind its vision tower."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.merge.decision import nearest_kept
from illava_hooks.merge.spans import scatter_back
from illava_hooks.patchers.qwen2_vl.layers import PackedTraits
from illava_hooks.patchers.vision import hooks
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.patchers.vision.tracking import token_sources, vision_tracks
from illava_hooks.runtime.provenance import sparse
from illava_hooks.runtime.session import KEY, MergeSession, VisualRecord

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
        for time, height, width in grids:
            run.records.append(_record(run, first, first + time, time * height * width // size))
            first += time
        self.session.note_vision(run.records)
        if kwargs.get("return_dict") is False:
            return output.to_tuple()
        output[KEY] = run.records
        return output


class ExpandTower:
    """Hook behind the vision tower: gives its outputs their unpatched lengths back before stock splits them."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Leaves the output alone when no run travels with the call."""
        run = kwargs.get(KEY)
        if run is None:
            return None
        hooks.expand_output(run, output)
        merged = output.pooler_output
        if run.traits.unit == 1:
            output.pooler_output = merged[_front(run, len(run.final.owner[0]), module.spatial_merge_size**2)]
        else:
            output.pooler_output = scatter_back(merged[None], run.final.owner.to(merged.device))[0]
        return output


def _front(run: EncoderPass, num_patches: int, size: int) -> Tensor:
    """The published layout: each slice's merged tokens fill the first places, the last one the rest.

    Returns:
        ``(num_patches // size,)`` int64, the merged token shown at each place.
    """
    start, parts = 0, []
    for chain in run.lengths:
        kept = chain[-1] // size
        parts.append(torch.arange(chain[0] // size).clamp_max(kept - 1) + start)
        start += kept
    return torch.cat(parts).to(run.final.owner.device)


def _record(run: EncoderPass, first: int, last: int, num_tokens: int) -> VisualRecord:
    """The record of the image or video in segments ``first .. last - 1``."""
    chains = tuple(run.lengths[first:last])
    device, start = run.final.owner.device, sum(chain[0] for chain in run.lengths[:first])
    place = torch.arange(num_tokens, device=device)
    if run.traits.unit == 1:
        size = sum(chain[0] for chain in chains) // num_tokens
        front = _front(run, 0, size)[start // size :][:num_tokens]
        keep = torch.cat([front.new_ones(1, dtype=torch.bool), front[1:] != front[:-1]])
        holder = nearest_kept(keep[None], torch.tensor([[num_tokens]], device=device))[0]
        kept_units = sum(chain[-1] for chain in chains)
        unit_of_token = torch.arange(kept_units)
        tokens = sparse(
            unit_of_token // size, unit_of_token, torch.full((kept_units,), 1 / size), (kept_units // size, kept_units)
        )
        rows = keep.cumsum(0).cpu() - 1
        tokens = torch.index_select(tokens, 0, rows).coalesce()
    else:
        units = slice(start, start + num_tokens)
        keep = run.keep_mask(run.final)[0, units]
        holder = run.final.seats[0][run.final.owner[0, units]] - start
        row = run.final.owner[0, units].cpu()
        kept_units = sum(chain[-1] for chain in chains)
        tokens = sparse(
            place.cpu(),
            row - sum(chain[-1] for chain in run.lengths[:first]),
            torch.ones(num_tokens),
            (num_tokens, kept_units),
        )
    record = VisualRecord(
        run.modality, num_tokens, keep, torch.where(keep, place, holder), run.patch_counts(first, last), run.layers
    )
    if run.session.config.track:
        record.sources = token_sources(run, first, last, tokens)
        record.vision = vision_tracks(run, first, last)
    return record
