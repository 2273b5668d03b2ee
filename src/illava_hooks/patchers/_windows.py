"""Windows of a packed row after merges: which survivors still see each other where attention stays within windows.

A survivor keeps its coordinates, and so its window. How many survivors a window has depends on who merged, so it is
counted where the survivors are, and nobody waits for it; a window may be left empty.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from illava_hooks.engine.encoder import EncoderRun
from illava_hooks.merge.segments import host_table

__all__ = ["window_borders", "window_pairs"]


def window_borders(run: EncoderRun, merges: int) -> Tensor:
    """``(W + 1,)`` int64: where each window begins and ends among the surviving patches after so many merges.

    Args:
        run: a run whose traits have windows.
        merges: how many merges happened.
    """
    windows = run.traits.windows
    assert windows is not None
    origins = run.patch_origins(merges)[0].contiguous()
    return torch.searchsorted(origins, windows.to(origins.device))


def window_pairs(run: EncoderRun, starts: Sequence[int]) -> Tensor:
    """``(n, merges + 1)`` int64: pairs of patches that share a window, of ``n`` images or videos.

    Args:
        run: a finished run whose traits have windows.
        starts: the first patch of each image or video in the row before any merge, and one past the last patch.
    """
    windows = run.traits.windows
    assert windows is not None
    first = torch.searchsorted(windows, host_table(starts, windows.device))
    columns = []
    for merges in range(len(run.plans) + 1):
        squares = window_borders(run, merges).to(windows.device).diff().square()
        sums = torch.nn.functional.pad(squares.cumsum(0), (1, 0))
        columns.append(sums[first].diff())
    return torch.stack(columns, 1)
