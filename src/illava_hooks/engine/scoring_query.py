"""Which token of each sample decides in the language model, whatever form the caller tells it in.

Shapes: ``B`` samples of ``N`` logical tokens.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["ScoringQuery"]


@dataclass(frozen=True, slots=True)
class ScoringQuery:
    """The scoring query of a forward; with nothing given, the last real token of each sample.

    Attributes:
        from_end: how many columns the query lies in front of the end, 1 for the last one; a number, or ``()``
            int64 on any device. Counted from each sample's last *real* token: in a batch padded on the right one
            ``logits_to_keep`` then means for every row what it means for the row alone.
        labelled: ``(B, N)`` bool, which tokens are answers. The query is the token before the first one: an answer
            must not rank the tokens of its own prompt.
    """

    from_end: int | Tensor | None = None
    labelled: Tensor | None = None

    @classmethod
    def of_call(cls, named: Mapping[str, Any], length: int) -> ScoringQuery:
        """What a call of the model with its head says: labels, else the positions whose logits it asks for.

        Args:
            named: arguments by name.
            length: ``N``.
        """
        if (labels := named.get("labels")) is not None:
            return cls(labelled=labels != -100)
        if (shifted := named.get("shift_labels")) is not None:  # already one to the left, as context parallel gives it
            return cls(labelled=torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=-100) != -100)
        asked = _first_asked(named.get("logits_to_keep", 0), length)
        return cls() if asked is None else cls(from_end=length - asked)

    @property
    def is_told(self) -> bool:
        """Whether the caller said anything."""
        return self.from_end is not None or self.labelled is not None

    def column(self, real: Tensor, last_visual: Tensor) -> Tensor:
        """The query's column in each sample, ``(B,)`` int64: a real one, never in front of the last visual token.

        A query in front of an image pays no attention to it and cannot rank its tokens.

        Args:
            real: ``(B, N)`` bool, False on padding.
            last_visual: ``(B,)`` int64, the last visual token of each sample; -1 where there is none.
        """
        columns = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, columns, -1).amax(1)
        column = last
        if self.labelled is not None:
            answers = self.labelled.to(real.device) & (columns > last_visual[:, None])
            first = answers.to(torch.int64).argmax(1)
            column = torch.where(answers.any(1), first - 1, last)
        elif self.from_end is not None:
            column = last + 1 - torch.as_tensor(self.from_end).to(real.device)
        return torch.maximum(torch.minimum(column, last), last_visual).clamp_min(0)


def _first_asked(keep: Any, length: int) -> int | Tensor | None:
    """The first position whose logits are asked for; None where all are, or none.

    Stock indexes with whatever it is given: here an index of the positions goes through the same expression.
    """
    if isinstance(keep, int) and keep == 0:
        return None
    if isinstance(keep, Tensor) and keep.dtype == torch.bool:  # a boolean index would ask the device how long it is
        return torch.where(keep, torch.arange(length, device=keep.device), length - 1).amin()
    index = slice(-keep, None) if isinstance(keep, int) else keep
    device = keep.device if isinstance(keep, Tensor) else "cpu"
    asked = torch.arange(length, device=device)[index]
    if not asked.numel():
        return None
    first = asked.amin()
    return first if isinstance(keep, Tensor) else int(first)
