"""What a method is, down to the code of its functions, so that an edited one is not taken for what it was."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass
from pathlib import Path
from types import (
    BuiltinFunctionType,
    CodeType,
    FunctionType,
    GetSetDescriptorType,
    MemberDescriptorType,
    MethodType,
    ModuleType,
)
from typing import Any

import torch

from illava_hooks.methods import Method
from illava_hooks.tools.evaluate.fingerprint import digest
from illava_hooks.tools.evaluate.installed import installed_parts, is_installed, module_name

__all__ = ["identity"]

#: Values that were met, by their ``id``; held, so that no other one gets the same.
Seen = dict[int, tuple[int, Any]]

_PLAIN = (str, bytes, int, float, complex, bool, type(None), type(...), torch.dtype, torch.device)
#: Builtins whose results depend on what no code names.
_UNTOLD = {"globals", "vars", "eval", "exec", "__import__", "import_module"}


def identity(method: Method) -> str | None:
    """A hash of all that a method consists of; None where that cannot be told, such as state in a foreign object."""
    try:
        return digest(part.encode() for part in _parts(method, {}))
    except _UnknownError:
        return None


class _UnknownError(Exception):
    """A value about which nothing lasting can be said."""


def _parts(value: Any, seen: Seen) -> Iterator[str]:
    """A value in words, those that it refers to as well."""
    if isinstance(value, _PLAIN):
        yield f"{type(value).__name__} {value!r}"
        return
    if id(value) in seen:
        yield f"again {seen[id(value)][0]}"
        return
    seen[id(value)] = len(seen), value
    if isinstance(value, torch.Tensor):
        yield f"tensor {value.dtype} {value.tolist()}"
    elif isinstance(value, tuple | list | Mapping):
        pairs = value.items() if isinstance(value, Mapping) else enumerate(value)
        yield f"{type(value).__name__} of {len(value)}"
        for pair in pairs:
            for part in pair:
                yield from _parts(part, seen)
    elif isinstance(value, set | frozenset):
        yield from sorted(" ".join(_parts(one, {})) for one in value)
    elif isinstance(value, ModuleType | type | BuiltinFunctionType) and is_installed(value):
        yield from installed_parts(value)
    elif isinstance(value, FunctionType):
        yield from _function(value, seen)
    elif isinstance(value, MethodType):
        yield from _parts((value.__func__, value.__self__), seen)
    elif isinstance(value, functools.partial):
        yield from _parts((value.func, value.args, value.keywords), seen)
    elif isinstance(value, staticmethod | classmethod):
        yield from _parts(value.__func__, seen)
    elif isinstance(value, property):
        yield from _parts((value.fget, value.fset), seen)
    elif isinstance(value, type):
        yield from _parts((value.__bases__, dict(_attributes(value))), seen)
    elif is_dataclass(value):
        yield from _parts((type(value), {field.name: getattr(value, field.name) for field in fields(value)}), seen)
    elif isinstance(value, ModuleType) and value.__file__:
        yield Path(value.__file__).read_text()
        yield from _parts(list(_own_modules(value)), seen)
    elif hasattr(value, "__dict__") and not is_installed(type(value)):
        yield from _parts((type(value), vars(value)), seen)
    else:
        raise _UnknownError


def _function(function: FunctionType, seen: Seen) -> Iterator[str]:
    """A function's code, its defaults, what it closes over, and the globals that it names."""
    if is_installed(function) and function.__closure__ is None:
        yield from installed_parts(function)
        return
    if _UNTOLD & {*_names(function.__code__)}:
        raise _UnknownError
    yield from _code(function.__code__)
    yield from _parts((function.__defaults__, function.__kwdefaults__), seen)
    cells = [cell.cell_contents for cell in function.__closure__ or ()]
    named = sorted(set(_names(function.__code__)) & set(function.__globals__))
    yield from _parts((cells, {name: function.__globals__[name] for name in named}), seen)


def _attributes(kind: type) -> Iterator[tuple[str, Any]]:
    """What a class says itself, without slots, and of the names that Python sets the user's own functions alone."""
    for name, part in vars(kind).items():
        if isinstance(part, MemberDescriptorType | GetSetDescriptorType) or name == "_abc_impl":
            continue
        own = isinstance(part, FunctionType | staticmethod | classmethod) and not is_installed(part)
        if own or not name.startswith("__"):
            yield name, part


def _own_modules(module: ModuleType) -> Iterator[ModuleType]:
    """The user's own modules that another one uses, by the names in it."""
    for part in vars(module).values():
        used = part if isinstance(part, ModuleType) else sys.modules.get(module_name(part))
        if used is not None and used is not module and not is_installed(used):
            yield used


def _names(code: CodeType) -> Iterator[str]:
    """All names of a function and of those inside of it, attributes too."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)


def _code(code: CodeType) -> Iterator[str]:
    yield f"{code.co_code.hex()} {code.co_names} {code.co_varnames} {code.co_freevars}"
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _code(constant)
        else:
            yield repr(sorted(map(repr, constant))) if isinstance(constant, frozenset) else repr(constant)
