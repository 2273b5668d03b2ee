"""What families share whose vision encoder has one packed row of patches and a 2x2 patch merger.

All images and video slices of a call lie one after the other in a single row; borders say who attends to whom. The
patches that the merger concatenates follow each other, so they are kept or merged as one unit, and survivors go
through the merger as in stock.
"""

from __future__ import annotations

import inspect
import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers.utils.generic import is_flash_attention_requested

from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.counts import encoder_counts
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import (
    MergingLayer,
    change_layers,
    expand_output,
    run_features,
    warn_of_direct_call,
)
from illava_hooks.engine.family import Family, ModelParts, changed_layers
from illava_hooks.engine.hookset import CALLED, Called, Hook, named_arguments
from illava_hooks.engine.provenance import sparse
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.session import MergeSession, SessionHook
from illava_hooks.engine.tooling import PIXELS, Picture, Workload
from illava_hooks.engine.trace import token_sources, vision_tracks
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.engine.transport import ENCODER_RUN, current_run, in_features, running_forward
from illava_hooks.errors import InputError
from illava_hooks.merge.segments import borders as packed_borders
from illava_hooks.patchers._windows import window_pairs

__all__ = ["ExpandTower", "FeatureMethods", "MergingBlock", "PackedFamily", "StartTower"]


class MergingBlock(MergingLayer):
    """In front of a stock vision block: merges between attention and MLP."""

    attention_name = "attn"

    def attend(self, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """As in the stock block."""
        block: Any = self
        out: Tensor = hidden + block.attn(block.norm1(hidden), *args, **kwargs)
        return out

    def feed_forward(self, hidden: Tensor) -> Tensor:
        """As in the stock block."""
        block: Any = self
        out: Tensor = hidden + block.mlp(block.norm2(hidden))
        return out


class PackedFamily(Family):
    """A family with a packed row of patches: a subclass says which blocks its tower has, and its sizes.

    Attributes:
        merging_blocks: the merging class of each stock block.
        frames_apart: whether each temporal slice of a video has a place of its own in the prompt.
        time_tokens: about how many tokens of text tell the time of such a slice.
    """

    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]]
    frames_apart: bool = False
    time_tokens: int = 0

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging blocks' classes, wraps the feature methods, hooks the tower."""
        changed = changed_layers(session.config, len(parts.encoder_layers))
        change_layers(parts.encoder_layers, changed, self.merging_blocks, session)
        methods = FeatureMethods(self, parts.base, session)
        for modality in self.modalities:
            session.hooks.wrap(parts.base, f"get_{modality}_features", getattr(methods, f"{modality}_features"))
        for tower in parts.towers:
            session.hooks.around_forward(tower, StartTower(self, session), ExpandTower(self))

    def traits(self, patches_per_token: int, published: bool) -> EncoderTraits:
        """How patches lie in the row: groups of one visual token stay together.

        Args:
            patches_per_token: what the merger concatenates.
            published: whether the published method merges.
        """
        return EncoderTraits(patches_per_token, granularity=patches_per_token)

    def shrink(self, kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        """The keyword arguments of a block, cut down to the survivors of a packed row: RoPE tables and borders."""
        if not merges:
            return {**kwargs, **self.borders(kwargs, run, 0)}
        tables = kwargs["position_embeddings"]
        state, borders = run.states[merges], self.borders(kwargs, run, merges)
        if state.rope is None or state.rope[0] is not tables:  # all layers between two merges are given the same
            # Whole units of patches lie side by side.
            units, shape = state.origins[0].to(tables[0].device), (run.states[0].origins.shape[1], -1)
            state.rope = tables, tuple(t.reshape(shape)[units].view(-1, t.shape[-1]) for t in tables)
        return {**kwargs, "position_embeddings": state.rope[1], **borders}

    def borders(self, kwargs: dict[str, Any], run: EncoderRun, merges: int) -> dict[str, Any]:
        """Who attends to whom among the survivors: what is left of each segment, which the host knows.

        Every back-end but flash asks for them on the host: from there it gets them without waiting for the device,
        as it does in each block of stock.
        """
        lengths = [units * run.traits.patches_per_unit for units in run.segments[merges].lengths]
        device = torch.device("cpu") if run.borders_on_host else kwargs["position_embeddings"][0].device
        return {"cu_seqlens": packed_borders(lengths, device, torch.int32), "max_seqlen": max(lengths)}

    def lay_out(self, run: EncoderRun, tower: Any, grids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The tower's keyword arguments for a run; a family whose tower permutes its row tells the run of it here.

        Args:
            run: the run, before the first layer.
            tower: the vision tower, about to be called.
            grids: ``(n, 3)``, patches of each image or video.
            kwargs: as the tower was given them.
        """
        return kwargs

    def expand_states(self, run: EncoderRun, out: Any) -> None:
        """Gives the tower's hidden states their unpatched length, in place.

        Args:
            run: its finished run.
            out: its output.
        """
        expand_output(run, out)

    def expand_beside(self, tower: Any, run: EncoderRun, out: Any) -> None:
        """Gives what else a tower puts out its unpatched length, in place; most put out nothing else.

        Args:
            tower: the tower.
            run: its finished run.
            out: its output; hidden states and ``pooler_output`` are done.
        """

    def run(
        self,
        session: MergeSession,
        modality: Modality,
        grids: list[list[int]],
        patches_per_token: int,
        device: torch.device,
    ) -> EncoderRun:
        """A run over the temporal slices of some images or videos, whose grids (t, h, w) count patches."""
        lengths = [height * width for time, height, width in grids for _ in range(time)]
        traits = self.traits(patches_per_token, session.config.method.is_published)
        return EncoderRun(session, modality, traits, lengths, 1, device, shrink=self.shrink)

    def kept_tokens(self, base: Any, config: MergeConfig, modality: Modality, shape: Sequence[int]) -> int:
        """Of one grid (t, h, w) of patches."""
        time, height, width = shape
        patches = int(base.config.vision_config.spatial_merge_size) ** 2
        traits = self.traits(patches, config.method.is_published)
        units = encoder_counts(config, modality, traits, height * width).units[-1]
        return time * (units * traits.patches_per_unit // patches)

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """``(3, B, N)``: the fourth row in front, if any, only tells packed sequences apart."""
        return position_ids[1:] if position_ids.dim() == 3 and position_ids.shape[0] == 4 else position_ids

    def pictures(self, model: Any, inputs: Mapping[str, Any]) -> list[Picture] | None:
        """Each image, and the first frame of each temporal slice of a video."""
        vision, found = self.config(model).vision_config, list[Picture]()
        for modality, name in PIXELS.items():
            if inputs.get(name) is not None:
                stacks = _unpacked(vision, inputs[name].detach().double().cpu(), inputs[f"{modality}_grid_thw"])
                found += [Picture(modality, tuple((frame,) for frame in stack)) for stack in stacks]
        return found

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor] | None:
        """Packed rows of patches.

        Raises:
            InputError: no grid of whole 2x2 groups has so many patches.
        """
        config = self.config(model)
        vision = config.vision_config
        height = max((h for h in range(2, int(load.patches**0.5) + 1, 2) if load.patches % (2 * h) == 0), default=1)
        width = load.patches // height
        if height % 2 or height * width != load.patches or width % 2:
            raise InputError(f"patches is {load.patches}; give a product of two even numbers")
        slices = -(-load.frames // vision.temporal_patch_size) if load.frames else 1
        count = 1 if load.frames else load.images
        channels = 3 * vision.temporal_patch_size * vision.patch_size**2
        modality: Modality = "video" if load.frames else "image"
        token = config.video_token_id if load.frames else config.image_token_id
        groups = slices if self.frames_apart else 1
        time = self.time_tokens if load.frames else 0
        inputs = load.prompt(token, slices * load.patches // 4 // groups, count * groups, generator, time)
        rows = load.batch * count * slices * load.patches
        inputs[PIXELS[modality]] = torch.randn(rows, channels, generator=generator)
        inputs[f"{modality}_grid_thw"] = torch.tensor([[slices, height, width]] * (load.batch * count))
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == token).int() * (2 if load.frames else 1)
        return inputs


class FeatureMethods:
    """Around the model's feature methods."""

    def __init__(self, family: PackedFamily, base: Any, session: MergeSession) -> None:
        """Belongs to one model and its session."""
        self.family, self.base, self.session = family, base, session

    def image_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_image_features``: same shapes, records attached."""
        return self._features("image", "image_grid_thw", method, args, kwargs)

    def video_features(self, method: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Around ``get_video_features``: same shapes, records attached."""
        return self._features("video", "video_grid_thw", method, args, kwargs)

    def _features(self, modality: Modality, grid: str, method: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        if in_features():  # asked by another one, whose run it is; tuples could not carry its records
            asked = {} if current_run() is None else {"return_dict": True}
            return method(*args, **kwargs, **asked)
        merges = self.session.active and not self.session.config.schedule(modality).is_identity
        if not merges:
            return run_features(self.session, method, args, kwargs, None, self.base.config, _nothing)
        call = inspect.signature(method).bind(*args, **kwargs).arguments
        device = call["pixel_values" if modality == "image" else "pixel_values_videos"].device
        grids, patches = call[grid].tolist(), self.base.visual.spatial_merge_size**2
        run = self.family.run(self.session, modality, grids, patches, device)

        def note(output: Any) -> None:
            run.records = packed_records(run, grids, patches)

        return run_features(self.session, method, args, kwargs, run, self.base.config, note)


def _nothing(output: Any) -> None:
    pass


def packed_records(run: EncoderRun, grids: list[list[int]], patches_per_token: int) -> list[VisualRecord]:
    """The record of each image or video of a finished run."""
    shown, first, records = _shown(run, patches_per_token), 0, []
    for time, _, _ in grids:
        records.append(_record(run, shown, first, first + time, patches_per_token))
        first += time
    if run.traits.windows is not None:
        starts = [0, *itertools.accumulate(math.prod(grid) for grid in grids)]
        for record, pairs in zip(records, window_pairs(run, starts), strict=True):
            record.window_pairs = pairs
    return records


class StartTower(SessionHook):
    """Hook in front of the vision tower: tells a run of its row, and starts one where a forward calls the tower.

    Retrievers do the latter. A call that belongs to no forward merges nothing, since it may be another model's
    that shares the tower; it is said once.
    """

    def __init__(self, family: PackedFamily, session: MergeSession) -> None:
        """Belongs to one model's session."""
        super().__init__(session)
        self.family = family

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves calls alone that bring a run, or are not to merge."""
        grids = named_arguments(module, args, kwargs).get("grid_thw")
        kwargs = {**kwargs, CALLED: Called(module)}
        if grids is not None and in_features() and (run := kwargs.get(ENCODER_RUN)) is not None:
            return args, self._laid_out(run, module, grids, kwargs)
        if grids is None or in_features() or not self.session.active:
            return args, kwargs
        modality: Modality = "video" if bool((grids[:, 0] > 1).any()) else "image"
        if self.session.config.schedule(modality).is_identity:
            return args, kwargs
        forward = running_forward()
        if forward is None or forward.session is not self.session:
            warn_of_direct_call(self.session, module)
            return args, kwargs
        patches = module.spatial_merge_size**2
        run = forward.encoder = self.family.run(self.session, modality, grids.tolist(), patches, grids.device)
        return args, self._laid_out(run, module, grids, {**kwargs, "return_dict": True, ENCODER_RUN: run})

    def _laid_out(self, run: EncoderRun, tower: Any, grids: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        run.borders_on_host = not is_flash_attention_requested(tower.config)
        return self.family.lay_out(run, tower, grids, kwargs)


class ExpandTower(Hook):
    """Hook behind the vision tower: gives its outputs their unpatched lengths back before stock splits them."""

    def __init__(self, family: PackedFamily) -> None:
        """Asks its family for what is beside the features."""
        self.family = family

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the output alone when no run travels with the call."""
        run: EncoderRun | None = kwargs.get(ENCODER_RUN)
        (out,), forward = output, running_forward()
        if forward is not None and forward.encoder is run:
            forward.encoder = None
        if run is None or out is None:
            return None
        self.family.expand_states(run, out)
        merged, patches = out.pooler_output, module.spatial_merge_size**2
        if run.traits.order is None:  # else stock puts the picture's order back, for which all must have been there
            out.pooler_output = merged[_shown(run, patches).to(merged.device)]
        self.family.expand_beside(module, run, out)
        if not in_features():
            run.check_finished()
            if forward is not None and forward.session is run.session:
                grids = named_arguments(module, args, kwargs)["grid_thw"].tolist()
                forward.records[run.modality] = packed_records(run, grids, patches)
        return out


def _shown(run: EncoderRun, patches_per_token: int) -> Tensor:
    """``(n,)`` int64: the output of the patch merger at each place of the packed row, or of its picture.

    Groups stay where they are. Single patches, as published, fill the first places of their slice; the last one
    fills the rest.
    """
    if run.traits.patches_per_unit == patches_per_token:
        return run.final.kept_at[0] if run.traits.order is None else run.final.kept_at[0][_row_places(run)]
    start, parts = 0, []
    for units in run.lengths:
        kept = units[-1] // patches_per_token
        parts.append(torch.arange(units[0] // patches_per_token).clamp_max(kept - 1) + start)
        start += kept
    return torch.cat(parts).to(run.final.kept_at.device)


def _record(run: EncoderRun, shown: Tensor, first: int, last: int, patches_per_token: int) -> VisualRecord:
    """The record of the image or video in segments ``first .. last - 1``.

    Args:
        run: the run of the encoder.
        shown: ``(n,)`` int64, the merged token at each place, as the pictures have them.
        first: the first segment.
        last: one past the last segment.
        patches_per_token: patches of one visual token.
    """
    unit = run.traits.patches_per_unit
    start = sum(units[0] for units in run.lengths[:first]) * unit // patches_per_token
    num_tokens = sum(units[0] for units in run.lengths[first:last]) * unit // patches_per_token
    place = torch.arange(num_tokens, device=shown.device)
    here = shown[start : start + num_tokens]
    if unit == 1:  # the first places of each slice; the others show what the last of them shows
        keep = torch.cat([place[:1] == 0, here[1:] != here[:-1]])
        survivor_of = torch.where(keep, place, 0).cummax(0).values
    elif run.traits.order is None:
        keep = run.keep_mask(run.final)[0, start : start + num_tokens]
        survivor_of = run.final.origins[0][here] - start
    else:
        keep = run.keep_mask(run.final)[0][_row_places(run)[start : start + num_tokens]]
        survivor_of = _picture_places(run)[run.final.origins[0][here]] - start
    record = VisualRecord(run.modality, num_tokens, keep, survivor_of, run.patch_counts(first, last), run.layers)
    if run.session.config.track:
        units_per_token = patches_per_token // unit
        lane = torch.arange(units_per_token).repeat(num_tokens)
        skipped = sum(units[-1] for units in run.lengths[:first])
        columns = here.cpu().repeat_interleave(units_per_token) * units_per_token + lane - skipped
        width = sum(units[-1] for units in run.lengths[first:last])
        rows = torch.arange(num_tokens).repeat_interleave(units_per_token)
        share = torch.full(rows.shape, 1 / units_per_token, dtype=torch.float32)
        record.sources = token_sources(run, first, last, sparse(rows, columns, share, (num_tokens, width)))
        record.vision = vision_tracks(run, first, last)
    return record


def _picture_places(run: EncoderRun) -> Tensor:
    """``(n,)`` int64: where the picture has each unit of a permuted row."""
    assert run.traits.order is not None
    unit = run.traits.patches_per_unit
    return run.traits.order[::unit].to(run.final.kept_at.device) // unit


def _row_places(run: EncoderRun) -> Tensor:
    """``(n,)`` int64: where the row has each unit of the pictures."""
    return _picture_places(run).argsort()


def _unpacked(vision: Any, values: Tensor, grids: Tensor) -> list[Tensor]:
    """Per image or video ``(T, 4, H, W)``: the first frame of each slice, pixels and patch numbers."""
    size, group = vision.patch_size, vision.spatial_merge_size
    found = []
    parts = torch.split_with_sizes(values, grids.prod(-1).tolist())
    for rows, (time, height, width) in zip(parts, grids.tolist(), strict=True):
        patches = rows.view(len(rows), -1, vision.temporal_patch_size, size, size)[:, :, 0]
        labels = torch.arange(len(rows)).to(rows).view(-1, 1, 1, 1).expand(-1, 1, size, size)
        stack = torch.cat([patches, labels], 1)
        stack = stack.view(time, height // group, width // group, group, group, -1, size, size)
        found.append(stack.permute(0, 5, 1, 3, 6, 2, 4, 7).reshape(time, -1, height * size, width * size))
    return found
