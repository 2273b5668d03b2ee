"""How the models of a run are patched: the moment that one is constructed, whoever constructs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from illava_hooks import MergeSession, PatchStateError, patch

__all__ = ["MODES", "merged", "patch_when_constructed"]

#: Settings of each run by family; None: the stock model.
MODES: dict[str, dict[str, dict[str, Any]] | None] = {
    "stock": None,
    # Nothing is to be removed: every hook is in place and steps aside.
    "identity": dict.fromkeys(
        ("llava_onevision", "qwen2_vl"), {"vit_layers": [0, 1], "vit_r": 0, "llm_layers": [1], "llm_ratio": 1.0}
    ),
    # A share too small to remove a single token: the merging layers, the gathering and the scattering all run.
    "idle": dict.fromkeys(
        ("llava_onevision", "qwen2_vl"), {"vit_layers": [0, 1], "vit_r": 1e-4, "llm_layers": [1], "llm_ratio": 0.9999}
    ),
    "merging": {
        "llava_onevision": {"vit_layers": [0, 1], "vit_r": 5, "llm_layers": [1], "llm_ratio": 0.6},
        "qwen2_vl": {"vit_layers": [0, 1], "vit_r": 0.25, "llm_layers": [1], "llm_ratio": 0.6},
    },
}


def patch_when_constructed(model_class: Any, settings: dict[str, Any], sessions: list[MergeSession]) -> None:
    """Wraps a class's constructor for the life of the process.

    ``from_pretrained``, ``from_config`` and subclasses all come through it. A model with a head constructs the bare
    model inside: only the outermost one is patched.

    Args:
        model_class: the class.
        settings: arguments of ``patch``.
        sessions: where the session of each patched model is put.
    """
    construct: Callable[..., None] = model_class.__init__

    @functools.wraps(construct)
    def constructed(self: Any, *args: Any, **kwargs: Any) -> None:
        outermost = not _under_construction
        _under_construction.append(self)
        try:
            construct(self, *args, **kwargs)
        finally:
            _under_construction.pop()
        if outermost:
            sessions.append(patch(self, **settings))

    model_class.__init__ = constructed


_under_construction: list[Any] = []


def merged(session: MergeSession) -> bool:
    """Whether a model ran a forward that removed tokens."""
    try:
        return session.report.kept_fraction < 1
    except PatchStateError:
        return False
