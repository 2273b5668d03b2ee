"""Merge redundant visual tokens in stock Hugging Face vision-language models, in one line, reversibly."""

from typing import TYPE_CHECKING, Any

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

if TYPE_CHECKING:
    from illava_hooks.tools.evaluate import evaluate
    from illava_hooks.tools.tune import tune

__version__ = "0.1.0"

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
    """``evaluate`` and ``tune`` come when they are asked for: what only tools need is not imported by everybody."""
    if name == "evaluate":
        from illava_hooks.tools.evaluate import evaluate

        return evaluate
    if name == "tune":
        from illava_hooks.tools.tune import tune

        return tune
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def __dir__() -> list[str]:
    """Names that come later too."""
    return sorted({*globals(), *__all__})
