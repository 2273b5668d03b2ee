"""What a merge rule may look at.

Shapes: ``S`` segments of ``L`` tokens (padded), ``P`` flat rows, which the segments' tokens are some of.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from illava_hooks.merge.segments import Segments, counting, host_table, made_once

__all__ = ["RuleInputs"]


@dataclass(frozen=True, slots=True)
class RuleInputs:
    """What a rule may look at.

    Attributes:
        scores: ``(S, L)`` float32, never NaN: that counts as the lowest score.
        lengths: tokens in each segment, on the host.
        num_removed: tokens to remove from each segment, on the host; below the segment's length.
        hidden: returns the hidden states, ``(S, L, C)``.
        keys: returns the attention keys with RoPE, all key heads side by side, ``(S, L, D)``.
        sizes: returns ``token_size``.
        seats: returns ``visible``, or None: all seats are.
        segments: where the tokens lie among flat rows; None: one segment after the other, each ``L`` rows.
        flat_hidden: returns the hidden states of all flat rows, ``(P, C)``; None: of the segments'.
        flat_keys: the same of the keys, ``(P, D)``.
    """

    scores: Tensor
    lengths: tuple[int, ...]
    num_removed: tuple[int, ...]
    hidden: Callable[[], Tensor]
    keys: Callable[[], Tensor]
    sizes: Callable[[], Tensor]
    seats: Callable[[], Tensor] | None = None
    segments: Segments | None = None
    flat_hidden: Callable[[], Tensor] | None = None
    flat_keys: Callable[[], Tensor] | None = None

    def __post_init__(self) -> None:
        """A sort puts NaN, which broken pixels give, behind the padding: a rule would then keep more than planned."""
        if min(self.lengths) == self.scores.shape[1]:
            scores = self.scores.nan_to_num(-torch.inf, torch.inf, -torch.inf)
        else:
            scores = torch.fmax(self.scores, _padding(self.lengths, self.scores.shape[1], self.scores.device))
        object.__setattr__(self, "scores", scores)

    @classmethod
    def of(
        cls,
        segments: Segments,
        num_removed: tuple[int, ...],
        scores: Tensor,
        hidden: Callable[[], Tensor],
        keys: Callable[[], Tensor],
        token_size: Tensor,
        visible: Callable[[], Tensor] | None = None,
    ) -> RuleInputs:
        """The inputs of segments of flat rows: ``(P,)`` or, what the callables return, ``(P, ...)``."""
        return cls(
            scores=segments.take(scores),
            lengths=segments.lengths,
            num_removed=num_removed,
            hidden=lambda: segments.take(hidden()),
            keys=lambda: segments.take(keys()),
            sizes=lambda: segments.take(token_size),
            seats=None if visible is None else lambda: segments.take(visible()),
            segments=segments,
            flat_hidden=hidden,
            flat_keys=keys,
        )

    @property
    def token_size(self) -> Tensor:
        """``(S, L)`` float32, how many original tokens each token stands for."""
        return self.sizes()

    @property
    def visible(self) -> Tensor | None:
        """``(S, L)`` bool or None; False where the layout will crop the seat away."""
        return None if self.seats is None else self.seats()

    @property
    def where(self) -> Segments:
        """Where the tokens lie among flat rows."""
        segments, length = self.scores.shape
        return self.segments or Segments.packed([length] * segments, self.scores.device)

    def count(self, values: list[int] | tuple[int, ...]) -> Tensor:
        """``(S, 1)`` int64 table of one host number per segment."""
        return host_table(values, self.scores.device)[:, None]

    def slots(self, num: int) -> Tensor:
        """``(1, num)`` int64: 0, 1, ..."""
        return counting(num, self.scores.device)[None]

    @property
    def even(self) -> bool:
        """Whether all segments have as many tokens and lose as many: tables have no padding then."""
        return len({*self.lengths}) == 1 and len({*self.num_removed}) == 1

    def firsts(self, table: Tensor, counts: tuple[int, ...]) -> Tensor:
        """The first so many columns of each segment's row, one after the other: ``(..., S, L)`` as ``(..., E)``."""
        most = max(counts)
        if len({*counts}) == 1:
            return table[..., :most].flatten(-2)
        return table.flatten(-2)[..., _firsts(counts, table.shape[-1], table.device)]

    def rows(self, tokens: Tensor, counts: tuple[int, ...]) -> Tensor:
        """``(E,)`` flat rows of the first so many of each segment's tokens ``(S, n)``."""
        return self.firsts(self.where.rows_of(tokens), counts)


@made_once
def _padding(lengths: tuple[int, ...], longest: int, device: torch.device) -> Tensor:
    """``(S, L)`` float32: infinity on padding, minus infinity on tokens."""
    return torch.where(
        torch.arange(longest, device="cpu") < torch.tensor(lengths, device="cpu")[:, None], -torch.inf, torch.inf
    )


@made_once
def _firsts(counts: tuple[int, ...], width: int, device: torch.device) -> Tensor:
    """``(E,)`` int64: where the first so many columns of each row stand in a flat table of rows of ``width``."""
    used = torch.arange(width, device="cpu") < torch.tensor(counts, device="cpu")[:, None]
    return used.flatten().nonzero()[:, 0]
