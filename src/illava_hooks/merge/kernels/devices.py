"""Which devices go through the kernels. Imports nothing but torch: most models never leave the CPU."""

from __future__ import annotations

import os
from functools import cache
from importlib.util import find_spec

import torch

__all__ = ["takes", "uses_triton"]


def takes(device: torch.device) -> bool:
    """Whether tensors of a device are better off in few large operations than in blocks that fit a CPU's cache."""
    return device.type != "cpu" or uses_triton(device)


def uses_triton(device: torch.device) -> bool:
    """Whether Triton's kernels run on tensors of a device: CUDA, or the CPU in Triton's interpreter."""
    if device.type == "cpu":
        return os.environ.get("TRITON_INTERPRET") == "1" and _has_triton() and _is_interpreted()
    return device.type == "cuda" and _has_triton()


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


@cache
def _is_interpreted() -> bool:
    """Whether Triton was imported as an interpreter: it reads the variable once."""
    import triton
    import triton.language as tl

    return not isinstance(tl.softmax, triton.JITFunction)
