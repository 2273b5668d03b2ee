"""The language stage of one forward that introduces visual tokens.

Shapes: ``B`` samples of ``N`` logical tokens (what the caller sees), ``K`` columns on the compact sequence of a
segment of layers (right-aligned, padded on the left), ``V`` images and videos, ``C`` width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.config import MergeConfig
from illava_hooks.merge.decision import RuleInputs, SegmentPlan
from illava_hooks.merge.plan import MergePlan, apply_merge, build_plan, take_kept
from illava_hooks.merge.scoring import Score, ScoreInputs
from illava_hooks.merge.spans import Segments, host_table, scatter_back
from illava_hooks.methods import checked_scores
from illava_hooks.patchers.base import max_removed
from illava_hooks.schedules import Modality, llm_removed

__all__ = ["CompactState", "DecoderPass", "Layout"]


@dataclass(slots=True)
class CompactState:
    """The compact sequence between two merges.

    Attributes:
        owner: ``(B, N)`` int64, the compact column that stands for each logical token.
        span: ``(B, K)`` int64, number of the image or video of each column, -1 for text and padding.
        seats: ``(B, K)`` int64, place of a visual token in its own span before any merge.
        token_size: ``(B, K)`` float32.
        query: ``(B,)`` int64, column of the scoring query.
        rope: RoPE tables of the columns, once known.
    """

    owner: Tensor
    span: Tensor
    seats: Tensor
    token_size: Tensor
    query: Tensor
    rope: tuple[Tensor, ...] | None = None


@dataclass(frozen=True, slots=True)
class Layout:
    """Everything about one segment of layers that the host knows.

    Attributes:
        lengths: real tokens per sample.
        span_lengths: visual tokens per image or video.
    """

    lengths: tuple[int, ...]
    span_lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the compact sequence."""
        return max(self.lengths)

    def valid(self, device: torch.device) -> Tensor | None:
        """``(B, K)`` bool, False on padding; None when nothing is padded."""
        if min(self.lengths) == self.width:
            return None
        first = self.width - host_table(self.lengths, device)
        return torch.arange(self.width, device=device) >= first[:, None]


def plan_layouts(
    config: MergeConfig, modalities: Sequence[Modality], sample_of: Sequence[int], start: Layout
) -> list[Layout]:
    """Counts before, between and after the merges of the listed decoder layers."""
    layouts = [start]
    for layer in config.llm_layers:
        spans, lengths = list(layouts[-1].span_lengths), list(layouts[-1].lengths)
        for index, modality in enumerate(modalities):
            schedule = config.schedule(modality)
            if schedule.merges_in_llm and layer in schedule.llm_layers and spans[index]:
                wish = llm_removed(spans[index], schedule.llm_ratio)
                removed = min(wish, max_removed(config.method, spans[index]))
                spans[index] -= removed
                lengths[sample_of[index]] -= removed
        layouts.append(Layout(tuple(lengths), tuple(spans)))
    return layouts


class DecoderPass:
    """One prefill through the decoder layers."""

    def __init__(self, config: MergeConfig, score: Score, layouts: list[Layout], state: CompactState) -> None:
        """Starts at the entry of layer 0.

        Args:
            config: the settings.
            score: the language-model score.
            layouts: one per segment of layers.
            state: the compact sequence of the first segment.
        """
        self.config, self.score, self.layouts = config, score, layouts
        self.layers = config.llm_layers
        self.states = [state]
        self.plans: list[MergePlan] = []
        self.scores: dict[int, Tensor] = {}
        self.keys: dict[int, Tensor] = {}

    def ordinal(self, layer_idx: int) -> int:
        """How many merges happened on or before the entry of a layer."""
        return sum(merging <= layer_idx for merging in self.layers)

    def rank(self, layer_idx: int, inputs: ScoreInputs, keys: Tensor) -> None:
        """Scores the tokens that enter a merging layer, by the attention of the layer before.

        Args:
            layer_idx: the layer that will merge.
            inputs: what the score may look at.
            keys: ``(B * K, D)`` keys of the tokens, all heads side by side.
        """
        self.scores[layer_idx] = checked_scores(self.config.method.name, self.score, inputs)
        self.keys[layer_idx] = keys

    def merge(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Merges ``(B, K, C)`` on entry to a listed layer."""
        ordinal = self.layers.index(layer_idx)
        if len(self.plans) == ordinal:
            scores, keys = self.scores.pop(layer_idx), self.keys.pop(layer_idx)
            with torch.no_grad():
                self._decide(ordinal, hidden.detach(), scores.to(hidden.device), keys.to(hidden.device))
        return apply_merge(hidden, self.plans[ordinal])

    def _decide(self, ordinal: int, hidden: Tensor, scores: Tensor, keys: Tensor) -> None:
        state, before, after = self.states[ordinal], self.layouts[ordinal], self.layouts[ordinal + 1]
        valid = before.valid(hidden.device)
        exists = torch.ones_like(state.span, dtype=torch.bool) if valid is None else valid
        counts = [(n, m) for n, m in zip(before.span_lengths, after.span_lengths, strict=True) if n]
        if counts:
            order = torch.argsort(state.span.flatten(), stable=True)[state.span.numel() - sum(n for n, _ in counts) :]
            segments = Segments.from_lengths([n for n, _ in counts], order)
            # The query is read after the last layer: it must stay.
            table = segments.take(scores.scatter(1, state.query[:, None], torch.inf).flatten())
            if segments.valid is not None:
                table = table.masked_fill(~segments.valid, torch.inf)
            inputs = RuleInputs(
                scores=table,
                lengths=segments.lengths,
                num_removed=tuple(n - m for n, m in counts),
                hidden=lambda: segments.take(hidden.flatten(0, 1)),
                keys=lambda: segments.take(keys),
                token_size=segments.take(state.token_size.flatten()),
            )
            local = self.config.method.rule(inputs)
        else:
            segments = Segments(torch.zeros(1, 1, dtype=torch.int64, device=hidden.device), None, (1,))
            local = _nothing(hidden.device)
        plan = build_plan(local, segments, exists, after.width)
        sizes = state.token_size.flatten()
        gained = torch.where((plan.weights > 0) & (plan.absorbed != plan.anchors), sizes[plan.absorbed], 0.0)
        sizes = sizes.index_add(0, plan.anchors, gained).view_as(state.token_size)
        self.plans.append(plan)
        self.states.append(
            CompactState(
                owner=plan.follow(state.owner),
                span=self._spans(plan, state, after),
                seats=take_kept(state.seats, plan),
                token_size=take_kept(sizes, plan),
                query=plan.follow(state.query[:, None])[:, 0],
                rope=None if state.rope is None else tuple(take_kept(table, plan) for table in state.rope),
            )
        )

    def _spans(self, plan: MergePlan, state: CompactState, after: Layout) -> Tensor:
        """Spans of the survivors; columns that became padding belong to none."""
        spans = take_kept(state.span, plan)
        valid = after.valid(spans.device)
        return spans if valid is None else spans.masked_fill(~valid, -1)

    def expand(self, hidden: Tensor, ordinal: int) -> Tensor:
        """``(B, K, C)`` of a segment at the logical length ``(B, N, C)``."""
        return scatter_back(hidden, self.states[ordinal].owner.to(hidden.device))


def _nothing(device: torch.device) -> SegmentPlan:
    """A plan in which one token keeps itself."""
    zero = torch.zeros(1, 1, dtype=torch.int64, device=device)
    none = zero[:, :0]
    return SegmentPlan(zero == 0, none, none, none.float(), (zero + 1).float(), zero)
