"""A merge plan is data: who stays, who is folded into whom, with which weight.

A rule decides inside segments (``SegmentPlan``); ``build_plan`` makes the plan of the whole batch of it.

Shapes: ``B`` rows of ``N`` tokens, ``K`` survivors per row, ``S`` segments of ``L`` tokens (padded), ``E`` edges from
an absorbed token to its anchor (per segment, or in all).
Everything that belongs to a token (hidden states, RoPE tables, positions, sizes) goes through the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.merge.segments import Segments, right_align

__all__ = ["MergePlan", "SegmentPlan", "apply_merge", "build_plan", "nearest_kept", "take_kept"]


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


@dataclass(frozen=True, slots=True)
class MergePlan:
    """The outcome of one merge for a whole batch.

    Attributes:
        keep_indices: ``(B, K)`` int64, column of each survivor, ascending, right-aligned.
        keep_mask: ``(B, N)`` bool.
        survivor_of: ``(B, N)`` int64, column of the survivor that represents each token from now on.
        absorbed: ``(E,)`` int64, flat rows (of ``B * N``) that are folded into an anchor.
        anchors: ``(E,)`` int64, flat rows of the survivors that receive them.
        weights: ``(E,)`` float32; edges that only fill up a table have weight 0.
        self_weights: ``(B, N)`` float32, the weight with which a survivor enters its own new value.
    """

    keep_indices: Tensor
    keep_mask: Tensor
    survivor_of: Tensor
    absorbed: Tensor
    anchors: Tensor
    weights: Tensor
    self_weights: Tensor

    @property
    def new_columns(self) -> Tensor:
        """``(B, N)`` int64: column among the survivors of each kept token (meaningless for others)."""
        rank = self.keep_mask.cumsum(-1)
        return (rank - rank[:, -1:] - 1 + self.keep_indices.shape[1]).clamp_min(0)

    def follow(self, kept_at: Tensor) -> Tensor:
        """Maps a table of columns before the merge, ``(B, M)``, to the columns after it."""
        return self.new_columns.gather(1, self.survivor_of).gather(1, kept_at)

    def grow(self, token_size: Tensor) -> Tensor:
        """How many original tokens each survivor stands for, ``(B, K)``, from the sizes before, ``(B, N)``.

        Edges of weight 0 only fill up a table, and some rules list an anchor among what it absorbs: neither adds.
        """
        sizes = token_size.flatten()
        gained = torch.where((self.weights > 0) & (self.absorbed != self.anchors), sizes[self.absorbed], 0.0)
        return take_kept(sizes.index_add(0, self.anchors, gained).view_as(token_size), self)


def build_plan(local: SegmentPlan, segments: Segments, keep_mask: Tensor, num_kept: int) -> MergePlan:
    """Turns decisions inside segments into a plan for the batch.

    Args:
        local: the rule's decision, in token numbers inside each segment.
        segments: where the segments lie among the ``B * N`` flat rows.
        keep_mask: ``(B, N)`` bool, tokens that exist (False on padding); tokens outside of all segments stay.
        num_kept: ``K``, planned on the host.
    """
    shape = keep_mask.shape
    kept = segments.put(keep_mask.flatten(), local.kept).view(shape)
    columns = torch.arange(shape[1], device=keep_mask.device).expand(shape).reshape(-1)
    survivor_rows = segments.rows.gather(1, local.survivor_of)
    ones = torch.ones(shape, dtype=torch.float32, device=keep_mask.device).flatten()
    return MergePlan(
        keep_indices=right_align(kept, num_kept),
        keep_mask=kept,
        survivor_of=segments.put(columns, columns[survivor_rows]).view(shape),
        absorbed=segments.rows.gather(1, local.absorbed).flatten(),
        anchors=segments.rows.gather(1, local.anchors).flatten(),
        weights=local.weights.flatten(),
        self_weights=segments.put(ones, local.self_weights).view(shape),
    )


def take_kept(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Selects the survivors of ``(B, N, ...)``: ``(B, K, ...)``. For positions, which are never averaged."""
    rows = torch.arange(tokens.shape[0], device=tokens.device)[:, None]
    return tokens[rows, plan.keep_indices]


def apply_merge(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Merges ``(B, N, C)`` into ``(B, K, C)``.

    Sums run in float32 (float64 for float64 input) and are cast back; ``tokens`` is never written to, and
    autograd flows through.
    """
    kept = take_kept(tokens, plan)
    if plan.absorbed.numel() == 0:
        return kept
    wide = torch.promote_types(tokens.dtype, torch.float32)
    self_weights = take_kept(plan.self_weights[..., None], plan).to(wide)
    edges = plan.weights.to(wide)[:, None] * tokens.flatten(0, 1)[plan.absorbed].to(wide)
    row = torch.div(plan.anchors, tokens.shape[1], rounding_mode="floor")
    target = row * kept.shape[1] + plan.new_columns.flatten()[plan.anchors]
    merged = (kept.to(wide) * self_weights).flatten(0, 1).index_add(0, target, edges)
    return merged.view(kept.shape).to(tokens.dtype)
