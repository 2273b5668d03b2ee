"""Qwen2-VL: a packed row of patches with a 2x2 patch merger, M-RoPE."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock

from illava_hooks.config import MergeSchedule, Modality
from illava_hooks.engine.encoder_layers import MergingLayer
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.tooling import LmmsEval, PublishedShape
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.patchers._packed import MergingBlock, PackedFamily

__all__ = ["FAMILY", "MergingQwen2VLVisionBlock", "Qwen2VL"]

_PRESET = MergeSchedule((12, 13, 14, 15), 0.16, (6, 7, 8), 0.90)
_TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "mlp_ratio": 4, "patch_size": 14}
_NARROW_TOWER = {"depth": 16, "embed_dim": 64, "num_heads": 2}


class MergingQwen2VLVisionBlock(MergingBlock, Qwen2VLVisionBlock):  # type: ignore[no-untyped-call]  # by the base class
    """A vision block that merges between attention and MLP."""


MergingQwen2VLVisionBlock.__name__ = Qwen2VLVisionBlock.__name__  # `_no_split_modules` goes by name


class Qwen2VL(PackedFamily):
    """Qwen2-VL's family: groups of 2x2 patches are kept or merged as one."""

    name = "qwen2_vl"
    title = "Qwen2-VL"
    model_types = ("qwen2_vl",)
    presets = MappingProxyType({"image": _PRESET, "video": _PRESET})
    published_llm_score = "query_lse"
    encoder_layer_types = (Qwen2VLVisionBlock,)
    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
        {Qwen2VLVisionBlock: MergingQwen2VLVisionBlock}
    )
    other_tower = "visual has {kind} blocks; use a stock Qwen2-VL model"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "qwen2-vl-2b": PublishedShape(1536, 8960, 28, 12, 2, "Qwen/Qwen2-VL-2B-Instruct"),
            "qwen2-vl-7b": PublishedShape(3584, 18944, 28, 28, 4, "Qwen/Qwen2-VL-7B-Instruct"),
        }
    )
    lmms_eval: LmmsEval | None = LmmsEval("simple.qwen2_vl.Qwen2_VL")
    vlmevalkit: tuple[str, ...] = ("Qwen2-VL-7B-Instruct", "Qwen2-VL-2B-Instruct")

    def traits(self, patches_per_token: int, published: bool) -> EncoderTraits:
        """As for all packed rows; the published code merges single patches, and ranks by another score."""
        unit = 1 if published else patches_per_token
        return EncoderTraits(unit, granularity=patches_per_token, published_score="query_lse")

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the vision tower and the patch merger."""
        vision = self.config(model).vision_config
        patches = vision.spatial_merge_size**2
        wide = vision.embed_dim * patches
        return EncoderShape(
            vision.depth,
            vision.embed_dim,
            int(vision.embed_dim * vision.mlp_ratio),
            patches,
            2 * wide * (wide + vision.hidden_size),
        )

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower, and M-RoPE in the decoder."""
        from transformers import Qwen2VLConfig

        sections = [4, 6, 6] if narrow else [16, 24, 24]
        rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": sections}
        vision = {**_TOWER, "hidden_size": text["hidden_size"]} | (_NARROW_TOWER if narrow else {})
        return Qwen2VLConfig(
            vision_config=vision,
            text_config={**text, "rope_parameters": rope},
            image_token_id=placeholders["image"],
            video_token_id=placeholders["video"],
        )


FAMILY = Qwen2VL()
