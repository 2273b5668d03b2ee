"""Named regions: where merging does what an unpatched forward does not.

Whoever measures listens to them; nobody does by default. ``torch.profiler.record_function`` is not used in their
place, since it costs microseconds also where no profiler runs, and a profiler counts wall time and what it adds to
every small operation. ``listening(lambda name, *what: record_function(name))`` puts them into a profile.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, ParamSpec, TypeVar

__all__ = ["ATTENTION", "Listener", "in_region", "listening", "region"]

P = ParamSpec("P")
R = TypeVar("R")

#: Gets the name of a region, and what it works on where that is told; its context is open while the region runs.
Listener = Callable[..., AbstractContextManager[Any]]

#: An attention that gives scores as well, in place of plain SDPA: with query, key, value and scale.
ATTENTION = "illava::attention"

#: One for the process, not for a thread: it stands there while one thing is measured.
_listener: Listener | None = None
_NOTHING = nullcontext()


def region(name: str, *what: Any) -> AbstractContextManager[Any]:
    """The context of a region.

    Args:
        name: "illava::" and what is done.
        what: tensors and numbers that it works on.
    """
    return _NOTHING if _listener is None else _listener(name, *what)


def in_region(name: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Makes a whole function a region."""

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def run(*args: P.args, **kwargs: P.kwargs) -> R:
            if _listener is None:
                return function(*args, **kwargs)
            with _listener(name):
                return function(*args, **kwargs)

        return run

    return decorate


@contextmanager
def listening(listener: Listener) -> Iterator[None]:
    """Tells ``listener`` of every region that is entered while the context is open."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before
