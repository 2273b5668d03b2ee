"""Merge rules: from scores to a decision inside each segment.

Shapes: ``S`` segments of ``L`` tokens (padded), ``R`` the largest number removed in any segment, ``Q`` tokens that
look for a match, ``E`` edges per segment. Scores are float32, higher means keep; padding and protected tokens carry
``+inf``. All rules break ties by position: of two equal scores the earlier token goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from illava_hooks.merge.kernels.devices import takes
from illava_hooks.merge.plan import SegmentPlan, nearest_kept
from illava_hooks.merge.segments import counting, everybody, host_table, made_once, ones, starts

__all__ = [
    "KEYLESS_RULES",
    "RULES",
    "MergeRule",
    "RuleInputs",
    "assemble",
    "best_match",
    "bipartite",
    "closest_above",
    "cluster",
    "diverse",
    "drop",
    "nearest",
    "recycle",
]

#: Elements of one block of similarities (16 MB in float32).
BLOCK_ELEMENTS = 1 << 22


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
        return counting(num, self.scores.device)[None]

    @property
    def even(self) -> bool:
        """Whether all segments have as many tokens and lose as many: tables have no padding then."""
        return len({*self.lengths}) == 1 and len({*self.num_removed}) == 1


class MergeRule(Protocol):
    """A function that decides one merge; give your own to ``Method(merge=...)``."""

    def __call__(self, inputs: RuleInputs) -> SegmentPlan:
        """Returns the decision for all segments at once."""
        ...


def assemble(
    inputs: RuleInputs,
    kept: Tensor,
    absorbed: Tensor,
    anchors: Tensor,
    weights: Tensor,
    self_weights: Tensor,
    *,
    holders: Tensor | None = None,
    sizes: Tensor | None = None,
) -> SegmentPlan:
    """Completes a plan: tokens with an edge are held by their heaviest anchor, others by the nearest kept.

    Where each token that goes has one edge, ``holders`` ``(S, E)`` says who holds it, and of edges that only fill up
    the table that who stays holds itself. ``sizes`` as in ``SegmentPlan``.
    """
    if holders is not None:
        survivor_of = inputs.slots(kept.shape[1]).expand_as(kept).scatter(1, absorbed, holders)
        return SegmentPlan(kept, absorbed, anchors, weights, self_weights, survivor_of, sizes)
    survivor_of = nearest_kept(kept, None if len({*inputs.lengths}) == 1 else inputs.count(inputs.lengths))
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
    return SegmentPlan(kept, absorbed, anchors, weights, self_weights, survivor_of, sizes)


# ---------------------------------------------------------------------- the rules


def _ascending(inputs: RuleInputs) -> Tensor:
    return torch.argsort(inputs.scores, dim=-1, stable=True)


def _lowest(inputs: RuleInputs, scores: Tensor | None = None) -> tuple[Tensor, Tensor | None, Tensor]:
    """Ascending order, the mask of edges in use ``(S, R)`` (None: all), and who stays ``(S, L)``."""
    order = _ascending(inputs) if scores is None else torch.argsort(scores, dim=-1, stable=True)
    lowest, used = order[:, : max(inputs.num_removed)], _used(inputs)
    kept = everybody(order.shape, order.device)
    if used is None:
        return order, None, kept.scatter(1, lowest, False)
    return order, used, kept.scatter(1, lowest, _slots_in_use(inputs.num_removed, False, order.device))


def _used(inputs: RuleInputs) -> Tensor | None:
    """``(S, R)`` bool, which of as many edges as the most that is removed a segment uses; None: all."""
    return None if inputs.even else _slots_in_use(inputs.num_removed, True, inputs.scores.device)


@made_once
def _slots_in_use(counts: tuple[int, ...], used: bool, device: torch.device) -> Tensor:
    """``(S, R)`` bool: ``used`` on the first so many slots of each segment, its opposite on the rest."""
    slots = torch.arange(max(counts), device="cpu")
    return (slots < torch.tensor(counts, device="cpu")[:, None]) == used


def drop(inputs: RuleInputs) -> SegmentPlan:
    """Loses the lowest-scored tokens (with the last query's attention as score: FastV, arXiv 2403.06764)."""
    order, _, kept = _lowest(inputs)
    none, own = order[:, :0], ones(kept.shape, kept.device)
    return assemble(inputs, kept, none, none, own[:, :0], own)


def recycle(inputs: RuleInputs) -> SegmentPlan:
    """Folds the ``r + 1`` lowest-scored tokens into one (iLLaVA v1, arXiv 2412.06263v1).

    With ``a_0 .. a_r`` ascending by score, the new token is
    ``sum_j (r + 1 - j) x[a_j] / ((r + 1)(r + 2) / 2)`` in the seat of ``a_r``: the lowest-scored token gets the
    largest weight, as in both published stages. If the layout will crop that seat away, the highest-ranked
    member inside takes its place.
    """
    removed, device = inputs.num_removed, inputs.scores.device
    members = _ascending(inputs)[:, : max(removed) + 1]
    in_use = None if inputs.even else _slots_in_use(tuple(n + 1 for n in removed), True, device)
    last, seat = inputs.count(removed), members[:, -1:]
    if inputs.visible is not None:
        inside = inputs.visible.gather(1, members)
        inside = inside if in_use is None else inside & in_use
        # The highest rank inside; where nobody is, the last one of all.
        best = (inside * inputs.slots(members.shape[1])).amax(1, keepdim=True)
        last = torch.where(inside.any(1, keepdim=True), best, last)
    if inputs.visible is not None or in_use is not None:
        seat = members.gather(1, last)
    members = members if in_use is None else torch.where(in_use, members, seat)
    self_weights = ones(inputs.scores.shape, device).scatter(1, seat, 0.0)
    kept = everybody(inputs.scores.shape, device).scatter(1, members, False).scatter(1, seat, True)
    weights, mass = _shares(removed, device), inputs.token_size.gather(1, members)
    anchors = seat.expand_as(members)
    together = (mass if in_use is None else mass * in_use).sum(1, keepdim=True)
    sizes = inputs.token_size.scatter(1, seat, together)
    return assemble(inputs, kept, members, anchors, weights, self_weights, holders=anchors, sizes=sizes)


@made_once
def _shares(removed: tuple[int, ...], device: torch.device) -> Tensor:
    """``(S, R + 1)`` float32, the weight of each rank in the one token that the lowest become; 0 beyond."""
    counts = torch.tensor(removed, device="cpu")[:, None]
    share = (counts + 1 - torch.arange(max(removed) + 1, device="cpu")).clamp_min(0).to(torch.float32)
    return share / ((counts + 1) * (counts + 2) // 2)


def cluster(inputs: RuleInputs) -> SegmentPlan:
    """Feeds the lowest-scored survivors from their most similar redundant tokens (iLLaVA v2, ICLR 2026).

    Of ``n`` survivors the last ``max(1, round(0.05 n))`` are recycling tokens. Each takes its 5 most similar
    redundant tokens (dot product of hidden states), weighted by ``softmax(similarity / sqrt(d))``, and becomes
    the mean of itself and that sum. Redundant tokens that nobody takes are lost.
    """
    order, _, kept = _lowest(inputs)
    most, used = max(inputs.num_removed), inputs.count(inputs.num_removed)
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
    redundant_used = inputs.slots(most) < used
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
    return _fold(inputs, _comparable(inputs.keys()), order, kept, used)


def diverse(inputs: RuleInputs) -> SegmentPlan:
    """Keeps tokens that no higher-scored token resembles; each other one joins its most similar survivor.

    A token's novelty is its distance (1 - cosine of hidden states) to the most similar token with a higher score; the
    ``r`` least novel ones are redundant. Of many alike tokens, such as background, the best-scored one stays, however
    low all of them score: one parallel look at what farthest-point sampling finds one by one. Joined tokens are
    averaged, weighted by token size. Hidden states, not keys: rotary keys of like things in two places differ.
    """
    states, order = _comparable(inputs.hidden()), _ascending(inputs)
    if takes(states.device):
        closest, _ = _search(inputs, states, order)
    else:
        inside = inputs.slots(order.shape[1]) < inputs.count(inputs.lengths)
        closest = closest_above(take_rows(states, order), inside.gather(1, order))
    novelty = torch.empty_like(closest).scatter_(1, order, (1 - closest).nan_to_num_(-torch.inf, torch.inf))
    novelty = novelty.masked_fill_(inputs.scores == torch.inf, torch.inf)
    order, used, kept = _lowest(inputs, novelty)
    return _fold(inputs, states, order, kept, used)


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
    used = _used(inputs)
    used = None if used is None else used[:, : order.shape[1]]
    absorbed = even_index.expand_as(best).gather(1, order)
    anchors = 2 * partner.gather(1, order) + 1
    return average(inputs, ~mark(absorbed, used, inputs.scores), absorbed, anchors, used)


def _fold(inputs: RuleInputs, features: Tensor, order: Tensor, kept: Tensor, used: Tensor | None) -> SegmentPlan:
    """Averages the tokens that come first in an order into the survivors that resemble them most."""
    absorbed = order[:, : max(inputs.num_removed)]
    if takes(features.device):
        _, match = _search(inputs, features, order, inputs.count(inputs.num_removed))
        anchors = match[:, : absorbed.shape[1]]
        if max(inputs.num_removed) > min(inputs.lengths):
            # Edges that only fill up the table lead from padding as well, and must point at a survivor: the best one.
            best = order.gather(1, inputs.count([n - 1 for n in inputs.lengths]))
            anchors = torch.where(_slots_in_use(inputs.num_removed, True, order.device), anchors, best)
    else:
        inside = inputs.slots(kept.shape[1]) < inputs.count(inputs.lengths)
        anchors = best_match(features, absorbed, kept & inside)
    return average(inputs, kept, absorbed, anchors, used)


def _comparable(features: Tensor) -> Tensor:
    """Features whose products are cosines; kernels divide by lengths themselves."""
    return features if takes(features.device) else unit_vectors(features)


def _search(
    inputs: RuleInputs, features: Tensor, order: Tensor, splits: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """``kernels.ops.most_similar`` in padded segments: ``(S, L)`` cosines, and numbers in the segment."""
    from illava_hooks.merge.kernels.ops import most_similar

    segments, length = order.shape
    begins = starts(segments, length, order.device)
    ends = inputs.count([i * length + n for i, n in enumerate(inputs.lengths)])
    cuts = None if splits is None else splits[:, 0]
    best, match = most_similar(features.flatten(0, 1), order.flatten(), begins[:, 0], ends[:, 0], length, cuts)
    return best.view_as(order), match.view_as(order)


# ---------------------------------------------------------------------- what rules by similarity share


def unit_vectors(features: Tensor) -> Tensor:
    """``(S, L, D)`` at length 1, in float32 at least."""
    wide = features.to(torch.promote_types(features.dtype, torch.float32))
    return torch.nn.functional.normalize(wide, dim=-1)


def closest_above(features: Tensor, valid: Tensor) -> Tensor:
    """The cosine of each token to the most similar one behind it, in blocks of rows that look only that far.

    Args:
        features: ``(S, L, D)`` unit vectors, in the order that counts.
        valid: ``(S, L)`` bool, False on who is no match.

    Returns:
        ``(S, L)``, ``-inf`` where nobody is behind.
    """
    segments, length, _ = features.shape
    # An eighth of the rows at a time leaves out nearly half of all products.
    rows = max(1, min(-(-length // 8), BLOCK_ELEMENTS // (segments * length)))
    place = torch.arange(length, device=features.device)
    found = []
    for first in range(0, length, rows):
        similarity = features[:, first : first + rows] @ features[:, first:].transpose(1, 2)
        hidden = place[first:] <= place[first : first + rows, None]
        similarity.masked_fill_(hidden | ~valid[:, None, first:], -torch.inf)
        found.append(similarity.amax(-1))
    return torch.cat(found, 1)


def best_match(features: Tensor, tokens: Tensor, allowed: Tensor) -> Tensor:
    """For each of some tokens the most similar one that is allowed, in blocks of rows.

    Args:
        features: ``(S, L, D)`` unit vectors.
        tokens: ``(S, Q)`` int64.
        allowed: ``(S, L)`` bool, whom they may match.

    Returns:
        Number of the match, ``(S, Q)``; of equals the first.
    """
    segments, length, _ = features.shape
    rows = max(1, BLOCK_ELEMENTS // (segments * length))
    found = []
    for first in range(0, tokens.shape[1], rows):
        similarity = take_rows(features, tokens[:, first : first + rows]) @ features.transpose(1, 2)
        found.append(similarity.masked_fill_(~allowed[:, None], -torch.inf).max(-1).indices)
    return torch.cat(found, 1) if found else tokens


def average(inputs: RuleInputs, kept: Tensor, absorbed: Tensor, anchors: Tensor, used: Tensor | None) -> SegmentPlan:
    """Size-weighted means of the anchors and what they absorb; each token is absorbed once."""
    size = inputs.token_size
    mass = size.gather(1, absorbed)
    mass = mass if used is None else mass * used
    total = size.scatter_add(1, anchors, mass)
    # Unused edges stay inside the table: they point at a survivor and weigh nothing.
    weights = mass / total.gather(1, anchors)
    holders = anchors if used is None else torch.where(used, anchors, absorbed)
    return assemble(inputs, kept, absorbed, anchors, weights, size / total, holders=holders, sizes=total)


def mark(index: Tensor, used: Tensor | None, like: Tensor) -> Tensor:
    """``(S, L)`` bool, True at each ``index`` that is in use; None: all are."""
    count = torch.zeros_like(like, dtype=torch.int64)
    hits = torch.ones_like(index) if used is None else used.to(torch.int64).expand_as(index)
    return count.scatter_add(1, index, hits) > 0


def take_rows(table: Tensor, index: Tensor) -> Tensor:
    """Rows ``index`` ``(S, ...)`` of a table ``(S, L, C)``: ``(S, ..., C)``."""
    return table.gather(1, index[..., None].expand(*index.shape, table.shape[-1]))


#: Merge rules by name.
RULES: dict[str, MergeRule] = {
    "recycle": recycle,
    "cluster": cluster,
    "nearest": nearest,
    "diverse": diverse,
    "bipartite": bipartite,
    "drop": drop,
}

#: Rules that look at no keys: where scores need none either, no attention is listened to.
KEYLESS_RULES: tuple[MergeRule, ...] = (recycle, cluster, diverse, drop)
