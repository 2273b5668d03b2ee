"""From a model to its family, and from a family to a patched model."""

from __future__ import annotations

import inspect
from importlib import import_module
from typing import Any

from torch import nn
from transformers.masking_utils import create_causal_mask

from illava_hooks.config import MergeConfig
from illava_hooks.errors import UnsupportedModelError
from illava_hooks.patchers.base import Family, ModelParts
from illava_hooks.runtime.releases import CACHE
from illava_hooks.runtime.report import DecoderShape
from illava_hooks.runtime.session import MergeSession

__all__ = ["FAMILIES", "find_family", "install", "unwrapped"]

#: ``config.model_type`` to the module that knows the family; imported when first needed.
FAMILIES = {
    "llava_onevision": "illava_hooks.patchers.llava_onevision",
    "qwen2_vl": "illava_hooks.patchers.qwen2_vl",
}


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside adapters (PEFT), ``torch.compile`` and data-parallel wrappers."""
    while isinstance(model, nn.Module):
        inner: Any = model
        if callable(find := getattr(model, "get_base_model", None)):
            inner = find()
        elif isinstance(compiled := getattr(model, "_orig_mod", None), nn.Module):
            inner = compiled
        elif isinstance(sharded := getattr(model, "_fsdp_wrapped_module", None), nn.Module):
            inner = sharded
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        if inner is model:
            break
        model = inner
    return model


def _inside_fsdp(module: Any) -> Any:
    """The part of a model that FSDP wrapped."""
    return getattr(module, "_fsdp_wrapped_module", module)


def find_family(model: Any) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: there is none; the message lists what is supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if kind not in FAMILIES:
        raise UnsupportedModelError(
            f"model is a {type(model).__name__} with model_type {kind!r}; supported are {sorted(FAMILIES)}: give one "
            "of those Hugging Face models, or the ...Model inside"
        )
    family: Family = import_module(FAMILIES[kind]).FAMILY
    return family


def locate(family: Family, model: Any) -> ModelParts:
    """The model's parts, all of them there.

    Raises:
        UnsupportedModelError: a release of transformers renamed a seam.
    """
    import transformers

    try:
        base = _inside_fsdp(model.model) if hasattr(model, "lm_head") else model
        parts = ModelParts(
            top=model if base is not model else None,
            base=base,
            encoder_layers=[_inside_fsdp(layer) for layer in family.encoder_layers(base)],
            text_model=_inside_fsdp(base.language_model),
            decoder_layers=[_inside_fsdp(layer) for layer in base.language_model.layers],
        )
        for layer in parts.decoder_layers:
            attention: Any = layer.self_attn
            _ = attention.q_proj, attention.k_proj
        _ = parts.base.get_image_features, parts.base.get_video_features, parts.base.get_placeholder_mask
        if parts.top is not None:
            _ = parts.top.generate
        for function, argument in (
            (type(parts.text_model).forward, CACHE),
            (create_causal_mask, "allow_is_causal_skip"),
        ):
            if argument not in inspect.signature(function).parameters:
                raise AttributeError(name=argument)
    except AttributeError as missing:
        raise UnsupportedModelError(
            f"model {type(model).__name__} of transformers {transformers.__version__} lacks {missing.name!r}, which "
            "patching needs; use a version of transformers that this library supports"
        ) from missing
    text = model.config.text_config
    if any(kind != "full_attention" for kind in getattr(text, "layer_types", None) or ()):
        raise UnsupportedModelError(
            "text_config.use_sliding_window gives sliding-window layers; merging needs full attention in every layer; "
            "load the model with use_sliding_window=False"
        )
    return parts


def _decoder_shape(text: Any) -> DecoderShape:
    """Sizes of a Qwen2 decoder, for the report."""
    head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    return DecoderShape(
        text.num_hidden_layers, text.hidden_size, text.intermediate_size, head * text.num_key_value_heads
    )


def install(family: Family, parts: ModelParts, config: MergeConfig, model: Any) -> MergeSession:
    """Makes all changes to a model, or none.

    Raises:
        Exception: whatever stopped it; the model is then as before.
    """
    from illava_hooks.patchers.forward import BaseModelHooks
    from illava_hooks.patchers.head import TopModelHooks
    from illava_hooks.patchers.language.attention import AttentionHook
    from illava_hooks.patchers.language.hooks import DecoderLayerHook, TextModelHook, restore_lengths
    from illava_hooks.patchers.vision.hooks import EncoderLayerHook

    session = MergeSession(config, model)
    hooks, base = session.hooks, BaseModelHooks(session, family.tokens_behind(parts.base))
    try:
        family.install(parts, session)
        for index, layer in enumerate(parts.encoder_layers):
            hooks.before(layer, EncoderLayerHook(index))
        hooks.before(parts.base, base.before)
        hooks.after(parts.base, base.after, always=True)
        hooks.wrap(parts.base, "get_image_features", base.features)
        hooks.wrap(parts.base, "get_video_features", base.features)
        hooks.wrap(parts.base, "get_placeholder_mask", base.placeholders)
        if parts.top is not None:
            top = TopModelHooks(session)
            hooks.before(parts.top, top.before)
            hooks.wrap(parts.top, "generate", top.generate)
            hooks.wrap(parts.top, "get_image_features", top.features)
            hooks.wrap(parts.top, "get_video_features", top.features)
            if hasattr(parts.top, "_expand_multimodal_outputs"):  # older releases expand pixels instead
                hooks.wrap(parts.top, "_expand_multimodal_outputs", top.expand)
        shapes = family.encoder_shape(model), _decoder_shape(model.config.text_config)
        hooks.before(parts.text_model, TextModelHook(family, shapes))
        hooks.after(parts.text_model, restore_lengths)
        for index, layer in enumerate(parts.decoder_layers):
            hooks.before(layer, DecoderLayerHook(index))
            if index + 1 in config.llm_layers:
                attention: Any = layer.self_attn
                hooks.before(attention, AttentionHook(index))
        hooks.swap(parts.base, "_illava_session", session)
        if parts.top is not None:
            hooks.swap(parts.top, "_illava_session", session)
    except BaseException:
        hooks.remove()
        raise
    return session
