"""What a family says about the rows of its vision encoder."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

__all__ = ["EncoderTraits"]


@dataclass(frozen=True, slots=True, eq=False)
class EncoderTraits:
    """How patches lie in a row of the encoder, and which belong together.

    Attributes:
        patches_per_unit: patches that stay together, such as the 2x2 that a patch merger concatenates; in a row they
            follow each other.
        granularity: counts of removed patches are rounded down to multiples of this.
        prefix: tokens in front of each row that never merge, such as a class token or registers.
        order: ``(patches of a row,)`` int64, the place in the picture of each place of the row, where patches are
            permuted, for windows or blocks; None: equal.
        regroups: whether the encoder itself keeps picture order. Then a run brings rows into ``order`` on entry to the
            first layer that removes something, so that units follow each other, and back behind the encoder: attention
            without positions of its own does not notice.
        windows: ``(W + 1,)`` int64, where windows begin and end in one packed row of patches, for layers whose
            attention stays within them; they lie one after the other, none across segments, and may be empty. None:
            every layer sees whole segments.
        published_score: what the published code ranks by; None where there is no published code.
    """

    patches_per_unit: int = 1
    granularity: int = 1
    prefix: int = 0
    order: Tensor | None = None
    regroups: bool = False
    windows: Tensor | None = None
    published_score: str | None = None
