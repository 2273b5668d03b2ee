"""GLM-OCR: GLM-4V's kind of tower and decoder, smaller, with classes of its own and norms of queries and keys."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from types import MappingProxyType
from typing import Any

from torch import nn
from transformers.models.glm_ocr.modeling_glm_ocr import GlmOcrVisionBlock

from illava_hooks.config import MergeSchedule, Modality
from illava_hooks.engine.encoder_layers import MergingLayer, handed_on
from illava_hooks.engine.family import ModelParts
from illava_hooks.engine.report import EncoderShape
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.tooling import PublishedShape
from illava_hooks.engine.transport import current_run
from illava_hooks.patchers._packed import MergingBlock
from illava_hooks.patchers.glm4v import Glm4V

__all__ = ["FAMILY", "GlmOcr", "MergingGlmOcrVisionBlock"]

# The fractions of depth and of tokens of Qwen2-VL's; not yet measured on trained weights.
_PRESET = MergeSchedule((9, 10, 11, 12), 0.16, (3, 4, 5), 0.90)

_TOWER: dict[str, Any] = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096}
_NARROW_TOWER: dict[str, Any] = {"depth": 16, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}


class MergingGlmOcrVisionBlock(MergingBlock, GlmOcrVisionBlock):  # type: ignore[no-untyped-call]  # by the base class
    """A vision block that merges between attention and MLP."""


class RunningBlocks(nn.ModuleList):
    """The tower's blocks, which it calls without its own keyword arguments: they bring the run along.

    Blocks need it among their arguments: what a checkpoint replays has no other memory.
    """

    #: By which copies of a swapped class are found again.
    swapped_in = True

    def __iter__(self) -> Iterator[Any]:
        """The blocks; during a run those that listen to it are called with it."""
        run = current_run()
        for block in super().__iter__():
            yield block if run is None else partial(block, **handed_on(block, run))


MergingGlmOcrVisionBlock.__name__ = GlmOcrVisionBlock.__name__  # `_no_split_modules` goes by name


class GlmOcr(Glm4V):
    """GLM-OCR's family: groups of 2x2 patches are kept or merged as one."""

    name = "glm_ocr"
    title = "GLM-OCR"
    model_types = ("glm_ocr",)
    presets: Mapping[Modality, MergeSchedule] = MappingProxyType({"image": _PRESET, "video": _PRESET})
    encoder_layer_types = (GlmOcrVisionBlock,)
    merging_blocks: Mapping[type[nn.Module], type[MergingLayer]] = MappingProxyType(
        {GlmOcrVisionBlock: MergingGlmOcrVisionBlock}
    )
    other_tower = "visual has {kind} blocks; use a stock GLM-OCR model"
    shapes: Mapping[str, PublishedShape] = MappingProxyType(
        {"glm-ocr": PublishedShape(1536, 4608, 16, 16, 8, "zai-org/GLM-OCR")}
    )
    lmms_eval = None
    vlmevalkit = ()

    def install(self, parts: ModelParts, session: MergeSession) -> None:
        """As of all packed rows, and blocks that are called with the run."""
        super().install(parts, session)
        towers: Sequence[Any] = parts.towers
        for tower in towers:
            session.hooks.swap_class(tower.blocks, RunningBlocks)

    def encoder_shape(self, model: Any) -> EncoderShape:
        """Sizes of the tower, and of convolution and merger together, which is as wide as the channels times more."""
        vision = self.config(model).vision_config
        patches, wide = vision.spatial_merge_size**2, vision.out_hidden_size
        joined = 2 * vision.hidden_size * patches * wide + 2 * wide * wide + 6 * wide * wide * vision.in_channels
        sizes = (vision.depth, vision.hidden_size, vision.intermediate_size)
        return EncoderShape(*sizes, patches, joined, mlp_matrices=3)

    def published_config(self, text: dict[str, Any], placeholders: Mapping[Modality, int], narrow: bool) -> Any:
        """The tower, and heads in the decoder that are wider than its width by their number."""
        from transformers import GlmOcrConfig

        sections, head = ([4, 6, 6], 32) if narrow else ([16, 24, 24], 128)
        rope = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": sections, "partial_rotary_factor": 1.0}
        vision = {**_TOWER, "out_hidden_size": text["hidden_size"]} | (_NARROW_TOWER if narrow else {})
        return GlmOcrConfig(
            vision_config=vision,
            text_config={**text, "head_dim": head, "rope_parameters": rope},
            image_token_id=placeholders["image"],
            video_token_id=placeholders["video"],
        )


FAMILY = GlmOcr()
