"""What comes with Python or a package, and what is the user's own code."""

from __future__ import annotations

import functools
import sys
import sysconfig
from collections.abc import Iterator
from importlib.metadata import packages_distributions, version
from pathlib import Path
from types import ModuleType
from typing import Any

__all__ = ["installed_parts", "is_installed", "module_name"]


def is_installed(value: Any) -> bool:
    """Whether a module, class or function comes with Python or a package."""
    name = module_name(value)
    if name in sys.builtin_module_names or name.split(".")[0] == "illava_hooks":
        return True
    file = getattr(sys.modules.get(name), "__file__", None)
    return file is not None and file.startswith(_folders())


def installed_parts(value: Any) -> Iterator[str]:
    """What is installed, in words: its name, its package's version, and the text of its module.

    The sources of this library are not read: every fingerprint holds them.
    """
    name = module_name(value)
    yield f"{name}.{getattr(value, '__qualname__', getattr(value, '__name__', ''))}"
    top = name.split(".")[0]
    for package in _distributions().get(top, ()):
        yield f"{package} {version(package)}"
    file = getattr(sys.modules.get(name), "__file__", None)
    if file and file.endswith(".py") and top != "illava_hooks" and top not in sys.stdlib_module_names:
        yield Path(file).read_text(encoding="utf-8", errors="replace")


def module_name(value: Any) -> str:
    """The module that a class or function is of, or a module's own name."""
    return value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None) or "builtins"


@functools.cache
def _folders() -> tuple[str, ...]:
    return tuple({sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib")})


@functools.cache
def _distributions() -> dict[str, list[str]]:
    return {name: sorted({*found}) for name, found in packages_distributions().items()}
