"""Merge rules: from scores to a decision inside each segment.

Shapes: ``S`` segments of ``L`` tokens (padded), ``R`` the largest number removed in any segment, ``E`` edges
per segment. Scores are float32, higher means keep; padding and protected tokens carry ``+inf``. All rules
break ties by position: of two equal scores the earlier token goes first.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from illava_hooks.merge.decision import RuleInputs, SegmentPlan, assemble
from illava_hooks.merge.matching import average, best_match, closest_above, mark, take_rows, unit_vectors

__all__ = ["RULES", "MergeRule", "bipartite", "cluster", "diverse", "drop", "nearest", "recycle"]


class MergeRule(Protocol):
    """A function that decides one merge; give your own to ``Method(merge=...)``."""

    def __call__(self, inputs: RuleInputs) -> SegmentPlan:
        """Returns the decision for all segments at once."""
        ...


def _ascending(inputs: RuleInputs) -> Tensor:
    return torch.argsort(inputs.scores, dim=-1, stable=True)


def _lowest(inputs: RuleInputs, scores: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor]:
    """Ascending order, the mask of edges in use ``(S, R)``, and who stays ``(S, L)``."""
    order = _ascending(inputs) if scores is None else torch.argsort(scores, dim=-1, stable=True)
    used = inputs.slots(max(inputs.num_removed)) < inputs.count(inputs.num_removed)
    return order, used, _rank(inputs, order) >= inputs.count(inputs.num_removed)


def _rank(inputs: RuleInputs, order: Tensor) -> Tensor:
    """The place of each token in an order, ``(S, L)``."""
    return torch.empty_like(order).scatter_(1, order, inputs.slots(order.shape[1]).expand_as(order))


def drop(inputs: RuleInputs) -> SegmentPlan:
    """Loses the lowest-scored tokens (with the last query's attention as score: FastV, arXiv 2403.06764)."""
    order, _, kept = _lowest(inputs)
    none = order[:, :0]
    ones = torch.ones_like(inputs.scores)
    return assemble(inputs, kept, none, none, ones[:, :0], ones)


def recycle(inputs: RuleInputs) -> SegmentPlan:
    """Folds the ``r + 1`` lowest-scored tokens into one (iLLaVA v1, arXiv 2412.06263v1).

    With ``a_0 .. a_r`` ascending by score, the new token is
    ``sum_j (r + 1 - j) x[a_j] / ((r + 1)(r + 2) / 2)`` in the seat of ``a_r``: the lowest-scored token gets the
    largest weight, as in both published stages. If the layout will crop that seat away, the highest-ranked
    member inside takes its place.
    """
    removed = inputs.count(inputs.num_removed)
    order = _ascending(inputs)
    members = order[:, : max(inputs.num_removed) + 1]
    rank = inputs.slots(members.shape[1])
    share = (removed + 1 - rank).clamp_min(0).to(torch.float32)
    weights = share / ((removed + 1) * (removed + 2) // 2)
    last = removed
    if inputs.visible is not None:
        inside = inputs.visible.gather(1, members) & (rank <= removed)
        best = torch.where(inside, rank, -1).amax(1, keepdim=True)
        last = torch.where(best < 0, removed, best)
    seat = members.gather(1, last)
    in_use = rank <= removed
    members = torch.where(in_use, members, seat)
    kept = torch.ones_like(inputs.scores, dtype=torch.bool).scatter(1, members, False).scatter(1, seat, True)
    self_weights = torch.ones_like(inputs.scores).scatter(1, seat, 0.0)
    return assemble(inputs, kept, members, seat.expand_as(members), weights, self_weights)


def cluster(inputs: RuleInputs) -> SegmentPlan:
    """Feeds the lowest-scored survivors from their most similar redundant tokens (iLLaVA v2, ICLR 2026).

    Of ``n`` survivors the last ``max(1, round(0.05 n))`` are recycling tokens. Each takes its 5 most similar
    redundant tokens (dot product of hidden states), weighted by ``softmax(similarity / sqrt(d))``, and becomes
    the mean of itself and that sum. Redundant tokens that nobody takes are lost.
    """
    order, _, kept = _lowest(inputs)
    most = max(inputs.num_removed)
    if most == 0:
        return drop(inputs)
    num_kept = [n - r for n, r in zip(inputs.lengths, inputs.num_removed, strict=True)]
    num_recycling = [max(1, round(0.05 * n)) if r else 0 for n, r in zip(num_kept, inputs.num_removed, strict=True)]
    states = inputs.hidden()
    hidden = states.to(torch.promote_types(states.dtype, torch.float32))
    width = hidden.shape[-1]
    last_rank = order.shape[1] - 1
    slot = inputs.slots(max(num_recycling))
    anchors = order.gather(1, (inputs.count(inputs.num_removed) + slot).clamp_max(last_rank))
    anchor_used = slot < inputs.count(num_recycling)
    redundant = order[:, :most]
    redundant_used = inputs.slots(most) < inputs.count(inputs.num_removed)
    similarity = torch.einsum("smc,src->smr", take_rows(hidden, anchors), take_rows(hidden, redundant))
    similarity = similarity.masked_fill(~redundant_used[:, None], -torch.inf)
    ranked, picked = torch.sort(similarity, dim=-1, descending=True, stable=True)
    ranked, picked = ranked[..., :5], picked[..., :5]
    weights = 0.5 * torch.softmax(ranked / width**0.5, dim=-1).nan_to_num(0.0) * anchor_used[..., None]
    absorbed = redundant.gather(1, picked.flatten(1)).view_as(picked)
    ones = torch.ones_like(inputs.scores)
    fed = mark(anchors, anchor_used, kept)
    return assemble(
        inputs,
        kept,
        absorbed.flatten(1),
        anchors[..., None].expand_as(picked).flatten(1),
        weights.flatten(1).to(torch.float32),
        torch.where(fed, 0.5 * ones, ones),
    )


def nearest(inputs: RuleInputs) -> SegmentPlan:
    """Averages each redundant token into its most similar survivor (cosine of keys, weighted by token size)."""
    order, used, kept = _lowest(inputs)
    return _fold(inputs, unit_vectors(inputs.keys()), kept, order[:, : used.shape[1]], used)


def diverse(inputs: RuleInputs) -> SegmentPlan:
    """Keeps tokens that no higher-scored token resembles; each other one joins its most similar survivor.

    A token's novelty is its distance (1 - cosine of hidden states) to the most similar token with a higher score; the
    ``r`` least novel ones are redundant. Of many alike tokens, such as background, the best-scored one stays, however
    low all of them score: one parallel look at what farthest-point sampling finds one by one. Joined tokens are
    averaged, weighted by token size. Hidden states, not keys: rotary keys of like things in two places differ.
    """
    states, order = unit_vectors(inputs.hidden()), _ascending(inputs)
    inside = inputs.slots(order.shape[1]) < inputs.count(inputs.lengths)
    closest = closest_above(take_rows(states, order), inside.gather(1, order))
    novelty = torch.empty_like(closest).scatter_(1, order, 1 - closest)
    novelty = torch.where(inputs.scores < torch.inf, novelty.nan_to_num(-torch.inf, torch.inf), torch.inf)
    order, used, kept = _lowest(inputs, novelty)
    return _fold(inputs, states, kept, order[:, : used.shape[1]], used)


def bipartite(inputs: RuleInputs) -> SegmentPlan:
    """ToMe's matching (Bolya et al., arXiv 2210.09461): even tokens propose to odd ones by key similarity.

    The ``r`` most similar pairs merge, weighted by token size; scores are not used. At most half of a segment
    can go, so ``r`` is clamped to that.
    """
    keys = unit_vectors(inputs.keys())
    even, odd = keys[:, ::2], keys[:, 1::2]
    lengths = inputs.count(inputs.lengths)
    even_index = 2 * inputs.slots(even.shape[1])
    if odd.shape[1] == 0:
        return drop(inputs)
    similarity = even @ odd.transpose(1, 2)
    similarity = similarity.masked_fill((2 * inputs.slots(odd.shape[1]) + 1 >= lengths)[:, None], -torch.inf)
    best, partner = similarity.max(-1)
    # A protected or padded token proposes to nobody.
    free = inputs.scores[:, ::2] < torch.inf
    best = best.masked_fill(~free, -torch.inf)
    order = torch.argsort(best, dim=-1, descending=True, stable=True)[:, : max(inputs.num_removed)]
    used = inputs.slots(order.shape[1]) < inputs.count(inputs.num_removed)
    absorbed = even_index.expand_as(best).gather(1, order)
    anchors = 2 * partner.gather(1, order) + 1
    return average(inputs, ~mark(absorbed, used, inputs.scores), absorbed, anchors, used)


def _fold(inputs: RuleInputs, features: Tensor, kept: Tensor, absorbed: Tensor, used: Tensor) -> SegmentPlan:
    """Averages the ``absorbed`` tokens into the survivors that resemble them most."""
    inside = inputs.slots(kept.shape[1]) < inputs.count(inputs.lengths)
    anchors = best_match(features, absorbed, kept & inside)
    return average(inputs, kept, absorbed, anchors, used)


#: Merge rules by name.
RULES: dict[str, MergeRule] = {
    "recycle": recycle,
    "cluster": cluster,
    "nearest": nearest,
    "diverse": diverse,
    "bipartite": bipartite,
    "drop": drop,
}
