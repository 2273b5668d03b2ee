"""The four verbs: patch, unpatch, merging, session_of."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from typing import Any

from illava_hooks.config import MergeConfig
from illava_hooks.engine.finding import find_family
from illava_hooks.engine.install import install
from illava_hooks.engine.modules import unwrapped
from illava_hooks.engine.session import MergeSession
from illava_hooks.errors import PatchStateError
from illava_hooks.methods import DEFAULT_METHOD, Method

__all__ = ["merging", "patch", "session_of", "unpatch"]


def patch(
    model: Any,
    vit_layers: Iterable[int] | None = None,
    vit_r: int | float | None = None,
    llm_layers: Iterable[int] | None = None,
    llm_ratio: float | None = None,
    *,
    keep: float | None = None,
    method: str | Method = DEFAULT_METHOD,
    preset: str | os.PathLike[str] = "auto",
    track: bool = False,
) -> MergeSession:
    """Makes a stock model merge redundant visual tokens, in both stages, until ``unpatch``.

    Outside nothing changes shape: features, logits, hidden states and cache lengths are the unpatched ones. What
    is not given comes from the paper's preset. On a patched model the settings are replaced. All or nothing: an
    error leaves the model as it was.

    Args:
        model: a Hugging Face LLaVA-OneVision or Qwen2-VL model, also inside PEFT's, ``torch.compile``'s and
            data-parallel wrappers. Without its head it works in calls of its own; where the head will be called
            (labels, beams, no cache), give the model with its head.
        vit_layers: 0-based vision-encoder layers; the merge sits in the layer, before its MLP. ``[]``: none.
        vit_r: int: tokens removed per tile, image or frame in each listed layer; float in (0, 1): that fraction
            of the layer's current tokens, rounded down (Qwen2-VL: to whole 2x2 groups). 0: none.
        llm_layers: 0-based decoder layers, each at least 1; the merge happens on entry. ``[]``: none.
        llm_ratio: fraction of a span's current visual tokens kept at each listed layer, in (0, 1]. 1.0: all.
        keep: one number instead of ``vit_r`` and ``llm_ratio``: the fraction of an image's or video's visual tokens
            that is left behind the last listed layer, in (0, 1]. Both stages cut by the same factor.
        method: a name in ``METHODS`` or a ``Method``; where it is not given, a preset's file says it.
        preset: ``"image"``, ``"video"``, ``"auto"`` (each image and video uses its own), or the path of a ``.json``
            file that ``MergeConfig.save`` wrote.
        track: keep provenance of the last forward.

    Returns:
        The session: ``enabled``, ``config``, ``report``, ``provenance``.

    Raises:
        UnsupportedModelError: no family knows the model, or its configuration cannot be merged.
        MergeConfigError: a value is outside of its range.
    """
    before, model = session_of(model), unwrapped(model)
    if before is not None and getattr(before.root, "model", None) is model:
        model = before.root  # what stands around the head must not get lost
    family = find_family(model)
    parts = family.locate(model)
    limits = family.limits(model)
    config = MergeConfig.build(limits, vit_layers, vit_r, llm_layers, llm_ratio, method, preset, track, keep)
    family.check(model, parts, config)
    if before is None:
        return install(family, parts, config, model)
    unpatch(model)
    try:
        return install(family, parts, config, model)
    except BaseException:
        old = family.locate(before.root)
        install(family, old, before.config, before.root).enabled = before.enabled
        raise


def unpatch(model: Any) -> None:
    """Takes every change back and leaves no trace; on an unpatched model it does nothing.

    Args:
        model: any model.
    """
    session = session_of(model)
    if session is not None:
        session.hooks.remove(session.root)


@contextlib.contextmanager
def merging(model: Any, enabled: bool = True) -> Iterator[Any]:
    """Switches merging on or off for this thread or task; nests, and is undone by exceptions too.

    Args:
        model: a patched model.
        enabled: whether to merge inside the context.

    Yields:
        The model.

    Raises:
        PatchStateError: the model is not patched.
        MergeConfigError: ``enabled`` is neither True nor False.
    """
    session = session_of(model)
    if session is None:
        raise PatchStateError(f"model {type(model).__name__} is not patched; call patch(model, ...) first")
    with session.switched(enabled):
        yield model


def session_of(model: Any) -> MergeSession | None:
    """The session of a patched model, or None.

    Args:
        model: any model.
    """
    model = unwrapped(model)
    for holder in (model, getattr(model, "base_model", None), getattr(model, "model", None)):
        session: Any = getattr(holder, "__dict__", {}).get("_illava_session")
        # By name: a notebook that imports the package anew finds the sessions of the old one.
        if type(session).__name__ == MergeSession.__name__:
            return session  # type: ignore[no-any-return]
    return None
