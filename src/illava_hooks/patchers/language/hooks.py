"""The hooks of the language stage, the same for both families.

What belongs to one forward travels in keyword arguments: from the base model to the text model, from there to
each decoder layer, and to the one attention that is scored.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from illava_hooks.methods import find_score
from illava_hooks.patchers.base import Family
from illava_hooks.patchers.language.attention import check_readable
from illava_hooks.patchers.language.masks import LayerPlan, continue_call, prefill_masks, remember_padding
from illava_hooks.patchers.language.placement import place
from illava_hooks.patchers.language.run import DecoderPass, plan_layouts
from illava_hooks.patchers.language.summary import Finish
from illava_hooks.runtime.cache import cache_layer, check_layers, is_merged, physical_lengths
from illava_hooks.runtime.masks import new_validity, unwrap_mask
from illava_hooks.runtime.releases import CACHE, as_given, cache_of, compose_tables
from illava_hooks.runtime.report import DecoderShape, EncoderShape
from illava_hooks.runtime.session import KEY, ForwardState

__all__ = ["DecoderLayerHook", "TextModelHook", "restore_lengths"]


class TextModelHook:
    """Pre-hook of the text model: compacts a prefill with visual tokens, and finds masks for merged caches."""

    def __init__(self, family: Family, shapes: tuple[EncoderShape, DecoderShape]) -> None:
        """Knows its family, and the sizes that the report needs."""
        self.family, self.shapes = family, shapes

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the call alone where nothing is, was or will be merged."""
        forward: ForwardState | None = kwargs.pop(KEY, None)
        if forward is not None and forward.placeholders:
            return args, self._prefill(module, forward, kwargs)
        if is_merged(cache_of(kwargs)):
            return args, continue_call(module, args, kwargs)
        return None

    def _prefill(self, module: Any, forward: ForwardState, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds, config = kwargs["inputs_embeds"], module.config
        batch, width = embeds.shape[:2]
        cache = kwargs[CACHE] = _resolve_cache(module, kwargs)
        check_layers(cache)
        past = physical_lengths(cache, config.num_hidden_layers)
        check_readable(cache, past, forward.session.config.llm_layers)
        logical = past[0] + (getattr(cache.layers[0], "num_merged", 0) if past[0] else 0)
        static = getattr(cache, "is_compileable", False)
        given = unwrap_mask(kwargs.get("attention_mask"))
        real = new_validity(given, logical, width, static)
        if logical and not is_merged(cache):
            remember_padding(cache, given, past)
        positions = _positions(self.family, kwargs.get("position_ids"), logical, embeds)
        checked = _packed_candidates(kwargs.get("position_ids"), real, cache)
        real = embeds.new_ones(batch, width, dtype=torch.bool) if real is None else real.to(embeds.device)
        placed = place(forward, real, checked)
        settings = forward.session.config
        modalities = [record.modality for record in placed.records]
        layouts = plan_layouts(settings, modalities, placed.sample_of, placed.layout)
        score = find_score(settings.method.llm_score, self.family.published_llm_score)
        run = DecoderPass(settings, score, layouts, placed.state)
        compact_embeds = embeds.gather(1, placed.columns[..., None].expand(-1, -1, embeds.shape[-1]))
        kwargs["position_ids"] = positions.gather(-1, placed.columns.expand(*positions.shape[:-1], -1))
        kwargs["inputs_embeds"] = compact_embeds
        masks = prefill_masks(config, run, compact_embeds, cache, past)
        kwargs["attention_mask"] = {"full_attention": masks[0]}
        finish = Finish(forward.session, self.shapes, run, placed, embeds.element_size())
        kwargs[KEY] = LayerPlan(masks, run, cache, tuple(past), width, placed.tail, finish, embeds)
        return kwargs


def _resolve_cache(module: Any, kwargs: dict[str, Any]) -> Any:
    """The cache that stock would use: ``use_cache`` is resolved inside its forward, too late for us."""
    use_cache = kwargs.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    if getattr(module, "gradient_checkpointing", False) and module.training:
        return None
    cache = cache_of(kwargs)
    return DynamicCache(config=module.config) if use_cache and cache is None else cache


def _positions(family: Family, given: Tensor | None, past: int, embeds: Tensor) -> Tensor:
    """``(B, N)`` or ``(3, B, N)`` positions of all logical tokens."""
    batch, width = embeds.shape[:2]
    if given is None:
        given = torch.arange(past, past + width, device=embeds.device)[None]
    positions = family.text_positions(given)
    expanded: Tensor = positions.expand(*positions.shape[:-2], batch, width)
    return expanded.to(embeds.device)


def _packed_candidates(given: Tensor | None, real: Tensor | None, cache: Any) -> Tensor | None:
    """Positions that stock would search for packed sequences: text positions without mask and cache."""
    if given is None or real is not None or cache is not None:
        return None
    if given.dim() == 3:
        return given[0] if given.shape[0] == 4 else None
    return given


class DecoderLayerHook:
    """Pre-hook of every decoder layer: merges on entry, and swaps in what belongs to the layer's segment."""

    def __init__(self, layer_idx: int) -> None:
        """Remembers which layer it sits on."""
        self.layer_idx = layer_idx

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Leaves the call alone when no plan travels with it."""
        plan: LayerPlan | None = kwargs.pop(KEY, None)
        if plan is None:
            return None
        kwargs["attention_mask"] = plan.masks[self.layer_idx]
        run = plan.run
        if run is None:
            return args, kwargs
        ordinal, hidden = run.ordinal(self.layer_idx), args[0]
        if run.states[0].rope is None:
            run.states[0].rope = _tables(kwargs["position_embeddings"], module.self_attn.config, hidden)
        if self.layer_idx in run.layers:
            hidden = run.merge(self.layer_idx, hidden)
        rope = run.states[ordinal].rope or ()
        given = kwargs["position_embeddings"]
        kwargs["position_embeddings"] = tuple(as_given(table.to(hidden.device), given[0]) for table in rope)
        # Gaps in positions look like packed sequences to flash attention.
        kwargs["position_ids"] = None
        if self.layer_idx + 1 in run.layers:
            kwargs[KEY] = plan
        if plan.cache is not None and kwargs.get(CACHE) is not None:
            layout, past = run.layouts[ordinal], plan.past[self.layer_idx]
            layer = cache_layer(plan.cache, self.layer_idx)
            layer.admit(past, layout.width, layout.lengths, plan.logical, layout.valid(hidden.device), plan.tail)
        return (hidden, *args[1:]), kwargs


def _tables(tables: tuple[Tensor, ...], config: Any, hidden: Tensor) -> tuple[Tensor, ...]:
    """RoPE tables with one row per sample."""
    return tuple(table.expand(hidden.shape[0], -1, -1) for table in compose_tables(tables, config))


def restore_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the text model: outputs at the logical length, and the report."""
    plan: LayerPlan | None = kwargs.get(KEY)
    if plan is None or plan.run is None:
        return None
    run = plan.run
    last = len(run.layouts) - 1
    output.last_hidden_state = run.expand(output.last_hidden_state, last)
    if output.hidden_states is not None:
        first, *behind = output.hidden_states
        ordinals = [*map(run.ordinal, range(len(behind) - 1)), last]
        output.hidden_states = (
            None if first is None else plan.embeds,  # gradients reach it, as in stock
            *(
                None if hidden is None else run.expand(hidden, ordinal)
                for hidden, ordinal in zip(behind, ordinals, strict=True)
            ),
        )
    if plan.finish is not None:
        plan.finish()
    return output
