"""Qwen3.5, Qwen3.6, their mixtures of experts: Qwen3-VL's tower without DeepStack, a decoder of two kinds of layers.

Three of four decoder layers are gated delta nets: a short convolution along the sequence, and a state that each token
fades, corrects and reads. They hold no keys and rank no tokens, so the language model merges on entry to layers behind
one with full attention. What they make of a merged sequence is what they make of any shorter one: the compact rows are
aligned on the right, and padding in front of a whole sequence leaves an empty state empty. In layers with attention,
queries share their projection with a gate on what the attention puts out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from types import MappingProxyType
from typing import Any

from torch import Tensor, nn
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionBlock
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionBlock

from illava_hooks.config import MergeConfig, MergeSchedule, Modality
from illava_hooks.engine.decoder import DecoderRun, LayerKind
from illava_hooks.engine.encoder_layers import MergingLayer
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.report import DecoderShape, EncoderShape, RecurrentShape
from illava_hooks.engine.tooling import LmmsEval, PublishedShape
from illava_hooks.patchers._experts import refuse_balancing, refuse_balancing_by_default
from illava_hooks.patchers._packed import MergingBlock, PackedFamily

__all__ = ["FAMILY", "MergingQwen35MoeVisionBlock", "MergingQwen35VisionBlock", "Qwen35"]

# Not yet measured on trained weights: Qwen2-VL's as fractions of depth and of tokens, in towers of 24 to 27 blocks
# (the smallest model's has 12) and decoders of 24 to 40 layers, where every fourth layer pays attention: one merge
# behind the second of those keeps what three at 0.90 do.
_PRESET = MergeSchedule((9, 10, 11, 12), 0.16, (8,), 0.73)
_PRESET_OF_SMALL_TOWER = MergeSchedule((3, 4, 5, 6), 0.16, (8,), 0.73)

_LARGE_TOWER: Mapping[str, Any] = MappingProxyType({"depth": 27, "hidden_size": 1152, "intermediate_size": 4304})
_SMALL_TOWER: Mapping[str, Any] = MappingProxyType(
    {"depth": 12, "hidden_size": 768, "intermediate_size": 3072, "num_heads": 12}
)
_NARROW_TOWER: Mapping[str, Any] = MappingProxyType(
    {"depth": 14, "hidden_size": 64, "intermediate_size": 128, "num_heads": 2}
)
#: Wider decoders come with the large tower.
_WIDEST_WITH_SMALL_TOWER = 1024

#: How many tokens stock's delta rule works on at a time.
_CHUNK = 64


class MergingQwen35VisionBlock(MergingBlock, Qwen3_5VisionBlock):  # type: ignore[no-untyped-call]  # by the base class
    """A vision block that merges between attention and MLP."""


class MergingQwen35MoeVisionBlock(MergingBlock, Qwen3_5MoeVisionBlock):  # type: ignore[no-untyped-call]  # as above
    """The same of the mixture of experts, whose tower has classes of its own."""


# `_no_split_modules` goes by name.
MergingQwen35VisionBlock.__name__ = Qwen3_5VisionBlock.__name__
MergingQwen35MoeVisionBlock.__name__ = Qwen3_5MoeVisionBlock.__name__


class Qwen35(PackedFamily):
    """Qwen3.5's family: groups of 2x2 patches are kept or merged as one."""

    name = "qwen3_5"
    title = "Qwen3.5"
    model_types = ("qwen3_5", "qwen3_5_moe")
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": _PRESET, "video": _PRESET})
    encoder_layer_types = (Qwen3_5VisionBlock, Qwen3_5MoeVisionBlock)
    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
        {Qwen3_5VisionBlock: MergingQwen35VisionBlock, Qwen3_5MoeVisionBlock: MergingQwen35MoeVisionBlock}
    )
    other_tower = "visual has {kind} blocks; use a stock Qwen3.5 model"
    frames_apart = True
    time_tokens = 6  # "<", "0", ".", "3", " seconds", ">", as in Qwen3-VL
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {
            "qwen3.5-0.8b": PublishedShape(1024, 3584, 24, 8, 2, "Qwen/Qwen3.5-0.8B"),
            "qwen3.5-9b": PublishedShape(4096, 12288, 32, 16, 4, "Qwen/Qwen3.5-9B"),
        }
    )
    lmms_eval = LmmsEval("simple.qwen3_5.Qwen3_5", "chat.qwen3_5.Qwen3_5")
    vlmevalkit = ("Qwen3.5-27B", "Qwen3.5-35B-A3B")

    # ------------------------------------------------------------------ what is possible

    def presets_of(self, model: Any) -> Mapping[Modality, MergeSchedule]:
        """Those of the family; in the smallest tower at the same fractions of its depth."""
        found, depth = super().presets_of(model), self.config(model).vision_config.depth
        if found is not self.presets or depth > _SMALL_TOWER["depth"]:
            return found
        return dict.fromkeys(self.modalities, _PRESET_OF_SMALL_TOWER)

    def check(self, model: Any, parts: ModelParts, config: MergeConfig) -> None:
        """Refuses a balancing loss over experts, too."""
        super().check(model, parts, config)
        refuse_balancing_by_default(self.text_config(model), config)

    def layer_kinds(self, text: Any) -> Sequence[LayerKind]:
        """Gated delta nets are recurrent."""
        kinds = text.layer_types[: text.num_hidden_layers]
        return ["recurrent" if kind == "linear_attention" else "attention" for kind in kinds]

    def compact(self, kwargs: dict[str, Any], columns: Tensor, run: DecoderRun) -> None:
        """Nothing else lies along the sequence; what routers saw of it is refused."""
        refuse_balancing(kwargs, run)

    # ------------------------------------------------------------------ sizes

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the vision tower and the patch merger."""
        vision = self.config(model).vision_config
        patches = vision.spatial_merge_size**2
        wide = vision.hidden_size * patches
        projector = 2 * wide * (wide + vision.out_hidden_size)
        return EncoderShape(vision.depth, vision.hidden_size, vision.intermediate_size, patches, projector)

    def decoder_shape(self, model: Any) -> DecoderShape:
        """Sizes of both kinds of layers; of experts those that a token is sent to, the shared one, and the router."""
        text = self.text_config(model)
        depth, width, queries = text.num_hidden_layers, text.hidden_size, text.head_dim * text.num_attention_heads
        shape = DecoderShape(
            depth,
            width,
            getattr(text, "intermediate_size", 0),
            text.head_dim * text.num_key_value_heads,
            queries,
            gate_width=queries,
            recurrent=_delta_nets(text, self.layer_kinds(text)),
        )
        if not getattr(text, "num_experts", None):
            return shape
        routed = text.moe_intermediate_size * text.num_experts_per_tok
        mlp = 6 * width * (routed + text.shared_expert_intermediate_size) + 2 * width * (text.num_experts + 1)
        return replace(shape, mlp_flops=(mlp,) * depth)

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower, and in the decoder both kinds of layers, M-RoPE on a quarter of each head."""
        from transformers import Qwen3_5Config

        small = text["hidden_size"] <= _WIDEST_WITH_SMALL_TOWER
        head, heads, sections = (64, 2, [4, 2, 2]) if narrow else (256, 16, [11, 11, 10])
        rope = {
            "rope_type": "default",
            "rope_theta": 1e7,
            "mrope_section": sections,
            "mrope_interleaved": True,
            "partial_rotary_factor": 0.25,
        }
        delta = {
            "linear_num_key_heads": heads,
            "linear_num_value_heads": heads if small else 2 * heads,
            "linear_key_head_dim": head // 2,
            "linear_value_head_dim": head // 2,
        }
        tower = _NARROW_TOWER if narrow else _SMALL_TOWER if small else _LARGE_TOWER
        return Qwen3_5Config(
            vision_config={**tower, "out_hidden_size": text["hidden_size"]},
            text_config={**text, **delta, "head_dim": head, "rope_parameters": rope},
            image_token_id=placeholders["image"],
            video_token_id=placeholders["video"],
        )


def _delta_nets(text: Any, kinds: Sequence[LayerKind]) -> RecurrentShape:
    """What gated delta nets cost.

    The matrix products of stock's delta rule in chunks: within a chunk keys with keys and queries with keys, and those
    with values; with the state, both kinds of keys and the queries. The two triangular systems of a chunk are left
    out, as torch's counter does: a tenth of that, and less of the layer.
    """
    keys = text.linear_key_head_dim * text.linear_num_key_heads
    values = text.linear_value_head_dim * text.linear_num_value_heads
    mixed, kernel = 2 * keys + values, text.linear_conv_kernel_dim
    projected = mixed + 2 * values + 2 * text.linear_num_value_heads
    pairs = 2 * text.linear_key_head_dim + text.linear_value_head_dim
    state = text.linear_key_head_dim * text.linear_value_head_dim
    per_token = 2 * text.linear_num_value_heads * (_CHUNK * pairs + 3 * state)
    return RecurrentShape(
        layers=frozenset(index for index, kind in enumerate(kinds) if kind == "recurrent"),
        token_flops=2 * text.hidden_size * projected + 2 * mixed * kernel,
        chunk=_CHUNK,
        chunk_flops=_CHUNK * per_token,
        sequence_flops=2 * mixed * kernel * (kernel - 1),
    )


FAMILY = Qwen35()
