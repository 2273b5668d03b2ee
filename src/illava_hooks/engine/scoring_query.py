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
    """The scoring query of a forward: one of three, or with nothing given the last real token of each sample.

    Attributes:
        from_end: a number counted from each sample's last real token, 1 for that itself: in a batch padded on the
            right one ``logits_to_keep`` then means for every row what it means for the row alone.
        column: ``()`` or ``(B,)`` int64, a column of the sequence, for all samples or for each.
        labelled: ``(B, N)`` bool, which tokens are answers. The query is the token before the first one: an answer
            must not rank the tokens of its own prompt.
    """

    from_end: int | None = None
    column: Tensor | None = None
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
        if (shifted := named.get("shift_labels")) is not None:  # already one to the left: the query has a label itself
            return cls(labelled=torch.nn.functional.pad(shifted[:, :-1], (1, 0), value=-100) != -100)
        keep = named.get("logits_to_keep", 0)
        if isinstance(keep, int) and keep >= 0:
            return cls(from_end=keep or None)
        return cls(column=_first(slice(-keep, None) if isinstance(keep, int) else keep, length))

    @property
    def is_told(self) -> bool:
        """Whether the caller said anything."""
        return self.from_end is not None or self.column is not None or self.labelled is not None

    def place(self, real: Tensor, last_visual: Tensor) -> Tensor:
        """The query's column in each sample, ``(B,)`` int64: a real one, never in front of the last visual token.

        A query in front of an image pays no attention to it and cannot rank its tokens: the first one behind does.

        Args:
            real: ``(B, N)`` bool, False on padding.
            last_visual: ``(B,)`` int64, the last visual token of each sample; -1 where there is none.
        """
        columns = torch.arange(real.shape[1], device=real.device)
        last = torch.where(real, columns, -1).amax(1)
        place = last
        if self.labelled is not None:
            answers = self.labelled.to(real.device) & (columns > last_visual[:, None])
            place = torch.where(answers.any(1), answers.to(torch.int64).argmax(1) - 1, last)
        elif self.column is not None:
            place = self.column.to(real.device).expand_as(last)
        elif self.from_end is not None:
            place = last + 1 - self.from_end
        place = torch.where(place < last_visual, last_visual + 1, place)
        return torch.minimum(place, last).clamp_min(0)


def _first(asked: Any, length: int) -> Tensor | None:
    """The first of the asked positions, ``()`` or ``(B,)`` int64; None where none is.

    Stock indexes its hidden states with whatever it is given, so an index of the positions goes through the same
    expression. A boolean one would have to be asked of the device, and is not.
    """
    if isinstance(asked, Tensor) and asked.dtype == torch.bool:
        return torch.where(asked, torch.arange(length, device=asked.device), length - 1).amin(-1)
    device = asked.device if isinstance(asked, Tensor) else "cpu"
    columns = torch.arange(length, device=device)[asked]
    if not columns.numel():
        return None
    return columns.amin(-1) if columns.dim() else columns
