"""From a model to its family, and what all families answer together."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Iterator, Mapping
from importlib import import_module
from importlib.util import find_spec
from typing import Any, TypeVar

from illava_hooks import tiny
from illava_hooks.config import MergeSchedule, Modality
from illava_hooks.engine.family import Family, schedules_of
from illava_hooks.errors import UnsupportedModelError

__all__ = ["PATCHERS", "PRESETS", "FromFamilies", "families", "find_family", "register_family"]

T = TypeVar("T")

#: Where the families of this package lie; the only list of them is that folder.
PATCHERS = "illava_hooks.patchers"

_registered: dict[str, Family] = {}


def find_family(model: Any) -> Family:
    """The family of a model.

    Raises:
        UnsupportedModelError: there is none; the message lists what is supported.
    """
    kind = getattr(getattr(model, "config", None), "model_type", None)
    if isinstance(kind, str) and kind in _registered:
        return _registered[kind]
    # By name first: the others need not be imported, nor the models that they know.
    if isinstance(kind, str) and kind.isidentifier() and find_spec(f"{PATCHERS}.{kind}") is not None:
        family: Family = import_module(f"{PATCHERS}.{kind}").FAMILY
        return family
    for family in families():
        if kind in family.model_types:
            return family
    supported = sorted(model_type for family in families() for model_type in family.model_types)
    loaded = "loaded with from_pretrained, " if isinstance(model, str) else ""
    raise UnsupportedModelError(
        f"model is a {type(model).__name__} with model_type {kind!r}; supported are {supported}: give one of those "
        f"Hugging Face models, {loaded}or the ...Model inside"
    )


def register_family(family: Family) -> None:
    """Makes ``patch`` know a family of another package; one with the same ``model_types`` is replaced.

    Args:
        family: an object of a subclass of ``Family``.
    """
    for model_type in family.model_types:
        _registered[model_type] = family


def families() -> Iterator[Family]:
    """All families: of this package, and registered ones."""
    found: dict[str, Family] = {}
    for module in pkgutil.iter_modules(import_module(PATCHERS).__path__):
        if not module.name.startswith("_"):
            family: Family = import_module(f"{PATCHERS}.{module.name}").FAMILY
            found[family.name] = family
    yield from (found | {family.name: family for family in _registered.values()}).values()


class FromFamilies(Mapping[str, T]):
    """What all families answer together, imported when it is asked for."""

    def __init__(self, read: Callable[[Family], Mapping[str, T]]) -> None:
        """``read`` gives the entries of one family."""
        self._read = read

    def _entries(self) -> dict[str, T]:
        return {name: entry for family in families() for name, entry in self._read(family).items()}

    def __getitem__(self, name: str) -> T:
        """The answer of that name, from whichever family has it."""
        return self._entries()[name]

    def __iter__(self) -> Iterator[str]:
        """The names of all families' entries, family by family."""
        return iter(self._entries())

    def __len__(self) -> int:
        """How many names all families have together."""
        return len(self._entries())


def _presets(family: Family) -> dict[str, Mapping[Modality, MergeSchedule]]:
    """Those of a family, and as ``family/tiny`` those of its embedded model."""
    found = {family.name: family.presets} if family.presets else {}
    if family.name in tiny.NAMES:
        own: Mapping[Any, Any] = tiny.presets(family.name)
        found[f"{family.name}/tiny"] = schedules_of(own)
    return found


#: Schedules by family and modality (read-only).
PRESETS: Mapping[str, Mapping[Modality, MergeSchedule]] = FromFamilies(_presets)
