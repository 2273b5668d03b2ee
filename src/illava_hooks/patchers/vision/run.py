"""One run of the vision encoder: who survives each merging layer.

Shapes: ``B`` rows (tiles, or one packed row) of ``M`` units before any merge and ``K`` survivors now; a unit is
``u`` patches that stay together (1, or Qwen2-VL's 2x2 group of 4). ``S`` segments, ``H`` heads, ``D`` head
width. The survivors of all segments lie one after the other, in segment order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from illava_hooks.merge.decision import RuleInputs
from illava_hooks.merge.plan import MergePlan, apply_merge, build_plan, take_kept
from illava_hooks.merge.spans import Segments, host_table
from illava_hooks.methods import find_score
from illava_hooks.patchers.base import EncoderTraits, max_removed
from illava_hooks.patchers.vision.scores import LayerAttention, segment_scores
from illava_hooks.runtime.provenance import merge_matrix, product
from illava_hooks.runtime.session import MergeSession, VisualRecord
from illava_hooks.schedules import Modality

__all__ = ["EncoderPass", "EncoderState"]


@dataclass(slots=True)
class EncoderState:
    """The survivors between two merges.

    Attributes:
        seats: ``(B, K)`` int64, the unit column in which each survivor sat before any merge.
        owner: ``(B, M)`` int64, the survivor that stands for each original unit.
        token_size: ``(B, K)`` float32, how many original units each survivor stands for.
        sources: sparse ``(B * K, B * M)`` weights of the original units, if tracked.
    """

    seats: Tensor
    owner: Tensor
    token_size: Tensor
    sources: Tensor | None = None


class EncoderPass:
    """One run of the vision encoder: counts planned on the host, decisions per merging layer."""

    def __init__(
        self,
        session: MergeSession,
        modality: Modality,
        traits: EncoderTraits,
        lengths: Sequence[int],
        num_rows: int,
        device: torch.device,
        visible: Tensor | None = None,
    ) -> None:
        """Plans all counts.

        Args:
            session: the session of the model.
            modality: whose schedule applies.
            traits: what the family says about its encoder.
            lengths: patches of each segment.
            num_rows: ``B``.
            device: where the encoder starts.
            visible: ``(B, M)`` bool, False where the layout will crop a unit away; None: nowhere.
        """
        self.session, self.modality, self.traits, self.num_rows = session, modality, traits, num_rows
        self.schedule = session.config.schedule(modality)
        self.rule = session.config.method.rule
        self.score = find_score(session.config.method.encoder_score, traits.published_score)
        self.visible = visible
        self.layers = self.schedule.vit_layers if self.schedule.merges_in_encoder else ()
        self.lengths = [self._plan_lengths(n) for n in lengths]
        self.segments = [
            Segments.packed([chain[i] for chain in self.lengths], device) for i in range(len(self.layers) + 1)
        ]
        seats = torch.arange(sum(chain[0] for chain in self.lengths) // num_rows, device=device).repeat(num_rows, 1)
        self.states = [EncoderState(seats, seats, torch.ones_like(seats, dtype=torch.float32))]
        self.plans: list[MergePlan] = []
        self.records: list[VisualRecord] = []
        self.num_videos = 1

    def _plan_lengths(self, num_patches: int) -> tuple[int, ...]:
        """Units of one segment before, between and after the merges."""
        unit = self.traits.unit
        chain = [num_patches // unit]

        def most(num: int) -> int:
            return min(max_removed(self.session.config.method, num // unit) * unit, num - self.traits.multiple)

        counts = self.schedule.encoder_removed(num_patches, self.traits.multiple, most) if self.layers else []
        wish = self.schedule.vit_r
        if isinstance(wish, int) and any(r < wish // self.traits.multiple * self.traits.multiple for r in counts):
            self.session.tell_once(
                f"vit_r is {wish}, more than some images have patches to give in {len(counts)} layers; they merge as "
                "many as possible; use a smaller vit_r or a float"
            )
        if isinstance(wish, int) and 0 < wish < self.traits.multiple:
            self.session.tell_once(
                f"vit_r is {wish} and removes nothing: this encoder gives up whole groups of {self.traits.multiple} "
                f"patches; use {self.traits.multiple} or more, or a float"
            )
        for removed in counts:
            chain.append(chain[-1] - removed // unit)
        return tuple(chain)

    def patch_counts(self, first: int, last: int) -> tuple[tuple[int, ...], ...]:
        """Patches of the segments ``first .. last - 1`` before, between and after the merges."""
        return tuple(tuple(n * self.traits.unit for n in chain) for chain in self.lengths[first:last])

    def ordinal(self, layer_idx: int) -> int:
        """How many merges happened before a layer."""
        return sum(merging < layer_idx for merging in self.layers)

    def removes(self, layer_idx: int) -> bool:
        """Whether a merging layer takes anything from any segment."""
        ordinal = self.layers.index(layer_idx)
        return self.segments[ordinal].lengths != self.segments[ordinal + 1].lengths

    def reaches(self, layer_idx: int) -> bool:
        """Whether a layer merges, or weighs the survivors of earlier ones by size."""
        return layer_idx in self.layers or (self.session.config.method.proportional and self.ordinal(layer_idx) > 0)

    def log_sizes(self, layer_idx: int) -> Tensor | None:
        """``(B * K * u,)`` float32, what a proportional method adds to the attention logits of a layer, or None."""
        ordinal = self.ordinal(layer_idx)
        if not ordinal or not self.session.config.method.proportional:
            return None
        return self.states[ordinal].token_size.log().flatten().repeat_interleave(self.traits.unit)

    @property
    def final(self) -> EncoderState:
        """The survivors after the last merge that ran."""
        return self.states[-1]

    def keep_mask(self, state: EncoderState) -> Tensor:
        """``(B, M)`` bool, which seats are taken."""
        return torch.zeros_like(state.owner, dtype=torch.bool).scatter(1, state.seats, True)

    def enter(self, layer_idx: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer, cut down to the survivors."""
        ordinal = self.ordinal(layer_idx)
        return self.traits.shrink(kwargs, self, ordinal) if ordinal else kwargs

    def patch_seats(self, ordinal: int) -> Tensor:
        """``(B, K * u)`` int64: original patch columns of the survivors, for RoPE tables and scores."""
        unit = self.traits.unit
        seats = self.states[ordinal].seats[..., None] * unit
        return (seats + torch.arange(unit, device=seats.device)).flatten(1)

    def merge(self, hidden: Tensor, attention: LayerAttention) -> Tensor:
        """Merges the patches of one layer.

        Args:
            hidden: ``(B, K * u, C)`` or, for one packed row, ``(K * u, C)``.
            attention: of the merging layer.

        Returns:
            The survivors, in the form of ``hidden``.
        """
        ordinal, width = self.layers.index(attention.layer_idx), hidden.shape[-1]
        units = hidden.reshape(self.num_rows, -1, self.traits.unit * width)
        # A replay under gradient checkpointing finds the plan of the first run.
        if len(self.plans) == ordinal:
            with torch.no_grad():
                self._decide(ordinal, units.detach(), attention)
        merged = apply_merge(units, self.plans[ordinal])
        return merged.reshape(*hidden.shape[:-2], -1, width)

    def _places(self, ordinal: int) -> Tensor:
        """``(P,)`` int64: each surviving patch's place in its segment before any merge."""
        segments = self.segments[ordinal]
        first = self.segments[0].rows[:, :1] % self.states[0].owner.shape[1] * self.traits.unit
        sizes = host_table([n * self.traits.unit for n in segments.lengths], first.device)
        total = sum(segments.lengths) * self.traits.unit
        return self.patch_seats(ordinal).flatten() - first[:, 0].repeat_interleave(sizes, output_size=total)

    def _decide(self, ordinal: int, units: Tensor, attention: LayerAttention) -> None:
        segments, state = self.segments[ordinal], self.states[ordinal]
        method, unit = self.session.config.method, self.traits.unit
        scores = segment_scores(method.name, self.score, attention, segments, unit, lambda: self._places(ordinal))
        after = self.segments[ordinal + 1].lengths
        sizes = state.token_size.flatten()
        inputs = RuleInputs(
            scores=scores,
            lengths=segments.lengths,
            num_removed=tuple(n - k for n, k in zip(segments.lengths, after, strict=True)),
            hidden=lambda: segments.take(units.flatten(0, 1)),
            keys=lambda: segments.take(attention.heads[1].reshape(len(sizes), -1)),
            token_size=segments.take(sizes),
            visible=None if self.visible is None else segments.take(self.visible.gather(1, state.seats).flatten()),
        )
        exists = torch.ones_like(state.seats, dtype=torch.bool)
        plan = build_plan(self.rule(inputs), segments, exists, sum(after) // self.num_rows)
        gained = torch.where((plan.weights > 0) & (plan.absorbed != plan.anchors), sizes[plan.absorbed], 0.0)
        sizes = sizes.index_add(0, plan.anchors, gained).view_as(state.token_size)
        self.plans.append(plan)
        self.states.append(
            EncoderState(take_kept(state.seats, plan), plan.follow(state.owner), take_kept(sizes, plan))
        )
        if self.session.config.track:
            matrix = merge_matrix(plan)
            self.states[-1].sources = matrix if state.sources is None else product(matrix, state.sources)
