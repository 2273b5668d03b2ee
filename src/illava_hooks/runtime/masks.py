"""Causal masks for layers whose keys are fewer than the logical length, by transformers' own functions."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from illava_hooks.errors import PatchStateError
from illava_hooks.runtime.releases import CACHE

__all__ = ["causal_mask", "new_validity", "unwrap_mask"]


@dataclass(frozen=True, slots=True)
class _PhysicalCache:
    """Answers the mask functions' questions about a cache with physical lengths.

    A real cache reports its logical length as query offset, which would let queries see the future.
    """

    past_length: int | Tensor
    key_length: int
    is_compileable: bool

    def get_query_offset(self, layer_idx: int = 0) -> int | Tensor:
        return self.past_length

    def get_seq_length(self, layer_idx: int = 0) -> int | Tensor:
        return self.past_length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.key_length, 0


def causal_mask(
    config: Any,
    embeds: Tensor,
    past_length: int | Tensor,
    key_length: int,
    key_valid: Tensor | None,
    compileable: bool = False,
) -> Any:
    """The mask of one segment for the model's attention back-end.

    Args:
        config: the text model's config.
        embeds: ``(B, N, C)`` queries; read for batch size, length, dtype and device.
        past_length: keys before the queries, physical.
        key_length: keys in all, physical (the buffer's length for a static cache).
        key_valid: ``(B, key_length)`` bool, or None where the host knows that nothing is padded.
        compileable: whether the cache is static.
    """
    cache: dict[str, Any] = {CACHE: _PhysicalCache(past_length, key_length, compileable)}
    return create_causal_mask(
        config=config,
        inputs_embeds=embeds,
        attention_mask=key_valid,
        position_ids=None,
        # With a mask the skip would look at its values, which synchronises with the host.
        allow_is_causal_skip=key_valid is None,
        **cache,
    )


def unwrap_mask(attention_mask: Any) -> Any:
    """The full-attention entry of what a text model accepts as mask.

    Raises:
        PatchStateError: a sliding-window mask is asked for.
    """
    if not isinstance(attention_mask, dict):
        return attention_mask
    if set(attention_mask) != {"full_attention"}:
        raise PatchStateError(
            f"attention_mask has the entries {sorted(attention_mask)}; merging supports full attention only; "
            "use merging(model, False) for this call"
        )
    return attention_mask["full_attention"]


def new_validity(attention_mask: Any, past_length: int, num_new: int, prepared: bool) -> Tensor | None:
    """Which of the new tokens are real: ``(B, num_new)`` bool, or None for all.

    Args:
        attention_mask: None, 2-D padding mask, or 4-D mask as ``generate`` prepares it for static caches.
        past_length: logical length of the cache before this call.
        num_new: number of new tokens.
        prepared: whether a 4-D mask was made by ``generate`` (causal, plus padding) rather than by the user.

    Raises:
        PatchStateError: a mask from which padding cannot be told.
    """
    if attention_mask is None:
        return None
    if isinstance(attention_mask, Tensor) and attention_mask.dim() == 2:
        return attention_mask[:, -num_new:].bool()
    if prepared and isinstance(attention_mask, Tensor) and attention_mask.dim() == 4:
        last = attention_mask[:, 0, -1, past_length : past_length + num_new]
        return last if last.dtype == torch.bool else last == 0
    shape = getattr(attention_mask, "shape", None)
    raise PatchStateError(
        f"attention_mask is a {type(attention_mask).__name__} of shape {tuple(shape) if shape else None}; merging "
        "needs a 2-D padding mask (batch, length) or none; use merging(model, False) for this call"
    )
