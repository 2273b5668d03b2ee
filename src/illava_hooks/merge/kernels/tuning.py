"""How Triton kernels of this package are launched: a short list of tile sizes, tried once for each kind of shape."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import triton

__all__ = ["launcher", "width_parts"]

_LARGE = 1024
#: What the interpreter takes of a width at a time.
_PART = 512
#: Beyond, longer segments are tuned as this one.
_LONGEST_CLASS = 4096


def launcher(
    kernel: Any, keys: list[str], configs: Sequence[tuple[dict[str, int], dict[str, int]]]
) -> Callable[..., None]:
    """A launcher of a kernel, which adds ``longest``, ``length_class``, ``WIDEN`` and the sizes.

    Args:
        kernel: of ``triton.jit``.
        keys: arguments that the best sizes depend on.
        configs: what is tried: sizes by name, among them ``TILE`` and ``STEP``, and warps and stages.

    Returns:
        A function of the grid, the longest segment, the other arguments in order, and constants by name.
    """
    tuned, chosen = kernel, dict[tuple[Any, ...], dict[str, Any]]()
    if isinstance(kernel, triton.JITFunction):
        tuned = triton.autotune([triton.Config(sizes, **how) for sizes, how in configs], key=keys)(kernel)

    def launch(grid: Callable[[dict[str, int]], tuple[int, int]], longest: int, *given: Any, **constants: Any) -> None:
        length_class = min(_LONGEST_CLASS, triton.next_power_of_2(max(1, longest)))
        interpreted = tuned is kernel
        if interpreted:  # there is nothing to time, and a tile costs nearly the same whatever its size
            tile = 128 if longest < _LARGE else _LARGE
            sizes = {name: _PART for name in configs[0][0]}
            constants |= {**sizes, "TILE": tile, "STEP": tile}
        arguments = (*given, longest, length_class)
        if interpreted:  # its products do not know bfloat16; float32 holds the same numbers
            kernel[grid](*arguments, WIDEN=True, **constants)
            return
        # Past the tuner, whose look at all arguments costs more than the launch, once it knows the best sizes.
        named = {**dict(zip(kernel.arg_names, arguments, strict=False)), **constants}
        kind = (given[0].device, given[0].dtype, *(named[key] for key in keys))
        # Triton launches on the current device, which of a model on several need not be that of its tensors.
        with torch.cuda.device(given[0].device):
            if kind in chosen:
                kernel[grid](*arguments, WIDEN=False, **constants, **chosen[kind])
                return
            tuned[grid](*arguments, WIDEN=False, **constants)
            chosen[kind] = tuned.best_config.all_kwargs()

    return launch


def width_parts(width: int) -> dict[str, int]:
    """A head width as one or two powers of two that a product takes: 72 is 64 + 16, of which the rest is masked."""
    first = max(16, triton.next_power_of_2(width + 1) // 2)
    rest = width - first
    return {"D": width, "D1": first, "D2": max(16, triton.next_power_of_2(rest)) if rest > 0 else 0}
