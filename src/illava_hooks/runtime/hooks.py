"""Every change to a model is made, owned and taken back by one ``HookSet``."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from threading import Lock
from typing import Any

import wrapt
from torch import Tensor, nn

from illava_hooks.errors import PatchStateError

__all__ = ["CaptureOutput", "HookSet", "MethodWrapper", "capture"]

_captured: ContextVar[dict[int, Tensor | None] | None] = ContextVar("illava_captured", default=None)
_lock = Lock()
#: What every class gets anew; ``forward`` from the ``__init_subclass__`` that wraps it for checkpointing.
_PER_CLASS = ("__dict__", "__weakref__", "forward")


class MethodWrapper(wrapt.CallableObjectProxy):  # type: ignore[type-arg]  # generic only for type checkers
    """A bound method with ``around(method, *args, **kwargs)`` in its place; keeps its signature and name.

    Unlike a closure it follows ``copy.deepcopy`` and pickle of the model that it belongs to.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any]) -> None:
        """Wraps ``method``; ``around`` is a bound method or callable object."""
        super().__init__(method)
        self._self_around = around

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``around`` with the wrapped method first."""
        return self._self_around(self.__wrapped__, *args, **kwargs)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodWrapper:
        """A wrapper of the copied method around the copied callable."""
        return MethodWrapper(copy.deepcopy(self.__wrapped__, memo), copy.deepcopy(self._self_around, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles as the two parts."""
        return MethodWrapper, (self.__wrapped__, self._self_around)


class CaptureOutput:
    """Forward hook that hands a module's output to whoever opened ``capture`` for it in this thread."""

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        """Stores the output without its graph."""
        slot = _captured.get()
        if slot is not None and id(module) in slot:
            slot[id(module)] = output.detach()


@contextlib.contextmanager
def capture(*modules: nn.Module) -> Iterator[Callable[[nn.Module], Tensor]]:
    """Collects the outputs of ``modules`` (which must carry ``CaptureOutput``) while the context is open.

    Yields:
        A function that gives a module's output and forgets it.
    """
    slot: dict[int, Tensor | None] = {id(module): None for module in modules}

    def take(module: nn.Module) -> Tensor:
        output = slot.pop(id(module))
        if output is None:
            raise PatchStateError(f"the projection {type(module).__name__} was not called by its attention layer")
        return output

    token = _captured.set(slot)
    try:
        yield take
    finally:
        _captured.reset(token)


class HookSet:
    """The changes made to one model; ``remove`` undoes them all, in reverse order, and leaves no trace."""

    def __init__(self) -> None:
        """Starts with no change."""
        self._handles: list[Any] = []
        self._attributes: list[tuple[Any, str, bool, Any]] = []
        self._classes: list[tuple[nn.Module, type, type, type]] = []

    def before(self, module: nn.Module, hook: Callable[..., Any]) -> None:
        """Adds a forward pre-hook that sees keyword arguments."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Callable[..., Any], *, always: bool = False) -> None:
        """Adds a forward hook that sees keyword arguments; ``always``: also after an exception."""
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always))

    def capture(self, module: nn.Module) -> None:
        """Makes ``capture`` work on ``module``; once is enough.

        Adapters may replace a projection after ``patch``, so merging layers call this again with what they find.
        """
        if not any(isinstance(hook, CaptureOutput) for hook in list(module._forward_hooks.values())):
            with _lock:
                self._handles.append(module.register_forward_hook(CaptureOutput()))

    def swap(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute in the owner's own ``__dict__`` and remembers what was there."""
        own = vars(owner)
        self._attributes.append((owner, name, name in own, own.get(name)))
        own[name] = value

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Puts ``around(method, *args, **kwargs)`` around a method of one object."""
        self.swap(owner, name, MethodWrapper(getattr(owner, name), around))

    def swap_class(self, module: nn.Module, new: type) -> None:
        """Gives ``module`` a subclass of its class, also where accelerate keeps the old ``forward``.

        Where a tool made a subclass of its own of the stock class, it is made anew of ``new``.
        """
        old, stock = type(module), new.__bases__[-1]
        made = _on_top_of(old, stock, new)
        self._classes.append((module, old, made, new))
        _rebind_forward(module, old, made)
        module.__class__ = made

    def remove(self, root: nn.Module | None = None) -> None:
        """Undoes every change, and what copied our hooks inside of ``root``. Safe to call twice."""
        while self._handles:
            self._handles.pop().remove()
        while self._attributes:
            owner, name, was_there, old = self._attributes.pop()
            if was_there:
                vars(owner)[name] = old
            else:
                vars(owner).pop(name, None)
        while self._classes:
            module, old, made, new = self._classes.pop()
            now = type(module)
            back = old if now is made else _on_top_of(now, new, new.__bases__[-1])
            _rebind_forward(module, now, back)
            module.__class__ = back
        for module in () if root is None else root.modules():  # quantization gives its modules the hooks of ours
            for key, hook in list(module._forward_hooks.items()):
                if isinstance(hook, CaptureOutput):
                    del module._forward_hooks[key]


def _on_top_of(kind: type, base: type, other: type) -> type:
    """``kind`` with ``other`` in place of ``base``: ``fully_shard`` makes a subclass of what it finds."""
    if not issubclass(kind, base):
        return kind
    if kind is base:
        return other
    bases = tuple(_on_top_of(parent, base, other) for parent in kind.__bases__)
    return type(kind.__name__, bases, {k: v for k, v in vars(kind).items() if k not in _PER_CLASS})


def _rebind_forward(module: nn.Module, old: type, new: type) -> None:
    """Accelerate stores a module's bound ``forward`` as ``_old_forward``: point it at the new class's."""
    for name in ("_old_forward", "forward"):
        bound = vars(module).get(name)
        if getattr(bound, "__func__", None) is getattr(old, "forward", None) and bound is not None:
            vars(module)[name] = getattr(new, "forward").__get__(module)  # noqa: B009  # mypy: not on type
