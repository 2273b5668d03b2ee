"""The SigLIP layer that merges."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.siglip.modeling_siglip import SiglipEncoderLayer

from illava_hooks.patchers.vision.hooks import EncoderStep
from illava_hooks.patchers.vision.run import EncoderPass
from illava_hooks.runtime.hooks import capture
from illava_hooks.runtime.session import KEY

__all__ = ["TRAITS", "MergingSiglipEncoderLayer", "SiglipTraits"]


class MergingSiglipEncoderLayer(SiglipEncoderLayer):  # type: ignore[no-untyped-call]  # by the base class
    """A SigLIP layer that merges between attention and MLP, or weighs tokens, when a step travels with the call."""

    def forward(self, hidden_states: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """The stock forward, or the merging one."""
        step = kwargs.pop(KEY, None)
        if step is None:
            out: Tensor = super().forward(hidden_states, attention_mask, **kwargs)
            return out
        forward = self._merging_forward if step.merges else self._weighing_forward
        merged: Tensor = forward(step, hidden_states, attention_mask, **kwargs)
        return merged

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _weighing_forward(self, step: EncoderStep, *args: Any, **kwargs: Any) -> Tensor:
        with step.listen():
            out: Tensor = super().forward(*args, **kwargs)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _merging_forward(
        self, step: EncoderStep, hidden: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> Tensor:
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
