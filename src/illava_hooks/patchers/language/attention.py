"""Scoring in the attention before a merging layer, without an attention map."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from illava_hooks.errors import PatchStateError
from illava_hooks.merge.scoring import ScoreInputs
from illava_hooks.patchers.language.masks import LayerPlan
from illava_hooks.patchers.language.run import DecoderPass
from illava_hooks.runtime.releases import CACHE
from illava_hooks.runtime.session import KEY

__all__ = ["AttentionHook", "check_readable"]


class AttentionHook:
    """Pre-hook of the attention before a merging layer: scores its tokens."""

    def __init__(self, layer_idx: int) -> None:
        """Remembers which layer it sits on."""
        self.layer_idx = layer_idx

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the call alone when no plan travels with it."""
        plan: LayerPlan | None = kwargs.pop(KEY, None)
        if plan is None or plan.run is None:
            return None
        with torch.no_grad():
            self._score(module, plan, plan.run, kwargs)
        return args, kwargs

    def _score(self, module: Any, plan: LayerPlan, run: DecoderPass, kwargs: dict[str, Any]) -> None:
        hidden, state = kwargs["hidden_states"].detach(), run.states[run.ordinal(self.layer_idx)]
        cos, sin = (table.to(hidden.device) for table in state.rope or ())
        shape = (*hidden.shape[:2], -1, module.head_dim)
        new_key = module.k_proj(hidden).view(shape).transpose(1, 2)
        new_key, _ = apply_rotary_pos_emb(new_key, new_key, cos, sin)
        key, valid = self._with_past(plan, run, new_key)

        def query() -> Tensor:
            table = module.q_proj(hidden).view(shape).transpose(1, 2)
            rotated: Tensor = apply_rotary_pos_emb(table, table, cos, sin)[0]
            return rotated

        def last_query() -> Tensor:
            row = torch.arange(len(hidden), device=hidden.device)
            at = state.query.to(hidden.device)
            table = module.q_proj(hidden[row, at]).view(len(hidden), 1, -1, module.head_dim).transpose(1, 2)
            rotated: Tensor = apply_rotary_pos_emb(table, table, cos[row, at][:, None], sin[row, at][:, None])[0]
            return rotated[:, :, 0]

        seats = state.seats.to(hidden.device)
        merging = self.layer_idx + 1
        inputs = ScoreInputs(
            key,
            query,
            last_query,
            seats,
            valid,
            module.scaling,
            merging,
            causal=True,
            last_place=state.query.to(hidden.device),
        )
        run.rank(merging, inputs, new_key.transpose(1, 2).flatten(2).flatten(0, 1))

    def _with_past(self, plan: LayerPlan, run: DecoderPass, new_key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys of the cache in front of the new ones, and which of them are real."""
        valid = run.layouts[run.ordinal(self.layer_idx)].valid(new_key.device)
        past = plan.past[self.layer_idx] if plan.past else 0
        if not past:
            return new_key, valid
        layer = plan.cache.layers[self.layer_idx]
        key = torch.cat([layer.keys[..., :past, :].to(new_key.device), new_key], dim=2)
        if valid is None and layer.key_valid is None:
            return key, None
        return key, layer.validity(key.shape[2], len(key), key.device)


def check_readable(cache: Any, past: Sequence[int], merging: Iterable[int]) -> None:
    """Raises ``PatchStateError`` where the layer before a ``merging`` one has no tensor of ``past`` keys to score."""
    for scored in (layer_idx - 1 for layer_idx in merging):
        if past[scored] and cache.layers[scored].keys.shape[-2:-1] < (past[scored],):  # quantized layers: often 1-D
            raise PatchStateError(
                f"{CACHE} holds a {type(cache.layers[scored]).__name__}, whose keys cannot be read; use DynamicCache "
                "or StaticCache for turns that bring new images, or merging(model, False) for this call"
            )
