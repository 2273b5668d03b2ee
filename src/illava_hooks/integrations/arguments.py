"""Merge settings out of a harness's arguments, in this library's names or in those of the published project."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from illava_hooks.errors import MergeConfigError
from illava_hooks.methods import METHODS, Method
from illava_hooks.tools.loading import parse_fraction, parse_layers, parse_number
from illava_hooks.tools.methods import find_method

__all__ = ["known_method", "split_arguments"]

_LAYERS = ("vit_layers", "llm_layers")
_AMOUNTS = ("vit_r", "llm_ratio")
_KEEP = "keep"
_CHOICES = ("method", "preset")

#: By published switch: the published names of a stage's layers and amount, ours, and what merges nothing.
_PUBLISHED = {
    "enable_illava_vit": ("illava_vit_k", "illava_vit_r", "vit_layers", "vit_r", 0),
    "enable_illava_llm": ("illava_llm_k", "illava_llm_r", "llm_layers", "llm_ratio", 1.0),
}


def split_arguments(given: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Takes the merge settings out of a harness's arguments.

    The published names mean what they meant there: a stage merges only where its ``enable_illava_*`` is true, and
    ``illava_llm_r`` is the fraction kept. Our own names leave to the preset what is not given.

    Args:
        given: arguments by name; layers as ``5-6-7-8``, a single number or a list; a method as ``find_method`` takes
            it.

    Returns:
        What ``patch`` takes, and all that is left, for the harness.

    Raises:
        MergeConfigError: names are mixed or miss each other, or a switch is no truth value.
        InputError: a value is no list of layers or no number.
    """
    left = dict(given)
    settings = {name: left.pop(name) for name in (*_LAYERS, *_AMOUNTS, _KEEP, *_CHOICES) if name in left}
    published = {n: left.pop(n) for switch, names in _PUBLISHED.items() for n in (switch, *names[:2]) if n in left}
    if published:
        mixed = [name for name in settings if name not in _CHOICES]
        if mixed:
            raise MergeConfigError(
                f"{mixed[0]} and {next(iter(published))} are both given; use either {[*_LAYERS, *_AMOUNTS, _KEEP]} or "
                "the published names, not both"
            )
        settings |= _translated(published)
    amounts = [name for name in _AMOUNTS if name in settings]
    if _KEEP in settings and amounts:
        raise MergeConfigError(f"keep and {amounts[0]} are both given; give keep alone, or vit_r and llm_ratio")
    for name in settings:
        if name in _LAYERS:
            settings[name] = _layers(name, settings[name])
        elif isinstance(settings[name], str) and name in _AMOUNTS:
            settings[name] = parse_number(settings[name], name)
        elif isinstance(settings[name], str) and name == _KEEP:
            settings[name] = parse_fraction(settings[name], name)
        elif name == "method":
            settings[name] = known_method(settings[name])
    return settings, left


def known_method(choice: str | Method) -> str | Method:
    """A name in ``METHODS`` as it is, and the ``Method`` that anything else stands for (``find_method``)."""
    return choice if isinstance(choice, str) and choice in METHODS else find_method(choice)


def _translated(published: Mapping[str, Any]) -> dict[str, Any]:
    """Our four settings for the published ones; a stage that is switched off merges nothing."""
    settings: dict[str, Any] = {}
    for switch, (layers, amount, our_layers, our_amount, nothing) in _PUBLISHED.items():
        named = [name for name in (layers, amount) if name in published]
        if switch not in published and named:
            raise MergeConfigError(
                f"{named[0]} is given without {switch}; add {switch}=True, or False to merge nothing"
            )
        if _truth(switch, published.get(switch, False)):
            missing = [name for name in (layers, amount) if name not in named]
            if missing:
                raise MergeConfigError(f"{switch} is True and {missing[0]} is not given; give {layers} and {amount}")
            settings |= {our_layers: published[layers], our_amount: published[amount]}
        else:
            settings |= {our_layers: [], our_amount: nothing}
    return settings


def _truth(name: str, value: object) -> bool:
    """A truth value, or its name."""
    found = {"true": True, "false": False}.get(str(value).lower())
    if found is None:
        raise MergeConfigError(f"{name} is {value!r}; give True or False")
    return found


def _layers(name: str, value: Any) -> Any:
    """Layers of any spelling; a harness reads ``8`` as a number and ``5-6`` as text."""
    return value if isinstance(value, list | tuple) else parse_layers(str(value), name)
