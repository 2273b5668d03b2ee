"""The range of every number that a user gives, and what is said of one outside of it."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real

from illava_hooks.errors import MergeConfigError
from illava_hooks.methods import METHODS

__all__ = ["check_keep", "check_layers", "check_ratio", "check_vit_r"]


def check_layers(name: str, value: object, first: int, depth: int | None, origin: str = "") -> tuple[int, ...]:
    """Layers in ascending order.

    Args:
        name: of the argument.
        value: what was given.
        first: the lowest layer that can merge.
        depth: of the stack; None: not known.
        origin: said behind a wrong layer that the user did not give.

    Raises:
        MergeConfigError: no list of layers, one out of range, or one twice.
    """
    allowed = f"{first}..{depth - 1}" if depth is not None else f"{first} and above"
    if isinstance(value, str) or not isinstance(value, Iterable):
        hint = f", or method={value!r}" if isinstance(value, str) and value in METHODS else ""
        raise MergeConfigError(f"{name} is {value!r}; give a list of layer numbers in {allowed}{hint}")
    layers = []
    for given in value:
        layer = _number(given)
        if not isinstance(layer, int) or layer < first or (depth is not None and layer >= depth):
            why = ": a layer needs the scores of the one before it" if layer == 0 and first == 1 else ""
            raise MergeConfigError(
                f"{name} contains {given!r}{origin}; this model allows {allowed}{why}; choose other layers"
            )
        layers.append(layer)
    if len(set(layers)) < len(layers):
        raise MergeConfigError(f"{name} is {layers} and lists a layer twice; list each layer once")
    return tuple(sorted(layers))


def check_vit_r(value: object) -> int | float:
    """A count or a fraction.

    Raises:
        MergeConfigError: it is neither.
    """
    number = _number(value)
    if number is None:
        raise MergeConfigError(f"vit_r is {value!r}; give an int >= 0 (tokens) or a float in (0, 1) (a fraction)")
    if number != 0 and (number < 0 if isinstance(number, int) else not 0 < number < 1):
        raise MergeConfigError(
            f"vit_r is {number!r}; an int must be >= 0 (tokens removed per layer), a float in (0, 1) (a fraction); "
            "use 0 to remove none"
        )
    return number or 0


def check_ratio(value: object) -> float:
    """A fraction kept in a layer.

    Raises:
        MergeConfigError: it is out of range.
    """
    number = _number(value)
    if number is None or not 0 < number <= 1:
        raise MergeConfigError(f"llm_ratio is {value!r}; it must be in (0, 1], the fraction kept; use 1.0 to keep all")
    return float(number)


def check_keep(name: str, value: object) -> float:
    """A fraction left in the end.

    Raises:
        MergeConfigError: it is out of range.
    """
    number = _number(value)
    if number is None or not 0 < number <= 1:
        raise MergeConfigError(
            f"{name} is {value!r}; it must be in (0, 1], the fraction of visual tokens left; use 1 to keep all"
        )
    return float(number)


def _number(value: object) -> int | float | None:
    """A number of any library as Python's own; None for anything else, truth values included."""
    if isinstance(value, bool) or not isinstance(value, Real):
        return None
    return int(value) if isinstance(value, Integral) else float(value)
