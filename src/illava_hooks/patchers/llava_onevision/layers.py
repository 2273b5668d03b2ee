"""The SigLIP layer that merges."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.patchers.vision.hooks import EncoderStep
from illava_hooks.patchers.vision.layer import SteppedLayer
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.runtime.hooks import capture

__all__ = ["TRAITS", "MergingSiglipEncoderLayer", "SiglipTraits"]


class MergingSiglipEncoderLayer(SteppedLayer, SiglipEncoderLayer):  # type: ignore[no-untyped-call]  # by the base class
    """A SigLIP layer that merges between attention and MLP, or weighs tokens, when a step travels with the call."""

    def merging_forward(
        self, step: EncoderStep, hidden: Tensor, attention_mask: Tensor | None = None, **kwargs: Any
    ) -> Tensor:
        """Merges in between."""
        hidden = self._attend_and_merge(step, hidden, attention_mask, **kwargs)
        out: Tensor = hidden + self.mlp(self.layer_norm2(hidden))
        return out

    def _attend_and_merge(
        self, step: EncoderStep, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
        """Ends with the projections out of sight: the MLP is where memory peaks."""
        attention = self.self_attn
        step.watch(attention.q_proj, attention.k_proj)
        with capture(attention.q_proj, attention.k_proj) as take, step.listen() as heard:
            mixed, _ = attention(hidden_states=self.layer_norm1(hidden), attention_mask=attention_mask, **kwargs)
            query, key = take(attention.q_proj), take(attention.k_proj)
        heads = (-1, attention.num_heads, attention.head_dim)
        return step.merge(hidden + mixed, lambda: (query.reshape(heads), key.reshape(heads)), attention.scale, heard)


MergingSiglipEncoderLayer.__name__ = SiglipEncoderLayer.__name__  # `_no_split_modules` goes by name


class SiglipTraits:
    """Tiles of single patches; nothing but hidden states belongs to a token."""

    unit = 1
    multiple = 1
    published_score = "received_attention"

    def shrink(self, kwargs: dict[str, Any], run: EncoderPass, ordinal: int) -> dict[str, Any]:
        """Nothing to cut."""
        return kwargs


TRAITS = SiglipTraits()
