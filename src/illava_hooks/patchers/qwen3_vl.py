"""Qwen3-VL and its mixture of experts: a packed row of patches, DeepStack, frames with timestamps between.

DeepStack: blocks in the middle of the tower give features of their own, which the decoder adds to the visual tokens
behind its first layers. They belong to tokens, so they follow every merge of theirs: features of an earlier block go
through the later merges of the encoder, and what is added behind a decoder layer went through the merges up to there.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionBlock
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionBlock

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.decoder import DecoderRun
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.report import DecoderShape, EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import LmmsEval, PublishedShape
from illava_hooks.merge.plan import MergePlan, apply_merge
from illava_hooks.patchers._experts import refuse_balancing, refuse_balancing_by_default
from illava_hooks.patchers._packed import MergingBlock, PackedFamily

__all__ = ["FAMILY", "MergingQwen3VLMoeVisionBlock", "MergingQwen3VLVisionBlock", "Qwen3VL"]

# Not yet measured on trained weights: the depths of Qwen2-VL's, as fractions of towers of 24 to 27 blocks and decoders
# of 28 to 48 layers, behind the last layer that DeepStack adds to.
_PRESET = MergeSchedule((9, 10, 11, 12), 0.16, (7, 8, 9), 0.90)

_LARGE_TOWER: Mapping[str, Any] = MappingProxyType(
    {"depth": 27, "hidden_size": 1152, "intermediate_size": 4304, "deepstack_visual_indexes": [8, 16, 24]}
)
_SMALL_TOWER: Mapping[str, Any] = MappingProxyType(
    {"depth": 24, "hidden_size": 1024, "intermediate_size": 4096, "deepstack_visual_indexes": [5, 11, 17]}
)
_NARROW_TOWER: Mapping[str, Any] = MappingProxyType(
    {
        "depth": 14,
        "hidden_size": 64,
        "intermediate_size": 128,
        "deepstack_visual_indexes": [3, 6, 9],
        "num_heads": 2,
    }
)
#: Wider decoders, and those with experts, come with the large tower.
_WIDEST_WITH_SMALL_TOWER = 2560


class MergingQwen3VLVisionBlock(MergingBlock, Qwen3VLVisionBlock):  # type: ignore[no-untyped-call]  # by the base class
    """A vision block that merges between attention and MLP."""


class MergingQwen3VLMoeVisionBlock(MergingBlock, Qwen3VLMoeVisionBlock):  # type: ignore[no-untyped-call]  # as above
    """The same of the mixture of experts, whose tower has classes of its own."""


# `_no_split_modules` goes by name.
MergingQwen3VLVisionBlock.__name__ = Qwen3VLVisionBlock.__name__
MergingQwen3VLMoeVisionBlock.__name__ = Qwen3VLMoeVisionBlock.__name__


class StackedFeatures:
    """Stands in for the features that stock adds to the visual tokens behind one decoder layer.

    Which merges they must follow is known once that layer has run. No dataclass: FSDP copies those wherever it finds
    them in keyword arguments.
    """

    def __init__(self, run: DecoderRun, layer_idx: int, features: Tensor, rows: Tensor) -> None:
        """Waits for its layer.

        Args:
            run: the prefill.
            layer_idx: the decoder layer behind which they are added.
            features: ``(n, C)``, one row per visual token of the logical sequence, in its order.
            rows: ``(B, K)`` int64, the row of each column in front of the first merge; -1 for text and padding.
        """
        self.run, self.layer_idx, self.features, self.rows = run, layer_idx, features, rows

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # plans are no business of a graph
    def added_to(self, hidden: Tensor) -> Tensor:
        """``hidden`` ``(B, K, C)`` of the layer's stage with the features of its columns."""
        features, rows = self.features.to(hidden.device, hidden.dtype), self.rows.to(hidden.device)
        table = torch.where(rows[..., None] >= 0, features[rows.clamp_min(0)], 0)
        plans = self.run.plans[: self.run.merges_through(self.layer_idx)]
        return hidden + _through(table, plans).to(hidden.device)


def add_features(method: Callable[..., Tensor], hidden: Tensor, mask: Tensor, features: Any) -> Tensor:
    """Around ``_deepstack_process``: on the compact sequence a mask of the logical one says nothing."""
    stacked = isinstance(features, StackedFeatures)
    added: Tensor = features.added_to(hidden) if stacked else method(hidden, mask, features)
    return added


class Qwen3VL(PackedFamily):
    """Qwen3-VL's family: groups of 2x2 patches are kept or merged as one."""

    name = "qwen3_vl"
    title = "Qwen3-VL"
    model_types = ("qwen3_vl", "qwen3_vl_moe")
    presets = MappingProxyType({"image": _PRESET, "video": _PRESET})
    encoder_layer_types = (Qwen3VLVisionBlock, Qwen3VLMoeVisionBlock)
    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
        {
            Qwen3VLVisionBlock: MergingQwen3VLVisionBlock,
            Qwen3VLMoeVisionBlock: MergingQwen3VLMoeVisionBlock,
        }
    )
    other_tower = "visual has {kind} blocks; use a stock Qwen3-VL model"
    frames_apart = True
    time_tokens = 6  # "<0.3 seconds>"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "qwen3-vl-2b": PublishedShape(2048, 6144, 28, 16, 8, "Qwen/Qwen3-VL-2B-Instruct"),
            "qwen3-vl-4b": PublishedShape(2560, 9728, 36, 32, 8, "Qwen/Qwen3-VL-4B-Instruct"),
            "qwen3-vl-8b": PublishedShape(4096, 12288, 36, 32, 8, "Qwen/Qwen3-VL-8B-Instruct"),
            "qwen3-vl-30b-a3b": PublishedShape(
                2048, 6144, 48, 32, 4, "Qwen/Qwen3-VL-30B-A3B-Instruct", experts=128, chosen=8, expert_mlp=768
            ),
        }
    )
    lmms_eval = LmmsEval("simple.qwen3_vl.Qwen3_VL", "chat.qwen3_vl.Qwen3_VL")
    vlmevalkit = ("Qwen3-VL-8B-Instruct", "Qwen3-VL-4B-Instruct", "Qwen3-VL-2B-Instruct", "Qwen3-VL-30B-A3B-Instruct")

    # ------------------------------------------------------------------ what is possible

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses a balancing loss over experts, too."""
        super().check(model, parts, config)
        refuse_balancing_by_default(self.text_config(model), config)

    # ------------------------------------------------------------------ DeepStack

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """As for all packed rows, and what adds DeepStack features in the decoder."""
        super().install(parts, session)
        for text in parts.text_models:
            session.hooks.wrap(text, "_deepstack_process", add_features)

    def expand_beside(self, tower: Any, run: EncoderRun, out: Any) -> None:
        """DeepStack features: one row per group, from the survivors of their block to those of the last merge."""
        expanded = []
        for layer_idx, features in zip(_stacked(tower, len(tower.blocks)), out.deepstack_features, strict=True):
            survivors = _through(features[None], run.plans[run.merges_before(layer_idx + 1) :])[0]
            expanded.append(survivors.to(features.device)[run.final.kept_at[0].to(features.device)])
        out.deepstack_features = expanded

    def compact(self, kwargs: dict[str, Any], columns: Tensor, run: DecoderRun) -> None:
        """DeepStack features of the compact columns, each of which follows the merges in front of its layer.

        Raises:
            PatchStateError: the call asks for what its routers saw.
        """
        refuse_balancing(kwargs, run)
        mask, given = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
        if mask is None or given is None:
            return
        number = (mask.flatten().cumsum(0) - 1).view_as(mask).to(columns.device).gather(1, columns)
        rows = number.masked_fill(run.states[0].visual < 0, -1)
        kwargs["deepstack_visual_embeds"] = [
            StackedFeatures(run, layer_idx, features, rows) for layer_idx, features in enumerate(given)
        ]

    # ------------------------------------------------------------------ sizes

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the vision tower and the patch merger, which runs again for each DeepStack block."""
        vision = self.config(model).vision_config
        patches = vision.spatial_merge_size**2
        wide = vision.hidden_size * patches
        return EncoderShape(
            vision.depth,
            vision.hidden_size,
            vision.intermediate_size,
            patches,
            2 * wide * (wide + vision.out_hidden_size),
            projected_behind=_stacked(vision, vision.depth),
        )

    def decoder_shape(self, model: Any) -> DecoderShape:
        """As of most; of experts those count that a token is sent to, and the router."""
        shape, text = super().decoder_shape(model), self.text_config(model)
        experts = getattr(text, "num_experts", None)
        if not experts:
            return shape
        dense = 6 * text.hidden_size * text.intermediate_size
        sparse = 6 * text.hidden_size * text.moe_intermediate_size * text.num_experts_per_tok
        sparse += 2 * text.hidden_size * experts
        return replace(shape, mlp_flops=tuple(sparse if _routes(text, i) else dense for i in range(shape.depth)))

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower, heads of their own width, and interleaved M-RoPE in the decoder, with experts or without."""
        from transformers import Qwen3VLConfig, Qwen3VLMoeConfig

        head, sections = (32, [8, 4, 4]) if narrow else (128, [24, 20, 20])
        rope = {"rope_type": "default", "rope_theta": 5e6, "mrope_section": sections, "mrope_interleaved": True}
        sparse = "num_experts" in text
        small = text["hidden_size"] <= _WIDEST_WITH_SMALL_TOWER and not sparse
        tower = _SMALL_TOWER if small else _LARGE_TOWER
        vision = {**tower, **(_NARROW_TOWER if narrow else {}), "out_hidden_size": text["hidden_size"]}
        return (Qwen3VLMoeConfig if sparse else Qwen3VLConfig)(
            vision_config=vision,
            text_config={**text, "head_dim": head, "rope_parameters": rope},
            image_token_id=placeholders["image"],
            video_token_id=placeholders["video"],
        )


def _through(tokens: Tensor, plans: Sequence[MergePlan]) -> Tensor:
    """``(B, N, C)`` merged by some plans one after the other, each of which may lie on another device."""
    for plan in plans:
        tokens = apply_merge(tokens.to(plan.keep_indices.device), plan)
    return tokens


def _stacked(vision: Any, depth: int) -> tuple[int, ...]:
    """Blocks that give DeepStack features, in the order in which they run."""
    return tuple(layer_idx for layer_idx in range(depth) if layer_idx in vision.deepstack_visual_indexes)


def _routes(text: Any, layer_idx: int) -> bool:
    """Whether a decoder layer sends its tokens to experts."""
    return layer_idx not in text.mlp_only_layers and (layer_idx + 1) % text.decoder_sparse_step == 0


FAMILY = Qwen3VL()
