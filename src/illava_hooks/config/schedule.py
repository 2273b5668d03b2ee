"""Where and how much one modality merges, and how many tokens that removes: pure functions of shapes."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

__all__ = ["MergeSchedule", "Modality", "describe", "llm_removed", "split_keep"]

Modality = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class MergeSchedule:
    """Where and how much one modality merges: by an amount for each listed layer, or by what is left in the end.

    Attributes:
        vit_layers: 0-based vision-encoder layers, ascending.
        vit_r: int: tokens removed per tile, image or frame in each listed layer; float in (0, 1): that fraction
            of the layer's current tokens, rounded down.
        llm_layers: 0-based decoder layers, ascending, each at least 1; the merge happens on entry.
        llm_ratio: fraction of a visual's current tokens kept at each listed decoder layer, in (0, 1].
        keep: fraction of a visual's tokens that is left behind the last listed layer, in (0, 1], each layer removing
            an equal share; None: ``vit_r`` and ``llm_ratio`` say how much. With it they remove nothing.
        keep_encoder: with ``keep``, the fraction of a segment's patches that is left behind the encoder.
    """

    vit_layers: tuple[int, ...] = ()
    vit_r: int | float = 0
    llm_layers: tuple[int, ...] = ()
    llm_ratio: float = 1.0
    keep: float | None = None
    keep_encoder: float | None = None

    @property
    def merges_in_encoder(self) -> bool:
        """Whether anything can be removed in the vision encoder."""
        removes = self.vit_r > 0 if self.keep_encoder is None else self.keep_encoder < 1
        return bool(self.vit_layers) and removes

    @property
    def merges_in_llm(self) -> bool:
        """Whether anything can be removed in the language model."""
        return bool(self.llm_layers) and (self.llm_ratio if self.keep is None else self.keep) < 1

    @property
    def is_identity(self) -> bool:
        """Whether nothing can be removed anywhere."""
        return not (self.merges_in_encoder or self.merges_in_llm)

    def encoder_removed(
        self, num_tokens: int, granularity: int = 1, most: Callable[[int], int] | None = None
    ) -> list[int]:
        """Tokens removed at each listed encoder layer from a segment of ``num_tokens``.

        Args:
            num_tokens: length of the segment before the first merge.
            granularity: the counts are multiples of this (4 for 2x2 groups): rounded down, or with ``keep`` such that
                what is left is nearest to it.
            most: how many a method can remove from so many tokens, if fewer than all but one.

        Returns:
            One count per listed layer; clamped so that at least ``granularity`` tokens stay.
        """
        counts: list[int] = []
        left = num_tokens
        for step in range(1, len(self.vit_layers) + 1):
            if self.keep_encoder is not None:
                gone = num_tokens * (1 - self.keep_encoder ** (step / len(self.vit_layers)))
                wish = _nearest(gone / granularity) * granularity - (num_tokens - left)
            else:
                wish = self.vit_r if isinstance(self.vit_r, int) else math.floor(left * self.vit_r)
            limit = left - granularity if most is None else most(left) // granularity * granularity
            counts.append(max(0, min(wish // granularity * granularity, limit)))
            left -= counts[-1]
        return counts

    def decoder_removed(self, num_tokens: int, whole: int, most: Callable[[int], int]) -> list[int]:
        """Tokens removed at each listed decoder layer from one image or video.

        With ``keep`` what is left behind the last layer is that fraction of ``whole``, as far as there are as many:
        whatever the encoder left and whatever was packed beside its survivors.

        Args:
            num_tokens: of it at the decoder's entry.
            whole: of it without any merging.
            most: how many a method can remove from so many tokens.

        Returns:
            One count per listed layer; one token always stays.
        """
        counts: list[int] = []
        target = None if self.keep is None else min(num_tokens, max(1, _nearest(self.keep * whole)))
        left = num_tokens
        for step in range(1, len(self.llm_layers) + 1):
            if target is None:
                wish = llm_removed(left, self.llm_ratio)
            elif num_tokens:
                wish = left - _nearest(num_tokens * (target / num_tokens) ** (step / len(self.llm_layers)))
            else:
                wish = 0
            counts.append(max(0, min(wish, most(left))))
            left -= counts[-1]
        return counts


def llm_removed(num_tokens: int, keep_ratio: float) -> int:
    """Tokens removed from the ``num_tokens`` of a visual: Python's ``round``, and one token always stays."""
    return max(0, min(round(num_tokens * (1 - keep_ratio)), num_tokens - 1))


def split_keep(
    keep: float, encoder_least: float = 0.0, llm_least: float = 0.0, wish: float | None = None
) -> float | None:
    """How the two stages share a cut: the fraction that the encoder leaves; the language model does the rest.

    The square root, so that both stages cut by the same factor, unless a stage cannot do its part.

    Args:
        keep: the fraction left behind both stages, in (0, 1].
        encoder_least: the smallest fraction that the encoder's layers can leave; 1: none merge.
        llm_least: the smallest fraction of what enters that the decoder's layers can leave; 1: none merge.
        wish: another fraction for the encoder than the square root.

    Returns:
        At most 1; None where both stages together cannot leave as little.
    """
    if encoder_least * llm_least > keep:
        return None
    most = 1.0 if llm_least <= keep else keep / llm_least
    return min(max(math.sqrt(keep) if wish is None else wish, keep, encoder_least), most)


def _nearest(number: float) -> int:
    """The nearest whole number, halves upwards."""
    return math.floor(number + 0.5)


def describe(schedule: MergeSchedule) -> str:
    """A schedule in a few words."""
    encoder, decoder = (list(layers) for layers in (schedule.vit_layers, schedule.llm_layers))
    if schedule.is_identity:
        return "nothing merges"
    if schedule.keep is not None:
        return f"keep={schedule.keep:.4g} over encoder layers {encoder} and decoder layers {decoder}"
    stages = []
    if schedule.merges_in_encoder:
        removed = schedule.vit_r if isinstance(schedule.vit_r, int) else f"{schedule.vit_r:.4g} of the tokens"
        stages.append(f"encoder layers {encoder} remove {removed} each")
    if schedule.merges_in_llm:
        stages.append(f"decoder layers {decoder} keep {schedule.llm_ratio:.4g} of them each")
    return ", ".join(stages)
