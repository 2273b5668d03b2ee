"""What encoder layers of all families share that merge, or weigh merged tokens by size."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from illava_hooks.patchers.vision.hooks import EncoderStep
from illava_hooks.runtime.session import KEY

__all__ = ["SteppedLayer"]


class SteppedLayer(nn.Module):
    """In front of a stock layer class: another forward where an ``EncoderStep`` travels with the call."""

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward without a step."""
        step = kwargs.pop(KEY, None)
        out: Tensor = super().forward(*args, **kwargs) if step is None else self._step(step, *args, **kwargs)
        return out

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # captures and function modes break graphs
    def _step(self, step: EncoderStep, *args: Any, **kwargs: Any) -> Tensor:
        if step.merges:
            return self.merging_forward(step, *args, **kwargs)
        with step.listen():
            out: Tensor = super().forward(*args, **kwargs)
        return out

    def merging_forward(self, step: EncoderStep, *args: Any, **kwargs: Any) -> Tensor:
        """The stock forward with a merge between attention and MLP."""
        raise NotImplementedError
