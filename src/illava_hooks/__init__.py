"""Merge redundant visual tokens in stock Hugging Face vision-language models, in one line, reversibly."""

from illava_hooks import tiny
from illava_hooks.api import merging, patch, session_of, unpatch
from illava_hooks.config import MergeConfig
from illava_hooks.errors import IllavaHooksError, MergeConfigError, PatchStateError, UnsupportedModelError
from illava_hooks.methods import METHODS, Method
from illava_hooks.runtime.report import MergeReport
from illava_hooks.runtime.session import MergeSession
from illava_hooks.schedules import PRESETS

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "PRESETS",
    "IllavaHooksError",
    "MergeConfig",
    "MergeConfigError",
    "MergeReport",
    "MergeSession",
    "Method",
    "PatchStateError",
    "UnsupportedModelError",
    "__version__",
    "merging",
    "patch",
    "session_of",
    "tiny",
    "unpatch",
]
