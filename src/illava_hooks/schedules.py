"""Where and how much a modality merges: schedules, their arithmetic, and the named ones."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Literal

__all__ = ["PRESETS", "MergeSchedule", "Modality", "llm_removed", "preset_name"]

Modality = Literal["image", "video"]


@dataclass(frozen=True, slots=True)
class MergeSchedule:
    """Where and how much one modality merges.

    Attributes:
        vit_layers: 0-based vision-encoder layers, ascending.
        vit_r: int: tokens removed per tile, image or frame in each listed layer; float in (0, 1): that fraction
            of the layer's current tokens, rounded down.
        llm_layers: 0-based decoder layers, ascending, each at least 1; the merge happens on entry.
        llm_ratio: fraction of a span's current visual tokens kept at each listed decoder layer, in (0, 1].
    """

    vit_layers: tuple[int, ...] = ()
    vit_r: int | float = 0
    llm_layers: tuple[int, ...] = ()
    llm_ratio: float = 1.0

    @property
    def merges_in_encoder(self) -> bool:
        """Whether anything can be removed in the vision encoder."""
        return bool(self.vit_layers) and self.vit_r > 0

    @property
    def merges_in_llm(self) -> bool:
        """Whether anything can be removed in the language model."""
        return bool(self.llm_layers) and self.llm_ratio < 1.0

    @property
    def is_identity(self) -> bool:
        """Whether nothing can be removed anywhere."""
        return not (self.merges_in_encoder or self.merges_in_llm)

    def encoder_removed(
        self, num_tokens: int, multiple: int = 1, most: Callable[[int], int] | None = None
    ) -> list[int]:
        """Tokens removed at each listed encoder layer from a segment of ``num_tokens``.

        Args:
            num_tokens: length of the segment before the first merge.
            multiple: the counts are rounded down to multiples of this (4 for 2x2 groups).
            most: how many a method can remove from so many tokens, if fewer than all but one.

        Returns:
            One count per listed layer; clamped so that at least ``multiple`` tokens stay.
        """
        counts = []
        for _ in self.vit_layers:
            wish = self.vit_r if isinstance(self.vit_r, int) else math.floor(num_tokens * self.vit_r)
            limit = num_tokens - multiple if most is None else most(num_tokens) // multiple * multiple
            counts.append(max(0, min(wish // multiple * multiple, limit)))
            num_tokens -= counts[-1]
        return counts


def llm_removed(num_tokens: int, keep_ratio: float) -> int:
    """Tokens removed from a visual span of ``num_tokens``: Python's ``round``, and one token always stays."""
    return max(0, min(round(num_tokens * (1 - keep_ratio)), num_tokens - 1))


_QWEN2_VL = MergeSchedule((12, 13, 14, 15), 0.16, (6, 7, 8), 0.90)
_QWEN2_VL_TINY = MergeSchedule((3, 4), 0.29, (2, 3), 0.85)

#: Schedules by family and modality (read-only): the paper's, and the same fractions at the depth of ``tiny``.
PRESETS: Mapping[str, Mapping[str, MergeSchedule]] = MappingProxyType(
    {
        "llava_onevision": MappingProxyType(
            {
                "image": MergeSchedule((5, 6, 7, 8), 92, (8,), 0.70),
                "video": MergeSchedule((3, 4, 5, 6), 92, (2,), 0.70),
            }
        ),
        "qwen2_vl": MappingProxyType({"image": _QWEN2_VL, "video": _QWEN2_VL}),
        "llava_onevision/tiny": MappingProxyType(
            {
                "image": MergeSchedule((3, 4), 16, (2,), 0.70),
                "video": MergeSchedule((2, 3), 16, (1,), 0.70),
            }
        ),
        "qwen2_vl/tiny": MappingProxyType({"image": _QWEN2_VL_TINY, "video": _QWEN2_VL_TINY}),
    }
)
_TINY_DEPTHS = (8, 6)


def preset_name(family: str, vit_depth: int, llm_depth: int) -> str:
    """The key of ``PRESETS`` for a model of a family with so many encoder and decoder layers."""
    return f"{family}/tiny" if (vit_depth, llm_depth) == _TINY_DEPTHS else family
