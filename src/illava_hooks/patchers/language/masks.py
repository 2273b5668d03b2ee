"""What the decoder layers of one call share: masks for keys of different lengths."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.patchers.language.run import DecoderPass
from illava_hooks.runtime.cache import MergedLayer, cache_layer
from illava_hooks.runtime.masks import causal_mask, new_validity, unwrap_mask
from illava_hooks.runtime.releases import cache_of
from illava_hooks.runtime.session import KEY

__all__ = ["LayerPlan", "continue_call", "prefill_masks", "remember_padding"]


@dataclass(slots=True)
class LayerPlan:
    """What the decoder layers of one call find in their keyword arguments.

    Attributes:
        masks: the mask of each layer.
        run: the prefill that merges, or None in calls that only continue.
        cache: the cache, or None.
        past: physical keys of each layer before this call.
        logical: logical tokens of this call.
        tail: trailing text tokens.
        finish: stores report and provenance.
        embeds: ``(B, N, C)``, what the text model was given: its first hidden state.
    """

    masks: list[Any]
    run: DecoderPass | None = None
    cache: Any = None
    past: tuple[int, ...] = ()
    logical: int = 0
    tail: int = 0
    finish: Callable[[], None] | None = None
    embeds: Tensor | None = None


def remember_padding(cache: Any, attention_mask: Any, past: list[int]) -> None:
    """Notes which keys of a stock cache are padding, before its layers hold merged tokens.

    Args:
        cache: a cache in which nothing was merged yet.
        attention_mask: the call's mask over past and new tokens, 2-D or as ``generate`` prepares it; or None.
        past: keys of each layer.
    """
    if attention_mask is None:
        return
    for layer_idx, length in enumerate(past):
        two_dimensional = attention_mask[:, :length] if attention_mask.dim() == 2 else attention_mask
        valid = new_validity(two_dimensional, 0, length, prepared=True)
        cache_layer(cache, layer_idx).extend_validity(0, valid)


def prefill_masks(config: Any, run: DecoderPass, embeds: Tensor, cache: Any, past: list[int]) -> list[Any]:
    """One mask per decoder layer, shared where segment and past are the same."""
    made: dict[tuple[Any, ...], Any] = {}
    masks = []
    for layer_idx in range(config.num_hidden_layers):
        layout = run.layouts[run.ordinal(layer_idx)]
        layer = cache.layers[layer_idx] if cache is not None and layer_idx < len(cache.layers) else None
        key = (run.ordinal(layer_idx), past[layer_idx], getattr(layer, "history", ()))
        if key not in made:
            queries = embeds[:, : layout.width]
            made[key] = _mask(config, queries, layer, past[layer_idx], layout.valid(embeds.device))
        masks.append(made[key])
    return masks


def _mask(config: Any, queries: Tensor, layer: Any, past: int | Tensor, valid: Tensor | None) -> Any:
    """The mask of new ``queries`` (validity ``valid``, None: all real) behind what a cache layer holds."""
    batch, width = queries.shape[:2]
    static = getattr(layer, "is_compileable", False)
    known = layer.key_valid if isinstance(layer, MergedLayer) else None
    length: Any = layer.max_cache_len if static else past + width
    if valid is None and known is None:
        return causal_mask(config, queries, past, length, None, static)
    keys = queries.new_ones(batch, length, dtype=torch.bool)
    if isinstance(layer, MergedLayer):
        keys = layer.validity(length, batch, queries.device)
    if valid is not None:
        place = torch.arange(width, device=queries.device) + past
        keys = keys.index_copy(1, place, valid.to(keys.device))
    return causal_mask(config, queries, past, length, keys, static)


def continue_call(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call that merges nothing on a cache that holds merged tokens: every layer needs a mask of its own length."""
    cache, config = cache_of(kwargs), module.config
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = module.embed_tokens(kwargs.pop("input_ids", None) if not args else args[0])
        kwargs["inputs_embeds"] = embeds
    width = embeds.shape[1]
    given = unwrap_mask(kwargs.get("attention_mask"))
    new = given[:, -width:].bool() if isinstance(given, Tensor) and given.dim() == 2 and width > 1 else None
    made: dict[Any, Any] = {}
    masks = []
    for layer_idx in range(config.num_hidden_layers):
        layer = cache_layer(cache, layer_idx)
        past: Any = layer.get_seq_length() - layer.num_merged if layer.is_initialized else 0
        key = (layer.history, layer.num_merged, None if isinstance(past, Tensor) else past)
        if key not in made:
            made[key] = _mask(config, embeds, layer, past, new)
        if new is not None:
            layer.extend_validity(past, new)
        masks.append(made[key])
    kwargs["attention_mask"] = {"full_attention": masks[0]}
    kwargs[KEY] = LayerPlan(masks)
    return kwargs
