"""Counting what a device would be told to do: one launch for each operation that computes or copies."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

#: Operations of this library, and the launches behind each where Triton is.
OURS = {"illava::row_lse": 1, "illava::column_means": 2, "illava::closest_behind": 1, "illava::match_behind": 1}
#: Memory without content, and names for what is there already.
FREE = {
    f"aten::{name}"
    for name in ("empty", "new_empty", "empty_like", "empty_strided", "lift_fresh", "detach", "_unsafe_view")
}


class LaunchCounter(TorchDispatchMode):
    """Counts launches on one kind of device; what is done to tensors of the host is none."""

    def __init__(self, device: str) -> None:
        super().__init__()
        self.device, self.launches = device, Counter[str]()
        #: Elements of the largest result.
        self.largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        results = [t for t in (out if isinstance(out, tuple | list) else (out,)) if isinstance(t, Tensor)]
        name, returns = func._schema.name, func._schema.returns
        is_view = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
        if any(t.device.type == self.device for t in results) and not is_view and name not in FREE:
            self.launches[name] += self.own(func, args)
            self.largest = max([self.largest, *(t.numel() for t in results)])
        return out

    @staticmethod
    def own(func: Any, args: Any) -> int:
        """Launches behind an operation; one that is lent an LSE does not make it."""
        is_lent = func._schema.name == "illava::column_means" and args[8] is not None
        return OURS.get(func._schema.name, 1) - is_lent

    @property
    def total(self) -> int:
        """All launches."""
        return sum(self.launches.values())


def launches_of(device: str, call: Any, *args: Any, **kwargs: Any) -> LaunchCounter:
    """What a call costs."""
    with torch.no_grad(), LaunchCounter(device) as counter:
        call(*args, **kwargs)
    return counter
