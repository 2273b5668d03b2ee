"""Modules that stand around others: what is called, and what runs."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

__all__ = ["inside", "unwrapped"]


def unwrapped(model: Any) -> Any:
    """The Hugging Face model inside adapters (PEFT), ``torch.compile`` and data-parallel wrappers."""
    while isinstance(model, nn.Module):
        inner: Any = model
        if callable(find := getattr(model, "get_base_model", None)):
            inner = find()
        elif isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
            inner = model.module
        elif (wrapped := _wrapped(model)) is not None:
            inner = wrapped
        if inner is model:
            break
        model = inner
    return model


def inside(module: Any) -> list[Any]:
    """Every module that may run where ``module`` is called: itself, or what is inside of the wrappers around it.

    Compiled, sharded and checkpointed modules hold one. An adapter that saves a whole module holds the original and
    a copy for each adapter.
    """
    return list(_inside(module))


def _inside(module: Any) -> Iterator[Any]:
    if (wrapped := _wrapped(module)) is not None:
        yield from _inside(wrapped)
    elif _is_adapter(module):
        yield from _inside(module.original_module)
        for copy in module.modules_to_save.values():
            yield from _inside(copy)
    elif (only := _only_child(module)) is not None:
        yield from _inside(only)
    else:
        yield module


def _wrapped(module: Any) -> Any:
    """What a compiled, sharded or checkpointed module holds; None for any other.

    Only an ``OptimizedModule`` is called in place of what it holds: regional compilation leaves the same attribute on
    a copy of the model, whose own parts are the ones that run.
    """
    held = getattr(module, "__dict__", {}).get("_modules", {})
    for name in ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"):
        if name in held:
            return held[name]
    return None


def _only_child(module: Any) -> Any:
    """What a wrapper of somebody's own holds: it has nothing but one module; None for any other.

    Models of transformers and layers of torch are no wrappers, even if they hold one module.
    """
    if not isinstance(module, nn.Module) or type(module).__module__.split(".")[0] in ("torch", "transformers"):
        return None
    held = module._modules
    if len(held) != 1 or module._parameters or module._buffers:
        return None
    return next(iter(held.values()))


def _is_adapter(module: Any) -> bool:
    """Whether it is PEFT's ``ModulesToSaveWrapper``; told by its parts, so that PEFT need not be there."""
    held = getattr(module, "__dict__", {}).get("_modules", {})
    return "original_module" in held and isinstance(held.get("modules_to_save"), nn.ModuleDict)
