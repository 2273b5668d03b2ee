"""What towers written again by loops share: one merge of units, from the papers' sentences."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["merged"]


def merged(rule: str, units: dict[int, Tensor], scores: dict[int, float], removed: int) -> dict[int, Tensor]:
    """Units after one merge: the lowest are dropped, or folded into one with falling weights."""
    ascending = sorted(units, key=lambda unit: (scores[unit], unit))
    left = {unit: rows for unit, rows in units.items() if unit not in ascending[:removed]}
    if rule == "recycle":
        whole = (removed + 1) * (removed + 2) / 2
        parts = [(removed + 1 - rank) / whole * units[unit] for rank, unit in enumerate(ascending[: removed + 1])]
        left[ascending[removed]] = torch.stack(parts).sum(0)
    return left
