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

from illava_hooks.merge.segments import Segments, counting, made_once, ones, right_align, starts

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
        sizes: ``(S, L)`` float32, how many original tokens each survivor stands for from now on (meaningless for
            others); None: what the edges with weight add up to.
    """

    kept: Tensor
    absorbed: Tensor
    anchors: Tensor
    weights: Tensor
    self_weights: Tensor
    survivor_of: Tensor
    sizes: Tensor | None = None


def nearest_kept(kept: Tensor, lengths: Tensor | None) -> Tensor:
    """For each token the closest survivor by position, the earlier one on a tie: ``(S, L)`` int64.

    Args:
        kept: ``(S, L)`` bool.
        lengths: ``(S, 1)`` int64, tokens of each segment; None: ``L``.
    """
    segments, length = kept.shape
    device = kept.device
    columns = counting(length, device)
    usable = kept if lengths is None else kept & (columns < lengths)
    # Survivors in order, those that are none far behind; a token belongs to the next one beyond the middle of two.
    survivors = columns.expand_as(kept).masked_fill(~usable, 4 * length).sort(-1).values
    middles = survivors[:, :-1] + survivors[:, 1:]
    closest = torch.searchsorted(middles, _doubled(segments, length, device))
    return survivors.gather(1, closest).clamp_max(length - 1)


@made_once
def _doubled(segments: int, length: int, device: torch.device) -> Tensor:
    """``(S, L)`` int64: 0, 2, 4, ..."""
    return 2 * torch.arange(length, device="cpu").repeat(segments, 1)


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
        new_columns: ``(B, N)`` int64, column among the survivors of each kept token (meaningless for others).
        columns_of: ``(B, N)`` int64, column among the survivors of each token's survivor.
        sizes: ``(B, N)`` float32, how many original tokens each survivor stands for from now on, or None: what the
            edges add up to. Tokens outside of all segments stand for one.
    """

    keep_indices: Tensor
    keep_mask: Tensor
    survivor_of: Tensor
    absorbed: Tensor
    anchors: Tensor
    weights: Tensor
    self_weights: Tensor
    new_columns: Tensor
    columns_of: Tensor
    sizes: Tensor | None = None

    def follow(self, kept_at: Tensor) -> Tensor:
        """Maps a table of columns before the merge, ``(B, M)``, to the columns after it."""
        return self.columns_of.gather(1, kept_at)

    def grow(self, token_size: Tensor) -> Tensor:
        """How many original tokens each survivor stands for, ``(B, K)``, from the sizes before, ``(B, N)``.

        Edges of weight 0 only fill up a table, and some rules list an anchor among what it absorbs: neither adds.
        """
        if self.sizes is not None:
            return take_kept(self.sizes, self)
        sizes = token_size.flatten()
        gained = sizes[self.absorbed] * ((self.weights > 0) & (self.absorbed != self.anchors))
        return take_kept(sizes.index_add(0, self.anchors, gained).view_as(token_size), self)


def build_plan(
    local: SegmentPlan, segments: Segments, keep_mask: Tensor, num_kept: int, *, full: bool = False
) -> MergePlan:
    """Turns decisions inside segments into a plan for the batch.

    Args:
        local: the rule's decision, in token numbers inside each segment.
        segments: where the segments lie among the ``B * N`` flat rows.
        keep_mask: ``(B, N)`` bool, tokens that exist (False on padding); tokens outside of all segments stay.
        num_kept: ``K``, planned on the host.
        full: whether the host knows that each row keeps so many.
    """
    shape, device = keep_mask.shape, keep_mask.device
    kept = segments.put(keep_mask.flatten(), local.kept).view(shape)
    rank = kept.cumsum(-1)
    if not full:  # shorter rows lie on the right
        rank = rank + (num_kept - rank[:, -1:])
    new_columns, survivor_of = (rank - 1).clamp_min_(0), _columns(segments, local.survivor_of, shape)
    single = ones((shape.numel(),), device)
    return MergePlan(
        keep_indices=right_align(kept, num_kept),
        keep_mask=kept,
        survivor_of=survivor_of,
        absorbed=segments.rows_of(local.absorbed).flatten(),
        anchors=segments.rows_of(local.anchors).flatten(),
        weights=local.weights.flatten(),
        self_weights=segments.put(single, local.self_weights).view(shape),
        new_columns=new_columns,
        columns_of=new_columns.gather(1, survivor_of),
        sizes=None if local.sizes is None else segments.put(single, local.sizes).view(shape),
    )


def _columns(segments: Segments, survivor_of: Tensor, shape: torch.Size) -> Tensor:
    """``(B, N)`` int64, the column of each token's survivor, of numbers inside the segments ``(S, L)``."""
    width, device = shape[1], survivor_of.device
    if segments.dense and survivor_of.shape[1] == width:
        return survivor_of
    if shape[0] == 1:
        return segments.put(counting(width, device), segments.rows_of(survivor_of)).view(shape)
    columns = counting(width, device).expand(shape).reshape(-1)
    return segments.put(columns, segments.rows_of(survivor_of) % width).view(shape)


def take_kept(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Selects the survivors of ``(B, N, ...)``: ``(B, K, ...)``. For positions, which are never averaged."""
    return tokens[counting(len(tokens), tokens.device)[:, None], plan.keep_indices]


def apply_merge(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Merges ``(B, N, C)`` into ``(B, K, C)``.

    Sums run in float32 (float64 for float64 input) and are cast back; ``tokens`` is never written to, and
    autograd flows through.
    """
    kept = take_kept(tokens, plan)
    if plan.absorbed.numel() == 0:
        return kept
    # Weights are float32, and products with them at least as wide.
    edges = plan.weights[:, None] * tokens.flatten(0, 1)[plan.absorbed]
    slots = plan.new_columns
    if len(tokens) > 1:
        slots = slots + starts(len(tokens), kept.shape[1], tokens.device)
    own = kept * take_kept(plan.self_weights[..., None], plan)
    merged = own.flatten(0, 1).index_add(0, slots.flatten()[plan.anchors], edges)
    return merged.view(kept.shape).to(tokens.dtype)
