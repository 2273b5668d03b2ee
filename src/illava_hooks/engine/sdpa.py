"""Keeps cuDNN out of SDPA while tokens merge.

cuDNN, which SDPA prefers on Hopper and newer, plans an attention anew for every length that it meets, and each plan
takes tens of milliseconds (docs/RESULTS.md, "On a GPU"). A stock model meets a new length with each image size, with
each prompt, and with every token that it decodes; a merging one meets another behind every merge, and all lengths of a
merged cache in each decode step. PyTorch's own flash and memory-efficient operators plan nothing; cuDNN's attention is
the faster one once it is planned, which counts where very many patches attend to each other.

The switch belongs to the process, so those who want cuDNN out are counted, and the last one puts it back.
"""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Any

import torch

__all__ = ["WithoutPlans", "without_plans"]

#: Pairs of tokens: beyond, what cuDNN's attention saves in one run comes near to what its plans cost (on an H200).
_WORTH_A_PLAN = 4096**2
#: Reentrant: a collection of garbage may close one inside.
_lock = threading.RLock()
_open = 0


class WithoutPlans:
    """From now on SDPA takes no cuDNN: until ``close``, or until nobody holds this any more."""

    def __init__(self) -> None:
        """Leaves it out, where there is something to take in its place."""
        global _open
        with _lock:
            self._counts = bool(_open) or _is_one_of_several()
            if self._counts:
                _open += 1
                _allow(False)

    def close(self) -> None:
        """Lets SDPA choose again, unless another one is open; a second call does nothing."""
        global _open
        if not self._counts:
            return
        with _lock:
            if self._counts:
                self._counts = False
                _open -= 1
                if not _open:
                    _allow(True)

    def __enter__(self) -> WithoutPlans:
        """For ``with``."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Closes it."""
        self.close()

    def __del__(self) -> None:
        """An interrupted forward runs no hook that could close it."""
        self.close()


def without_plans(device: torch.device, pairs: int = 0) -> WithoutPlans | None:
    """Keeps cuDNN out of a call; None: there is nothing to keep out, or a plan pays.

    A compiled graph knows its operators, and is none of this.

    Args:
        device: where the tensors of the call lie.
        pairs: of tokens that attend to each other in an encoder's layer; 0 for a language model, in which attention is
            a small part of the work.
    """
    if device.type != "cuda" or torch.compiler.is_compiling() or pairs > _WORTH_A_PLAN:
        return None
    return WithoutPlans()


def _is_one_of_several() -> bool:
    """Whether cuDNN may be chosen, and the two that take its place as well."""
    backends: Any = torch.backends.cuda
    return bool(backends.cudnn_sdp_enabled() and backends.flash_sdp_enabled() and backends.mem_efficient_sdp_enabled())


def _allow(allowed: bool) -> None:
    backends: Any = torch.backends.cuda
    backends.enable_cudnn_sdp(allowed)
