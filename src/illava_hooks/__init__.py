"""Merge redundant visual tokens in stock Hugging Face vision-language models, in one line, reversibly."""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from illava_hooks import tiny
    from illava_hooks.api import merging, patch, session_of, unpatch
    from illava_hooks.config import MergeConfig, MergeSchedule
    from illava_hooks.engine.family import Family
    from illava_hooks.engine.finding import PRESETS, register_family
    from illava_hooks.engine.provenance import Provenance
    from illava_hooks.engine.report import MergeReport
    from illava_hooks.engine.session import MergeSession
    from illava_hooks.errors import (
        IllavaHooksError,
        InputError,
        MergeConfigError,
        PatchStateError,
        UnsupportedModelError,
    )
    from illava_hooks.merge.plan import SegmentPlan
    from illava_hooks.merge.rules import RuleInputs
    from illava_hooks.merge.scores import ScoreInputs
    from illava_hooks.methods import METHODS, Method
    from illava_hooks.tools.evaluate import evaluate
    from illava_hooks.tools.tune import tune

__version__ = "0.2.0"

#: Where each name comes from. It is imported when it is asked for: ``illava-hooks --help`` needs no torch.
_HOMES = {
    "api": ("merging", "patch", "session_of", "unpatch"),
    "config": ("MergeConfig", "MergeSchedule"),
    "engine.family": ("Family",),
    "engine.finding": ("PRESETS", "register_family"),
    "engine.provenance": ("Provenance",),
    "engine.report": ("MergeReport",),
    "engine.session": ("MergeSession",),
    "errors": ("IllavaHooksError", "InputError", "MergeConfigError", "PatchStateError", "UnsupportedModelError"),
    "merge.plan": ("SegmentPlan",),
    "merge.rules": ("RuleInputs",),
    "merge.scores": ("ScoreInputs",),
    "methods": ("METHODS", "Method"),
    "tools.evaluate": ("evaluate",),
    "tools.tune": ("tune",),
}

__all__ = [
    "METHODS",
    "PRESETS",
    "Family",
    "IllavaHooksError",
    "InputError",
    "MergeConfig",
    "MergeConfigError",
    "MergeReport",
    "MergeSchedule",
    "MergeSession",
    "Method",
    "PatchStateError",
    "Provenance",
    "RuleInputs",
    "ScoreInputs",
    "SegmentPlan",
    "UnsupportedModelError",
    "__version__",
    "evaluate",
    "merging",
    "patch",
    "register_family",
    "session_of",
    "tiny",
    "tune",
    "unpatch",
]


def __getattr__(name: str) -> Any:
    """Imports what is asked for, and keeps it."""
    if name == "tiny":
        return importlib.import_module("illava_hooks.tiny")
    for module, names in _HOMES.items():
        if name in names:
            found = getattr(importlib.import_module(f"illava_hooks.{module}"), name)
            return globals().setdefault(name, found)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    """Names that come later too."""
    return sorted({*globals(), *__all__})
