"""What is left between two merges of the vision encoder, and what its layout will show; shapes as in ``encoder``."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor

from illava_hooks.merge.attention import SizeBias

__all__ = ["EncoderState", "Visible"]


@dataclass(slots=True)
class EncoderState:
    """The survivors between two merges.

    Attributes:
        origins: ``(B, K)`` int64, the unit of the row where each survivor stood before any merge.
        kept_at: ``(B, M)`` int64, the survivor that stands for each original unit.
        token_size: ``(B, K)`` float32, how many original units each survivor stands for.
        sources: sparse ``(B * K, B * M)`` weights of the original units, if tracked.
        windows: borders of the traits' windows among the survivors, once a layer has asked for them.
        rope: the tables of all tokens that a layer was given, and what the survivors need of them.
        size_bias: what a proportional method adds to their attention logits, once a layer has asked for it.
    """

    origins: Tensor
    kept_at: Tensor
    token_size: Tensor
    sources: Tensor | None = None
    windows: Tensor | None = None
    rope: tuple[Any, Any] | None = None
    size_bias: SizeBias | None = None


@dataclass(frozen=True, slots=True)
class Visible:
    """What the layout will show of each tile; the rest is cropped away behind the encoder.

    Attributes:
        mask: ``(B, M)`` bool.
        counts: shown units of each tile, on the host.
    """

    mask: Tensor
    counts: tuple[int, ...]

    def survivors(self, state: EncoderState) -> Tensor:
        """``(B, K)`` bool, which survivors stand where the layout shows them."""
        return self.mask.gather(1, state.origins)
