"""Every change to a model is made, owned and taken back by one ``HookSet``."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Iterator, MutableMapping
from types import MethodType
from typing import Any

import torch
import wrapt
from torch import nn

__all__ = [
    "CallForward",
    "Called",
    "Hook",
    "HookSet",
    "MethodWrapper",
    "foreign_forward",
    "has_hooks",
    "named_arguments",
]

#: Keyword under which a pre-hook tells ``CallForward`` that the module was called, and which module that was.
CALLED = "illava_called"

#: What every class gets anew; ``forward`` from the ``__init_subclass__`` that wraps it for checkpointing.
_PER_CLASS = ("__dict__", "__weakref__", "forward")


class Hook:
    """Base of all hooks of this library, by which copies of them are found again when they are taken back."""

    def __call__(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], *output: Any) -> Any:
        """As PyTorch calls a hook with keyword arguments: without ``output`` before the forward, with it behind."""
        raise NotImplementedError


def named_arguments(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Positional arguments by name, to be read.

    A subclass may take ``*args``: then the names are those of the first parent that has some.
    """
    return {**dict(zip(_names_by_place(type(module), len(args)), args, strict=False)), **kwargs} if args else kwargs


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]  # a compiler cannot look into signatures
def _names_by_place(kind: type, count: int) -> tuple[str, ...]:
    """Of the first arguments of ``forward``; none where no parent has so many."""
    for base in kind.__mro__:
        if "forward" not in vars(base):
            continue
        parameters = list(inspect.signature(vars(base)["forward"]).parameters.values())[1:]
        names = [p.name for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
        if len(names) >= count:
            return tuple(names[:count])
    return ()


class MethodWrapper(wrapt.CallableObjectProxy):  # type: ignore[type-arg]  # generic only for type checkers
    """A bound method with ``around(method, *args, **kwargs)`` in its place; keeps its signature and name.

    Unlike a closure it follows ``copy.deepcopy`` and pickle of the model that it belongs to.
    """

    def __init__(self, method: Callable[..., Any], around: Callable[..., Any], installed: Installed) -> None:
        """Wraps ``method`` while hooks are ``installed``; ``around`` is a bound method or callable object."""
        super().__init__(method)
        self._self_around, self._self_installed = around, installed

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Calls ``around`` with the wrapped method first."""
        if not self._self_installed.now:
            return self.__wrapped__(*args, **kwargs)
        return self._self_around(self.__wrapped__, *args, **kwargs)

    @property
    def __func__(self) -> Any:
        """The wrapper for any object of the class: tools that copy a module bind this to the copy."""
        return _Unbound(self.__wrapped__.__func__, self._self_around, self._self_installed)

    def __deepcopy__(self, memo: dict[int, Any]) -> MethodWrapper:
        """A wrapper of the copied method around the copied callable."""
        method, around = copy.deepcopy(self.__wrapped__, memo), copy.deepcopy(self._self_around, memo)
        return MethodWrapper(method, around, copy.deepcopy(self._self_installed, memo))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        """Pickles method, callable and switch; the proxy itself refuses to be pickled."""
        return MethodWrapper, (self.__wrapped__, self._self_around, self._self_installed)


class _Unbound:
    """A wrapped function that takes the object first, as functions of a class do."""

    def __init__(self, function: Callable[..., Any], around: Callable[..., Any], installed: Installed) -> None:
        self.function, self.around, self.installed = function, around, installed

    def __call__(self, owner: Any, *args: Any, **kwargs: Any) -> Any:
        if not self.installed.now:
            return self.function(owner, *args, **kwargs)
        return self.around(MethodType(self.function, owner), *args, **kwargs)

    @property
    def __name__(self) -> str:
        return self.function.__name__

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(self.function)


class Called:
    """Which module was called: a box, since accelerate sends whatever has a ``to`` to another device."""

    def __init__(self, module: nn.Module) -> None:
        """Keeps ``module`` where tools that walk through keyword arguments do not find it."""
        self.module = module


class CallForward:
    """In place of a module's ``forward``: called directly, it does what the hooks of a call do.

    PEFT, sentence-transformers and others call ``model.forward(...)``. Which token scores, and that a forward merges
    at all, is decided in hooks of the call: without this, such a call would merge in one stage only.
    """

    def __init__(self, module: nn.Module, installed: Installed, before: Hook, after: Hook | None) -> None:
        """Stands in for ``module.forward`` while hooks are ``installed``; ``before`` and ``after`` are two of them."""
        self.module, self.installed, self.before, self.after = module, installed, before, after
        # Accelerate's own forward calls this one, and puts it back where it was.
        self.name = "_old_forward" if "_old_forward" in vars(module) else "forward"
        self.inner = vars(module).get(self.name)
        self.__doc__ = type(module).forward.__doc__

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward that was there before, with the hooks around it where no call has run them."""
        return self.run(self.module, args, kwargs)

    def run(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The same for a copy of the module that shares this object."""
        called: Called | None = kwargs.pop(CALLED, None)
        if called is not None or not self.installed.now:
            return self._forward(module if called is None else called.module, args, kwargs)
        args, kwargs = self.before(module, args, kwargs) or (args, kwargs)
        kwargs.pop(CALLED, None)
        output = changed = None
        try:
            output = self._forward(module, args, kwargs)
        finally:
            if self.after is not None:
                changed = self.after(module, args, kwargs, output)
        return output if changed is None else changed

    def _forward(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.inner is not None:
            return self.inner(*args, **kwargs)
        return type(module).forward(module, *args, **kwargs)

    def take_out(self) -> None:
        """Puts back what was there, wherever accelerate moved this to; who else holds it gets the stock forward."""
        own = vars(self.module)
        for name in ("forward", "_old_forward"):
            if own.get(name) is not self:
                continue
            if self.inner is None and name == "forward":
                del own[name]
            else:
                own[name] = self.__wrapped__

    @property
    def __wrapped__(self) -> Any:
        """The stock forward, bound: what signatures and documentation are read from."""
        return MethodType(type(self.module).forward, self.module) if self.inner is None else self.inner

    @property
    def __self__(self) -> nn.Module:
        """The module, as of a bound method."""
        return self.module

    @property
    def __func__(self) -> Any:
        """For any module: tools read the signature from it, or bind it to a copy."""
        return _ForwardOfAny(self)

    @property
    def __name__(self) -> str:
        """Of the stock forward, for tools that print or look it up."""
        return "forward"


class _ForwardOfAny:
    """A ``CallForward`` that takes the module first, as functions of a class do."""

    def __init__(self, stand_in: CallForward) -> None:
        self.stand_in = stand_in

    def __call__(self, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return self.stand_in.run(module, args, kwargs)

    @property
    def __name__(self) -> str:
        return "forward"

    @property
    def __signature__(self) -> inspect.Signature:
        return inspect.signature(type(self.stand_in.module).forward)


class Installed:
    """Whether hooks are; shared by those that outlive them in somebody else's hands."""

    now = True


def foreign_forward(module: nn.Module) -> bool:
    """Whether somebody put a forward of their own on the module, which a swapped class would not reach.

    Accelerate's is known: it calls ``_old_forward``, which is bound to the class anew with the swap.
    """
    own = vars(module)
    if "forward" not in own or "_old_forward" in own:
        return False
    return getattr(own["forward"], "__func__", None) is not type(module).forward


class HookSet:
    """The changes made to one model; ``remove`` undoes them all, in reverse order, and leaves no trace."""

    def __init__(self) -> None:
        """Owns nothing yet."""
        self.installed = Installed()
        self._handles: list[Any] = []
        self._attributes: list[tuple[Any, str, bool, Any]] = []
        self._classes: list[tuple[nn.Module, type, type, type]] = []
        self._forwards: list[CallForward] = []

    def before(self, module: nn.Module, hook: Hook) -> None:
        """Adds a forward pre-hook that sees keyword arguments."""
        self._handles.append(module.register_forward_pre_hook(hook, with_kwargs=True))

    def after(self, module: nn.Module, hook: Hook, *, always: bool = False) -> None:
        """Adds a forward hook that sees keyword arguments; ``always``: also after an exception."""
        self._handles.append(module.register_forward_hook(hook, with_kwargs=True, always_call=always))

    def swap(self, owner: Any, name: str, value: Any) -> None:
        """Sets an attribute in the owner's own ``__dict__`` and remembers what was there."""
        own = vars(owner)
        self._attributes.append((owner, name, name in own, own.get(name)))
        own[name] = value

    def wrap(self, owner: Any, name: str, around: Callable[..., Any]) -> None:
        """Puts ``around(method, *args, **kwargs)`` around a method of one object."""
        self.swap(owner, name, MethodWrapper(getattr(owner, name), around, self.installed))

    def around_forward(self, module: nn.Module, before: Hook, after: Hook | None = None) -> None:
        """Adds hooks that also hold for ``module.forward(...)``; ``before`` must mark calls with ``CALLED``."""
        self.before(module, before)
        if after is not None:
            self.after(module, after, always=True)
        stand_in = CallForward(module, self.installed, before, after)
        vars(module)[stand_in.name] = stand_in
        self._forwards.append(stand_in)

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
        self.installed.now = False  # first: what others still hold of ours turns into stock at once
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
        while self._forwards:
            self._forwards.pop().take_out()
        # Quantization gives its modules the hooks of ours, an adapter added later is a copy of a patched module.
        for module in () if root is None else root.modules():
            _remove_copies(module)


def has_hooks(module: nn.Module) -> bool:
    """Whether some model that holds the module is patched."""
    return any(isinstance(hook, Hook) for hooks in _hooks_of(module) for hook in hooks.values())


def _hooks_of(module: nn.Module) -> Iterator[MutableMapping[int, Any]]:
    yield from (module._forward_pre_hooks, module._forward_hooks)


def _remove_copies(module: nn.Module) -> None:
    for hooks in _hooks_of(module):
        for key in [key for key, hook in hooks.items() if isinstance(hook, Hook)]:
            del hooks[key]
            for flags in (
                "_forward_pre_hooks_with_kwargs",
                "_forward_hooks_with_kwargs",
                "_forward_hooks_always_called",
            ):
                getattr(module, flags, {}).pop(key, None)
    old = type(module)
    if getattr(old, "swapped_in", False):
        swapped = next(kind for kind in old.__mro__ if not getattr(kind.__bases__[-1], "swapped_in", False))
        back = _on_top_of(old, swapped, swapped.__bases__[-1])
        _rebind_forward(module, old, back)
        module.__class__ = back
    for name, value in list(vars(module).items()):
        if isinstance(value, CallForward):
            value.take_out()
        if (restore := getattr(type(value), "stock_of_copy", None)) is not None:
            vars(module)[name] = restore(value)


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
