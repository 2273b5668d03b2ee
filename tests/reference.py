"""A slow reference of the patched models, written from the description of the method with lists and loops.

It imports nothing of the library. A single sample without padding goes through the stock model's own weights
(projections, layer norms, MLPs, projector, rotary tables, packing); everything that merging adds (scores, order,
weights, who holds what, which positions a layer sees) is spelled out token by token. The encoders are the families'
(`tests/families/_*_reference.py`), on the segments, rules and attention of this file.

Vocabulary: a *segment* is what one encoder merge works on (tile, frame, temporal slice), counted in *units*
(one token, or a group of patches that stay together). A *visual* is one image or video in the prompt;
its tokens in the language model form one *span*. *Logical* positions are those of the unpatched sequence. The
*holder* of a token that was merged away is the survivor that stands for it.

Legend: `N` tokens of a segment, `C` hidden width, `H` heads, `D` head width, `L` logical length.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from families import family_of

TAKEN_BY_RECYCLER = 5
RECYCLER_SHARE = 0.05


class MethodLike(Protocol):
    """The choices of a method that the reference knows; the library's `Method` has the same names."""

    @property
    def encoder_score(self) -> str: ...
    @property
    def llm_score(self) -> str: ...
    @property
    def merge(self) -> str: ...


@dataclass(frozen=True)
class ReferenceMethod:
    """A method by its three choices (the layout is always "aligned").

    Attributes:
        merge: "recycle", "cluster", "nearest", "diverse", "selective", "bipartite" or "drop".
        encoder_score: "received_attention" or "query_lse".
        llm_score: "last_query_attention" or "query_lse".
    """

    merge: str = "recycle"
    encoder_score: str = "received_attention"
    llm_score: str = "last_query_attention"


@dataclass(frozen=True)
class ReferenceSettings:
    """Where, how much and how to merge: the arguments of `reference_forward` in one object."""

    vit_layers: Sequence[int] = ()
    vit_r: int | float = 0
    llm_layers: Sequence[int] = ()
    llm_ratio: float = 1.0
    method: MethodLike = field(default_factory=ReferenceMethod)


# ------------------------------------------------------------------------------- merge rules


@dataclass(frozen=True)
class Merge:
    """The decision of one merge among `n` tokens.

    Attributes:
        kept: Survivors, ascending.
        recipe: For each survivor that changes, the (token, weight) pairs of its new value.
        holder: For each token the survivor that stands for it; None where its content is lost.
        shown: For lost tokens who is seen in their place; where nothing is said, the nearest.
    """

    kept: list[int]
    recipe: dict[int, list[tuple[int, float]]]
    holder: list[int | None]
    shown: dict[int, int] = field(default_factory=dict)

    def apply(self, values: Sequence[Tensor]) -> list[Tensor]:
        """New values of the survivors, from the values of all tokens."""
        merged: list[Any] = []
        for token in self.kept:
            if token in self.recipe:
                merged.append(sum(weight * values[member] for member, weight in self.recipe[token]))
            else:
                merged.append(values[token])
        return merged

    def new_sizes(self, sizes: Sequence[float]) -> list[float]:
        """How many source tokens each survivor stands for."""
        totals = {token: 0.0 for token in self.kept}
        for token, holder in enumerate(self.holder):
            if holder is not None:
                totals[holder] += sizes[token]
        return [totals[token] for token in self.kept]

    def holder_or_nearest(self) -> list[int]:
        """The holder of each token; for lost ones who is shown, else the nearest by index, the lower one on a tie."""
        nearest = {token: nearest_index(token, self.kept) for token in range(len(self.holder))} | self.shown
        return [nearest[token] if holder is None else holder for token, holder in enumerate(self.holder)]


def nearest_index(index: int, kept: Sequence[int]) -> int:
    """The kept index closest to `index`; the lower one on a tie."""
    return min(kept, key=lambda other: (abs(other - index), other))


def no_merge(count: int) -> Merge:
    """The merge that leaves `count` tokens as they are."""
    return Merge(list(range(count)), {}, list(range(count)))


def ascending(scores: Sequence[float]) -> list[int]:
    """Token indices from the lowest score to the highest; of equal scores the lower index first."""
    return sorted(range(len(scores)), key=lambda token: (scores[token], token))


def recycle(scores: Sequence[float], num_removed: int, visible: Sequence[bool] | None = None) -> Merge:
    """Folds the `num_removed + 1` lowest tokens into one, the lowest with the largest weight.

    Args:
        scores: Score of each token, higher is kept.
        num_removed: Tokens that disappear.
        visible: False where a seat would be cropped away later.

    Returns:
        The merge; the seat is the highest-ranked member, or the highest-ranked visible one if there is any.
    """
    members = ascending(scores)[: num_removed + 1]
    total = (num_removed + 1) * (num_removed + 2) / 2
    seat = members[-1]
    seats_inside = [token for token in members if visible is None or visible[token]]
    if seats_inside:
        seat = seats_inside[-1]
    recipe = {seat: [(token, (num_removed + 1 - rank) / total) for rank, token in enumerate(members)]}
    kept = [token for token in range(len(scores)) if token == seat or token not in members]
    holder: list[int | None] = [seat if token in members else token for token in range(len(scores))]
    return Merge(kept, recipe, holder)


def cluster(scores: Sequence[float], num_removed: int, hidden: Tensor) -> Merge:
    """Keeps the top tokens; the lowest kept ones recycle their most similar redundant tokens.

    Args:
        scores: Score of each token, higher is kept.
        num_removed: Tokens that disappear.
        hidden: (N, C) hidden states, for similarities by dot product.

    Returns:
        The merge; redundant tokens that nobody takes are lost, one taken by several is held by the one that
        gives it the largest weight (in float32, where saturated weights are equal; then by the lowest-scored).
    """
    order = ascending(scores)
    redundant, kept = order[:num_removed], order[num_removed:]
    num_recyclers = max(1, round(RECYCLER_SHARE * len(kept)))
    recipe: dict[int, list[tuple[int, float]]] = {}
    holder: list[int | None] = [None if token in redundant else token for token in range(len(scores))]
    strongest: dict[int, float] = {}
    for recycler in kept[:num_recyclers]:
        similarity = dict(zip(redundant, (hidden[redundant] @ hidden[recycler]).tolist(), strict=True))
        taken = sorted(redundant, key=lambda token: (-similarity[token], token))[:TAKEN_BY_RECYCLER]
        weights = _softmax([similarity[token] / math.sqrt(hidden.shape[1]) for token in taken])
        recipe[recycler] = [(recycler, 0.5)]
        for token, weight in zip(taken, weights, strict=True):
            recipe[recycler].append((token, 0.5 * weight))
            if _single(weight) > strongest.get(token, 0.0):
                strongest[token], holder[token] = _single(weight), recycler
    return Merge(sorted(kept), recipe, holder)


def nearest(scores: Sequence[float], num_removed: int, keys: Tensor, sizes: Sequence[float]) -> Merge:
    """Averages each of the lowest tokens into its most similar survivor.

    Args:
        scores: Score of each token, higher is kept.
        num_removed: Tokens that disappear.
        keys: (N, D) features compared by cosine.
        sizes: Source tokens that each token stands for, its weight in the average.

    Returns:
        The merge; of equally similar survivors the lower index.
    """
    order = ascending(scores)
    redundant, kept = order[:num_removed], sorted(order[num_removed:])
    cosine = _cosines(keys)
    anchors = {token: max(kept, key=lambda other: (cosine[token][other], -other)) for token in redundant}
    return _averaged(kept, anchors, sizes)


def diverse(scores: Sequence[float], num_removed: int, hidden: Tensor, sizes: Sequence[float]) -> Merge:
    """Removes the tokens that some better token resembles most; each joins its most similar survivor.

    Args:
        scores: Score of each token; infinity must stay.
        num_removed: Tokens that disappear.
        hidden: (N, D) features compared by cosine.
        sizes: Source tokens that each token stands for, its weight in the average.

    Returns:
        The merge; ties go to the lower index.
    """
    cosine = _cosines(hidden)
    order = ascending(scores)
    novelty = [math.inf] * len(order)
    for place, token in enumerate(order[:-1]):
        if scores[token] < math.inf:
            novelty[token] = 1 - max(cosine[token][better] for better in order[place + 1 :])
    redundant = ascending(novelty)[:num_removed]
    kept = sorted(set(order) - set(redundant))
    anchors = {token: max(kept, key=lambda other: (cosine[token][other], -other)) for token in redundant}
    return _averaged(kept, anchors, sizes)


def selective(scores: Sequence[float], num_removed: int, hidden: Tensor, sizes: Sequence[float]) -> Merge:
    """As `diverse`, but what is unlike its survivor, both seen from the mean of all, is lost; that one is shown."""
    merge = diverse(scores, num_removed, hidden, sizes)
    centred = _cosines(hidden - hidden.mean(0))
    anchors = {token: held for token, held in enumerate(merge.holder) if held is not None and held != token}
    alike = {token: anchor for token, anchor in anchors.items() if centred[token][anchor] >= 0.5}
    found = _averaged(merge.kept, alike, sizes)
    shown = {token: anchor for token, anchor in anchors.items() if token not in alike}
    holder = [None if token in shown else held for token, held in enumerate(found.holder)]
    return Merge(found.kept, found.recipe, holder, shown)


def bipartite(num_removed: int, keys: Tensor, sizes: Sequence[float]) -> Merge:
    """Token merging: even tokens propose to their most similar odd token, the most similar pairs merge.

    Args:
        num_removed: Tokens that should disappear; at most half of them can.
        keys: (N, D) features compared by cosine.
        sizes: Source tokens that each token stands for, its weight in the average.

    Returns:
        The merge; ties go to the lower index.
    """
    cosine = _cosines(keys)
    even, odd = range(0, len(keys), 2), range(1, len(keys), 2)
    best = {token: max(odd, key=lambda other: (cosine[token][other], -other)) for token in even if len(odd)}
    proposals = sorted(best, key=lambda token: (-cosine[token][best[token]], token))
    absorbed = proposals[: min(num_removed, len(keys) // 2)]
    kept = [token for token in range(len(keys)) if token not in absorbed]
    return _averaged(kept, {token: best[token] for token in absorbed}, sizes)


def drop(scores: Sequence[float], num_removed: int) -> Merge:
    """Loses the lowest tokens."""
    lost = ascending(scores)[:num_removed]
    kept = [token for token in range(len(scores)) if token not in lost]
    return Merge(kept, {}, [None if token in lost else token for token in range(len(scores))])


def decide(
    rule: str,
    scores: Sequence[float],
    num_removed: int,
    hidden: Tensor,
    keys: Tensor,
    sizes: Sequence[float],
    visible: Sequence[bool] | None = None,
) -> Merge:
    """Runs a merge rule by name on what it needs; with nothing to remove nothing changes."""
    if num_removed <= 0:
        return no_merge(len(scores))
    rules: dict[str, Callable[[], Merge]] = {
        "recycle": lambda: recycle(scores, num_removed, visible),
        "cluster": lambda: cluster(scores, num_removed, hidden),
        "nearest": lambda: nearest(scores, num_removed, keys, sizes),
        "diverse": lambda: diverse(scores, num_removed, hidden, sizes),
        "selective": lambda: selective(scores, num_removed, hidden, sizes),
        "bipartite": lambda: bipartite(num_removed, keys, sizes),
        "drop": lambda: drop(scores, num_removed),
    }
    return rules[rule]()


def _averaged(kept: list[int], anchors: dict[int, int], sizes: Sequence[float]) -> Merge:
    """Size-weighted means of anchors and what they absorb."""
    holder: list[int | None] = [anchors.get(token, token) for token in range(len(sizes))]
    recipe = {}
    for anchor in set(anchors.values()):
        members = [token for token in range(len(sizes)) if holder[token] == anchor]
        total = sum(sizes[token] for token in members)
        recipe[anchor] = [(token, sizes[token] / total) for token in members]
    return Merge(kept, recipe, holder)


def _cosines(keys: Tensor) -> list[list[float]]:
    unit = keys / keys.norm(dim=-1, keepdim=True)
    return (unit @ unit.T).tolist()


def _single(value: float) -> float:
    """Rounded to float32."""
    return float(torch.tensor(value, dtype=torch.float32))


def _softmax(values: Sequence[float]) -> list[float]:
    exponentials = [math.exp(value - max(values)) for value in values]
    return [value / sum(exponentials) for value in exponentials]


# ------------------------------------------------------------------------- attention, scores


def attention_logits(query: Tensor, key: Tensor, causal: bool) -> Tensor:
    """Scaled dot products (H, Nq, Nk) in float32 or wider; with `causal` the last query sees all keys."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logits = query.to(wide) @ key.to(wide).transpose(-1, -2) / math.sqrt(query.shape[-1])
    if causal:
        num_queries, num_keys = logits.shape[-2:]
        for row in range(num_queries):
            logits[:, row, num_keys - num_queries + row + 1 :] = -torch.inf
    return logits


def attend(query: Tensor, key: Tensor, value: Tensor, causal: bool) -> Tensor:
    """Attention output (Nq, H * D) for query (H, Nq, D) and key, value (H, Nk, D)."""
    probabilities = attention_logits(query, key, causal).softmax(-1).to(value.dtype)
    return (probabilities @ value).transpose(0, 1).flatten(1)


def encoder_scores(name: str, query: Tensor, key: Tensor) -> list[float]:
    """Scores of the tokens of one segment from its own attention, heads (H, N, D)."""
    logits = attention_logits(query, key, causal=False)
    if name == "query_lse":
        return logits.logsumexp(-1).mean(0).tolist()
    return logits.softmax(-1).mean((0, 1)).tolist()


def decoder_scores(name: str, query: Tensor, key: Tensor, row: int) -> list[float]:
    """Scores of all tokens of a decoder layer, heads (H, N, D); `row` is the token that asks."""
    logits = attention_logits(query, key, causal=True)
    if name == "query_lse":
        return logits.logsumexp(-1).mean(0).tolist()
    return logits[:, row].softmax(-1).mean(0).tolist()


def heads_of(projected: Tensor, head_dim: int) -> Tensor:
    """(N, H * D) to (H, N, D)."""
    return projected.view(len(projected), -1, head_dim).transpose(0, 1)


def _side_by_side(heads: Tensor) -> Tensor:
    """(H, N, D) to (N, H * D)."""
    return heads.transpose(0, 1).flatten(1)


# ------------------------------------------------------------------------------ vision stage


@dataclass
class Segment:
    """What is left of one tile, frame or slice.

    Attributes:
        unit: Tokens that are kept or merged together.
        seats: Unit number, in the full segment, of each survivor; ascending.
        holder: For each unit of the full segment the seat that stands for it.
        sizes: Source units of each survivor.
        visible: False for units that the layout will crop away.
        prefix: Tokens in front that never merge, such as a class token; they are in hidden states, not in seats.
        merges: The decisions, one per merging layer.
        values: Features of the survivors for the language model, (survivors, C).
        beside: Further features of theirs, each with one entry per survivor; they follow the merges that come.
    """

    unit: int
    seats: list[int]
    holder: list[int]
    sizes: list[float]
    visible: list[bool] | None = None
    prefix: int = 0
    merges: list[Merge] = field(default_factory=list)
    values: Tensor | None = None
    beside: list[list[Tensor]] = field(default_factory=list)

    @classmethod
    def full(cls, count: int, unit: int, visible: list[bool] | None = None, prefix: int = 0) -> Segment:
        """A segment of `count` units before any merge."""
        return cls(unit, list(range(count)), list(range(count)), [1.0] * count, visible, prefix)

    def num_removed(self, vit_r: int | float) -> int:
        """Units that one merging layer removes; at least one stays."""
        tokens = len(self.seats) * self.unit
        removed = vit_r if isinstance(vit_r, int) else math.floor(tokens * vit_r)
        return min(removed // self.unit, len(self.seats) - 1)

    def merge(self, settings: ReferenceSettings, hidden: Tensor, query: Tensor, key: Tensor) -> Tensor:
        """Merges (N, C) hidden states between attention and MLP; query and key are the layer's, (H, N, D)."""
        count, width = len(self.seats), hidden.shape[1]
        token_scores = encoder_scores(settings.method.encoder_score, query, key)[self.prefix :]
        front, hidden, key = hidden[: self.prefix], hidden[self.prefix :], key[:, self.prefix :]
        scores = [sum(token_scores[u * self.unit : (u + 1) * self.unit]) / self.unit for u in range(count)]
        units = hidden.reshape(count, self.unit * width)
        decision = decide(
            settings.method.merge,
            scores,
            self.num_removed(settings.vit_r),
            hidden=units,
            keys=_side_by_side(key).reshape(count, -1),
            sizes=self.sizes,
            visible=None if self.visible is None else [self.visible[seat] for seat in self.seats],
        )
        self._follow(decision)
        return torch.cat([front, torch.stack(decision.apply(list(units))).reshape(-1, width)])

    def _follow(self, decision: Merge) -> None:
        to = decision.holder_or_nearest()
        moved = {seat: self.seats[to[index]] for index, seat in enumerate(self.seats)}
        self.holder = [moved[seat] for seat in self.holder]
        self.sizes = decision.new_sizes(self.sizes)
        self.seats = [self.seats[index] for index in decision.kept]
        self.beside = [decision.apply(features) for features in self.beside]
        self.merges.append(decision)

    def expanded(self, features: Sequence[Tensor] | Tensor | None = None) -> Tensor:
        """Features at full length, `values` if none are given: each unit shows its holder's."""
        row = {seat: index for index, seat in enumerate(self.seats)}
        shown = self.values if features is None else features
        return torch.stack([shown[row[seat]] for seat in self.holder])

    def mass(self) -> Tensor:
        """1.0 at the seats of survivors, 0.0 elsewhere, (units,)."""
        return torch.tensor([float(unit in self.seats) for unit in range(len(self.holder))])


@dataclass
class Visual:
    """One image or video as the language model gets it.

    Attributes:
        kind: "image" or "video".
        values: (tokens, C) features at full length; merged-away positions show what absorbed them.
        kept: Which tokens enter the language model.
        holder: For each token the kept token that stands for it; where the seat that stands for it was cropped
            away, the nearest kept token by index.
        segments: The segments it is made of.
        added: What is added to the tokens behind the first decoder layers, one by one; in the form of `values`.
    """

    kind: str
    values: Tensor
    kept: list[bool]
    holder: list[int]
    segments: list[Segment]
    added: list[Tensor] = field(default_factory=list)


@torch.no_grad()
def vision_stage(model: Any, inputs: dict[str, Tensor], settings: ReferenceSettings) -> list[Visual]:
    """Runs the vision encoder with merging: images first, then videos, each in the order of the inputs."""
    return list(family_of(model).reference_visuals(model, inputs, settings))


def choose_by_mass(
    values: Tensor, masses: Sequence[float], columns: int, num_kept: int
) -> tuple[Tensor, list[int], list[int]]:
    """Chooses positions of a pooled grid and folds the others into them.

    Args:
        values: (positions, C), row-major.
        masses: How much of a survivor stands under each position.
        columns: Columns of the grid.
        num_kept: Positions to keep: those with the largest mass, of equal ones the lower index.

    Returns:
        The values after folding (every position shows its holder's), the chosen positions, each one's holder.
    """
    by_mass = sorted(range(len(masses)), key=lambda position: (-masses[position], position))
    chosen = sorted(by_mass[:num_kept])
    held = [
        position if position in chosen else min(chosen, key=lambda other: (_distance(position, other, columns), other))
        for position in range(len(masses))
    ]
    folded: dict[int, Any] = {}
    for seat in chosen:
        members = [position for position in range(len(masses)) if held[position] == seat]
        total = sum(masses[position] for position in members)
        folded[seat] = values[seat]
        if total > 0:
            folded[seat] = sum(masses[position] * values[position] for position in members) / total
    return torch.stack([folded[seat] for seat in held]), chosen, held


def _distance(first: int, second: int, columns: int) -> int:
    """Squared distance on the grid, exact."""
    rows = first // columns - second // columns
    return rows**2 + (first % columns - second % columns) ** 2


# ---------------------------------------------------------------------------- language stage


@dataclass
class ReferenceOutput:
    """What a forward gives.

    Attributes:
        logits: (L, vocabulary) at logical length.
        hidden: (L, C) last hidden state after the final norm, at logical length.
        kept: For each decoder layer the logical positions that it sees.
        merges: For each merging decoder layer its decisions, one per visual.
        kv_lengths: Tokens in the cache of each decoder layer that has keys.
        vision_kept: For each visual, which of its tokens enter the language model.
        vision_seats: For each visual, the surviving units of each of its segments.
        caches: For each decoder layer the rotated keys and the values, (key-value heads, tokens, D); of a gated delta
            net the last inputs of its convolution, (K - 1, M), and its state, (heads, D, D).
        next_position: Position of the first generated token, one number per rotary axis.
    """

    logits: Tensor
    hidden: Tensor
    kept: list[list[int]]
    merges: dict[int, list[Merge]]
    kv_lengths: list[int]
    vision_kept: list[list[bool]]
    vision_seats: list[list[list[int]]]
    caches: list[tuple[Tensor, Tensor]]
    next_position: list[int]


@dataclass
class GenerationOutput:
    """What greedy decoding gives.

    Attributes:
        ids: The generated token ids.
        logits: (steps, vocabulary), the scores that each id was chosen from.
        prefill: The forward over the prompt.
        kv_lengths: Tokens in the cache of each decoder layer that has keys, after the last step that was run.
    """

    ids: list[int]
    logits: Tensor
    prefill: ReferenceOutput
    kv_lengths: list[int]


@dataclass
class Tokens:
    """The sequence inside the language model.

    Attributes:
        hidden: (n, C).
        places: Logical position of each token, ascending.
        spans: For each visual its logical positions.
        sizes: Source tokens of each token, by logical position.
        holder: For every logical position the one that stands for it.
        added: For each of the first layers, what is added behind it, by logical position.
    """

    hidden: Tensor
    places: list[int]
    spans: list[list[int]]
    sizes: dict[int, float]
    holder: list[int]
    added: list[dict[int, Tensor]]

    def add_behind(self, layer: int) -> None:
        """Adds to the hidden states what belongs behind a layer."""
        if layer < len(self.added):
            zero = torch.zeros_like(self.hidden[0])
            self.hidden = self.hidden + torch.stack([self.added[layer].get(place, zero) for place in self.places])


@torch.no_grad()
def reference_forward(
    model: Any,
    inputs: dict[str, Tensor],
    *,
    vit_layers: Sequence[int] = (),
    vit_r: int | float = 0,
    llm_layers: Sequence[int] = (),
    llm_ratio: float = 1.0,
    method: MethodLike | None = None,
    query: int | None = None,
) -> ReferenceOutput:
    """Runs a prompt with merging.

    Args:
        model: A stock, unpatched model of one of the families.
        inputs: A batch of one without padding.
        vit_layers: Encoder layers that merge.
        vit_r: Tokens (int) or fraction of the current tokens (float) removed per segment and layer.
        llm_layers: Decoder layers on whose entry merging happens.
        llm_ratio: Fraction of a span's current tokens kept at each of them.
        method: Scores and rule; `ReferenceMethod()` when not given.
        query: Logical position of the token that ranks the visual tokens in the decoder; the last one when
            not given.

    Returns:
        Outputs at logical length and what happened on the way.
    """
    settings = ReferenceSettings(vit_layers, vit_r, llm_layers, llm_ratio, method or ReferenceMethod())
    visuals = vision_stage(model, inputs, settings)
    language = family_of(model).language(model)
    length = inputs["input_ids"].shape[1]
    tokens = _language_tokens(model, inputs["input_ids"][0], visuals)
    positions = family_of(model).positions(model, inputs)
    cos, sin = _rotary(language, tokens.hidden, positions)
    query_place = length - 1 if query is None else query
    kept, caches = [], []
    merges: dict[int, list[Merge]] = {}
    query_heads = key_heads = None
    for index, layer in enumerate(language.layers):
        if index in settings.llm_layers:
            merges[index] = _merge_spans(tokens, settings, query_heads, key_heads, query_place)
        tokens.hidden, query_heads, key_heads, cache = _decoder_layer(
            layer, tokens.hidden, cos[tokens.places], sin[tokens.places]
        )
        tokens.add_behind(index)
        kept.append(list(tokens.places))
        caches.append(cache)
    row = {place: index for index, place in enumerate(tokens.places)}
    hidden = language.norm(tokens.hidden)[[row[place] for place in tokens.holder]]
    return ReferenceOutput(
        logits=model.lm_head(hidden),
        hidden=hidden,
        kept=kept,
        merges=merges,
        kv_lengths=[len(kept[index]) for index, layer in enumerate(language.layers) if hasattr(layer, "self_attn")],
        vision_kept=[visual.kept for visual in visuals],
        vision_seats=[[segment.seats for segment in visual.segments] for visual in visuals],
        caches=caches,
        next_position=[int(positions.max()) + 1] * len(positions),
    )


@torch.no_grad()
def reference_generate(
    model: Any, inputs: dict[str, Tensor], *, max_new_tokens: int, **settings: Any
) -> GenerationOutput:
    """Decodes greedily, one token at a time, on the caches that the merged prefill left.

    Args:
        model: A stock, unpatched model of one of the families.
        inputs: A batch of one without padding.
        max_new_tokens: Number of tokens to generate.
        **settings: As for `reference_forward`.

    Returns:
        The ids and the scores of each step.
    """
    prefill = reference_forward(model, inputs, **settings)
    language = family_of(model).language(model)
    caches = list(prefill.caches)
    logits = [prefill.logits[-1]]
    ids = [int(logits[-1].argmax())]
    for step in range(max_new_tokens - 1):
        hidden = language.embed_tokens(torch.tensor([ids[-1]], device=inputs["input_ids"].device))
        position = torch.tensor(prefill.next_position, device=hidden.device).view(-1, 1, 1) + step
        cos, sin = _rotary(language, hidden, _as_axes(position))
        for index, layer in enumerate(language.layers):
            hidden, _, _, caches[index] = _decoder_layer(layer, hidden, cos, sin, caches[index])
        logits.append(model.lm_head(language.norm(hidden))[0])
        ids.append(int(logits[-1].argmax()))
    kv_lengths = [
        cache[0].shape[1] for layer, cache in zip(language.layers, caches, strict=True) if hasattr(layer, "self_attn")
    ]
    return GenerationOutput(ids, torch.stack(logits), prefill, kv_lengths)


def _language_tokens(model: Any, ids: Tensor, visuals: list[Visual]) -> Tokens:
    """Embeds the prompt, fills the placeholders and takes out what the encoder merged away."""
    embeddings = family_of(model).language(model).embed_tokens(ids).clone()
    config = model.config
    free = {
        "image": (ids == config.image_token_id).nonzero().flatten().tolist(),
        "video": (ids == getattr(config, "video_token_id", -1)).nonzero().flatten().tolist(),
    }
    enters = [True] * len(ids)
    holder = list(range(len(ids)))
    spans = []
    added: list[dict[int, Tensor]] = [{} for _ in range(max((len(visual.added) for visual in visuals), default=0))]
    for visual in visuals:
        count = len(visual.kept)
        span, free[visual.kind] = free[visual.kind][:count], free[visual.kind][count:]
        for index, place in enumerate(span):
            embeddings[place] = visual.values[index]
            enters[place] = visual.kept[index]
            holder[place] = span[visual.holder[index]]
            for layer, features in enumerate(visual.added):
                added[layer][place] = features[index]
        spans.append(span)
    places = [place for place in range(len(ids)) if enters[place]]
    return Tokens(
        hidden=embeddings[places],
        places=places,
        spans=spans,
        sizes={place: 1.0 for place in places},
        holder=holder,
        added=added,
    )


def _merge_spans(
    tokens: Tokens, settings: ReferenceSettings, query: Tensor, key: Tensor, query_place: int
) -> list[Merge]:
    """Merges each visual span by the attention of the layer before; changes `tokens`."""
    groups = len(query) // len(key)
    row = {place: index for index, place in enumerate(tokens.places)}
    scores = decoder_scores(settings.method.llm_score, query, key.repeat_interleave(groups, dim=0), row[query_place])
    flat_keys = _side_by_side(key)
    values = {place: tokens.hidden[row[place]] for place in tokens.places}
    moved = {place: place for place in tokens.places}
    decisions = []
    for span in tokens.spans:
        current = [place for place in span if place in row]
        rows = [row[place] for place in current]
        removed = min(round(len(current) * (1 - settings.llm_ratio)), len(current) - 1)
        decision = decide(
            settings.method.merge,
            [scores[index] for index in rows],
            removed,
            hidden=tokens.hidden[rows],
            keys=flat_keys[rows],
            sizes=[tokens.sizes[place] for place in current],
        )
        sizes = decision.new_sizes([tokens.sizes[place] for place in current])
        for index, value, size in zip(decision.kept, decision.apply(list(tokens.hidden[rows])), sizes, strict=True):
            values[current[index]], tokens.sizes[current[index]] = value, size
        for features in tokens.added:
            merged = decision.apply([features[place] for place in current])
            features.update(zip((current[index] for index in decision.kept), merged, strict=True))
        for place, held in zip(current, decision.holder_or_nearest(), strict=True):
            moved[place] = current[held]
        decisions.append(decision)
    tokens.places = [place for place in tokens.places if moved[place] == place]
    tokens.hidden = torch.stack([values[place] for place in tokens.places])
    tokens.holder = [moved[held] for held in tokens.holder]
    return decisions


def _rotary(language: Any, hidden: Tensor, positions: Tensor) -> list[Tensor]:
    """Cosines and sines (L, D); old releases give the three axes apart, each dimension belongs to one."""
    tables = language.rotary_emb(hidden, positions)
    if tables[0].dim() == 3:
        return [table[0] for table in tables]
    sections = language.config.rope_parameters["mrope_section"]
    axis = [number for number, size in enumerate(sections) for _ in range(size)] * 2
    return [torch.stack([table[a, 0, :, d] for d, a in enumerate(axis)], -1) for table in tables]


def _as_axes(position: Tensor) -> Tensor:
    """(axes, 1, 1) to what the rotary table wants: (1, 1) for one axis, else as it is."""
    return position[0] if len(position) == 1 else position


def _rotated(heads: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions: the first half of each head turns against the second; what is beyond the table stays."""
    turning, still = heads[..., : cos.shape[-1]], heads[..., cos.shape[-1] :]
    first, second = turning.chunk(2, dim=-1)
    return torch.cat([turning * cos + torch.cat([-second, first], dim=-1) * sin, still], dim=-1)


def _decoder_layer(
    layer: Any, hidden: Tensor, cos: Tensor, sin: Tensor, cache: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor, Any, Any, tuple[Tensor, Tensor]]:
    """One decoder layer on (n, C): new hidden states, rotated query and key heads, the grown cache."""
    normed = layer.input_layernorm(hidden)
    if not hasattr(layer, "self_attn"):
        mixed, cache = _delta_net(layer.linear_attn, normed, cache)
        hidden = hidden + mixed
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden)[None])[0], None, None, cache
    attention = layer.self_attn
    projected, key, value = (
        projection(normed) for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    gate: Tensor | int = 1
    if projected.shape[1] == 2 * attention.o_proj.in_features:  # of each head the query, then its gate
        by_head = projected.view(len(projected), -1, 2, attention.head_dim)
        projected, gate = by_head[:, :, 0].flatten(1), torch.sigmoid(by_head[:, :, 1].flatten(1))
    query, key, value = (heads_of(part, attention.head_dim) for part in (projected, key, value))
    if hasattr(attention, "q_norm"):
        query, key = attention.q_norm(query), attention.k_norm(key)
    query, key = _rotated(query, cos, sin), _rotated(key, cos, sin)
    if cache is not None:
        key, value = torch.cat([cache[0], key], dim=1), torch.cat([cache[1], value], dim=1)
    groups = len(query) // len(key)
    keys, values = (part.repeat_interleave(groups, dim=0) for part in (key, value))
    hidden = hidden + attention.o_proj(attend(query, keys, values, causal=True) * gate)
    hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden)[None])[0]
    return hidden, query, key, (key, value)


def _delta_net(net: Any, hidden: Tensor, cache: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """A gated delta net on (n, C), token by token and head by head.

    Each token fades the state, takes out what the state holds under its key as far as it is to be replaced by its
    value, puts that in, and reads what is under its query.
    """
    kernel = net.conv1d.weight[:, 0].T
    count, heads, group = kernel.shape[0], net.num_v_heads, net.num_v_heads // net.num_k_heads
    if cache is None:
        cache = hidden.new_zeros(count - 1, kernel.shape[1]), hidden.new_zeros(heads, net.head_k_dim, net.head_v_dim)
    seen, state = torch.cat([cache[0], net.in_proj_qkv(hidden)]), cache[1].clone()
    replaced = torch.sigmoid(net.in_proj_b(hidden))
    faded = torch.exp(-torch.exp(net.A_log) * torch.nn.functional.softplus(net.in_proj_a(hidden) + net.dt_bias))
    gates = torch.nn.functional.silu(net.in_proj_z(hidden)).view(len(hidden), heads, -1)
    rows = []
    for token in range(len(hidden)):
        mixed = torch.nn.functional.silu((seen[token : token + count] * kernel).sum(0))
        queries, keys, values = mixed.split([net.key_dim, net.key_dim, net.value_dim])
        row = []
        for head in range(heads):
            part = slice(head // group * net.head_k_dim, (head // group + 1) * net.head_k_dim)
            query, key = _unit(queries[part]) / net.head_k_dim**0.5, _unit(keys[part])
            value = values[head * net.head_v_dim : (head + 1) * net.head_v_dim]
            state[head] *= faded[token, head]
            state[head] += torch.outer(key, replaced[token, head] * (value - key @ state[head]))
            read = query @ state[head]
            row.append(
                read / (read.pow(2).mean() + net.layer_norm_epsilon).sqrt() * net.norm.weight * gates[token, head]
            )
        rows.append(torch.cat(row))
    return net.out_proj(torch.stack(rows)), (seen[len(hidden) :], state)


def _unit(vector: Tensor) -> Tensor:
    """A vector of length 1, unless it is very short."""
    return vector / (vector.pow(2).sum() + 1e-6).sqrt()
