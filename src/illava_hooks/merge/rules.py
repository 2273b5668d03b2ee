"""Merge rules: from scores to a decision inside each segment.

Shapes: ``S`` segments of ``L`` tokens (padded), ``R`` the largest number removed in any segment, ``Q`` tokens that
look for a match, ``E`` edges per segment. Scores are float32, higher means keep; padding and protected tokens carry
``+inf``. All rules break ties by position: of two equal scores the earlier token goes first.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Protocol

import torch
from torch import Tensor

from illava_hooks.merge.kernels.devices import takes
from illava_hooks.merge.plan import Fold, SegmentPlan, nearest_kept
from illava_hooks.merge.rule_inputs import RuleInputs
from illava_hooks.merge.segments import everybody, host_table, made_once, repeated

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
    "selective",
]

#: Elements of one block of similarities (16 MB in float32).
BLOCK_ELEMENTS = 1 << 22
#: The centred cosine from which on ``selective`` averages two tokens; chosen on validation questions.
ALIKE = 0.5


class MergeRule(Protocol):
    """A function that decides one merge; give your own to ``Method(merge=...)``."""

    def __call__(self, inputs: RuleInputs) -> SegmentPlan | Fold:
        """Returns the decision for all segments at once."""
        ...


def assemble(
    inputs: RuleInputs, kept: Tensor, absorbed: Tensor, anchors: Tensor, weights: Tensor, self_weights: Tensor
) -> SegmentPlan:
    """Completes a plan: tokens with an edge are held by their heaviest anchor, others by the nearest kept."""
    survivor_of = _nearest(inputs, kept)
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


def _nearest(inputs: RuleInputs, kept: Tensor) -> Tensor:
    return nearest_kept(kept, None if len({*inputs.lengths}) == 1 else inputs.count(inputs.lengths))


# ---------------------------------------------------------------------- the rules


def _ascending(inputs: RuleInputs) -> Tensor:
    return torch.argsort(inputs.scores, dim=-1, stable=True)


def _who_stays(inputs: RuleInputs, order: Tensor) -> Tensor:
    """``(S, L)`` bool, False on the first so many of each segment in an order."""
    gone = order[:, : max(inputs.num_removed)]
    kept = everybody(order.shape, order.device)
    if inputs.even:
        return kept.scatter(1, gone, False)
    return kept.scatter(1, gone, _slots_in_use(inputs.num_removed, False, order.device))


@made_once
def _slots_in_use(counts: tuple[int, ...], used: bool, device: torch.device) -> Tensor:
    """``(S, R)`` bool: ``used`` on the first so many slots of each segment, its opposite on the rest."""
    slots = torch.arange(max(counts), device="cpu")
    return (slots < torch.tensor(counts, device="cpu")[:, None]) == used


def drop(inputs: RuleInputs) -> Fold:
    """Loses the lowest-scored tokens (with the last query's attention as score: FastV, arXiv 2403.06764)."""
    order = _ascending(inputs)
    absorbed = order[:, : max(inputs.num_removed)]
    # Who is lost shows the nearest that stayed.
    shown = _nearest(inputs, _who_stays(inputs, order)).gather(1, absorbed)
    return Fold(inputs.rows(absorbed, inputs.num_removed), inputs.rows(shown, inputs.num_removed), "none")


def recycle(inputs: RuleInputs) -> Fold:
    """Folds the ``r + 1`` lowest-scored tokens into one (iLLaVA v1, arXiv 2412.06263v1).

    With ``a_0 .. a_r`` ascending by score, the new token is
    ``sum_j (r + 1 - j) x[a_j] / ((r + 1)(r + 2) / 2)`` in the seat of ``a_r``: the lowest-scored token gets the
    largest weight, as in both published stages. If the layout will crop that seat away, the highest-ranked
    member inside takes its place.
    """
    removed, device, visible = inputs.num_removed, inputs.scores.device, inputs.visible
    counts = tuple(n + 1 for n in removed)
    members = _ascending(inputs)[:, : max(counts)]
    rows, last = inputs.where.rows_of(members), inputs.count(removed)
    seats = rows[:, -1:]
    if visible is not None:
        inside = visible.gather(1, members)
        inside = inside if inputs.even else inside & _slots_in_use(counts, True, device)
        # The highest rank inside; where nobody is, -1 is the last one of all.
        best = torch.where(inside, inputs.slots(members.shape[1]), host_table((-1,), device)).amax(1, keepdim=True)
        last = best.remainder(inputs.count(counts))
    if visible is not None or not inputs.even:
        seats = rows.gather(1, last)
    seats = seats[:, 0]
    anchors = (
        seats[:, None].expand_as(members).flatten()
        if inputs.even
        else seats[repeated(range(len(counts)), counts, device)]
    )
    return Fold(inputs.firsts(rows, counts), anchors, _shares(removed, device), seats)


@made_once
def _shares(removed: tuple[int, ...], device: torch.device) -> Tensor:
    """``(E,)`` float32, the weight of each rank in the one token that the lowest of a segment become."""
    counts = torch.tensor(removed, device="cpu")[:, None]
    share = counts + 1 - torch.arange(max(removed) + 1, device="cpu")
    return (share.to(torch.float32) / ((counts + 1) * (counts + 2) // 2))[share > 0]


def cluster(inputs: RuleInputs) -> SegmentPlan | Fold:
    """Feeds the lowest-scored survivors from their most similar redundant tokens (iLLaVA v2, ICLR 2026).

    Of ``n`` survivors the last ``max(1, round(0.05 n))`` are recycling tokens. Each takes its 5 most similar
    redundant tokens (dot product of hidden states), weighted by ``softmax(similarity / sqrt(d))``, and becomes
    the mean of itself and that sum. Redundant tokens that nobody takes are lost.
    """
    most, used = max(inputs.num_removed), inputs.count(inputs.num_removed)
    if most == 0:
        return drop(inputs)
    order = _ascending(inputs)
    kept = _who_stays(inputs, order)
    num_kept = [n - r for n, r in zip(inputs.lengths, inputs.num_removed, strict=True)]
    num_recycling = [max(1, round(0.05 * n)) if r else 0 for n, r in zip(num_kept, inputs.num_removed, strict=True)]
    states = inputs.hidden()
    hidden = states.to(torch.promote_types(states.dtype, torch.float32))
    width = hidden.shape[-1]
    last_rank = order.shape[1] - 1
    slot = inputs.slots(max(num_recycling))
    anchors = order.gather(1, (inputs.count(inputs.num_removed) + slot).clamp_max(last_rank))
    anchor_used = slot < inputs.count(num_recycling)
    anchors = torch.where(anchor_used, anchors, anchors[:, :1])  # behind a short segment lies somebody who may go
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


def nearest(inputs: RuleInputs) -> Fold:
    """Averages each redundant token into its most similar survivor (cosine of keys, weighted by token size)."""
    order = _ascending(inputs)
    if takes(order.device):
        return _match(inputs, _flat(inputs.flat_keys, inputs.keys), order)
    return _fold(inputs, unit_vectors(inputs.keys()), order)


def diverse(inputs: RuleInputs) -> Fold:
    """Keeps tokens that no higher-scored token resembles; each other one joins its most similar survivor.

    A token's novelty is its distance (1 - cosine of hidden states) to the most similar token with a higher score; the
    ``r`` least novel ones are redundant. Of many alike tokens, such as background, the best-scored one stays, however
    low all of them score: one parallel look at what farthest-point sampling finds one by one. Joined tokens are
    averaged, weighted by token size. Hidden states, not keys: rotary keys of like things in two places differ.
    """
    order = _ascending(inputs)
    if takes(order.device):
        from illava_hooks.merge.kernels.ops import closest_behind

        states, rows = _flat(inputs.flat_hidden, inputs.hidden), inputs.where.rows
        lengths = host_table(inputs.lengths, order.device)
        return _match(inputs, states, _closest_first(closest_behind(states, rows, order, lengths, inputs.scores)))
    states = unit_vectors(inputs.hidden())
    inside = inputs.slots(order.shape[1]) < inputs.count(inputs.lengths)
    behind = closest_above(take_rows(states, order), inside.gather(1, order))
    closest = torch.empty_like(behind).scatter_(1, order, behind)
    # Protected: as novel as who has nobody above.
    return _fold(inputs, states, _closest_first(closest.masked_fill_(inputs.scores == torch.inf, -torch.inf)))


def selective(inputs: RuleInputs, alike: float = ALIKE) -> Fold:
    """As ``diverse``, but a token that no survivor resembles is lost instead of averaged into one.

    Hidden states of a layer share a direction (they are anisotropic: Ethayarajh, arXiv 1909.00512), so that all of
    them resemble each other by plain cosine, and at small budgets a mean is of tokens that have little in common.
    What counts here is the cosine between a token and its survivor, both less the mean of their segment: below
    ``alike`` the token is dropped, and its survivor does not count for more. That plain merging, plain dropping or a
    choice between them by layer fits better was noted before (Token Fusion, Kim et al., arXiv 2312.01026).
    """
    fold = diverse(inputs)
    return replace(fold, joins=_centred_cosine(inputs, fold) >= alike)


def _centred_cosine(inputs: RuleInputs, fold: Fold) -> Tensor:
    """``(E,)`` float32 at least: of each token that goes and its survivor, both less the mean of their segment."""
    tables, rows = inputs.hidden(), _flat(inputs.flat_hidden, inputs.hidden)
    wide = torch.promote_types(rows.dtype, torch.float32)
    inside = inputs.slots(tables.shape[1]) < inputs.count(inputs.lengths)
    means = (tables * inside[..., None]).sum(1, dtype=wide) / inputs.count(inputs.lengths)
    middle = means[repeated(range(len(means)), inputs.num_removed, rows.device)]
    first, second = (rows[tokens].to(wide) - middle for tokens in (fold.absorbed, fold.anchors))
    return torch.nn.functional.cosine_similarity(first, second, dim=-1)


def _closest_first(closest: Tensor) -> Tensor:
    """Order of tokens by a cosine, the largest first; no number, which broken pixels give, comes out in front."""
    return torch.argsort(closest, dim=-1, descending=True, stable=True)


def bipartite(inputs: RuleInputs) -> Fold:
    """ToMe's matching (Bolya et al., arXiv 2210.09461): even tokens propose to odd ones by key similarity.

    The ``r`` most similar pairs merge, weighted by token size; scores are not used. At most half of a segment
    can go, so ``r`` is clamped to that.
    """
    if inputs.scores.shape[1] == 1:
        return drop(inputs)
    best, pairs = (_proposals_by_kernel if takes(inputs.scores.device) else _proposals)(inputs)
    # A protected or padded token proposes to nobody.
    best = best.masked_fill(inputs.scores[:, ::2] == torch.inf, -torch.inf)
    order = _closest_first(best)[:, : max(inputs.num_removed)]
    absorbed, anchors = inputs.firsts(pairs.gather(2, order.expand(2, *order.shape)), inputs.num_removed).unbind()
    return Fold(absorbed, anchors, "size")


def _proposals(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """The best cosine of each even token to an odd one, ``(S, E)``, and the rows of both, ``(2, S, E)``."""
    keys = unit_vectors(inputs.keys())
    similarity = keys[:, ::2] @ keys[:, 1::2].transpose(1, 2)
    beyond = _slots_in_use(inputs.lengths, False, inputs.scores.device)
    best, partner = similarity.masked_fill(beyond[:, None, 1::2], -torch.inf).max(-1)
    even = 2 * inputs.slots(best.shape[1]).expand_as(best)
    return best, torch.stack([inputs.where.rows_of(tokens) for tokens in (even, 2 * partner + 1)])


def _proposals_by_kernel(inputs: RuleInputs) -> tuple[Tensor, Tensor]:
    """The same in one launch; it divides by lengths of its own, so that of almost equals another may be found."""
    from illava_hooks.merge.kernels.ops import match_behind

    device, longest = inputs.scores.device, inputs.scores.shape[1]
    # Who is alone has nobody to propose to.
    lengths, even = (
        host_table(n, device) for n in (inputs.lengths, [(n + 1) // 2 if n > 1 else 0 for n in inputs.lengths])
    )
    features, order = _flat(inputs.flat_keys, inputs.keys), _even_first(inputs.lengths, longest, device)
    pairs, best = match_behind(features, inputs.where.rows, order, lengths, even)
    return best[:, : (longest + 1) // 2], pairs[..., : (longest + 1) // 2]


@made_once
def _even_first(lengths: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """``(S, L)`` int64, the even numbers of each segment's tokens, the odd ones, and padding."""
    return torch.tensor([[*range(0, n, 2), *range(1, n, 2), *range(n, longest)] for n in lengths], device="cpu")


def _fold(inputs: RuleInputs, features: Tensor, order: Tensor) -> Fold:
    """Averages the tokens that come first in an order into the survivors whose unit vectors resemble theirs most."""
    absorbed, kept = order[:, : max(inputs.num_removed)], _who_stays(inputs, order)
    inside = inputs.slots(kept.shape[1]) < inputs.count(inputs.lengths)
    anchors = best_match(features, absorbed, kept & inside)
    return Fold(inputs.rows(absorbed, inputs.num_removed), inputs.rows(anchors, inputs.num_removed), "size")


def _match(inputs: RuleInputs, features: Tensor, order: Tensor) -> Fold:
    """The same in one launch, of the features ``(P, C)`` of flat rows as they are."""
    from illava_hooks.merge.kernels.ops import match_behind

    lengths, removed = (host_table(n, order.device) for n in (inputs.lengths, inputs.num_removed))
    match, _ = match_behind(features, inputs.where.rows, order, lengths, removed)
    absorbed, anchors = inputs.firsts(match, inputs.num_removed).unbind()
    return Fold(absorbed, anchors, "size")


def _flat(flat: Callable[[], Tensor] | None, tables: Callable[[], Tensor]) -> Tensor:
    return tables().flatten(0, 1) if flat is None else flat()


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
    "selective": selective,
    "bipartite": bipartite,
    "drop": drop,
}

#: Rules that look at no keys: where scores need none either, no attention is listened to.
KEYLESS_RULES: tuple[MergeRule, ...] = (recycle, cluster, diverse, selective, drop)
