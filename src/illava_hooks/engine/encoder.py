"""One run of the vision encoder: who survives each merging layer.

Shapes: ``B`` rows (tiles, or one packed row) of ``M`` units before any merge and ``K`` survivors now; a unit is
``u`` patches that stay together (1, or the 4 of a 2x2 patch merger). A row may begin with tokens that never merge (a
class token); they are split off before anything here looks at it. ``S`` segments, ``P`` patches in all, ``H`` heads,
``D`` head width. The survivors of all segments lie one after the other, in segment order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from illava_hooks.config import Modality
from illava_hooks.engine.attention_tap import EncoderTap
from illava_hooks.engine.counts import SegmentCounts, encoder_counts, keeps_quota, shown_units
from illava_hooks.engine.encoder_scores import ScoredLayer, scores_by_place, unit_scores
from illava_hooks.engine.encoder_state import EncoderState, Visible
from illava_hooks.engine.padding import Padding, Shares, filled_up, padded_segments
from illava_hooks.engine.provenance import merge_matrix, product
from illava_hooks.engine.records import VisualRecord
from illava_hooks.engine.regions import in_region
from illava_hooks.engine.session import MergeSession
from illava_hooks.engine.traits import EncoderTraits
from illava_hooks.errors import PatchStateError
from illava_hooks.merge.attention import SizeBias
from illava_hooks.merge.plan import MergePlan, apply_merge, build_plan, take_kept
from illava_hooks.merge.rules import RuleInputs
from illava_hooks.merge.scores import ATTENTION_SCORES, PLACE_SCORES
from illava_hooks.merge.segments import Segments, counting, everybody, repeated, scatter_back, starts
from illava_hooks.methods import find_score

__all__ = ["EncoderRun"]

#: A family's way to cut a layer's keyword arguments down to the survivors after so many merges.
Shrink = Callable[[dict[str, Any], "EncoderRun", int], dict[str, Any]]


class EncoderRun:
    """One run of the vision encoder: counts planned on the host, decisions per merging layer."""

    @in_region("illava::encoder_plan")
    def __init__(
        self,
        session: MergeSession,
        modality: Modality,
        traits: EncoderTraits,
        lengths: Sequence[int],
        num_rows: int,
        device: torch.device,
        *,
        visible: Visible | None = None,
        padding: Padding | None = None,
        shrink: Shrink | None = None,
        filled: bool = False,
    ) -> None:
        """Plans all counts.

        Args:
            session: the session of the model.
            modality: whose schedule applies.
            traits: what the family says about its encoder.
            lengths: patches of each segment: of what attends to each other.
            num_rows: ``B``.
            device: where the encoder starts.
            visible: what the layout will show; None: everything.
            padding: which patches of rows of equal length show something; None: all.
            shrink: cuts a layer's keyword arguments down to the survivors; None: nothing in them belongs to tokens.
            filled: whether rows of one width hold segments of unequal length: behind each of them lies padding up to
                one unit more than the longest. It is a segment of its own, which nobody sees.
        """
        self.session, self.modality, self.traits, self.num_rows = session, modality, traits, num_rows
        self.device = device
        #: Whether layers find the borders of their segments on the host, also those in front of all merges.
        self.borders_on_host = False
        self.schedule = session.config.schedule(modality)
        self.rule = session.config.method.rule
        self.score = find_score(session.config.method.encoder_score, traits.published_score)
        self._listens = session.config.method.listens_in_encoder
        self.visible, self.padding, self._shrink, self._filled = visible, padding, shrink, filled
        self.layers = self.schedule.vit_layers if self.schedule.merges_in_encoder else ()
        self.lengths = self._plan(lengths)
        #: Segments of what attends to each other, before, between and after the merges.
        self.segments = [Segments.packed([n[i] for n in self.lengths], device) for i in range(len(self.layers) + 1)]
        origins = counting(sum(n[0] for n in self.lengths) // num_rows, device).expand(num_rows, -1)
        self.states = [EncoderState(origins, origins, torch.ones_like(origins, dtype=torch.float32))]
        self.plans: list[MergePlan] = []
        self.records: list[VisualRecord] = []
        self.num_videos = 1

    def _plan(self, lengths: Sequence[int]) -> list[tuple[int, ...]]:
        """Units of each segment before, between and after the merges; says where the settings ask for too much."""
        config, unit = self.session.config, self.traits.granularity
        counts = [encoder_counts(config, self.modality, self.traits, n) for n in lengths]
        if self.padding is not None:
            counts = [self._plan_padded(self.padding, counts[0], lengths[0])] * len(lengths)
        wish = self.schedule.vit_r
        if any(segment.short_of > 0 for segment in counts):
            self.session.warn_once(
                f"vit_r is {wish}, more than some images have patches to give in {len(self.layers)} layers; they "
                "merge as many as possible; use a smaller vit_r or a float"
            )
        if isinstance(wish, int) and 0 < wish < unit:
            self.session.warn_once(
                f"vit_r is {wish} and removes nothing: this encoder gives up whole groups of {unit} patches; use "
                f"{unit} or more, or a float"
            )
        planned = [segment.units for segment in counts]
        return filled_up(planned) if self._filled else planned

    def _plan_padded(self, padding: Padding, plain: SegmentCounts, num_patches: int) -> SegmentCounts:
        """The same for tiles with padding, of which all give up as many as the one that can give least."""
        self.shares = Shares(self.session.config, self.modality, self.traits, num_patches, padding)
        if self.shares.units != plain:
            self.session.warn_once(
                f"a tile has {min(tile.whole for tile in padding.counts)} of {plain.units[0]} units without padding "
                f"and cannot give up what vit_r {self.schedule.vit_r} asks for; all tiles of the batch merge less; "
                "use a smaller vit_r, or images without padding"
            )
        return self.shares.units

    # ------------------------------------------------------------------ where a layer stands

    def merges_before(self, layer_idx: int) -> int:
        """How many merges happened when a layer is entered: one in the layer itself is still to come."""
        return sum(merging < layer_idx for merging in self.layers)

    def merges_in(self, layer_idx: int) -> bool:
        """Whether the settings list a layer, also one that finds nothing to remove."""
        return layer_idx in self.layers

    def reaches(self, layer_idx: int) -> bool:
        """Whether a layer merges, or weighs the survivors of earlier ones by size."""
        weighs = self.session.config.method.proportional and self.merges_before(layer_idx) > 0
        return self.merges_in(layer_idx) or weighs

    @in_region("illava::encoder_enter")
    def enter(self, layer_idx: int, kwargs: dict[str, Any]) -> dict[str, Any]:
        """The keyword arguments of a layer, cut down to the survivors."""
        merges = self.merges_before(layer_idx)
        self._check_reached(merges)
        differs = self._arranged(layer_idx) if self.traits.regroups else merges or self.borders_on_host
        if self._shrink is None or not differs:
            return kwargs
        return self._shrink(kwargs, self, merges)

    def _arranged(self, layer_idx: int) -> bool:
        """Whether rows of an encoder that keeps picture order are in ours when a layer runs."""
        return self._idle < len(self.layers) and layer_idx >= self.layers[self._idle]

    def arrange(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Hidden states ``(B, prefix + P, C)`` as the layers see them from the first one that removes something.

        Where nothing is removed nothing moves: sums would come out in another order.
        """
        if not self.traits.regroups or layer_idx not in self.layers or self.layers.index(layer_idx) != self._idle:
            return hidden
        return self._permuted(hidden, self._order(hidden.device))

    @property
    def _idle(self) -> int:
        """Merges in front of the first one that removes something."""
        removes = [before.lengths != after.lengths for before, after in pairwise(self.segments)]
        return removes.index(True) if any(removes) else len(removes)

    def _order(self, device: torch.device) -> Tensor:
        width = self.states[0].kept_at.shape[1] * self.traits.patches_per_unit
        return torch.arange(width, device=device) if self.traits.order is None else self.traits.order.to(device)

    def _permuted(self, hidden: Tensor, order: Tensor) -> Tensor:
        prefix = self.traits.prefix
        return torch.cat([hidden[:, :prefix], hidden[:, prefix:][:, order]], 1) if prefix else hidden[:, order]

    def tap(self, layer_idx: int) -> EncoderTap | None:
        """What listens to the attention of a layer that merges or weighs; None: it has nothing to tell."""
        merges, prefix = self.merges_before(layer_idx), self.traits.prefix
        lengths = [n * self.traits.patches_per_unit + prefix for n in self.segments[merges].lengths]
        sizes = self._size_bias(merges, lengths)
        if sizes is None and not self._listens:
            return None
        ranks = self._listens and self.merges_in(layer_idx) and len(self.plans) == merges  # a replay finds the plan
        removes = ranks and self.segments[merges].lengths != self.segments[merges + 1].lengths
        # Padding attends, but no score gets to see it.
        falls_out = removes and self.padding is None and self.score in ATTENTION_SCORES
        return EncoderTap(lengths, ranks=ranks, score=self.score if falls_out else None, sizes=sizes)

    def _size_bias(self, merges: int, lengths: Sequence[int]) -> SizeBias | None:
        """What a proportional method adds to the logits of each key, or None; 0 for the prefix."""
        if not merges or not self.session.config.method.proportional:
            return None
        state, unit, prefix = self.states[merges], self.traits.patches_per_unit, self.traits.prefix
        if state.size_bias is None:
            sizes = state.token_size.log()
            sizes = sizes.repeat_interleave(unit, dim=1) if unit > 1 else sizes
            padded = torch.nn.functional.pad(sizes, (prefix, 0)) if prefix else sizes
            state.size_bias = SizeBias(padded.flatten(), lengths)
        return state.size_bias

    def check_finished(self) -> None:
        """Every planned merge ran.

        Raises:
            PatchStateError: some layer was passed by.
        """
        self._check_reached(len(self.layers))

    def _check_reached(self, merges: int) -> None:
        if len(self.plans) < merges:
            layer = self.layers[len(self.plans)]
            raise PatchStateError(
                f"vision encoder layer {layer} did not merge, vit_layers is {list(self.layers)}; another forward "
                "ran in its place: call patch(model, ...) again after wrapping or replacing parts of the model"
            )

    # ------------------------------------------------------------------ survivors

    @property
    def pairs(self) -> int:
        """Pairs of patches that attend to each other in a layer in front of all merges."""
        return sum((n * self.traits.patches_per_unit) ** 2 for n in self.segments[0].lengths)

    @property
    def final(self) -> EncoderState:
        """The survivors after the last merge that ran."""
        return self.states[-1]

    def keep_mask(self, state: EncoderState) -> Tensor:
        """``(B, M)`` bool, where a survivor stands."""
        return torch.zeros_like(state.kept_at, dtype=torch.bool).scatter(1, state.origins, True)

    def patch_origins(self, merges: int) -> Tensor:
        """``(B, K * u)`` int64: the place in the row of each surviving patch, for RoPE tables and scores."""
        unit = self.traits.patches_per_unit
        first = self.states[merges].origins[..., None] * unit
        return (first + counting(unit, first.device)).flatten(1)

    def patch_counts(self, first: int, last: int) -> tuple[tuple[int, ...], ...]:
        """Patches of the segments ``first .. last - 1`` before, between and after the merges."""
        return tuple(tuple(n * self.traits.patches_per_unit for n in units) for units in self.lengths[first:last])

    def expand(self, hidden: Tensor, merges: int) -> Tensor:
        """Hidden states after so many merges at their unpatched length: each place shows who stands for it."""
        kept_at, width = self.states[merges].kept_at, hidden.shape[-1]
        prefix, units = self._split(hidden)
        if units.shape[1] != kept_at.shape[1]:
            hidden = self._join(prefix, scatter_back(units, kept_at.to(hidden.device)), hidden.shape[:-2], width)
        if self.traits.regroups and merges > self._idle:
            hidden = self._permuted(hidden, torch.argsort(self._order(hidden.device)))
        return hidden

    def _split(self, hidden: Tensor) -> tuple[Tensor, Tensor]:
        """``(B, prefix, C)`` and ``(B, K, u * C)`` of the rows ``(B, prefix + K * u, C)`` or ``(K * u, C)``."""
        rows, width = hidden.reshape(self.num_rows, -1, hidden.shape[-1]), hidden.shape[-1]
        prefix, patches = rows[:, : self.traits.prefix], rows[:, self.traits.prefix :]
        return prefix, patches.reshape(self.num_rows, -1, self.traits.patches_per_unit * width)

    def _join(self, prefix: Tensor, units: Tensor, batch: torch.Size, width: int) -> Tensor:
        """The way back from ``_split``."""
        patches = units.reshape(self.num_rows, -1, width)
        rows = torch.cat([prefix, patches], 1) if self.traits.prefix else patches
        return rows.reshape(*batch, -1, width)

    # ------------------------------------------------------------------ merging

    @in_region("illava::encoder_merge")
    def merge(self, layer_idx: int, hidden: Tensor, tap: EncoderTap | None) -> Tensor:
        """Merges the patches of one layer.

        Args:
            layer_idx: the layer.
            hidden: ``(B, prefix + K * u, C)`` or, for one packed row, ``(K * u, C)``.
            tap: what its attention left behind; None where places alone say who stays.

        Returns:
            The survivors, in the form of ``hidden``.
        """
        merges = self.layers.index(layer_idx)
        prefix, units = self._split(hidden)
        # A replay under gradient checkpointing finds the plan of the first run.
        self._check_reached(merges)
        if len(self.plans) == merges:
            with torch.no_grad():
                self._decide(merges, units.detach(), tap)
        merged = apply_merge(units, self.plans[merges])
        return self._join(prefix, merged, hidden.shape[:-2], hidden.shape[-1])

    def _decide(self, merges: int, units: Tensor, tap: EncoderTap | None) -> None:
        state, shown, after = self.states[merges], self.visible, self.segments[merges + 1].lengths
        scores = self.scores(merges, tap)
        segments, kept = self._merge_segments(merges)
        inputs = RuleInputs.of(
            segments,
            tuple(n - k for n, k in zip(segments.lengths, kept, strict=True)),
            scores,
            hidden=lambda: units.flatten(0, 1),
            keys=lambda: self._keys(tap).reshape(scores.numel(), -1),
            token_size=state.token_size.flatten(),
            visible=None if shown is None else lambda: shown.survivors(state).flatten(),
        )
        exists = everybody(state.origins.shape, state.origins.device)
        plan = build_plan(
            self.rule(inputs), segments, exists, sum(after) // self.num_rows, state.token_size, full=True
        )
        self.plans.append(plan)
        self.states.append(
            EncoderState(take_kept(state.origins, plan), plan.follow(state.kept_at), plan.grow(state.token_size))
        )
        if self.session.config.track:
            matrix = merge_matrix(plan)
            self.states[-1].sources = matrix if state.sources is None else product(matrix, state.sources)

    def scores(self, merges: int, tap: EncoderTap | None) -> Tensor:
        """``(B * K,)`` float32 scores of the units of a layer; ``tap`` may be None for one of ``PLACE_SCORES``.

        An engine whose ranks hold some of the heads each makes one of all of them here.
        """
        layer = self._scored_layer(merges)
        if self.score in PLACE_SCORES:
            return scores_by_place(layer)
        assert tap is not None
        return unit_scores(layer, tap)

    def _scored_layer(self, merges: int) -> ScoredLayer:
        real, counts = None, list[int]()
        if self.padding is not None:
            unit = self.traits.patches_per_unit
            real = self.padding.real.gather(1, self.patch_origins(merges))
            left = zip(self.padding.counts, self.shares.left[merges], strict=True)
            counts = [tile.real - (tile.whole - whole) * unit for tile, (whole, _) in left]
        return ScoredLayer(
            method=self.session.config.method.name,
            score=self.score,
            layer_idx=self.layers[merges],
            segments=self.segments[merges],
            num_rows=self.num_rows,
            unit=self.traits.patches_per_unit,
            prefix=self.traits.prefix,
            places=lambda: self.places(merges),
            num_places=self.states[0].kept_at.shape[1] * self.traits.patches_per_unit,
            real=real,
            real_counts=counts,
        )

    def _merge_segments(self, merges: int) -> tuple[Segments, tuple[int, ...]]:
        """Who may merge with whom, and how many are to stay: the segments that attend, or their two parts apart."""
        segments, after = self.segments[merges], self.segments[merges + 1].lengths
        if self.padding is not None and segments.lengths != after:
            left = self.shares.left
            return padded_segments(self.padding, self.states[merges].origins, left[merges], left[merges + 1])
        parts = self._parts(self.visible)
        if self.visible is None or not parts:
            return segments, after
        # Stable: within its part each survivor keeps its place.
        number = starts(self.num_rows, 2, segments.rows.device)
        order = torch.argsort((number + ~self.visible.survivors(self.states[merges])).flatten(), stable=True)
        lengths = [part[merges] for part in parts if part[0]]
        return Segments.from_lengths(lengths, order), tuple(part[merges + 1] for part in parts if part[0])

    def _parts(self, visible: Visible | None) -> list[tuple[int, ...]]:
        """Counts of the shown and the cropped part of each tile; empty where they merge together."""
        if visible is None or not all(keeps_quota(self.session.config.method, units) for units in self.lengths):
            return []
        parts: list[tuple[int, ...]] = []
        for units, shown in zip(self.lengths, visible.counts, strict=True):
            mine = shown_units(units, shown)
            parts += [mine, tuple(n - m for n, m in zip(units, mine, strict=True))]
        return parts

    def _keys(self, tap: EncoderTap | None) -> Tensor:
        """``(P, G, D)``, what rules by similarity of keys compare, without the tokens in front of each row."""
        assert tap is not None
        keys, prefix = tap.keys(), self.traits.prefix
        return keys.view(self.num_rows, -1, *keys.shape[1:])[:, prefix:].flatten(0, 1) if prefix else keys

    def places(self, merges: int) -> Tensor:
        """``(P,)`` int64: each surviving patch's place in its segment before any merge, as the picture has it."""
        unit, width = self.traits.patches_per_unit, self.states[0].kept_at.shape[1]
        now = self.segments[merges].lengths
        begins = [n % width * unit for n in accumulate((0, *self.segments[0].lengths))][: len(now)]
        origins = self.patch_origins(merges).flatten()
        if self.traits.order is not None:
            origins = self.traits.order.to(origins.device)[origins]
        return origins - repeated(begins, [n * unit for n in now], origins.device)
