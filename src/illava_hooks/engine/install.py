"""From a family and a model to a patched model, or nothing."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from illava_hooks.config import MergeConfig
from illava_hooks.engine.attention_tap import TappedConfig
from illava_hooks.engine.decoder_hooks import DecoderLayerHook, RankingHook, RestoreLengths, TextModelHook
from illava_hooks.engine.encoder_layers import EncoderLayerHook
from illava_hooks.engine.family import Family, ModelParts
from illava_hooks.engine.hookset import HookSet, has_hooks
from illava_hooks.engine.model_hooks import (
    AfterBase,
    AfterHead,
    BaseMethods,
    BeforeBase,
    BeforeHead,
    HeadMethods,
    QuietFeatures,
)
from illava_hooks.engine.proof import check_scores
from illava_hooks.engine.session import MergeSession
from illava_hooks.errors import PatchStateError

__all__ = ["install", "install_encoder", "taken_off"]


@contextlib.contextmanager
def taken_off(session: MergeSession, family: Family) -> Iterator[None]:
    """The model without the changes of a session, while the context is open; then the same session is back.

    Args:
        session: of a patched model.
        family: the model's.
    """
    session.hooks.remove(session.root)
    try:
        yield
    finally:
        session.hooks = HookSet()
        install(family, family.locate(session.root), session.config, session.root, session)


def install(
    family: Family, parts: ModelParts, config: MergeConfig, model: Any, session: MergeSession | None = None
) -> MergeSession:
    """Makes all changes to a model, or none.

    Args:
        family: the model's.
        parts: where its parts are.
        config: settings that the family has checked.
        model: the model that was given; it gets the session.
        session: one that has been taken off, to be put on again; None: a new one.

    Raises:
        UnsupportedModelError: its language model cannot be ranked, or a layer cannot be changed.
        PatchStateError: a part belongs to another patched model too.
        Exception: whatever else stopped it; the model is then as before.
    """
    _refuse_shared(parts)
    # Before anything is changed: what is compared is the stock layer, and a refusal leaves nothing to undo.
    for text in parts.text_models:
        check_scores(text, _ranking(config))
    session = MergeSession(config, model) if session is None else session
    try:
        install_encoder(family, parts, session)
        if "language" in family.stages:
            _install_language(family, parts, session)
        if not family.around(parts, session):
            around = _install_around if "language" in family.stages else _install_quiet
            around(family, parts, session)
    except BaseException:
        session.hooks.remove()
        raise
    return session


def install_encoder(family: Family, parts: ModelParts, session: MergeSession) -> None:
    """The vision stage alone: feature methods whose outputs carry records of what merged.

    Enough where the language model is somebody else's: it asks nothing of a decoder.

    Args:
        family: the model's.
        parts: where its parts are; those of the decoder may be empty.
        session: owns the changes.
    """
    family.install(parts, session)
    # Every layer, merging or not: behind a merge each needs the survivors' tables.
    for index, layers in enumerate(parts.encoder_layers):
        for layer in layers:
            session.hooks.before(layer, EncoderLayerHook(index))


def _install_language(family: Family, parts: ModelParts, session: MergeSession) -> None:
    hooks, ranking = session.hooks, _ranking(session.config)
    kinds = family.layer_kinds(family.text_config(session.root))
    shapes = family.encoder_shape(session.root), family.decoder_shape(session.root)
    for text in parts.text_models:
        hooks.before(text, TextModelHook(family, shapes))
        hooks.after(text, RestoreLengths(), always=True)
    # Every layer, merging or not: each needs the mask and the RoPE tables of its stage.
    for index, layers in enumerate(parts.decoder_layers):
        for layer in layers:
            if index in ranking:
                attention: Any = layer.self_attn
                hooks.swap(attention, "config", TappedConfig(attention.config))
                hooks.after(layer, RankingHook(), always=True)
            hooks.before(layer, DecoderLayerHook(index, kinds[index]))


def _ranking(config: MergeConfig) -> list[int]:
    """The decoder layers whose attention ranks for the next one."""
    return [layer - 1 for layer in config.llm_layers] if config.method.listens_in_llm else []


def _install_around(family: Family, parts: ModelParts, session: MergeSession) -> None:
    hooks, base = session.hooks, parts.base
    methods = BaseMethods(session, family, base)
    features = [f"get_{modality}_features" for modality in family.modalities]
    hooks.around_forward(base, BeforeBase(session, methods), AfterBase())
    for name in features:
        hooks.wrap(base, name, methods.features)
    hooks.wrap(base, family.placeholder_method(base), methods.placeholders)
    hooks.swap(base, "_illava_session", session)
    if parts.top is not None:
        head = HeadMethods(session, methods.visuals_in)
        hooks.around_forward(parts.top, BeforeHead(session), AfterHead())
        hooks.wrap(parts.top, "generate", head.generate)
        for name in features:
            if hasattr(parts.top, name):
                hooks.wrap(parts.top, name, head.features)
        if hasattr(parts.top, "_expand_multimodal_outputs"):  # older releases expand pixels instead
            hooks.wrap(parts.top, "_expand_multimodal_outputs", head.expand)
        hooks.swap(parts.top, "_illava_session", session)


def _install_quiet(family: Family, parts: ModelParts, session: MergeSession) -> None:
    """Around a model whose language model is left alone: it sees stock's features, and nothing of ours."""
    for part in (parts.base, parts.top):
        if part is not None:
            session.hooks.swap(part, "_illava_session", session)
    methods = QuietFeatures(session, family.encoder_shape(session.root))
    for modality in family.modalities:
        session.hooks.wrap(parts.base, f"get_{modality}_features", methods.features)


def _refuse_shared(parts: ModelParts) -> None:
    """Raises ``PatchStateError`` where a part is patched already, by way of another model that holds it too."""
    shared: tuple[tuple[str, Iterable[nn.Module]], ...] = (
        ("vision encoder", parts.towers),
        ("language model", parts.text_models),
        ("base model", [parts.base]),
    )
    for name, modules in shared:
        for module in modules:
            if has_hooks(module):
                raise PatchStateError(
                    f"the {name} {type(module).__name__} belongs to another patched model too; unpatch that one "
                    "first, or give this model a copy of it"
                )
