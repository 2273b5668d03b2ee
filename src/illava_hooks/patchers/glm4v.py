"""GLM-4.1V, 4.5V and 4.6V: a packed row of patches whose groups a convolution joins, M-RoPE with part of each head.

A convolution with the stride of its kernel sees one 2 x 2 group at a time, so groups go through it as in stock. What
the tower calls its last hidden state lies behind it: a row for each group, not for each patch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.models.glm4v.modeling_glm4v import Glm4vVisionBlock
from transformers.models.glm4v_moe.modeling_glm4v_moe import Glm4vMoeVisionBlock

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.decoder import DecoderRun
from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.engine.encoder_layers import MergingLayer
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.report import DecoderShape, EncoderShape
from illava_hooks.engine.tooling import LmmsEval, PublishedShape, Workload
from illava_hooks.patchers._experts import refuse_balancing, refuse_balancing_by_default
from illava_hooks.patchers._packed import MergingBlock, PackedFamily

__all__ = ["FAMILY", "Glm4V", "MergingGlm4vMoeVisionBlock", "MergingGlm4vVisionBlock"]

# The fractions of depth and of tokens of Qwen2-VL's; not yet measured on trained weights.
_PRESET = MergeSchedule((9, 10, 11, 12), 0.16, (7, 8, 9), 0.90)
_TOWER: dict[str, Any] = {"depth": 24, "hidden_size": 1536, "num_heads": 12, "intermediate_size": 13696}
_NARROW_TOWER: dict[str, Any] = {"depth": 16, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}


class MergingGlm4vVisionBlock(MergingBlock, Glm4vVisionBlock):  # type: ignore[no-untyped-call]  # by the base class
    """A vision block that merges between attention and MLP."""


class MergingGlm4vMoeVisionBlock(MergingBlock, Glm4vMoeVisionBlock):  # type: ignore[no-untyped-call]  # as above
    """The same of the mixture of experts, whose tower has classes of its own."""


# `_no_split_modules` goes by name.
MergingGlm4vVisionBlock.__name__ = Glm4vVisionBlock.__name__
MergingGlm4vMoeVisionBlock.__name__ = Glm4vMoeVisionBlock.__name__


class Glm4V(PackedFamily):
    """GLM-4V's family: groups of 2x2 patches are kept or merged as one."""

    name = "glm4v"
    title = "GLM-4V"
    model_types: tuple[str, ...] = ("glm4v", "glm4v_moe")
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": _PRESET, "video": _PRESET})
    encoder_layer_types: tuple[type[nn.Module], ...] = (Glm4vVisionBlock, Glm4vMoeVisionBlock)
    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
        {Glm4vVisionBlock: MergingGlm4vVisionBlock, Glm4vMoeVisionBlock: MergingGlm4vMoeVisionBlock}
    )
    other_tower = "visual has {kind} blocks; use a stock GLM-4V model"
    frames_apart = True
    time_tokens = 1  # whole seconds
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {"glm-4.1v-9b": PublishedShape(4096, 13696, 40, 32, 2, "zai-org/GLM-4.1V-9B-Thinking")}
    )
    lmms_eval: LmmsEval | None = LmmsEval("simple.glm4v.GLM4V")
    vlmevalkit: tuple[str, ...] = ("GLM4_1VThinking-9b",)

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses a balancing loss over experts, too."""
        super().check(model, parts, config)
        refuse_balancing_by_default(self.text_config(model), config)

    def compact(self, kwargs: dict[str, Any], columns: Tensor, run: DecoderRun) -> None:
        """Nothing else lies along the sequence; what routers saw of it is refused."""
        refuse_balancing(kwargs, run)

    def expand_states(self, run: EncoderRun, out: Any) -> None:
        """Hidden states by patches; the last one, also among the others, by groups."""
        joined = out.last_hidden_state
        if joined is not None:
            out.last_hidden_state = joined[run.final.kept_at[0].to(joined.device)]
        if out.hidden_states is not None:
            out.hidden_states = tuple(
                out.last_hidden_state
                if hidden is joined
                else None
                if hidden is None
                else run.expand(hidden, run.merges_before(index))
                for index, hidden in enumerate(out.hidden_states)
            )

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the tower, whose MLPs are as wide as its output, and of convolution and merger together."""
        vision = self.config(model).vision_config
        patches = vision.spatial_merge_size**2
        wide, context = vision.out_hidden_size, vision.intermediate_size
        joined = 2 * vision.hidden_size * patches * wide + 2 * wide * wide + 6 * wide * context
        return EncoderShape(vision.depth, vision.hidden_size, wide, patches, joined, mlp_matrices=3)

    def decoder_shape(self, model: Any) -> DecoderShape:
        """As of most; of experts those count that a token is sent to, the shared ones, and the router."""
        shape, text = super().decoder_shape(model), self.text_config(model)
        experts = getattr(text, "n_routed_experts", None)
        if not experts:
            return shape
        dense = 6 * text.hidden_size * text.intermediate_size
        chosen = text.num_experts_per_tok + text.n_shared_experts
        sparse = 6 * text.hidden_size * text.moe_intermediate_size * chosen + 2 * text.hidden_size * experts
        kinds = (dense if layer < text.first_k_dense_replace else sparse for layer in range(shape.depth))
        return replace(shape, mlp_flops=tuple(kinds))

    def workload(self, model: Any, load: Workload, generator: torch.Generator) -> dict[str, Tensor] | None:
        """As of all packed rows; frames stand where images do, by the same placeholder."""
        inputs, config = super().workload(model, load, generator), self.config(model)
        if inputs is not None:
            ids = inputs["input_ids"]
            inputs["input_ids"] = ids.masked_fill(ids == config.video_token_id, config.image_token_id)
        return inputs

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower, and M-RoPE on half of each head in the decoder."""
        from transformers import Glm4vConfig

        sections = [4, 2, 2] if narrow else [8, 12, 12]
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, "partial_rotary_factor": 0.5}
        vision = {**_TOWER, "out_hidden_size": text["hidden_size"]} | (_NARROW_TOWER if narrow else {})
        return Glm4vConfig(
            vision_config=vision,
            text_config={**text, "rope_parameters": rope},
            image_token_id=placeholders["image"],
            video_token_id=placeholders["video"],
        )


FAMILY = Glm4V()
