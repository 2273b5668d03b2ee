"""From what a user calls a method to the ``Method``: a name, ``file.py:NAME``, or the object itself.

Commands and tools look methods up here. ``patch`` itself does not: a file that is named is run, so nothing that did
not come from the user's own command or program (a page in a browser, a file of settings) may name one.
"""

from __future__ import annotations

import contextlib
import sys
import traceback
from collections.abc import Iterator
from hashlib import sha256
from pathlib import Path
from types import ModuleType
from typing import Final

from illava_hooks.errors import InputError, MergeConfigError
from illava_hooks.methods import METHODS, Method

__all__ = ["UNIFORM", "find_method", "place_in_own_file"]

#: The files of the user's that were run.
_RUN: set[str] = set()

#: A control that is no method of ``METHODS``: what it drops is spread evenly.
UNIFORM: Final = Method("uniform", "uniform", "uniform", merge="drop")


def find_method(choice: str | Method) -> Method:
    """Looks a method up.

    Args:
        choice: a name in ``METHODS``, "uniform", ``file.py:NAME`` for a ``Method`` that a Python file calls so, or a
            ``Method``, which passes through. The file is run, with its own folder in front of the import path.

    Raises:
        MergeConfigError: the name is not known.
        InputError: the file cannot be run, or holds no such ``Method``.
    """
    if isinstance(choice, Method):
        return choice
    if not isinstance(choice, str):
        raise MergeConfigError(f"method is {choice!r}; give a name, file.py:NAME or a Method")
    if choice in METHODS:
        return METHODS[choice]
    if choice == UNIFORM.name:
        return UNIFORM
    path, colon, name = choice.rpartition(":")
    if colon and path.endswith(".py"):
        return _named(_run_file(choice, Path(path)), choice, name)
    if choice.endswith(".py"):
        return _named(_run_file(choice, Path(choice)), choice, "")
    raise MergeConfigError(
        f"method is {choice!r}; choose one of {[*METHODS, UNIFORM.name]}, or give file.py:NAME for one of your own"
    )


def place_in_own_file(error: BaseException) -> str | None:
    """The last line of a file that ``find_method`` has run in which an error was raised; None: it was elsewhere."""
    lines = traceback.extract_tb(error.__traceback__)
    return next(
        (f"{Path(line.filename).name}, line {line.lineno}" for line in lines[::-1] if line.filename in _RUN), None
    )


def _named(module: ModuleType, choice: str, name: str) -> Method:
    """The method of a module that has this name."""
    found = vars(module).get(name)
    if isinstance(found, Method):
        return found
    held = [own for own, value in vars(module).items() if isinstance(value, Method) and not own.startswith("_")]
    has = f"the file holds {held}" if held else f"the file holds none; write {name or 'mine'} = Method(...) in it"
    if name in vars(module):
        raise InputError(f"method is {choice!r}, which is a {type(found).__name__} and no Method; {has}")
    raise InputError(f"method is {choice!r}, which names no Method; give file.py:NAME; {has}")


def _run_file(choice: str, path: Path) -> ModuleType:
    """Runs a Python file as a module of its own."""
    if not path.is_file():
        raise InputError(f"method is {choice!r}, and there is no file {str(path)!r}; give file.py:NAME")
    file = path.resolve()
    name = f"{file.stem}_{sha256(str(file).encode()).hexdigest()[:8]}"  # nobody else's module has it
    module = ModuleType(name)
    module.__file__ = str(file)
    sys.modules[name] = module  # dataclasses look there
    _RUN.add(str(file))
    try:
        with _importing_from(file.parent):
            # Compiled here and not imported: a cached compilation can be older than the file.
            exec(compile(file.read_bytes(), str(file), "exec", dont_inherit=True), vars(module))
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise InputError(f"method is {choice!r}, and {file.name} cannot be run ({reason}); repair the file") from error
    return module


@contextlib.contextmanager
def _importing_from(folder: Path) -> Iterator[None]:
    """What lies beside a file can be imported by it."""
    sys.path.insert(0, str(folder))
    try:
        yield
    finally:
        with contextlib.suppress(ValueError):  # the file may have changed the path itself
            sys.path.remove(str(folder))
