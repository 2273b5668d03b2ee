"""The vision block that merges, and what belongs to a packed row of patches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2_vl.modeling_qwen2_vl import Qwen2VLVisionBlock, apply_rotary_pos_emb_vision

from illava_hooks.patchers.vision.hooks import EncoderStep
from illava_hooks.patchers.vision.layer import SteppedLayer
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.runtime.hooks import capture

__all__ = ["MergingQwen2VLVisionBlock", "PackedTraits"]


class MergingQwen2VLVisionBlock(SteppedLayer, Qwen2VLVisionBlock):  # type: ignore[no-untyped-call]  # by the base class
    """A vision block that merges between attention and MLP, or weighs tokens, when a step travels with the call."""

    def merging_forward(self, step: EncoderStep, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Merges in between."""
        hidden = self._attend_and_merge(step, hidden, *args, **kwargs)
        out: Tensor = hidden + self.mlp(self.norm2(hidden))
        return out

    def _attend_and_merge(self, step: EncoderStep, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Ends with the projections out of sight: the MLP is where memory peaks."""
        attention = self.attn
        step.watch(attention.qkv)
        with capture(attention.qkv) as take, step.listen() as heard:
            hidden = hidden + attention(self.norm1(hidden), *args, **kwargs)
            projected = take(attention.qkv)

        def heads() -> tuple[Tensor, Tensor]:
            query, key, _ = projected.view(len(projected), 3, attention.num_heads, -1).unbind(1)
            rotated: tuple[Tensor, Tensor] = apply_rotary_pos_emb_vision(query, key, *kwargs["position_embeddings"])
            return rotated

        return step.merge(hidden, heads, attention.scaling, heard)


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
