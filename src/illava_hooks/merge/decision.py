"""What a merge rule is given, and what it decides.

Shapes: ``S`` segments of ``L`` tokens (padded), ``E`` edges per segment. Scores are float32, higher means keep;
padding and protected tokens carry ``+inf``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.merge.segments import host_table

__all__ = ["RuleInputs", "SegmentPlan", "assemble", "nearest_kept"]


@dataclass(frozen=True, slots=True)
class RuleInputs:
    """What a rule may look at.

    Attributes:
        scores: ``(S, L)`` float32, never NaN: that counts as the lowest score.
        lengths: tokens in each segment, on the host.
        num_removed: tokens to remove from each segment, on the host; below the segment's length.
        hidden: returns the hidden states, ``(S, L, C)``.
        keys: returns the attention keys with RoPE, all key heads side by side, ``(S, L, D)``.
        token_size: ``(S, L)`` float32, how many original tokens each token stands for.
        visible: ``(S, L)`` bool or None; False where the layout will crop the seat away.
    """

    scores: Tensor
    lengths: tuple[int, ...]
    num_removed: tuple[int, ...]
    hidden: Callable[[], Tensor]
    keys: Callable[[], Tensor]
    token_size: Tensor
    visible: Tensor | None = None

    def __post_init__(self) -> None:
        """A sort puts NaN, which broken pixels give, behind the padding: a rule would then keep more than planned."""
        object.__setattr__(self, "scores", self.scores.nan_to_num(-torch.inf, torch.inf, -torch.inf))

    def count(self, values: list[int] | tuple[int, ...]) -> Tensor:
        """``(S, 1)`` int64 table of one host number per segment."""
        return host_table(values, self.scores.device)[:, None]

    def slots(self, num: int) -> Tensor:
        """``(1, num)`` int64: 0, 1, ..."""
        return torch.arange(num, device=self.scores.device)[None]


@dataclass(frozen=True, slots=True)
class SegmentPlan:
    """A rule's decision, in token numbers inside each segment.

    Attributes:
        kept: ``(S, L)`` bool.
        absorbed: ``(S, E)`` int64, tokens folded into an anchor.
        anchors: ``(S, E)`` int64, the survivors that receive them.
        weights: ``(S, E)`` float32, 0 for edges that only fill up the table.
        self_weights: ``(S, L)`` float32, weight of a survivor in its own new value.
        survivor_of: ``(S, L)`` int64, the survivor that represents each token; itself for survivors.
    """

    kept: Tensor
    absorbed: Tensor
    anchors: Tensor
    weights: Tensor
    self_weights: Tensor
    survivor_of: Tensor


def nearest_kept(kept: Tensor, lengths: Tensor) -> Tensor:
    """For each token the closest survivor by position, the earlier one on a tie: ``(S, L)`` int64."""
    columns = torch.arange(kept.shape[1], device=kept.device).expand_as(kept)
    usable = kept & (columns < lengths)
    far = 2 * kept.shape[1]
    before = torch.where(usable, columns, -far).cummax(-1).values
    after = torch.where(usable, columns, far).flip(-1).cummin(-1).values.flip(-1)
    closest = torch.where(columns - before <= after - columns, before, after)
    return closest.clamp(0, kept.shape[1] - 1)


def assemble(
    inputs: RuleInputs, kept: Tensor, absorbed: Tensor, anchors: Tensor, weights: Tensor, self_weights: Tensor
) -> SegmentPlan:
    """Completes a plan: tokens with an edge are held by their heaviest anchor, others by the nearest kept."""
    survivor_of = nearest_kept(kept, inputs.count(inputs.lengths))
    if absorbed.shape[1]:
        light_first = torch.argsort(weights, dim=-1, stable=True, descending=True).flip(-1)
        edge_from, edge_to = absorbed.gather(1, light_first), anchors.gather(1, light_first)
        rank = torch.zeros_like(survivor_of).scatter_reduce(
            1,
            edge_from,
            torch.where(weights.gather(1, light_first) > 0, inputs.slots(edge_from.shape[1]) + 1, 0),
            "amax",
        )
        heaviest = edge_to.gather(1, (rank - 1).clamp_min(0))
        survivor_of = torch.where((rank > 0) & ~kept, heaviest, survivor_of)
    return SegmentPlan(kept, absorbed, anchors, weights, self_weights, survivor_of)
