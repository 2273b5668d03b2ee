"""How the models of a run are patched: the moment that one is constructed, whoever constructs it."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from families import Family, families, family
from illava_hooks import MergeSession, PatchStateError, patch

__all__ = ["CLASSES", "MODES", "merged", "patch_when_constructed"]

#: The families that are tested, and the names of their test classes.
CLASSES = {name: family(name).suite()[0].__name__.removesuffix("Tester") for name in families(with_suite=True)}

_LAYERS: dict[str, Any] = {"vit_layers": [0, 1], "llm_layers": [1]}
#: Settings of each run, as functions of a family; None: the stock model.
MODES: dict[str, Callable[[Family], dict[str, Any]] | None] = {
    "stock": None,
    # Nothing is to be removed: every hook is in place and steps aside.
    "identity": lambda _: {**_LAYERS, "vit_r": 0, "llm_ratio": 1.0},
    # A share too small to remove a single token: the merging layers, the gathering and the scattering all run.
    "idle": lambda _: {**_LAYERS, "vit_r": 1e-4, "llm_ratio": 0.9999},
    "merging": lambda known: {**_LAYERS, "vit_r": known.suite()[0].vit_r, "llm_ratio": 0.6},
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
