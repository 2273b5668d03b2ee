"""Which keys every decoder layer sees: layers of a stage share a mask, and each stage has one of its own length."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from illava_hooks.engine.cache import (
    Ledger,
    MergedLayer,
    Past,
    cache_layer,
    key_length,
    layer_mask,
    logical_mask,
    read_mask,
)
from illava_hooks.engine.compat import CACHE
from illava_hooks.engine.decoder import DecoderRun, LayerKind
from illava_hooks.errors import PatchStateError

__all__ = ["masks_of_call", "masks_of_prefill"]


def masks_of_prefill(
    kinds: Sequence[LayerKind],
    config: Any,
    run: DecoderRun,
    embeds: Tensor,
    cache: Any,
    past: Past,
    mask: Tensor | None,
) -> tuple[list[Any], list[Tensor | None]]:
    """For each decoder layer its mask, and which of its keys are real; shared where stage and past are the same."""
    made: dict[tuple[Any, ...], tuple[Any, Tensor | None]] = {}
    masks: list[Any] = []
    valid: list[Tensor | None] = []
    for layer_idx, kind in enumerate(kinds):
        merges, held = run.merges_through(layer_idx), past.keys[layer_idx]
        if kind == "recurrent":
            masks.append(_padding(run, merges, past, embeds.device))
            valid.append(None)
            continue
        layer = cache.layers[layer_idx] if cache is not None and layer_idx < len(cache.layers) else None
        key = merges, held, layer.ledger.history if isinstance(layer, MergedLayer) else ()
        if key not in made:
            new = run.counts[merges].valid(embeds.device)
            queries = embeds[:, : run.counts[merges].width]
            keys = _with_past(layer if held == 0 else cache_layer(cache, layer_idx), held, new, mask, queries)
            made[key] = layer_mask(config, queries, layer, held, keys), keys
        masks.append(made[key][0])
        valid.append(made[key][1])
    return masks, valid


def _padding(run: DecoderRun, merges: int, past: Past, device: torch.device) -> Tensor | None:
    """``(B, K)`` bool, which columns a recurrent layer reads; None: all.

    Padding in front of a whole sequence leaves an empty state empty.

    Raises:
        PatchStateError: it would fade a state that is not empty.
    """
    valid = run.counts[merges].valid(device)
    if valid is not None and past.logical:
        raise PatchStateError(
            f"{CACHE} holds tokens, and the rows of this call keep different numbers of new ones, "
            f"{list(run.counts[merges].lengths)}: padding between would fade the state of recurrent layers (linear "
            "attention); give one row at a time, or use merging(model, False)"
        )
    return valid


def _with_past(layer: Any, past: int, new: Tensor | None, mask: Tensor | None, queries: Tensor) -> Tensor | None:
    """``(B, past + K)`` bool, which keys are real: past ones by the call's mask, new ones as planned; None: all."""
    if not past:
        return new
    device, (batch, width) = queries.device, queries.shape[:2]
    before = layer.ledger.validity(past, device) if mask is None else layer.ledger.read(mask.to(device), past)
    if before is None and new is None:
        return None
    before = torch.ones(batch, past, dtype=torch.bool, device=device) if before is None else before
    new = torch.ones(batch, width, dtype=torch.bool, device=device) if new is None else new
    return torch.cat([before, new], 1)


def masks_of_call(
    kinds: Sequence[LayerKind], config: Any, cache: Any, embeds: Tensor, attention_mask: Any, grows: bool
) -> list[Any]:
    """For each decoder layer its mask in a call that merges nothing, on a cache that holds merged tokens.

    Args:
        kinds: of the layers.
        config: the text model's.
        cache: with merged tokens.
        embeds: ``(B, N, C)``, all tokens of the call.
        attention_mask: what a text model accepts.
        grows: whether masks only grow by real tokens once the first is known.
    """
    width = embeds.shape[1]
    logical = cache_layer(cache, kinds.index("attention")).get_seq_length()
    made: dict[Any, tuple[Any, Ledger]] = {}
    masks: list[Any] = []
    layers = cache.layers
    mask: Any = None
    before: tuple[Any, Any, Any] = (None, None, None)
    for layer_idx, kind in enumerate(kinds):
        if kind == "recurrent":
            masks.append(_recurrent_mask(attention_mask, embeds, logical))
            continue
        layer: Any = layers[layer_idx] if layer_idx < len(layers) else None
        kind_of, known, held = before
        # The way of nearly all layers in nearly all steps, which must cost next to nothing: as the layer before.
        if layer.__class__ is kind_of and layer.ledger is known and layer.keys.shape[-2] == held:
            masks.append(mask)
            continue
        layer = cache_layer(cache, layer_idx)
        past, ledger = layer.num_keys(), layer.ledger
        key = ledger.history, ledger.num_merged, None if isinstance(past, Tensor) else past
        if key not in made:
            if not (grows and ledger.knows_mask):
                _read(attention_mask, layer, past, width, grows)
            valid = layer.ledger.validity(key_length(layer, past, width), embeds.device)
            made[key] = layer_mask(config, embeds, layer, past, valid), layer.ledger
        mask, layer.ledger = made[key]
        if _grows_plainly(layer):
            before = type(layer), layer.ledger, past
        masks.append(mask)
    return masks


def _grows_plainly(layer: MergedLayer) -> bool:
    """Whether a layer holds its keys in one tensor of as many columns, and the host knows how many."""
    return type(layer).__mro__[2] is DynamicLayer and layer.is_initialized


def _recurrent_mask(attention_mask: Any, queries: Tensor, past: Any) -> Any:
    """Which of a call's tokens a recurrent layer reads, ``(B, N)``, or None for all.

    Args:
        attention_mask: what a text model accepts. One that is longer than the sequence says nothing by its end; of one
            that is shorter, stock looks at the last columns.
        queries: ``(B, N, C)``, all tokens of the call.
        past: tokens before the call.
    """
    if isinstance(attention_mask, dict):
        return attention_mask["linear_attention"]
    width = queries.shape[1]
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2 or width == 1:
        return None
    end = torch.as_tensor(past + width, device=attention_mask.device).clamp_max(attention_mask.shape[1])
    columns = (end - width + torch.arange(width, device=attention_mask.device)).clamp_min(0)
    return attention_mask[:, columns]


def _read(attention_mask: Any, layer: MergedLayer, past: Any, width: int, inside_generate: bool) -> None:
    """Notes what a mask says of the keys of a layer."""
    mask = logical_mask(attention_mask, prepared=True)
    if mask is not None:
        known = mask.device.type == "cpu" and not torch.compiler.is_compiling()
        read_mask(layer, mask, past, width, may_ask=known or inside_generate)
