"""The language stage of one forward that introduces visual tokens.

Shapes: ``B`` samples of ``N`` logical tokens (what the caller sees), ``K`` columns on the compact sequence of a
stage, which is what lies between two merges (right-aligned, padded on the left), ``V`` images and videos, ``C`` width,
``D`` width of all key heads.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from illava_hooks.config import MergeConfig, Modality
from illava_hooks.engine.regions import in_region
from illava_hooks.errors import PatchStateError
from illava_hooks.merge.plan import Fold, MergePlan, apply_merge, build_plan, take_kept
from illava_hooks.merge.rules import RuleInputs
from illava_hooks.merge.scores import Score, ScoreInputs, place_scores
from illava_hooks.merge.segments import Segments, everybody, made_once, scatter_back
from illava_hooks.methods import checked_scores

__all__ = ["DecoderRun", "LayerKind", "PromptState", "TokenCounts", "plan_counts"]

#: What a decoder layer mixes tokens by: keys of all of them, or a state that one token hands to the next.
LayerKind = Literal["attention", "recurrent"]


@dataclass(slots=True)
class PromptState:
    """The compact sequence between two merges. What is looked up together lies together.

    Attributes:
        places: ``(B, N + 1)`` int64, the compact column that stands for each logical token, and the column of the
            scoring query.
        tables: ``(B, K, 3)`` int64, ``visual``, ``columns`` and ``origins`` of each column; with ``ends``, where
            somebody asks for them, ``(B, K, 4)``.
        token_size: ``(B, K)`` float32, how many tokens each stands for.
        rope: RoPE tables of the columns side by side, once known.
        rope_widths: the width of each.
    """

    places: Tensor
    tables: Tensor
    token_size: Tensor
    rope: Tensor | None = None
    rope_widths: tuple[int, ...] = ()

    @property
    def kept_at(self) -> Tensor:
        """``(B, N)`` int64, the compact column that stands for each logical token."""
        return self.places[:, :-1]

    @property
    def query(self) -> Tensor:
        """``(B,)`` int64, column of the scoring query."""
        return self.places[:, -1]

    @property
    def visual(self) -> Tensor:
        """``(B, K)`` int64, number of the image or video of each column, -1 for text and padding."""
        return self.tables[..., 0]

    @property
    def columns(self) -> Tensor:
        """``(B, K)`` int64, the logical column of each; -1 for padding."""
        return self.tables[..., 1]

    @property
    def origins(self) -> Tensor:
        """``(B, K)`` int64, where a visual token stood in its image or video before any merge."""
        return self.tables[..., 2]

    @property
    def ends(self) -> Tensor | None:
        """``(B, K)`` bool, who stands for the last token of an image or video; None where nobody asks."""
        return self.tables[..., 3] > 0 if self.tables.shape[-1] > 3 else None

    def keep_rope(self, tables: Sequence[Tensor]) -> None:
        """Remembers RoPE tables ``(B, K, D)``."""
        self.rope, self.rope_widths = torch.cat([*tables], -1), tuple(table.shape[-1] for table in tables)

    def rope_on(self, device: torch.device) -> tuple[Tensor, ...]:
        """The RoPE tables; none before they are known."""
        return () if self.rope is None else torch.split(self.rope.to(device), [*self.rope_widths], -1)

    def to(self, device: torch.device) -> PromptState:
        """The same on another device: layers of one model may lie on several."""
        rope = None if self.rope is None else self.rope.to(device)
        return PromptState(
            self.places.to(device), self.tables.to(device), self.token_size.to(device), rope, self.rope_widths
        )


@dataclass(frozen=True, slots=True)
class TokenCounts:
    """Everything about one stage that the host knows.

    Attributes:
        lengths: real tokens per sample.
        visual_lengths: visual tokens per image or video.
    """

    lengths: tuple[int, ...]
    visual_lengths: tuple[int, ...]

    @property
    def width(self) -> int:
        """Columns of the compact sequence."""
        return max(self.lengths)

    def valid(self, device: torch.device) -> Tensor | None:
        """``(B, K)`` bool, False on padding; None when nothing is padded."""
        if min(self.lengths) == self.width:
            return None
        return _on_the_right(self.lengths, True, device)

    def padding(self, device: torch.device) -> Tensor | None:
        """``(B, K)`` bool, True on padding; None when nothing is padded."""
        return None if min(self.lengths) == self.width else _on_the_right(self.lengths, False, device)


@made_once
def _on_the_right(lengths: tuple[int, ...], valid: bool, device: torch.device) -> Tensor:
    """``(B, K)`` bool, ``valid`` on the last so many columns of each row and its opposite in front of them."""
    width = max(lengths)
    first = torch.tensor([width - n for n in lengths], device="cpu")[:, None]
    return (torch.arange(width, device="cpu") >= first) == valid


def plan_counts(
    config: MergeConfig,
    visuals: Sequence[tuple[Modality, int]],
    sample_of: Sequence[int],
    start: TokenCounts,
) -> list[TokenCounts]:
    """Counts before, between and after the merges of the listed decoder layers.

    Args:
        config: the settings.
        visuals: the modality of each image or video, and its tokens without merging.
        sample_of: the sample of each.
        start: counts at the entry.
    """
    removed: list[dict[int, int]] = []  # of each image or video, by layer
    for (modality, whole), now in zip(visuals, start.visual_lengths, strict=True):
        schedule = config.schedule(modality)
        amounts = schedule.decoder_removed(now, whole, config.method.in_llm.max_removed)
        removed.append(dict(zip(schedule.llm_layers, amounts, strict=True)) if schedule.merges_in_llm else {})
    counts = [start]
    for layer in config.llm_layers:
        left, lengths = list(counts[-1].visual_lengths), list(counts[-1].lengths)
        for index, by_layer in enumerate(removed):
            left[index] -= by_layer.get(layer, 0)
            lengths[sample_of[index]] -= by_layer.get(layer, 0)
        counts.append(TokenCounts(tuple(lengths), tuple(left)))
    return counts


class DecoderRun:
    """One prefill through the decoder layers.

    Attributes:
        layers: the merging decoder layers.
        counts: one per stage: before, between and after the merges.
        states: the compact sequence of each stage that was reached.
        plans: one per merge that ran.
        is_finished: whether the text model has ended; what runs then is a replay.
    """

    def __init__(self, config: MergeConfig, score: Score, counts: list[TokenCounts], state: PromptState) -> None:
        """Starts at the entry of layer 0.

        Args:
            config: the settings.
            score: the language-model score.
            counts: as the attribute.
            state: the compact sequence of the first stage.
        """
        self.config, self.score, self.counts = config, score, counts
        self.layers = config.llm_layers
        self.states = [state]
        self.plans: list[MergePlan] = []
        self.is_finished = False
        self._ranked: dict[int, tuple[Tensor, Tensor]] = {}

    def merges_through(self, layer_idx: int) -> int:
        """How many merges have happened where a layer's attention runs: one on its entry included."""
        return sum(merging <= layer_idx for merging in self.layers)

    def ranks_for(self, layer_idx: int) -> bool:
        """Whether the attention of a layer ranks the tokens that the next one merges, and they are not ranked yet."""
        following = layer_idx + 1
        if not self.config.method.listens_in_llm:
            return False
        return following in self.layers and len(self.plans) == self.layers.index(following)

    def stage(self, layer_idx: int) -> PromptState:
        """The compact sequence that a layer's attention sees.

        Raises:
            PatchStateError: a merge in front of it did not run.
        """
        merges = self.merges_through(layer_idx)
        self._check_reached(merges)
        return self.states[merges]

    def rank(self, layer_idx: int, inputs: ScoreInputs, keys: Tensor) -> None:
        """Scores the tokens that enter a merging layer, by the attention of the layer before.

        Args:
            layer_idx: the layer that will merge.
            inputs: what the score may look at.
            keys: ``(B * K, D)`` keys of the tokens, all heads side by side.
        """
        self._ranked[layer_idx] = checked_scores(self.config.method.name, self.score, inputs), keys

    @in_region("illava::decoder_merge")
    def merge(self, layer_idx: int, hidden: Tensor) -> Tensor:
        """Merges ``(B, K, C)`` on entry to a listed layer.

        Raises:
            PatchStateError: the layer before did not rank the tokens.
        """
        merges = self.layers.index(layer_idx)
        self._check_reached(merges)
        # A replay under gradient checkpointing finds the plan of the first run.
        if len(self.plans) == merges:
            scores, keys = self._ranking(layer_idx)
            with torch.no_grad():
                self._decide(merges, hidden.detach(), scores.to(hidden.device), keys)
        return apply_merge(hidden, self.plans[merges])

    def _ranking(self, layer_idx: int) -> tuple[Tensor, Tensor | None]:
        """``(B, K)`` scores of the tokens that enter a merging layer, and their keys where attention was listened to.

        Raises:
            PatchStateError: it should have been, and was not.
        """
        if not self.config.method.listens_in_llm:
            origins, width = self.states[self.layers.index(layer_idx)].origins, self.states[0].kept_at.shape[1]
            return place_scores(self.score, origins, layer_idx, width), None
        if layer_idx not in self._ranked:
            raise PatchStateError(
                f"decoder layer {layer_idx} cannot merge: the attention of layer {layer_idx - 1} was not heard; "
                "call patch(model, ...) again after wrapping or replacing parts of the model"
            )
        return self._ranked.pop(layer_idx)

    def check_finished(self) -> None:
        """Every planned merge ran.

        Raises:
            PatchStateError: some layer was passed by.
        """
        self._check_reached(len(self.layers))

    def _check_reached(self, merges: int) -> None:
        if len(self.plans) < merges:
            raise PatchStateError(
                f"decoder layer {self.layers[len(self.plans)]} did not merge, llm_layers is {list(self.layers)}; "
                "another forward ran in its place: call patch(model, ...) again after wrapping or replacing parts of "
                "the model"
            )

    @in_region("illava::restore")
    def expand(self, hidden: Tensor, merges: int) -> Tensor:
        """``(B, K, C)`` of a stage at the logical length ``(B, N, C)``."""
        return scatter_back(hidden, self.states[merges].kept_at.to(hidden.device))

    def _decide(self, merges: int, hidden: Tensor, scores: Tensor, keys: Tensor | None) -> None:
        before, after = self.counts[merges], self.counts[merges + 1]
        state = self.states[merges] = self.states[merges].to(hidden.device)
        valid = before.valid(hidden.device)
        exists = everybody(state.visual.shape, hidden.device) if valid is None else valid
        # Images that the encoder or a mask emptied make no segment: a rule is never asked about nothing.
        counts = [(n, m) for n, m in zip(before.visual_lengths, after.visual_lengths, strict=True) if n]
        if counts:
            # Text and padding, -1, sort to the front; behind them the visuals follow each other.
            total = sum(n for n, _ in counts)
            order = torch.argsort(state.visual.flatten(), stable=True)[state.visual.numel() - total :]
            segments = Segments.from_lengths([n for n, _ in counts], order)
            # The query is read after the last layer: it must stay.
            scores = scores.scatter(1, state.query[:, None], torch.inf)
            if state.ends is not None:
                # The query of a prompt that ends with an image, and so of every prompt: no question decides.
                scores = scores.masked_fill(state.ends, torch.inf)
            inputs = RuleInputs.of(
                segments,
                tuple(n - m for n, m in counts),
                scores.flatten(),
                hidden=lambda: hidden.flatten(0, 1),
                keys=lambda: _heard(keys).to(hidden.device),
                token_size=state.token_size.flatten(),
            )
            local = self.config.method.in_llm.rule(inputs)
        else:  # no visual token is left; stages are counted by plans, so there must be one
            segments, local = Segments.packed([1], hidden.device), _nothing(hidden.device)
        full = min(after.lengths) == after.width
        plan = build_plan(local, segments, exists, after.width, state.token_size, full=full)
        self.plans.append(plan)
        self.states.append(_after(plan, state, after))


def _heard(keys: Tensor | None) -> Tensor:
    assert keys is not None
    return keys


def _after(plan: MergePlan, state: PromptState, counts: TokenCounts) -> PromptState:
    """The compact sequence behind a merge; columns that became padding belong to nothing."""
    tables = take_kept(state.tables, plan)
    if (padding := counts.padding(tables.device)) is not None:
        tables[..., :2].masked_fill_(padding[..., None], -1)
    return PromptState(
        places=plan.follow(state.places),
        tables=tables,
        token_size=plan.grow(state.token_size),
        rope=None if state.rope is None else take_kept(state.rope, plan),
        rope_widths=state.rope_widths,
    )


def _nothing(device: torch.device) -> Fold:
    """Nobody goes anywhere."""
    nobody = torch.empty(0, dtype=torch.int64, device=device)
    return Fold(nobody, nobody, "none")
