"""Qwen2-VL: one packed row of patches, 2x2 patch merger, M-RoPE."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock, apply_rotary_pos_emb_vision

from illava_hooks.config import MergeConfig, Modality, ModelLimits
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.merge.rules import nearest_kept
from illava_hooks.merge.spans import scatter_back
from illava_hooks.patchers import encoder
from illava_hooks.patchers.base import ModelParts
from illava_hooks.patchers.encoder import EncoderPass
from illava_hooks.patchers.tracking import token_sources, vision_tracks
from illava_hooks.runtime.hooks import capture
from illava_hooks.runtime.provenance import sparse
from illava_hooks.runtime.report import DecoderShape, EncoderShape
from illava_hooks.runtime.session import KEY, MergeSession, VisualRecord

__all__ = ["FAMILY"]


class MergingQwen2VLVisionBlock(Qwen2VLVisionBlock):
    """A vision block that merges between attention and MLP when a step travels with the call."""

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward, or the merging one."""
        step = kwargs.pop(KEY, None)
        if step is None:
            out: Tensor = super().forward(hidden_states, *args, **kwargs)
            return out
        return self._merging_forward(step, hidden_states, *args, **kwargs)

    @torch.compiler.disable
    def _merging_forward(self, step: encoder.EncoderStep, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        attention = self.attn
        step.watch(attention.qkv)
        with capture(attention.qkv) as take:
            hidden = hidden + attention(self.norm1(hidden), *args, **kwargs)
            projected = take(attention.qkv)
        query, key, _ = projected.view(len(hidden), 3, attention.num_heads, -1).unbind(1)
        query, key = apply_rotary_pos_emb_vision(query, key, *kwargs["position_embeddings"])
        hidden = step.merge(hidden, query, key, attention.scaling)
        return hidden + self.mlp(self.norm2(hidden))


MergingQwen2VLVisionBlock.__name__ = Qwen2VLVisionBlock.__name__  # `_no_split_modules` goes by name


class PackedTraits:
    """One row of patches, cut into images and temporal slices by ``cu_seqlens``."""

    published_score = "query_lse"

    def __init__(self, unit: int, multiple: int) -> None:
        """``unit`` patches stay together; counts are multiples of ``multiple`` patches."""
        self.unit, self.multiple = unit, multiple

    def shrink(self, kwargs: dict[str, Any], run: EncoderPass, ordinal: int) -> dict[str, Any]:
        """RoPE tables and segment borders of the survivors."""
        tables = kwargs["position_embeddings"]
        seats = run.patch_seats(ordinal)[0].to(tables[0].device)
        lengths = [units * self.unit for units in run.segments[ordinal].lengths]
        borders = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return {
            **kwargs,
            "position_embeddings": tuple(table[seats] for table in tables),
            "cu_seqlens": borders.to(tables[0].device, non_blocking=True),
            "max_seqlen": max(lengths),
        }


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
        with encoder.running(run):
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
        encoder.expand_output(run, output)
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


class Qwen2VL:
    """The family."""

    name = "qwen2_vl"
    published_llm_score = "query_lse"

    def locate(self, model: Any) -> ModelParts:
        """Finds the parts of the model."""
        base = model.model if hasattr(model, "lm_head") else model
        return ModelParts(
            top=model if base is not model else None,
            base=base,
            encoder_layers=base.visual.blocks,
            text_model=base.language_model,
            decoder_layers=base.language_model.layers,
        )

    def limits(self, model: Any) -> ModelLimits:
        """Depths; images have no fixed number of tokens."""
        return ModelLimits(
            self.name, model.config.vision_config.depth, model.config.text_config.num_hidden_layers, None
        )

    def check(self, model: Any, config: MergeConfig) -> None:
        """Refuses towers with other blocks."""
        block = self.locate(model).encoder_layers[0]
        if not isinstance(block, Qwen2VLVisionBlock):
            raise UnsupportedModelError(f"visual has {type(block).__name__} blocks; use a stock Qwen2-VL model")

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """Swaps merging blocks' classes, wraps the feature methods, hooks the tower."""
        for layer in session.config.vit_layers:
            session.hooks.swap_class(parts.encoder_layers[layer], MergingQwen2VLVisionBlock)
        base: Any = parts.base
        methods = FeatureMethods(base, session)
        session.hooks.wrap(base, "get_image_features", methods.image_features)
        session.hooks.wrap(base, "get_video_features", methods.video_features)
        session.hooks.after(base.visual, ExpandTower())

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the vision tower and the patch merger."""
        vision = model.config.vision_config
        size = vision.spatial_merge_size**2
        wide = vision.embed_dim * size
        return EncoderShape(
            vision.depth,
            vision.embed_dim,
            int(vision.embed_dim * vision.mlp_ratio),
            size,
            2 * wide * (wide + vision.hidden_size),
        )

    def decoder_shape(self, model: Any) -> DecoderShape:
        """Sizes of the Qwen2-VL decoder."""
        text = model.config.text_config
        head = text.hidden_size // text.num_attention_heads
        return DecoderShape(
            text.num_hidden_layers, text.hidden_size, text.intermediate_size, head * text.num_key_value_heads
        )

    def text_positions(self, position_ids: Tensor) -> Tensor:
        """``(3, B, N)``: the fourth row in front, if any, only tells packed sequences apart."""
        return position_ids[1:] if position_ids.dim() == 3 and position_ids.shape[0] == 4 else position_ids


FAMILY = Qwen2VL()
