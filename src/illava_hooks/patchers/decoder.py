"""The hooks of the language stage, the same for both families.

What belongs to one forward travels in keyword arguments: from the base model to the text model, from there to
each decoder layer, and to the one attention that is scored.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb

from illava_hooks.errors import PatchStateError
from illava_hooks.merge.scoring import ScoreInputs
from illava_hooks.methods import find_score
from illava_hooks.patchers.base import Family
from illava_hooks.patchers.decoder_pass import DecoderPass, plan_layouts
from illava_hooks.patchers.placement import place
from illava_hooks.patchers.summary import Finish
from illava_hooks.runtime.cache import MergedLayer, cache_layer, is_merged, physical_lengths
from illava_hooks.runtime.masks import causal_mask, new_validity, unwrap_mask
from illava_hooks.runtime.report import DecoderShape, EncoderShape
from illava_hooks.runtime.session import KEY, ForwardState

__all__ = ["AttentionHook", "DecoderLayerHook", "TextModelHook", "restore_lengths"]


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
    """

    masks: list[Any]
    run: DecoderPass | None = None
    cache: Any = None
    past: tuple[int, ...] = ()
    logical: int = 0
    tail: int = 0
    finish: Callable[[], None] | None = None


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
        if is_merged(kwargs.get("past_key_values")):
            return args, _continue(module, args, kwargs)
        return None

    def _prefill(self, module: Any, forward: ForwardState, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds, config = kwargs["inputs_embeds"], module.config
        batch, width = embeds.shape[:2]
        cache = kwargs["past_key_values"] = _resolve_cache(module, kwargs)
        past = physical_lengths(cache, config.num_hidden_layers)
        logical = past[0] + (getattr(cache.layers[0], "num_merged", 0) if past[0] else 0)
        static = getattr(cache, "is_compileable", False)
        real = new_validity(unwrap_mask(kwargs.get("attention_mask")), logical, width, static)
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
        masks = _prefill_masks(config, run, compact_embeds, cache, past)
        kwargs["attention_mask"] = {"full_attention": masks[0]}
        finish = Finish(forward.session, self.shapes, run, placed, embeds.element_size())
        kwargs[KEY] = LayerPlan(masks, run, cache, tuple(past), width, placed.tail, finish)
        return kwargs


def _resolve_cache(module: Any, kwargs: dict[str, Any]) -> Any:
    """The cache that stock would use: ``use_cache`` is resolved inside its forward, too late for us."""
    use_cache = kwargs.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    if getattr(module, "gradient_checkpointing", False) and module.training:
        return None
    cache = kwargs.get("past_key_values")
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


def _prefill_masks(config: Any, run: DecoderPass, embeds: Tensor, cache: Any, past: list[int]) -> list[Any]:
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
    length = layer.max_cache_len if static else past + width
    if valid is None and known is None:
        return causal_mask(config, queries, past, length, None, static)
    keys = queries.new_ones(batch, length, dtype=torch.bool)
    if isinstance(layer, MergedLayer):
        keys = layer.validity(length, batch, queries.device)
    if valid is not None:
        place = torch.arange(width, device=queries.device) + past
        keys = keys.index_copy(1, place, valid.to(keys.device))
    return causal_mask(config, queries, past, length, keys, static)


def _continue(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """A call that merges nothing on a cache that holds merged tokens: every layer needs a mask of its own length."""
    cache, config = kwargs["past_key_values"], module.config
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
            run.states[0].rope = _tables(kwargs["position_embeddings"], hidden)
        if self.layer_idx in run.layers:
            hidden = run.merge(self.layer_idx, hidden)
        rope = run.states[ordinal].rope
        kwargs["position_embeddings"] = tuple(table.to(hidden.device) for table in rope)
        # Gaps in positions look like packed sequences to flash attention.
        kwargs["position_ids"] = None
        if self.layer_idx + 1 in run.layers:
            kwargs[KEY] = plan
        if plan.cache is not None and kwargs.get("past_key_values") is not None:
            layout, past = run.layouts[ordinal], plan.past[self.layer_idx]
            layer = cache_layer(plan.cache, self.layer_idx)
            layer.admit(past, layout.width, layout.lengths, plan.logical, layout.valid(hidden.device), plan.tail)
        return (hidden, *args[1:]), kwargs


def _tables(tables: tuple[Tensor, ...], hidden: Tensor) -> tuple[Tensor, ...]:
    """RoPE tables with one row per sample."""
    return tuple(table.expand(hidden.shape[0], -1, -1) for table in tables)


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
        hidden, (cos, sin) = kwargs["hidden_states"].detach(), kwargs["position_embeddings"]
        state = run.states[run.ordinal(self.layer_idx)]
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
        inputs = ScoreInputs(key, query, last_query, seats, valid, module.scaling, merging, causal=True)
        run.rank(merging, inputs, new_key.transpose(1, 2).flatten(2).flatten(0, 1))

    def _with_past(self, plan: LayerPlan, run: DecoderPass, new_key: Tensor) -> tuple[Tensor, Tensor | None]:
        """Keys of the cache in front of the new ones, and which of them are real."""
        valid = run.layouts[run.ordinal(self.layer_idx)].valid(new_key.device)
        past = plan.past[self.layer_idx] if plan.past else 0
        if not past:
            return new_key, valid
        layer = plan.cache.layers[self.layer_idx]
        if not isinstance(layer.keys, Tensor) or layer.keys.shape[-2] < past:
            raise PatchStateError(
                f"past_key_values holds a {type(layer).__name__}, whose keys cannot be read; use DynamicCache or "
                "StaticCache for turns that bring new images"
            )
        key = torch.cat([layer.keys[..., :past, :].to(new_key.device), new_key], dim=2)
        if valid is None and layer.key_valid is None:
            return key, None
        return key, layer.validity(key.shape[2], len(key), key.device)


def restore_lengths(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """Forward hook of the text model: outputs at the logical length, and the report."""
    plan: LayerPlan | None = kwargs.get(KEY)
    if plan is None or plan.run is None:
        return None
    run = plan.run
    last = len(run.layouts) - 1
    output.last_hidden_state = run.expand(output.last_hidden_state, last)
    if output.hidden_states is not None:
        depth = len(output.hidden_states) - 1
        output.hidden_states = tuple(
            None if hidden is None else run.expand(hidden, last if index == depth else run.ordinal(max(0, index - 1)))
            for index, hidden in enumerate(output.hidden_states)
        )
    if plan.finish is not None:
        plan.finish()
    return output
