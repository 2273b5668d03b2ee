"""The hooks of the language stage.

What belongs to one forward travels in keyword arguments: from the base model to the text model, from there to each
decoder layer. The layer whose attention ranks is listened to while it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache

from illava_hooks.engine.attention_tap import Attention, AttentionTap, close_tap, open_tap
from illava_hooks.engine.cache import (
    Ledger,
    Past,
    cache_layer,
    check_layers,
    logical_mask,
    past_of,
    real_tokens,
    touches,
)
from illava_hooks.engine.compat import CACHE, as_given, cache_of, compose_tables
from illava_hooks.engine.decoder import DecoderRun, LayerKind, plan_counts
from illava_hooks.engine.decoder_masks import masks_of_call, masks_of_prefill
from illava_hooks.engine.family import Family
from illava_hooks.engine.hookset import Hook
from illava_hooks.engine.modules import inside
from illava_hooks.engine.prompt import CompactPrompt, Visuals, compact_prompt
from illava_hooks.engine.regions import in_region
from illava_hooks.engine.report import DecoderShape, EncoderShape
from illava_hooks.engine.sdpa import WithoutPlans, without_plans
from illava_hooks.engine.trace import Finish
from illava_hooks.engine.transport import DECODER_CALL, FORWARD, ForwardState, current_generation
from illava_hooks.errors import PatchStateError
from illava_hooks.merge.scores import ScoreInputs
from illava_hooks.merge.segments import counting
from illava_hooks.methods import find_score

__all__ = ["DecoderCall", "DecoderLayerHook", "Prefill", "RankingHook", "RestoreLengths", "TextModelHook"]


class Listening:
    """Keeps what listens to the layer that runs, so that it goes with the call.

    No dataclass: FSDP copies those wherever it finds them in keyword arguments, and the copy goes too early.
    """

    tap: AttentionTap | None = None


@dataclass(frozen=True, slots=True)
class Prefill:
    """A call that introduces visual tokens.

    Attributes:
        run: who survives.
        prompt: what the compact sequence is made of.
        embeds: ``(B, N, C)``, what the text model was given: its first hidden state.
        cache: the cache, or None.
        past: what it held before this call.
        valid: which keys of each layer are real, those to come included; None: all.
        finish: stores report and provenance.
        listening: holds the open tap.
        ledgers: what the keys of a stage will stand for, made by the first layer that needs it.
    """

    run: DecoderRun
    prompt: CompactPrompt
    embeds: Tensor
    cache: Any
    past: Past
    valid: Sequence[Tensor | None]
    finish: Finish
    listening: Listening
    ledgers: dict[Any, Ledger]


@dataclass(frozen=True, slots=True)
class DecoderCall:
    """What the decoder layers of one call find in their keyword arguments.

    Attributes:
        masks: the mask of each layer.
        attention: keeps SDPA from planning for every length while the call lasts; None: it does not.
        prefill: what merges, or None in calls that only continue.
    """

    masks: list[Any]
    attention: WithoutPlans | None
    prefill: Prefill | None = None


class TextModelHook(Hook):
    """Pre-hook of the text model: compacts a prefill with visual tokens, and finds masks for merged caches."""

    def __init__(self, family: Family, shapes: tuple[EncoderShape, DecoderShape]) -> None:
        """Knows its family, and the sizes that the report needs."""
        self.family, self.shapes = family, shapes

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the call alone where nothing is, was or will be merged."""
        forward: ForwardState | None = kwargs.pop(FORWARD, None)
        if forward is not None and forward.placeholders:
            return args, self._prefill(module, forward, kwargs)
        if touches(cache_of(kwargs)):
            return args, continue_call(module, args, kwargs, self.family.layer_kinds(module.config))
        return None

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # plans a prefill on the host
    @in_region("illava::prefill")
    def _prefill(self, module: Any, forward: ForwardState, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeds, config = kwargs["inputs_embeds"], module.config
        _check_layers_are_patched(module)
        cache = kwargs[CACHE] = _resolve_cache(module, kwargs)
        check_layers(cache)  # now: a layer that refuses later would leave keys in those before it
        past = past_of(cache, config.num_hidden_layers)
        mask = logical_mask(kwargs.get("attention_mask"), prepared=getattr(cache, "is_compileable", False))
        prompt = compact_prompt(
            Visuals(forward.records, forward.placeholders),
            forward.query,
            real_tokens(mask, past.logical, embeds),
            _packed_candidates(kwargs.get("position_ids"), mask, cache),
            allows_holes="recurrent" not in self.family.layer_kinds(config),
            keeps_ends=not forward.session.config.method.listens_in_llm,
        )
        run = forward.run = self._plan(forward, prompt)
        _refuse_mixed(prompt, run)
        # Survivors keep the positions that they have in the logical sequence: RoPE must not notice what is gone.
        columns, positions = prompt.columns, self._positions(kwargs.get("position_ids"), past.logical, embeds)
        compact = kwargs["inputs_embeds"] = embeds.gather(1, columns[..., None].expand(-1, -1, embeds.shape[-1]))
        kwargs["position_ids"] = positions.gather(-1, columns.expand(*positions.shape[:-1], -1))
        kwargs["attention_mask"] = _ready_made(compact)
        self.family.compact(kwargs, columns, run)
        masks, valid = masks_of_prefill(self.family.layer_kinds(config), config, run, compact, cache, past, mask)
        finish = Finish(forward.session, self.shapes, run, prompt, past, (mask, valid), embeds.element_size())
        prefill = Prefill(run, prompt, embeds, cache, past, valid, finish, Listening(), {})
        kwargs[DECODER_CALL] = DecoderCall(masks, without_plans(embeds.device), prefill)
        return kwargs

    def _plan(self, forward: ForwardState, prompt: CompactPrompt) -> DecoderRun:
        settings = forward.session.config
        visuals = [(record.modality, record.num_tokens) for record in prompt.records]
        counts = plan_counts(settings, visuals, prompt.sample_of, prompt.counts)
        forward.session.tell_missed(visuals, counts[-1].visual_lengths)
        score = find_score(settings.method.llm_score, self.family.published_llm_score)
        return DecoderRun(settings, score, counts, prompt.state)

    def _positions(self, given: Tensor | None, past: int, embeds: Tensor) -> Tensor:
        """``(B, N)`` or ``(3, B, N)`` positions of all logical tokens."""
        batch, width = embeds.shape[:2]
        if given is None:
            given = torch.arange(past, past + width, device=embeds.device)[None]
        positions = self.family.text_positions(given)
        return positions.expand(*positions.shape[:-2], batch, width).to(embeds.device)


def _refuse_mixed(prompt: CompactPrompt, run: DecoderRun) -> None:
    """Raises ``PatchStateError`` where tokens of one image lie in two rows, and some of the prompt's are to merge."""
    if prompt.mixed is not None and run.counts[-1].lengths != prompt.prompt_lengths:
        raise PatchStateError(
            f"features of one {prompt.mixed} begin in one row of the batch and end in another: releases of "
            "transformers that repeat the images of a prompt one by one for beams and return sequences mix them so; "
            "use num_beams=1 and num_return_sequences=1, or merging(model, False)"
        )


def _check_layers_are_patched(module: Any) -> None:
    """Every layer will see the compact sequence.

    Raises:
        PatchStateError: one was put in behind ``patch``.
    """
    for index, wrapped in enumerate(module.layers):
        for layer in inside(wrapped):
            if not any(isinstance(hook, DecoderLayerHook) for hook in layer._forward_pre_hooks.values()):
                raise PatchStateError(
                    f"decoder layer {index} ({type(layer).__name__}) was put in behind patch and cannot merge; call "
                    "patch(model, ...) again after replacing parts of the model"
                )


def _ready_made(embeds: Tensor) -> Tensor:
    """A mask that text models take as prepared and do not look at: each decoder layer gets its own."""
    return embeds.new_zeros(1, 1, 1, 1)


def _resolve_cache(module: Any, kwargs: dict[str, Any]) -> Any:
    """The cache that stock would use: ``use_cache`` is resolved inside its forward, too late for us."""
    use_cache = kwargs.get("use_cache")
    use_cache = module.config.use_cache if use_cache is None else use_cache
    if getattr(module, "gradient_checkpointing", False) and module.training:
        return None
    cache = cache_of(kwargs)
    return DynamicCache(config=module.config) if use_cache and cache is None else cache


def _packed_candidates(given: Tensor | None, mask: Tensor | None, cache: Any) -> Tensor | None:
    """Positions that stock would search for packed sequences: text positions without mask and cache."""
    if given is None or mask is not None or cache is not None:
        return None
    if given.dim() == 3:
        return given[0] if given.shape[0] == 4 else None
    return given


def continue_call(
    module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], kinds: Sequence[LayerKind]
) -> dict[str, Any]:
    """A call that merges nothing on a cache that holds merged tokens: every layer needs a mask of its own length."""
    embeds = kwargs.get("inputs_embeds")
    if embeds is None:
        embeds = module.embed_tokens(kwargs.pop("input_ids", None) if not args else args[0])
        kwargs["inputs_embeds"] = embeds
    # In `generate` masks only grow by real tokens once the first is known; elsewhere each is read anew.
    grows = current_generation() is not None
    masks = masks_of_call(kinds, module.config, cache_of(kwargs), embeds, kwargs.get("attention_mask"), grows)
    # The text model would ask the first layer only, and find a mask that is wrong for all behind a merge.
    kwargs["attention_mask"] = _ready_made(embeds)
    kwargs[DECODER_CALL] = DecoderCall(masks, without_plans(embeds.device))
    return kwargs


class DecoderLayerHook(Hook):
    """Pre-hook of every decoder layer: merges on entry, and swaps in what belongs to the layer's stage."""

    def __init__(self, layer_idx: int, kind: LayerKind) -> None:
        """Remembers which layer it sits on, and what that mixes tokens by."""
        self.layer_idx, self.kind = layer_idx, kind

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the call alone when nothing travels with it."""
        call: DecoderCall | None = kwargs.pop(DECODER_CALL, None)
        if call is None:
            return None
        kwargs["attention_mask"] = call.masks[self.layer_idx]
        return (args, kwargs) if call.prefill is None else self._enter(module, call.prefill, args, kwargs)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # plans are no business of a graph
    def _enter(self, module: Any, prefill: Prefill, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run, hidden, (cos, sin) = prefill.run, args[0], kwargs["position_embeddings"]
        if run.states[0].rope is None:
            # The text model makes the tables behind our hook: the first layer is the first to see them.
            tables = (cos, sin) if cos.dim() == 3 else compose_tables((cos, sin), module.self_attn.config)
            run.states[0].keep_rope([table.expand(hidden.shape[0], -1, -1) for table in tables])
        if self.layer_idx in run.layers:
            hidden = run.merge(self.layer_idx, hidden)
        rope = run.stage(self.layer_idx).rope_on(hidden.device)
        kwargs["position_embeddings"] = tuple(as_given(table, cos) for table in rope)
        # Gaps in positions look like packed sequences to flash attention.
        kwargs["position_ids"] = None
        if prefill.cache is not None and kwargs.get(CACHE) is not None:
            if run.is_finished:  # a wrapper around the layer replays it for its gradients
                _refuse_past(prefill.past, self.layer_idx)
                kwargs[CACHE] = None  # its keys are there already
            elif self.kind == "attention":
                self._announce(prefill, hidden.device)
        if run.ranks_for(self.layer_idx):
            ranking = _Ranking(run, self.layer_idx, prefill.past.keys[self.layer_idx], prefill.valid[self.layer_idx])
            prefill.listening.tap = tap = AttentionTap(ranking)
            open_tap(tap)  # until RankingHook
        return (hidden, *args[1:]), kwargs

    def _announce(self, prefill: Prefill, device: torch.device) -> None:
        """Tells the layer's cache what the keys to come stand for; layers of one stage and past share the answer."""
        run, past, layer = prefill.run, prefill.past.keys[self.layer_idx], cache_layer(prefill.cache, self.layer_idx)
        state, num_logical = run.stage(self.layer_idx), prefill.embeds.shape[1]
        num_new, key = state.columns.shape[1], (run.merges_through(self.layer_idx), past, layer.ledger.history, device)
        lengths = run.counts[run.merges_through(self.layer_idx)].lengths
        if key not in prefill.ledgers:
            columns, before = state.columns, prefill.past.logical
            if before:
                columns = (columns + before).masked_fill(columns < 0, -1)
            columns = columns.to(device)
            valid = prefill.valid[self.layer_idx]
            prefill.ledgers[key] = layer.ledger.with_prefill(past, columns, lengths, num_logical, valid)
        # A row may become shorter while the longest one, which says how many columns there are, loses nothing.
        differs = num_logical != num_new or prefill.prompt.moves or lengths != prefill.prompt.prompt_lengths
        layer.announce(prefill.ledgers[key], past + num_new, prefill.prompt.trailing_text, differs=differs)


def _refuse_past(past: Past, layer_idx: int) -> None:
    """Raises ``PatchStateError`` where a layer that runs a second time needs the keys in front of its own."""
    if past.logical:
        raise PatchStateError(
            f"decoder layer {layer_idx} is run again for its gradients behind a cache that holds keys; start from a "
            "new cache, or checkpoint with model.gradient_checkpointing_enable()"
        )


class RankingHook(Hook):
    """Around a decoder layer whose attention ranks for the next: its tap is closed behind it."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> None:
        """Closes the tap that ``DecoderLayerHook`` opened, whatever the layer came to."""
        close_tap()


class _Ranking:
    """Listens to the attention in front of a merging layer, and scores what enters that."""

    def __init__(self, run: DecoderRun, layer_idx: int, past: int, valid: Tensor | None) -> None:
        self.run, self.layer_idx, self.past, self.valid = run, layer_idx, past, valid

    def attend(
        self, attention: Attention, module: nn.Module, query: Tensor, key: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        """What stock gives; the tokens are ranked on the way."""
        scale = kwargs.get("scaling") or query.shape[-1] ** -0.5
        with torch.no_grad():
            self._score(query.detach(), key.detach(), scale)
        return attention(module, query, key, *args, **kwargs)

    @in_region("illava::rank")
    def _score(self, query: Tensor, key: Tensor, scale: float) -> None:
        state = self.run.stage(self.layer_idx).to(query.device)
        key = key[:, :, : self.past + query.shape[2]]  # a static cache gives its whole buffer
        row = counting(len(query), query.device)
        inputs = ScoreInputs(
            key=key,
            query=lambda: query,
            last_query=lambda: query[row, :, state.query],
            positions=state.origins,
            key_valid=None if self.valid is None else self.valid.to(query.device),
            scale=scale,
            layer_idx=self.layer_idx + 1,
            causal=True,
            last_place=state.query,
        )
        new = key[:, :, self.past :].transpose(1, 2).flatten(2).flatten(0, 1)
        self.run.rank(self.layer_idx + 1, inputs, new)


class RestoreLengths(Hook):
    """Forward hook of the text model: outputs at the logical length, and the report."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """Leaves the output alone where nothing was merged; there is none where the forward failed."""
        call: DecoderCall | None = kwargs.get(DECODER_CALL)
        if call is None:
            return None
        if call.attention is not None:
            call.attention.close()
        if call.prefill is None or output[0] is None:
            return None
        (out,), run = output, call.prefill.run
        run.check_finished()
        run.is_finished = True  # what runs from here on is a replay for gradients
        last = len(run.layers)
        out.last_hidden_state = run.expand(out.last_hidden_state, last)
        if out.hidden_states is not None:
            first, *behind = out.hidden_states
            # The entry after layer i counts the merges up to i; behind the final norm, all.
            merges = [*map(run.merges_through, range(len(behind) - 1)), last]
            out.hidden_states = (
                None if first is None else call.prefill.embeds,  # gradients reach it, as in stock
                *(None if h is None else run.expand(h, m) for h, m in zip(behind, merges, strict=True)),
            )
        call.prefill.finish()
        return out
