"""A merge plan is data: who stays, who is folded into whom, with which weight.

A rule decides inside segments: as a ``Fold``, where each token that goes has one survivor, or as a ``SegmentPlan``,
which can say anything. ``build_plan`` makes the plan of the whole batch of it.

Shapes: ``B`` rows of ``N`` tokens, ``K`` survivors per row, ``S`` segments of ``L`` tokens (padded), ``E`` edges from
an absorbed token to its anchor (per segment, or in all).
Everything that belongs to a token (hidden states, RoPE tables, positions, sizes) goes through the same plan.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from illava_hooks.merge.segments import Segments, aligned_rows, counting, made_once, ones, starts, zeros

__all__ = ["Fold", "MergePlan", "SegmentPlan", "apply_merge", "build_plan", "nearest_kept", "take_kept"]


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


@dataclass(frozen=True, slots=True)
class Fold:
    """A rule's decision where each token that goes is folded into one survivor: all else follows from that.

    Attributes:
        absorbed: ``(E,)`` int64, flat rows of the tokens that go.
        anchors: ``(E,)`` int64, flat rows of their survivors.
        weights: how tokens enter their survivor's new value: ``"size"``, the mean by token size; ``"none"``, not at
            all; or ``(E,)`` float32, and survivors in ``seats`` then consist of these alone.
        seats: ``(S,)`` int64, flat rows of survivors that are among ``absorbed`` themselves; None: there are none.
        joins: ``(E,)`` bool, with ``"size"``: False on tokens that are lost, so that their survivor stands for no more
            than before; None: nobody is.
    """

    absorbed: Tensor
    anchors: Tensor
    weights: Tensor | Literal["size", "none"]
    seats: Tensor | None = None
    joins: Tensor | None = None


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
        keep_rows: ``(B, K)`` int64, flat row of each survivor, ascending, right-aligned.
        keep_mask: ``(B, N)`` bool.
        holders: ``(B * N,)`` int64, flat row of the survivor that represents each token from now on.
        absorbed: ``(E,)`` int64, flat rows (of ``B * N``) that are folded into an anchor.
        anchors: ``(E,)`` int64, flat rows of the survivors that receive them.
        weights: ``(E,)`` float32; edges that only fill up a table have weight 0.
        self_weights: ``(B, N)`` float32, the weight with which a survivor enters its own new value.
        slots: ``(B, N)`` int64, flat place among the ``B * K`` survivors of each kept token (meaningless for others).
        columns_of: ``(B, N)`` int64, column among the survivors of each token's survivor.
        sizes: ``(B, N)`` float32, how many original tokens each survivor stands for from now on, or None: what the
            edges add up to. Tokens outside of all segments stand for one.
    """

    keep_rows: Tensor
    keep_mask: Tensor
    holders: Tensor
    absorbed: Tensor
    anchors: Tensor
    weights: Tensor
    self_weights: Tensor
    slots: Tensor
    columns_of: Tensor
    sizes: Tensor | None = None

    @property
    def keep_indices(self) -> Tensor:
        """``(B, K)`` int64, column of each survivor, ascending, right-aligned."""
        rows, width = self.keep_mask.shape
        return self.keep_rows - starts(rows, width, self.keep_rows.device)

    @property
    def survivor_of(self) -> Tensor:
        """``(B, N)`` int64, column of the survivor that represents each token from now on."""
        return self.holders.view(self.keep_mask.shape) % self.keep_mask.shape[1]

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
    local: SegmentPlan | Fold,
    segments: Segments,
    keep_mask: Tensor,
    num_kept: int,
    token_size: Tensor | None = None,
    *,
    full: bool = False,
) -> MergePlan:
    """Turns decisions inside segments into a plan for the batch.

    Args:
        local: the rule's decision.
        segments: where the segments lie among the ``B * N`` flat rows.
        keep_mask: ``(B, N)`` bool, tokens that exist (False on padding); tokens outside of all segments stay.
        num_kept: ``K``, planned on the host.
        token_size: ``(B, N)`` float32, how many original tokens each token stands for; None: itself.
        full: whether the host knows that each row keeps so many.
    """
    shape = keep_mask.shape
    single = ones((shape.numel(),), keep_mask.device)
    rows = counting(shape.numel(), keep_mask.device)
    if isinstance(local, Fold):
        sizes = single if token_size is None else token_size.flatten()
        decided = _folded(local, keep_mask.flatten(), rows, sizes, single)
    else:
        decided = _Decided(
            kept=segments.put(keep_mask.flatten(), local.kept),
            holders=segments.put(rows, segments.rows_of(local.survivor_of)),
            absorbed=segments.rows_of(local.absorbed).flatten(),
            anchors=segments.rows_of(local.anchors).flatten(),
            weights=local.weights.flatten(),
            self_weights=segments.put(single, local.self_weights),
            sizes=None if local.sizes is None else segments.put(single, local.sizes),
        )
    kept, size_of = decided.kept.view(shape), decided.sizes
    if size_of is not None and isinstance(local, Fold) and not full:
        size_of = size_of.clamp_min(1.0)  # who went has none, and fills up shorter rows: the next merge divides by it
    rank = kept.cumsum(-1)
    if not full:  # shorter rows lie on the right
        rank = rank + (num_kept - rank[:, -1:])
    new_columns = slots = rank - 1
    if len(kept) > 1:
        slots = slots + starts(len(kept), num_kept, slots.device)
    return MergePlan(
        keep_rows=aligned_rows(kept, num_kept, slots if full else None),
        keep_mask=kept,
        holders=decided.holders,
        absorbed=decided.absorbed,
        anchors=decided.anchors,
        weights=decided.weights,
        self_weights=decided.self_weights.view(shape),
        slots=slots,
        columns_of=new_columns.flatten()[decided.holders].view(shape),
        sizes=None if size_of is None else size_of.view(shape),
    )


@dataclass(frozen=True, slots=True)
class _Decided:
    """A decision in flat rows: as in ``MergePlan``, ``(B * N,)`` each."""

    kept: Tensor
    holders: Tensor
    absorbed: Tensor
    anchors: Tensor
    weights: Tensor
    self_weights: Tensor
    sizes: Tensor | None


def _folded(fold: Fold, exists: Tensor, rows: Tensor, sizes: Tensor, single: Tensor) -> _Decided:
    """What follows from who goes where; ``sizes`` and ``single``, ones, are ``(B * N,)`` float32."""
    absorbed, anchors, weights = fold.absorbed, fold.anchors, fold.weights
    kept, holders = exists.scatter(0, absorbed, False), rows.scatter(0, absorbed, anchors)
    if weights == "none":
        nobody = absorbed[:0]
        return _Decided(kept, holders, nobody, nobody, single[:0], single, sizes)
    if fold.joins is not None:
        sizes = sizes.scatter(0, absorbed, sizes[absorbed] * fold.joins)
    # Whole numbers, whose sums are exact in any order.
    total = zeros((len(sizes),), sizes.device).index_add(0, holders, sizes)
    if isinstance(weights, Tensor):
        own = single
        if fold.seats is not None:
            kept, own = kept.scatter_(0, fold.seats, True), single.scatter(0, fold.seats, 0.0)
        return _Decided(kept, holders, absorbed, anchors, weights, own, total)
    share = sizes / total[holders]
    return _Decided(kept, holders, absorbed, anchors, share[absorbed], share, total)


def take_kept(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Selects the survivors of ``(B, N, ...)``: ``(B, K, ...)``. For positions, which are never averaged."""
    return _taken(tokens.flatten(0, 1), plan)


def _taken(flat: Tensor, plan: MergePlan) -> Tensor:
    """The same of ``(B * N, ...)``."""
    return flat.index_select(0, plan.keep_rows.flatten()).view(*plan.keep_rows.shape, *flat.shape[1:])


def apply_merge(tokens: Tensor, plan: MergePlan) -> Tensor:
    """Merges ``(B, N, C)`` into ``(B, K, C)``.

    Sums run in float32 (float64 for float64 input) and are cast back; ``tokens`` is never written to, and
    autograd flows through.
    """
    flat = tokens.flatten(0, 1)
    kept = _taken(flat, plan)
    if plan.absorbed.numel() == 0:
        return kept
    # Weights are float32, and products with them at least as wide.
    edges = plan.weights[:, None] * flat.index_select(0, plan.absorbed)
    own = kept * take_kept(plan.self_weights, plan)[..., None]
    merged = own.flatten(0, 1).index_add_(0, plan.slots.flatten()[plan.anchors], edges)
    return merged.view(kept.shape).to(tokens.dtype)
