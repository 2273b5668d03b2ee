"""The harness's own model classes, whose loaded model merges; each is an attribute of this module by its name.

``classes_of`` in the package tells the names.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

from accelerate import PartialState  # type: ignore[import-untyped, unused-ignore]
from loguru import logger  # type: ignore[import-not-found, unused-ignore]

from illava_hooks.api import patch
from illava_hooks.engine.finding import families
from illava_hooks.engine.tooling import LmmsEval
from illava_hooks.integrations.arguments import split_arguments
from illava_hooks.integrations.lmms_eval import classes_of

__all__: list[str] = []


class _Merging:
    """Takes the merge settings out of a harness class's arguments, and patches the model that it loads."""

    model: Any

    def __init__(self, **arguments: Any) -> None:
        settings, others = split_arguments(arguments)
        super().__init__(**others)
        # The harness's `model` is what it loaded, without what accelerate puts around it.
        config = patch(self.model, **settings).config
        logger.info(f"illava_hooks merges with {config.method.name!r}; images {config.image}; videos {config.video}")


class _OneDevice:
    """Names the device of a single process: the empty ``device_map`` that is the default there is refused by now."""

    def __init__(self, **arguments: Any) -> None:
        if PartialState().num_processes == 1:
            arguments.setdefault("device_map", arguments.get("device", "cuda"))
        super().__init__(**arguments)


def __getattr__(name: str) -> type:
    """Makes one of our classes when it is asked for the first time."""
    for family in families():
        for kind, known in classes_of(family).items():
            if known == name and family.lmms_eval is not None:
                globals()[name] = made = _merging(name, kind, family.lmms_eval)
                return made
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)


def _merging(name: str, kind: str, harness: LmmsEval) -> type:
    """A class of the harness whose model merges."""
    path = harness.chat if kind == "chat" else harness.simple
    module, _, stock = (path or "").rpartition(".")
    bases = [_Merging, *([_OneDevice] if harness.names_device else [])]
    bases.append(getattr(import_module(f"lmms_eval.models.{module}"), stock))
    return type(name, tuple(bases), {"__module__": __name__, "__doc__": f"``{stock}``, whose model merges."})
